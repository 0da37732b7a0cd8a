"""The answers of GSM8K, read as the authors of PiSSA and MetaMath do, or as PEFT's comparison of methods does."""

from __future__ import annotations

import re
from decimal import Decimal, DecimalException
from fractions import Fraction
from typing import Any

from lowrank_dist.data.shapes import INSTRUCTION_PROMPT
from lowrank_dist.errors import InputError

MARK = "The answer is: "
_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")

PEFT_PROMPT = "Question: {query} Think step by step.\nAnswer:"
_PEFT_MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def number_in(text: str) -> float | None:
    """The number after the last mark, rounded to a whole one; None if there is none.

    At most one comma, point or slash is part of it, as in the authors' own expression: ``1,234,567`` is 1234.
    """
    _, mark, rest = text.rpartition(MARK)
    found = _NUMBER.search(rest.strip()) if mark else None
    if found is None:
        return None
    digits = found[0].replace(",", "")
    if "/" not in digits:
        return float(round(float(digits)))
    above, below = digits.split("/")
    if not above.strip("+-"):
        return None
    return float(round(float(Fraction(digits)))) if int(below) else float(round(float(above)))


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer to a question is right."""
    return {"exact_match": float(number_in(results[0]) == float(doc["number"]))}


def documents(dataset: Any) -> Any:
    """Questions with the prompt that training gives them and the number that is right.

    Raises
    ------
    InputError
        If the records are neither GSM8K's own nor those of the authors' data set.
    """
    if {"question", "answer"} <= set(dataset.column_names):
        return dataset.map(_own, remove_columns=dataset.column_names)
    if {"instruction", "output", "type"} <= set(dataset.column_names):
        chosen = dataset.filter(lambda doc: doc["type"] == "gsm8k")
        if len(chosen) == 0:
            raise InputError("gsm8k_pissa: no record of the data has the type 'gsm8k'")
        return chosen.map(_of_authors, remove_columns=dataset.column_names)
    raise InputError(
        f"gsm8k_pissa: the data have the columns {', '.join(dataset.column_names)}; they must be GSM8K's (question, "
        "answer) or those of the authors of PiSSA (instruction, output, type)"
    )


def _own(doc: dict[str, Any]) -> dict[str, Any]:
    number = doc["answer"].rpartition("#### ")[2].strip().replace(",", "")
    return {"prompt": INSTRUCTION_PROMPT.format(query=doc["question"]), "number": _checked(number)}


def _of_authors(doc: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": doc["instruction"], "number": _checked(str(doc["output"]).strip().replace(",", ""))}


def _checked(number: str) -> str:
    try:
        float(number)
    except ValueError as error:
        raise InputError(f"gsm8k_pissa: an answer in the data ends with {number[:40]!r}, not with a number") from error
    return number


def answer_in(text: str) -> float | str | None:
    """The answer as PEFT's comparison reads it: a number, else the text after the last mark; None without a mark.

    Of the marks, the first in the order of that comparison counts. Commas make an answer text.
    """
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in _PEFT_MARKS if mark in text), None)
    if mark is None:
        return None
    answer = text.rpartition(mark)[2].strip().partition("\n")[0].strip(" .!?$%")
    above, slash, below = answer.partition("/")
    try:
        return float(Decimal(above.strip()) / Decimal(below.strip()) if slash else Decimal(answer.strip()))
    except (DecimalException, ValueError):
        return answer


def documents_for_peft(dataset: Any) -> Any:
    """Questions of GSM8K with the prompt of PEFT's comparison.

    Raises
    ------
    InputError
        If the records are not GSM8K's own.
    """
    if not {"question", "answer"} <= set(dataset.column_names):
        raise InputError(
            f"gsm8k_peft: the data have the columns {', '.join(dataset.column_names)}; they must be GSM8K's (question, "
            "answer)"
        )
    return dataset.map(lambda doc: {"prompt": PEFT_PROMPT.format(query=doc["question"])})


def score_as_peft(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer to a question is right; marks in the question count, as in PEFT's comparison."""
    found, right = answer_in(doc["prompt"] + results[0]), answer_in(doc["answer"])
    if right is None:
        raise InputError(f"gsm8k_peft: an answer in the data ends with {doc['answer'][-40:]!r}, without a mark")
    return {"exact_match": float(found is not None and found == right)}
