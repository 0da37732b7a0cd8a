"""What ``lowrank-dist data`` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.chat_templates import FAMILIES
from helpers.sft import byte_level_tokenizer, write_jsonl
from lowrank_dist.cli.commands import main
from lowrank_dist.cli.data import histogram

GOOD = {"prompt": "hello", "completion": " world", "id": 3}


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    byte_level_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def show(capsys: Any, *argv: str) -> str:
    assert main(["data", *argv]) == 0
    return str(capsys.readouterr().out)


def test_examples_lengths_and_faults_are_shown(tokenizer: str, tmp_path: Path, capsys: Any) -> None:
    records = [
        GOOD,
        GOOD | {"id": 4},
        {"prompt": "", "completion": "all\x1b[2J of it"},
        {"prompt": "silence", "completion": ""},
        {"prompt": "hello" * 50, "completion": "dropped"},
        {"text": "hello world " * 40},
        {"prompt": 3, "completion": ""},
        {"nothing": 1},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    out = show(
        capsys, path, "--tokenizer", tokenizer, "--max_length", "40", "--on_bad_record", "skip", "--examples", "9"
    )
    assert f"== {path}:1: 4 tokens, 2 trained\nhello[[ world<|im_end|>]]" in out
    assert "ll\\x1b[2J of it" in out
    assert "\x1b" not in out
    assert "\n8 records, " in out
    assert "2 examples are longer" not in out
    assert "1 of 6 examples are longer than max_length=40 and were cut; 1 of them had no response left" in out
    assert "1 of 6 examples are longer than max_length=40 and were split" in out
    assert "1 examples have no prompt: every token of them is trained" in out
    assert "1 examples have an empty response: only their last token is trained" in out
    assert f"skipped 2 of 8 records; the first: {path}:7: `prompt` is a int, not text" in out
    assert f"\n  {path}:8: columns found: `nothing`" in out
    assert f"1 examples are duplicates; the first: {path}:2 repeats {path}:1" in out
    assert "columns that are not used: id\n" in out
    assert "< max_length" in out


def test_columns_that_nothing_reads_are_told_by_their_names_in_the_data(
    tokenizer: str, tmp_path: Path, capsys: Any
) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", [{"task": "a", "input": "b", "output": "c", "instruction": "d", "id": 3}]
    )
    out = show(capsys, path, "--tokenizer", tokenizer, "--columns", '{"instruction": "task"}')
    assert "columns that are not used: id, instruction\n" in out


def test_trained_tokens_have_a_color(tokenizer: str, tmp_path: Path, capsys: Any) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD])
    out = show(capsys, path, "--tokenizer", tokenizer, "--color", "always")
    assert "\033[2mhello\033[0m\033[1;32m world<|im_end|>\033[0m" in out
    assert "[[" not in out


def test_the_options_of_a_run_are_those_of_the_command(tmp_path: Path, capsys: Any) -> None:
    FAMILIES["qwen3"].tokenizer().save_pretrained(tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}] * 2
    for name in ("x.jsonl", "y.jsonl"):
        write_jsonl(tmp_path / name, [{"chat": turns}])
    out = show(
        capsys,
        *(str(tmp_path / "*.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--columns", '{"messages": "chat"}'),
        *("--train_on", "last_assistant", "--thinking", "drop", "--limit", "1"),
    )
    assert "1 records, 1 examples" in out
    assert "[[<think>\n\n</think>\n\nc<|im_end|>]]" in out
    assert out.count("[[") == 1


def test_errors_are_one_line(tokenizer: str, tmp_path: Path, capsys: Any) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"nothing": 1}])
    for argv, message in (
        ([path, "--tokenizer", tokenizer], f"lowrank-dist data: {path}:1: columns found: `nothing`"),
        ([path, "--tokenizer", tokenizer, "--limit", "0"], "lowrank-dist data: --limit 0 must be at least 1"),
        ([path, "--tokenizer", tokenizer, "--examples", "-1"], "--examples -1 must not be negative"),
        ([path, "--tokenizer", str(tmp_path / "no")], "lowrank-dist data: --tokenizer "),
        ([str(tmp_path / "no.csv"), "--tokenizer", tokenizer], "lowrank-dist data: data='"),
        (
            [path, "--tokenizer", tokenizer, "--on_bad_record", "skip"],
            "none of its 1 records is left: skipped 1 of 1 records; the first: ",
        ),
    ):
        assert main(["data", *argv]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_bars_have_the_lengths_of_the_counts() -> None:
    *bars, quantiles = histogram([1, 2, 3, 13, 100], 50)
    assert [int(line[15:].split()[0]) for line in bars] == [3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert [line.split()[0] for line in bars if "max_length" in line] == ["45-53"]
    assert bars[0].count("#") == 3 * bars[1].count("#") or bars[0].count("#") > bars[1].count("#") > 0
    assert quantiles == "median 3  90 % 65  99 % 97  longest 100"
