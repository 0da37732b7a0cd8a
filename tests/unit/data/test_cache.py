"""Tokenized data are kept, and are those that would be made."""

from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.chat_templates import FAMILIES
from helpers.sft import CONVERSATION, byte_level_tokenizer, sentencepiece_tokenizer, write_jsonl
from lowrank_dist.data import cache
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.packing import Tokens
from lowrank_dist.data.tokenizing import Encoder
from lowrank_dist.errors import InputError
from lowrank_dist.storage.writer import write_tensors

RECORDS = [{"prompt": f"hello {index}", "completion": " world" * (1 + index % 5)} for index in range(23)]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a data module with a cache."""
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    records = [*RECORDS, {"messages": CONVERSATION}, {"nothing": 1}, {"prompt": "hello" * 99, "completion": "a"}]
    return {
        "tokenizer": str(tmp_path / "tokenizer"),
        "train": write_jsonl(tmp_path / "train.jsonl", records),
        "on_bad_record": "skip",
        "max_length": 40,
        "cache_dir": str(tmp_path / "cache"),
    }


def batches(arguments: dict[str, Any]) -> list[dict[str, list[list[int]]]]:
    module = SFTDataModule(**arguments, batch_size=3)
    module.setup("fit")
    return [{name: values.tolist() for name, values in batch.items()} for batch in module.train_dataloader()]


def entries(arguments: dict[str, Any]) -> list[Path]:
    return sorted(path for path in Path(arguments["cache_dir"]).iterdir() if not path.name.startswith("."))


@pytest.fixture
def no_tokenizing(monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse() -> None:
        def called(*_: Any) -> None:
            raise AssertionError("tokenized again")

        monkeypatch.setattr(Encoder, "__call__", called)

    return refuse


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"group_by_length": True}])
def test_batches_are_those_without_a_cache(data: dict[str, Any], settings: dict[str, Any], no_tokenizing: Any) -> None:
    expected = batches(data | settings | {"cache_dir": None})
    assert batches(data | settings) == expected
    (entry,) = entries(data)
    assert len({file.stat().st_mode for file in entry.iterdir()}) == 1  # that of the umask
    no_tokenizing()
    assert batches(data | settings) == expected


def test_what_was_left_out_is_said_again(data: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    said = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            batches(data)
        said.append([record.getMessage() for record in caplog.records])
    assert said[0] == said[1]
    assert len(said[0]) == 2


def test_an_entry_belongs_to_all_that_decides_it(data: dict[str, Any], tmp_path: Path) -> None:
    batches(data)
    batches(data | {"packing": True, "seed": 5})
    assert len(entries(data)) == 1
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    for settings in (
        {"max_length": 41},
        {"limit": 4},
        {"train_on": "last_assistant"},
        {"thinking": "drop"},
        {"as_chat": True},
        {"prompt_template": "Q: {prompt}\nA: "},
        {"columns": {"prompt": "prompt", "completion": "completion"}},
        {"chat_template": template},
    ):
        count = len(entries(data))
        batches(data | settings)
        assert len(entries(data)) == count + 1, settings
    Path(data["train"]).write_text(json.dumps(RECORDS[0]) + "\n")
    batches(data)
    assert len(entries(data)) == 10
    sentencepiece_tokenizer(template=template).save_pretrained(tmp_path / "other")
    batches(data | {"tokenizer": str(tmp_path / "other")})
    assert len(entries(data)) == 11


def test_the_name_of_a_file_decides_nothing(data: dict[str, Any], tmp_path: Path, no_tokenizing: Any) -> None:
    expected = batches(data)
    moved = Path(data["train"]).rename(tmp_path / "other.jsonl")
    no_tokenizing()
    assert batches(data | {"train": [str(moved)]}) == expected


@pytest.mark.parametrize("damage", ["manifest", "cut", "sizes", "missing"])
def test_a_damaged_entry_is_made_again(data: dict[str, Any], damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = batches(data)
    (entry,) = entries(data)
    file = entry / cache.FILE
    if damage == "manifest":
        (entry / "lowrank_dist.json").write_text("{")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "missing":
        file.unlink()
    else:
        values = torch.zeros(3, dtype=torch.int32)
        write_tensors(file, {"tokens": values, "labels": values.clone(), "sizes": torch.tensor([2])})
    assert batches(data) == expected
    assert damage == "missing" or "tokenized again" in caplog.text
    caplog.clear()
    assert batches(data) == expected
    assert "tokenized again" not in caplog.text


def test_an_error_leaves_nothing(data: dict[str, Any]) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="columns found: `nothing`"):
            batches(data | {"on_bad_record": "error"})
    assert not list(Path(data["cache_dir"]).iterdir())


def test_a_function_of_the_user_is_not_cached(data: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    batches(data | {"transform": dict})
    assert not Path(data["cache_dir"]).exists()
    assert "not cached, because what the function of `transform` does cannot be known" in caplog.text


def test_a_template_with_the_date_has_an_entry_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES["llama3"].tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    source = SFTDataModule("t", write_jsonl(tmp_path / "a.jsonl", RECORDS)).sources["train"][0].source

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return datetime.date(2099, 1, 1)

    key = cache.key_of(source, tokenizer, {})
    assert cache.key_of(source, tokenizer, {}) == key
    monkeypatch.setattr(cache, "date", Tomorrow)
    assert cache.key_of(source, tokenizer, {}) != key


def test_tokens_are_mapped_and_not_read(tmp_path: Path) -> None:
    examples = [torch.arange(2_000_000, dtype=torch.int32).view(2, -1) for _ in range(8)]
    tokens, lines = cache.cached(tmp_path / "entry", lambda _: (Tokens.of(examples), ["a line"]))
    assert (lines, tokens.largest, tokens.sizes) == (["a line"], 999_999, [1_000_000] * 8)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped
