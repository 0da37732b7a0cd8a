"""Lines of a file: what is read, and how a bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank_dist.data.records import read_jsonl


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\n", "empty line"),
        (b"   \n", "empty line"),
        (b'{"prompt": \n', "not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not valid JSON"),
        (b"[1, 2]\n", "a JSON list"),
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
