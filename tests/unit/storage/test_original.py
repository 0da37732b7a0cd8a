"""The original model of an adapter is found again: at its commit, from any directory, and where it was moved to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.hub import commit
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.storage.original import Original, find_original
from lowrank_dist.storage.parse import Record

COMMIT = commit("a")


def recorded(**entries: Any) -> Original | None:
    return Original.recorded(Record(entries, "lowrank_dist.json"))


def test_what_is_recorded_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / COMMIT
    for original, location, revision in (
        (Original.at("tiny", Path("tiny")), str(tmp_path / "tiny"), None),
        (Original.at("me/tiny", snapshot), "me/tiny", COMMIT),
    ):
        assert (original.location, original.revision) == (location, revision)
        assert recorded(**original.facts()) == original


@pytest.mark.parametrize(
    ("entries", "location", "revision"),
    [
        ({"base": "me/tiny", "pretrained": "me/tiny", "pretrained_commit": COMMIT}, "me/tiny", COMMIT),
        ({"base": "tiny", "pretrained": "/models/tiny"}, "/models/tiny", None),
        # from a residual model, whose commit is not that of the original
        ({"base": "me/tiny", "pretrained": "me/tiny-pissa", "pretrained_commit": COMMIT}, "me/tiny", None),
        ({"base": "me/tiny"}, "me/tiny", None),
    ],
)
def test_what_older_versions_recorded(entries: dict[str, str], location: str, revision: str | None) -> None:
    found = recorded(**entries)
    assert found is not None
    assert (found.location, found.revision) == (location, revision)
    assert recorded() is None


def test_a_directory_is_found_from_elsewhere_and_where_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("first/tiny", "second", "moved/tiny"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "first")
    original = Original.at("tiny", Path("tiny"))
    monkeypatch.chdir(tmp_path / "second")
    assert original.chosen() == (str(tmp_path / "first" / "tiny"), None)
    (tmp_path / "first" / "tiny").rmdir()
    monkeypatch.chdir(tmp_path / "moved")
    assert original.chosen() == ("tiny", None)


def test_what_is_said_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step: names no base model; pass pretrained"):
        find_original(None, of=Path("step"), option="pretrained")
    gone = Original(name="tiny", location=str(tmp_path / "tiny"))
    with pytest.raises(CheckpointError, match=r"no such directory \(step names this base model; pass base if it is"):
        find_original(gone, of=Path("step"), option="base")
    here = Original(name="tiny", location=str(tmp_path))
    with pytest.raises(InputError, match="is a directory, which has no revisions such as 'v1'"):
        find_original(here, revision="v1", of=Path("step"), option="base")
    assert find_original(here, of=Path("step"), option="base") == tmp_path
