"""Records of training data as questions, whose responses are to be given exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.prompts import Prompter
from lowrank_dist.data.records import read_file
from lowrank_dist.errors import InputError


def documents(
    data: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    columns: dict[str, str] | None = None,
    as_chat: bool = False,
    prompt_template: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The split ``test``: prompts as in training, and responses.

    Parameters
    ----------
    data
        A data file.
    tokenizer, chat_template
        The tokenizer of the model by its name, and a chat template in place of its own.
    columns, as_chat, prompt_template
        As in `lowrank_dist.SFTDataModule`.

    Raises
    ------
    InputError
        If there is no file, or a record has no response.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    if data is None or tokenizer is None:
        raise InputError("responses: scores a data file of yours; give one (--data responses=FILE)")
    prompter = Prompter(
        AutoTokenizer.from_pretrained(tokenizer),
        chat_template,
        columns=columns,
        as_chat=as_chat,
        prompt_template=None if prompt_template is None else PromptTemplate(prompt_template),
    )
    pairs = [
        (prompter.record(record, where), prompter.response(record, where)) for where, record in read_file(Path(data))
    ]
    if not pairs:
        raise InputError(f"{data}: holds no records")
    rows = [{"where": prompt.where, "prompt": prompt.text, "response": response} for prompt, response in pairs]
    return {"test": Dataset.from_list(rows)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the response was given."""
    return {"exact_match": float(results[0].strip() == doc["response"].strip())}
