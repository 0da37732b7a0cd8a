"""A prompt has the tokens that it has in training, and an answer ends where the model learned to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chat_templates import FAMILIES
from helpers.sft import CHATML, CONVERSATION, byte_level_tokenizer, encode, sentencepiece_tokenizer
from lowrank_dist.data.prompts import Prompter
from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError

RECORDS: list[dict[str, Any]] = [
    {"messages": CONVERSATION},
    {"messages": CONVERSATION[:2], "completion": "world"},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "world"}]},
    {"prompt": "2 and 2? ", "completion": "four"},
    {"prompt": [{"role": "user", "content": "hello"}], "completion": "world"},
    {"query": "add 2 and 2", "response": "four"},
    {"question": "add 2 and 2", "answer": "four"},
    {"instruction": "add", "input": "2 and 2", "output": "four"},
]
RESPONSES = ("completion", "response", "answer", "output")


def trained_prompt(tokenizer: Any, record: dict[str, Any]) -> list[int]:
    """The tokens of the last example before its last trained stretch."""
    tokens, labels = encode(tokenizer, record)[-1]
    last = max(i for i, label in enumerate(labels) if label == IGNORE_INDEX)
    return tokens[: last + 1]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "+".join(record))
@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_a_prompt_has_its_tokens_of_training(make: Any, record: dict[str, Any]) -> None:
    tokenizer = make(template=CHATML)
    prompter, expected = Prompter(tokenizer), trained_prompt(tokenizer, record)
    assert prompter.record(record, "f:1").tokens == expected
    alone = {name: value for name, value in record.items() if name not in RESPONSES}
    assert prompter.record(alone, "f:1").tokens == expected


def test_a_prompt_beside_other_columns() -> None:
    tokenizer = byte_level_tokenizer(template=CHATML)
    expected = Prompter(tokenizer).record({"messages": CONVERSATION}, "f:1")
    assert Prompter(tokenizer).record({"messages": CONVERSATION, "prompt": "hello"}, "f:1") == expected
    assert Prompter(tokenizer).record({"messages": None, "prompt": "hello", "completion": None}, "f:1").text == "hello"
    named = Prompter(tokenizer, columns={"prompt": "q", "completion": "gold"})
    assert named.record({"messages": CONVERSATION, "q": "hello"}, "f:1").text == "hello"


def test_responses_and_what_has_none() -> None:
    prompter = Prompter(byte_level_tokenizer())
    responses = [prompter.response(record, "f:1").strip() for record in RECORDS]
    assert responses == ["four", "world", "world", "four", "world", "four", "four", "four"]
    for record in ({"text": "all"}, {"messages": CONVERSATION[:2]}, {"messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(InputError, match=r"f:1: "):
            prompter.response(record, "f:1")


def test_files_of_records_and_of_lines(tmp_path: Path) -> None:
    prompter = Prompter(byte_level_tokenizer(), system="Be short.")
    (tmp_path / "a.txt").write_text("hello\n\n2 and 2?\n")
    lines = list(prompter.file(tmp_path / "a.txt"))
    assert [prompt.where for prompt in lines] == [f"{tmp_path / 'a.txt'}:1", f"{tmp_path / 'a.txt'}:3"]
    assert lines[0].text == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    assert len(list(prompter.file(tmp_path / "a.jsonl"))) == len(RECORDS)
    for name, content, says in (("b.txt", "\n", "holds no prompts"), ("c.jsonl", '{"x": 1}', r"c\.jsonl:1: columns")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=says):
            list(prompter.file(tmp_path / name))
    with pytest.raises(InputError, match="missing"):
        list(prompter.file(tmp_path / "none.jsonl"))


def test_without_a_template_a_line_is_text() -> None:
    tokenizer = byte_level_tokenizer(template=None)
    assert Prompter(tokenizer).line("hello", "here").text == "hello"
    with pytest.raises(InputError, match="have a chat template|need a chat template"):
        Prompter(tokenizer).record(RECORDS[0], "f:1")


def test_an_answer_ends_with_the_end_of_a_turn_and_with_eos() -> None:
    assert Prompter(byte_level_tokenizer()).stops().keys() == {byte_level_tokenizer().eos_token_id}
    other = byte_level_tokenizer(eos="<|endoftext|>")  # the template ends turns with another token
    stops = Prompter(other).stops()
    assert {other.convert_ids_to_tokens(token): what for token, what in stops.items()} == {
        "<|endoftext|>": "eos",
        "<|im_end|>": "end of turn",
    }
    assert Prompter(byte_level_tokenizer(template=None)).stops() == {byte_level_tokenizer().eos_token_id: "eos"}


ENDS = {
    "qwen2.5": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "zephyr": "</s>",
    "gpt-oss": "<|return|>",
    "parts": "<|end|>",
}


@pytest.mark.parametrize("family", ENDS)
def test_turns_of_every_family_end(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    stops = {tokenizer.convert_ids_to_tokens(token) for token in Prompter(tokenizer).stops()}
    assert stops == {ENDS[family], tokenizer.eos_token}
