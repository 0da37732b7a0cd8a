"""What becomes of records: examples, and an account of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
    assert found.lines(20) == ["1 passages are longer than max_length=20 and were split"]


def test_what_a_template_made_us_do_is_said(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}] * 3)
    (line,) = loaded(path, tokenizer=FAMILIES["r1"].tokenizer()).lines(64)
    assert line.endswith("closed at once, in 3 turns")
