"""What killed writers leave beside a target: swept or put back, and nothing of others is touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers.staging import RANDOM, put, thesis_in, value_of
from lowrank_dist.errors import InputError
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.beside import exclusive, restore_replaced, sweep
from lowrank_dist.storage.lock import Lock, lock_of


def test_remains_are_swept(tmp_path: Path) -> None:
    put(tmp_path / "kept", 1)
    (tmp_path / f".half.{RANDOM}.partial").mkdir()
    (tmp_path / f".half.{RANDOM}.partial" / "x").touch()
    put(tmp_path / f".kept.{RANDOM}.old", 0)  # killed before the one that was replaced had gone
    put(tmp_path / f".removed.{RANDOM}.removed", 0)  # killed while it was removed
    put(tmp_path / f".between.{RANDOM}.old", 5)  # killed between two renames
    (tmp_path / f".between.{RANDOM}.partial").mkdir()
    put(tmp_path / f".first.{RANDOM}.old", 6)  # killed while it was renamed, before any other was built
    (tmp_path / f".last.{RANDOM}.link").symlink_to("kept")
    dead = Lock(lock_of(tmp_path / "kept"), "kept")
    dead.attempt()
    shutil.copytree(tmp_path / ".kept.lock", tmp_path / ".dead.lock")
    dead.release()
    (token,) = (tmp_path / ".dead.lock").iterdir()
    token.rename(token.with_name(token.name.replace(f"_{os.getpid()}_", "_999999999_")))
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["between", "first", "kept"]
    assert value_of(tmp_path / "between") == 5
    sweep(tmp_path / "nowhere")


def test_a_replacement_that_was_killed_is_undone_unless_it_goes_on(tmp_path: Path) -> None:
    put(tmp_path / f".out.{RANDOM}.old", 5)
    put(tmp_path / f".gone.{RANDOM}.removed", 6)  # killed while it was removed: not to come back
    with exclusive(tmp_path / "out"):
        restore_replaced(tmp_path)
        assert not (tmp_path / "out").exists()
    for _ in range(2):
        restore_replaced(tmp_path)
        assert value_of(tmp_path / "out") == 5
    assert not (tmp_path / "gone").exists()


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as staging:
        sweep(tmp_path)
        assert staging.exists()
        with pytest.raises(InputError, match="another run is writing it"), exclusive(tmp_path / "out"):
            pass


def test_links_and_directories_in_the_way_are_not_followed(tmp_path: Path) -> None:
    """Under the names of earlier versions, and under those that a dead writer leaves."""
    thesis, out = thesis_in(tmp_path), tmp_path / "run" / "out"
    out.parent.mkdir()
    for name in (
        ".out.partial",
        ".out.old",
        ".other.lock",
        f".out.{RANDOM}.partial",
        f".out.{RANDOM}.old",
        f".out.{RANDOM}.removed",
    ):
        (out.parent / name).symlink_to(thesis)
    sweep(out.parent)
    restore_replaced(out.parent)
    put(out, 1)
    put(out, 2)
    sweep(out.parent)
    assert value_of(out) == 2
    (out.parent / ".out.lock").symlink_to(thesis)
    with pytest.raises(InputError, match="is a link in the place of a lock"):
        put(out, 3)
    shutil.copytree(thesis, out.parent / ".more.lock")
    with pytest.raises(InputError, match="in the place of a lock, but holds other files"):
        put(out.with_name("more"), 1)
    sweep(out.parent)
    assert os.listdir(thesis) == os.listdir(out.parent / ".more.lock") == ["chapter-1"]


def test_names_of_other_programs_are_left_alone(tmp_path: Path) -> None:
    for name in (".thesis.partial", ".thesis.old", ".thesis.link", ".other.lock", ".rsync.0123.partial"):
        (tmp_path / name).mkdir()
    before = sorted(os.listdir(tmp_path))
    sweep(tmp_path)
    put(tmp_path / "thesis", 1)
    assert sorted(os.listdir(tmp_path)) == [*before, "thesis"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make directories of other users")
def test_directories_of_others_are_not_swept(tmp_path: Path) -> None:
    planted = tmp_path / f".out.{RANDOM}.old"
    put(planted, 1)
    os.chown(planted, 12345, 12345)
    sweep(tmp_path)
    restore_replaced(tmp_path)
    assert os.listdir(tmp_path) == [planted.name]
