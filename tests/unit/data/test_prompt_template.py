"""Templates of prompts: what they may hold, and what becomes of records."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.sft import byte_level_tokenizer
from lowrank_dist.data.preference import read_preference
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.prompts import Prompter
from lowrank_dist.data.shapes import Conversation, Pair, read_columns
from lowrank_dist.errors import InputError

ASK = PromptTemplate("Question: {query} {{think}}\nAnswer: ")


def test_the_space_at_the_end_is_the_responses() -> None:
    """As in the Alpaca prompt: the token of a word holds the space before it."""
    assert read_columns({"query": "2+2?", "response": "4"}, template=ASK) == Pair(
        "Question: 2+2? {think}\nAnswer:", " 4"
    )
    bare = PromptTemplate("{query}")
    assert read_columns({"query": "{braces} stay ", "response": "4"}, template=bare) == Pair("{braces} stay ", "4")


def test_every_prompt_that_is_text_is_put_into_it() -> None:
    for question, answer in (("prompt", "completion"), ("question", "answer"), ("query", "response")):
        read = read_columns({question: "a", answer: "b"}, template=PromptTemplate(f"<{{{question}}}>"))
        assert read == Pair("<a>", "b")
    with_input = PromptTemplate("{instruction}|{input}|")
    assert read_columns({"instruction": "a", "output": "b", "input": "c"}, template=with_input) == Pair("a|c|", "b")
    assert read_columns({"instruction": "a", "output": "b"}, template=with_input) == Pair("a||", "b")
    named = read_columns({"q": "a", "gold": "b"}, {"query": "q", "response": "gold"}, template=ASK)
    assert named == Pair("Question: a {think}\nAnswer:", " b")
    beside = PromptTemplate("{topic}: {query}")
    assert read_columns({"topic": "sums", "query": "a", "response": "b"}, template=beside) == Pair("sums: a", "b")


def test_in_a_chat_it_is_the_message() -> None:
    read = read_columns({"query": "a", "response": "b"}, as_chat=True, template=ASK)
    assert isinstance(read, Conversation)
    assert [message.text for message in read.messages] == ["Question: a {think}\nAnswer:", "b"]


def test_pairs_of_text() -> None:
    record = {"query": "a", "chosen": "b", "rejected": "c"}
    read = read_preference(record, template=ASK)
    assert (read.chosen, read.rejected) == tuple(Pair("Question: a {think}\nAnswer:", f" {side}") for side in "bc")


def test_generation_has_the_prompt_of_training() -> None:
    prompter = Prompter(byte_level_tokenizer(), prompt_template=ASK)
    assert prompter.record({"query": "2+2?"}, "f:1").text == "Question: 2+2? {think}\nAnswer:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no column", r"name the column of the prompt in braces, as in `\{query\}`"),
        ("{query", "write a brace of the text twice"),
        ("{0}", "braces hold the name of a column and nothing else"),
        ("{}", "braces hold the name of a column and nothing else"),
        ("{query.__class__}", "braces hold the name of a column and nothing else"),
        ("{query[0]}", "braces hold the name of a column and nothing else"),
        ("{query:>9999999999}", "braces hold the name of a column and nothing else"),
        ("{query!r}", "braces hold the name of a column and nothing else"),
    ],
)
def test_braces_hold_names(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PromptTemplate(text)


MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, r"leaves `question` of the record out; add `\{question\}`"),
        ({"query": 3, "response": "b"}, "`query` is a int, not text"),
        ({"messages": MESSAGES}, "is for a prompt and a response, and this record is `messages`"),
        ({"text": "a"}, "is for a prompt and a response, and this record is `text`"),
        ({"prompt": MESSAGES, "completion": "b"}, "is for text, and `prompt` or `completion` holds messages"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_columns(record, template=ASK)


def test_what_the_template_leaves_out_is_named() -> None:
    record = {"instruction": "a", "input": "b", "output": "c"}
    with pytest.raises(InputError, match=r"leaves `input` of the record out; add `\{input\}`"):
        read_columns(record, template=PromptTemplate("{instruction}"))
    other = {"query": "a", "response": "b", "input": "c"}  # as without a template: a column of no meaning
    assert read_columns(other, template=PromptTemplate("{query}")) == Pair("a", "b")


def test_a_column_that_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="`topic`, which prompt_template names, is missing"):
        read_columns({"query": "a", "response": "b"}, template=PromptTemplate("{topic} {query}"))
    with pytest.raises(InputError, match="is for text, and this pair holds messages"):
        read_preference({"prompt": MESSAGES, "chosen": "b", "rejected": "c"}, template=ASK)
