"""What becomes of records: examples, and an account of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.chat_templates import FAMILIES
from helpers.sft import byte_level_tokenizer, write_jsonl
from lowrank_dist.data.loading import Loaded, load
from lowrank_dist.data.rendering import Renderer
from lowrank_dist.data.sources import Source
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoder
from lowrank_dist.errors import InputError

GOOD = {"prompt": "hello", "completion": " world"}


def loaded(path: Path | str, *, max_length: int = 64, tokenizer: Any = None, **settings: Any) -> Loaded:
    tokenizer = tokenizer or byte_level_tokenizer()
    source = Source(role="train", names=str(path))
    return load(source, Renderer(tokenizer, None), Encoder(tokenizer), max_length=max_length, **settings)


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Three good records, and bad ones of every kind: no JSON, no columns, no text, not rendered."""
    lines = [GOOD, "{", {"a": 1}, GOOD | {"prompt": 3}, GOOD, {"messages": []}, GOOD]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_bad_records_are_skipped_and_counted(bad: Path) -> None:
    found = loaded(bad, on_bad_record="skip")
    assert found.records == 7
    assert found.wheres == [f"{bad}:{line}" for line in (1, 5, 7)]
    assert sorted(error.split(": ")[0] for error in found.skipped) == [f"{bad}:{line}" for line in (2, 3, 4, 6)]
    (line,) = found.lines(64)
    assert line.startswith(f"skipped 4 of 7 records; the first: {bad}:2: not valid JSON")


def test_a_bad_record_is_an_error(bad: Path) -> None:
    with pytest.raises(InputError, match=rf"^{bad}:2: not valid JSON"):
        loaded(bad)


@pytest.mark.parametrize(("limit", "lines", "skipped"), [(1, [1], 0), (4, [1], 3), (5, [1, 5], 3), (99, [1, 5, 7], 4)])
def test_a_limit_counts_bad_records(bad: Path, limit: int, lines: list[int], skipped: int) -> None:
    found = loaded(bad, on_bad_record="skip", limit=limit)
    assert found.wheres == [f"{bad}:{line}" for line in lines]
    assert len(found.skipped) <= skipped


def test_half_a_surrogate_pair_in_json_in_json_is_named(tmp_path: Path) -> None:
    """The line itself is text; what its arguments say is none."""
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, {"messages": messages}, GOOD])
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    with pytest.raises(InputError, match=rf"^{path}:2: .*surrogates not allowed"):
        loaded(path, tokenizer=tokenizer)
    assert len(loaded(path, tokenizer=tokenizer, on_bad_record="skip").examples) == 2


def test_a_function_makes_records_and_leaves_out_others(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"q": "a", "a": "b"}, {"q": "c", "a": None}])
    found = loaded(path, transform=lambda row: {"prompt": row["q"], "completion": row["a"]} if row["a"] else None)
    assert (len(found.examples), found.left_out) == (1, 1)
    assert found.lines(64) == ["transform left out 1 of 2 records"]
    with pytest.raises(InputError, match=rf"^{path}:1: transform: KeyError: 'x'"):
        loaded(path, transform=lambda row: row["x"])
    with pytest.raises(InputError, match=rf"^{path}:1: transform returned a str; it must return a dict"):
        loaded(path, transform=lambda row: "x")
    assert len(loaded(path, transform=lambda row: row["x"], on_bad_record="skip").skipped) == 2


def test_long_text_is_split(tmp_path: Path) -> None:
    text = " ".join(str(number) for number in range(100))
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": text}, {"text": "short"}])
    tokenizer = byte_level_tokenizer()
    found = loaded(path, max_length=20)
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    parts = [example[0].tolist() for example in found.examples[:-1]]
    assert [len(part) for part in parts[:-1]] == [20] * (len(whole) // 20)
    assert [token for part in parts for token in part] == whole[: sum(map(len, parts))]
    assert len(whole) - sum(map(len, parts)) <= 1
    assert all((example[1][1:] != IGNORE_INDEX).all() for example in found.examples)
    assert found.lines(20) == ["1 of 2 examples are longer than max_length=20 and were split"]


LONG = [
    GOOD,
    {"prompt": "hello", "completion": " world" * 20},
    {"prompt": "hello" * 20, "completion": " world"},
    {"text": "hello " * 40},
]


def test_long_examples_are_dropped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", LONG)
    found = loaded(path, max_length=20, on_long_example="drop")
    assert found.wheres == [f"{path}:1"]
    assert found.lines(20) == ["3 of 4 examples are longer than max_length=20 and were dropped"]


def test_long_examples_are_split(tmp_path: Path) -> None:
    """Every trained token is trained once, but for the first of a part, which nothing predicts."""
    path = write_jsonl(tmp_path / "data.jsonl", LONG)
    whole = loaded(path, max_length=10_000)
    found = loaded(path, max_length=20, on_long_example="split")
    for line in range(4):
        (one,) = (
            example
            for where, example in zip(whole.wheres, whole.examples, strict=True)
            if where == f"{path}:{line + 1}"
        )
        parts = [e for where, e in zip(found.wheres, found.examples, strict=True) if where == f"{path}:{line + 1}"]
        ranges = [one[:, at : at + 20] for at in range(0, one.shape[1], 20)]
        assert [part.tolist() for part in parts] == [
            part.tolist() for part in ranges if (part[1, 1:] != IGNORE_INDEX).any()
        ]
    dropped = sum(-(-length // 20) for length in whole.lengths) - len(found.examples)
    assert dropped > 0  # of the long prompt
    (line,) = found.lines(20)
    assert line.startswith("3 of 4 examples are longer than max_length=20 and were split; ")
    assert line.endswith(f"; {dropped} parts had no response and were dropped")


def test_weights_are_split_with_their_tokens(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 40, "weight": 0.5}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}])
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    whole = loaded(path, tokenizer=tokenizer, max_length=10_000)
    found = loaded(path, tokenizer=tokenizer, max_length=16, on_long_example="split")
    (weights,) = (along["weights"] for along in whole.along)
    parts = [along["weights"] for along in found.along]
    assert len(parts) > 2
    assert [len(part) for part in parts] == [example.shape[1] for example in found.examples]
    assert (torch.cat(parts) == 0.5).sum() >= (weights == 0.5).sum() - 1


def test_what_a_template_made_us_do_is_said(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}] * 3)
    (line,) = loaded(path, tokenizer=FAMILIES["r1"].tokenizer()).lines(64)
    assert line.endswith("closed at once, in 3 turns")


def test_examples_without_a_token_to_train_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD, {"text": ""}, {"text": "hello"}])
    found = loaded(path)
    assert (len(found.examples), found.lengths[1]) == (2, 1)
    assert "1 examples have no token to train and were dropped" in found.lines(64)
