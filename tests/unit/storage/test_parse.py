"""Values from files: typed and bounded, from regular files, in messages that a terminal shows as they are."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.layout import read_manifest
from lowrank_dist.storage.parse import Record, is_flag, is_inside, parse_object, printable, read_bytes, read_record
from lowrank_dist.storage.reader import open_file, read_index
from lowrank_dist.storage.verify import damage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no JSON object"),
        ("{", "cannot be read"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nests deeper than 64"),
        ("[" * 100_000, "cannot be read"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
        ("\udcff", "cannot be read"),
    ],
)
def test_text_that_is_no_bounded_object(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^some file: .*{message}"):
        parse_object(text.encode(errors="surrogateescape"), "some file")


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "nothing", "large"])
def test_only_regular_files_of_bounded_size(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.json"
    if kind == "pipe":
        os.mkfifo(path)  # without a writer
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "large":
        path.touch()
        os.truncate(path, 10**12)
    messages = {"nothing": "is missing", "large": "has 1000000000000 bytes, and at most 16777216 are read"}
    message = messages.get(kind, "is no regular file")
    for read in (read_bytes, read_record, read_index):
        with pytest.raises(CheckpointError, match=message):
            read(path)
    if kind != "large":
        with pytest.raises(CheckpointError, match=message):
            open_file(path)


def test_a_header_is_not_read_beyond_the_file(tmp_path: Path) -> None:
    """A sparse file that claims a header of 12 GB, which a reader would read whole."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((12 * 10**9).to_bytes(8, "little"))
    os.truncate(path, 13 * 10**9)
    with pytest.raises(CheckpointError, match="a header of 12000000000 bytes"):
        open_file(path)


def test_entries_are_read_by_type() -> None:
    record = Record({"a": "x", "b": 3, "c": True, "d": {"e": [1]}, "f": None, "g": "a\x1b[2J"}, "file")
    assert (record.text("a"), record.integer("b"), record.integer("f", 7), record.text("h", None)) == ("x", 3, 7, None)
    assert record.expect("c", is_flag, "true or false") is True
    assert record.record("d")["e"] == [1]
    for wrong, message in [
        (lambda: record.integer("c"), "file: c is True, must be an integer"),
        (lambda: record.integer("b", high=2), "must be an integer from 0 to 2"),
        (lambda: record.text("g"), r"g is 'a\\x1b\[2J', must be plain text"),
        (lambda: record["h"], "file: has no entry 'h'"),
        (lambda: record.record("d").records("e"), r"file: d: e is a list of 1, must be a list of objects"),
        (lambda: record.integer("f"), "file: f is None, must be an integer"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            wrong()


@pytest.mark.parametrize(
    "entries",
    [
        {"step": "3"},
        {"step": -1},
        {"step": 10**30},
        {"base": "a\nb"},
        {"base": ["a"]},
        {"files": {"../thesis": "0"}},
        {"files": {"/etc/passwd": "0"}},
        {"hashes": {"adapter": {"a": 3}}},
        {"matrices": [{"name": 3}]},
        {"matrices": [{"rank": 4}]},
        {"experts": {"a": 0}},
        {"starts_at_zero": "no"},
    ],
    ids=str,
)
def test_a_manifest_of_other_types_is_damaged(tmp_path: Path, entries: dict[str, Any]) -> None:
    (tmp_path / "lowrank_dist.json").write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/dev/zero", "a/b.safetensors", "model.bin", "a\x1b.safetensors", 3]
)
def test_an_index_names_files_beside_it(tmp_path: Path, file: Any) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="weight_map is .*, must be safetensors files beside it"):
        read_index(tmp_path / "index.json")


def test_what_is_printed_is_plain() -> None:
    assert printable("a\x1b[31m\n\u202eb") == r"a\x1b[31m\n\u202eb"
    assert printable("x" * 300) == "x" * 200 + "... (300 characters)"
    assert printable("Gewicht von Größe 3") == "Gewicht von Größe 3"
    assert [is_inside(path) for path in ("a/b", "a/../../b", "/a", ".", "", "a\x00")] == [True] + [False] * 5


@pytest.mark.parametrize("read", [read_record, open_file, lambda path: damage(path.parent, ShardGroup.single())])
def test_an_error_that_may_pass_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    """A job that a stale handle ends starts again; one that damage ends does not."""
    path = tmp_path / "lowrank_dist.json"
    path.write_text("{}")
    before = os.open

    def stale(file: Any, *arguments: Any) -> int:
        if Path(file) == path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))
        return before(file, *arguments)

    monkeypatch.setattr(os, "open", stale)
    with pytest.raises(OSError, match="[Ss]tale") as caught:
        read(path)
    assert not isinstance(caught.value, CheckpointError)
