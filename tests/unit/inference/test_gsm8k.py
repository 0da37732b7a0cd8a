"""Numbers in answers, read as the authors of PiSSA and PEFT's comparison read them."""

from __future__ import annotations

import pytest
from datasets import Dataset

from lowrank_dist.data.shapes import INSTRUCTION_PROMPT
from lowrank_dist.errors import InputError
from lowrank_dist.inference.tasks.gsm8k import (
    PEFT_PROMPT,
    answer_in,
    documents,
    documents_for_peft,
    number_in,
    score,
    score_as_peft,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 2 + 3 = 5.\nThe answer is: 5", 5),
        ("The answer is: 1\nno, The answer is: $1,234.", 1234),
        ("The answer is: 1,234,567", 1234),  # theirs takes one comma
        ("The answer is: -3", -3),
        ("The answer is: 7/2", 4),
        ("The answer is: 5/2", 2),
        ("The answer is: 7/0", 7),
        ("The answer is: 2.6 apples", 3),
        ("The answer is: .5", 0),
        ("The answer is: none", None),
        ("#### 5", None),
        ("The answer is 5", None),
    ],
)
def test_the_number_after_the_last_mark(text: str, number: float | None) -> None:
    assert number_in(text) == number


def test_documents_of_gsm8k_and_of_the_authors() -> None:
    own = Dataset.from_list([{"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}])
    (doc,) = documents(own)
    assert doc == {"prompt": INSTRUCTION_PROMPT.format(query="2 + 3?"), "number": "1005"}
    assert score(doc, ["The answer is: 1,005"]) == {"exact_match": 1.0}
    assert score(doc, ["The answer is: 1006"]) == {"exact_match": 0.0}
    assert score(doc, ["1005"]) == {"exact_match": 0.0}
    theirs = Dataset.from_list(
        [
            {"instruction": "Solve", "output": "5", "type": "gsm8k"},
            {"instruction": "Solve", "output": "x", "type": "math"},
        ]
    )
    assert list(documents(theirs)) == [{"prompt": "Solve", "number": "5"}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, "columns text"),
        ({"question": "a", "answer": "#### five"}, "not with a number"),
        ({"instruction": "a", "output": "1", "type": "math"}, "no record of the data has the type"),
    ],
)
def test_other_data_are_refused(row: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        documents(Dataset.from_list([row]))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("equal to $4^2 = \\boxed{16}$.The answer is: 16", 16.0),
        ("The answer is 16.\n\nQuestion: next", 16.0),
        ("The answer is: 1. The answer is: $20/35%.", 20 / 35),
        ("#### 0.50", 0.5),
        ("#### 3\nThe answer is 4", 4.0),  # the order of the marks, not of the text
        ("The answer is: 1,234", "1,234"),
        ("The answer is: 1/0", "1/0"),
        ("The answer is: 1/2/3", "1/2/3"),
        ("The answer is: x + 1!", "x + 1"),
        ("5", None),
    ],
)
def test_peft_reads_numbers_and_text(text: str, answer: float | str | None) -> None:
    assert answer_in(text) == answer


def test_scores_as_pefts_comparison() -> None:
    (doc,) = documents_for_peft(Dataset.from_list([{"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}]))
    assert doc["prompt"] == PEFT_PROMPT.format(query="2 + 3?")
    for said, right in ((" The answer is: 5.0", 1.0), (" The answer is: 6", 0.0), (" 5", 0.0), (" #### 5", 1.0)):
        assert score_as_peft(doc, [said]) == {"exact_match": right}
    with pytest.raises(InputError, match="gsm8k_peft: the data have the columns text"):
        documents_for_peft(Dataset.from_list([{"text": "a"}]))
    with pytest.raises(InputError, match="gsm8k_peft: an answer in the data ends with 'five', without a mark"):
        score_as_peft({**doc, "answer": "five"}, [" The answer is: 5"])
