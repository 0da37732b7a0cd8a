"""Lines of a file: what is read, and how a bad one is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lowrank_dist.data.records import read_jsonl
from lowrank_dist.errors import InputError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "empty line"),
        (b"   \n", "empty line"),
        (b'{"prompt": \n', "not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not valid JSON"),
        (b"[1, 2]\n", "a JSON list"),
        (b'{"a": 1, "a": 2}\n', "the entry 'a' is there twice"),
        (b'{"a\\n": 1}\n', "a column is called 'a.*n'; choose a name"),
        (b'{"a": "\\ud800"}\n', "surrogates not allowed"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70 + b"\n", "nests deeper than 64"),
        (b'{"a": ' * 9999 + b"\n", "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line + b'{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match=message) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_jsonl_is_utf8(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps({"prompt": "größer"}, ensure_ascii=False).encode())
    assert list(read_jsonl(path)) == [(f"{path}:1", {"prompt": "größer"})]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n", b"\r\n\r\n"])
def test_empty_lines_may_stand_at_the_end(tmp_path: Path, end: bytes):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}' + end)
    assert list(read_jsonl(path)) == [(f"{path}:1", {"prompt": "a"})]


def test_bad_lines_can_be_passed_over(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{\n[]\n{"a": 2}\n\n')
    errors: list[InputError] = []
    assert [record for _, record in read_jsonl(path, errors.append)] == [{"a": 1}, {"a": 2}]
    assert [str(error).split(": ")[0] for error in errors] == [f"{path}:{number}" for number in (2, 3, 4)]


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="is no regular file"):
        list(read_jsonl(tmp_path / "pipe.jsonl"))
