"""Directories that are complete or absent, whatever happens to their writer."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import lowrank_dist.storage.atomic as directories
from lowrank_dist.errors import InputError
from lowrank_dist.storage.atomic import (
    atomic_directory,
    check_free,
    exclusive,
    remove_directory,
    restore_replaced,
    staging_of,
    sweep,
)
from lowrank_dist.storage.writer import write_json


def test_a_directory_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="half-way"), atomic_directory(target) as staging:
        write_json(staging / "a.json", {})
        raise RuntimeError("half-way")
    assert list(tmp_path.iterdir()) == []
    for value in (1, 2):
        with atomic_directory(target) as staging:
            write_json(staging / "a.json", {"value": value})
    assert json.loads((target / "a.json").read_text()) == {"value": 2}
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_leaves_no_half_directory(tmp_path: Path) -> None:
    """kill -9 in the middle of writing: the target is not there, and the next writer sweeps the remains."""
    program = f"""
        import os, signal
        from lowrank_dist.storage.atomic import atomic_directory
        with atomic_directory({str(tmp_path / "out")!r}) as staging:
            (staging / "part").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    with atomic_directory(tmp_path / "out") as staging:
        write_json(staging / "a.json", {})
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["a.json"]


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as staging:
        (staging / "part").touch()
        with pytest.raises(InputError, match="another run is writing it"), atomic_directory(tmp_path / "out"):
            raise AssertionError("two writers")
        assert os.listdir(staging) == ["part"]
    assert os.listdir(tmp_path / "out") == ["part"]


def test_the_disk_is_the_one_that_the_target_will_be_on(tmp_path: Path) -> None:
    target = tmp_path / "not" / "yet"
    check_free(target, shutil.disk_usage(tmp_path).free // 2)
    with pytest.raises(InputError, match=f"{target}: .* GB are needed, .* GB are free there"):
        check_free(target, 2**60)


def test_a_full_disk_leaves_the_previous_directory(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "out") as staging:
        write_json(staging / "a.json", {"old": 1})
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "out") as staging:
        (staging / "full").symlink_to("/dev/full")
        (staging / "full").write_text("x" * 100_000)
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["out"]


def put(target: Path, value: int) -> None:
    with atomic_directory(target) as staging:
        write_json(staging / "a.json", {"value": value})


def value_of(target: Path) -> int:
    return json.loads((target / "a.json").read_text())["value"]


def test_replacing_leaves_no_instant_without(tmp_path: Path) -> None:
    """A reader that looks all the time always finds a whole one (where directories can be exchanged)."""
    target = tmp_path / "out"
    put(target, 0)
    if not directories.exchange(target, target):
        pytest.skip("this file system cannot exchange two directories")
    missed, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if not target.exists():
                missed.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(200):
        put(target, value)
    stop.set()
    reader.join()
    assert not missed
    assert value_of(target) == 199


def test_replacing_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system whose C library has no ``renameat2``."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    put(tmp_path / "out", 1)
    put(tmp_path / "out", 2)
    assert value_of(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "first", 1)
    (tmp_path / "last").symlink_to("first")
    put(tmp_path / "last", 2)
    assert value_of(tmp_path / "first") == 1
    assert value_of(tmp_path / "last") == 2


def test_remains_are_swept(tmp_path: Path) -> None:
    put(tmp_path / "kept", 1)
    (tmp_path / ".half.partial").mkdir()
    (tmp_path / ".half.partial" / "x").touch()
    put(tmp_path / ".kept.old", 0)  # killed before the one that was replaced had gone
    put(tmp_path / ".removed.old", 0)  # killed while it was removed
    put(tmp_path / ".between.old", 5)  # killed between two renames
    (tmp_path / ".between.partial").mkdir()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["between", "kept"]
    assert value_of(tmp_path / "between") == 5
    sweep(tmp_path / "nowhere")


def test_a_replacement_that_was_killed_is_undone_unless_it_goes_on(tmp_path: Path) -> None:
    put(tmp_path / ".out.old", 5)
    put(tmp_path / ".gone.old", 6)  # killed while it was removed: not to come back
    with exclusive(tmp_path / ".out.partial"):
        restore_replaced(tmp_path)
        assert not (tmp_path / "out").exists()
    for _ in range(2):
        restore_replaced(tmp_path)
        assert value_of(tmp_path / "out") == 5
    assert not (tmp_path / "gone").exists()


def test_a_lock_is_on_the_directory_that_bears_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner may move what it has locked to its place between another one's open and lock."""
    staging, flock = staging_of(tmp_path / "out"), fcntl.flock

    def move_and_lock(descriptor: int, how: int) -> None:
        if not (tmp_path / "out").exists():
            staging.rename(tmp_path / "out")
        flock(descriptor, how)

    monkeypatch.setattr(directories.fcntl, "flock", move_and_lock)
    with exclusive(staging):
        assert staging.exists()
        with pytest.raises(InputError, match="another run is writing it"), exclusive(staging):
            pass


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    staging = staging_of(tmp_path / "out")
    with exclusive(staging):
        sweep(tmp_path)
        assert staging.exists()
        with pytest.raises(InputError, match="another run is writing it"), exclusive(staging):
            pass
    sweep(tmp_path)
    assert not staging.exists()


def test_removing(tmp_path: Path) -> None:
    put(tmp_path / "out", 1)
    (tmp_path / "link").symlink_to("out")
    remove_directory(tmp_path / "link")
    assert value_of(tmp_path / "out") == 1
    remove_directory(tmp_path / "out")
    remove_directory(tmp_path / "out")
    assert os.listdir(tmp_path) == []
