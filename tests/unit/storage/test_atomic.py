"""Directories that are complete or absent, whatever happens to their writer."""

from __future__ import annotations

import ctypes
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
from helpers.staging import put, thesis_in, value_of
from lowrank_dist.errors import InputError
from lowrank_dist.storage.atomic import atomic_directory, atomic_file, put_link, remove_directory
from lowrank_dist.storage.beside import restore_replaced, sweep
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.writer import write_json, write_report


def test_a_directory_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="half-way"), atomic_directory(target) as staging:
        write_json(staging / "a.json", {})
        raise RuntimeError("half-way")
    assert list(tmp_path.iterdir()) == []
    for value in (1, 2):
        put(target, value)
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


def test_a_full_disk_leaves_the_previous_directory(tmp_path: Path) -> None:
    put(tmp_path / "out", 1)
    with pytest.raises(OSError, match="No space left"), atomic_directory(tmp_path / "out", overwrite=True) as staging:
        (staging / "full").symlink_to("/dev/full")
        (staging / "full").write_text("x" * 100_000)
    assert value_of(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


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


def test_staging_names_are_never_the_same(tmp_path: Path) -> None:
    names = set()
    for value in range(5):
        with atomic_directory(tmp_path / "out", overwrite=True) as staging:
            names.add(staging.name)
            write_json(staging / MANIFEST, {"value": value})
    assert len(names) == 5


def test_a_staging_directory_that_was_exchanged_is_not_put_in_place(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="another process put something else in its place"),
        atomic_directory(tmp_path / "out") as staging,
    ):
        staging.rename(tmp_path / "moved")
        staging.symlink_to(thesis_in(tmp_path))
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / "thesis") == ["chapter-1"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Between the last look and the renaming, by another program."""
    put(tmp_path / "out", 1)
    real = directories.check_target
    looks = []

    def look_and_lose(target: Path, **options: bool) -> None:
        real(target, **options)
        looks.append(target)
        if len(looks) == 2:
            shutil.rmtree(target)
            thesis_in(tmp_path).rename(target)

    monkeypatch.setattr(directories, "check_target", look_and_lose)
    if not exchanges:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    with pytest.raises(InputError, match="was not written by lowrank_dist"):
        put(tmp_path / "out", 2)
    assert len(looks) == 2
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["chapter-1"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_rename_that_fails_is_undone(tmp_path: Path, killed: bool) -> None:
    """Where directories cannot be exchanged; also if the process is killed just then."""
    put(tmp_path / "out", 1)
    program = f"""
        import ctypes, os, signal, sys, types
        from pathlib import Path
        from lowrank_dist.storage.atomic import atomic_directory
        from lowrank_dist.storage.layout import MANIFEST
        ctypes.CDLL = lambda *_, **__: types.SimpleNamespace()
        real, calls = os.rename, []
        def rename(source, target):
            calls.extend([source] * (str(target).endswith("/out")))
            if len(calls) == 2 and source is calls[-1]:  # the first was onto what is there
                if {killed}:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(5, "Input/output error", str(source))
            real(source, target)
        os.rename = rename
        with atomic_directory({str(tmp_path / "out")!r}, overwrite=True) as staging:
            (staging / MANIFEST).touch()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True)
    assert ("Input/output error" in done.stderr, done.returncode) == ((False, -9) if killed else (True, 1))
    assert (tmp_path / "out").exists() != killed
    restore_replaced(tmp_path)
    assert value_of(tmp_path / "out") == 1
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["out"]


def test_links_are_put_without_a_gap(tmp_path: Path) -> None:
    """In the place of a link, of a directory of this package, and of nothing; never of anything else."""
    for name in ("one", "two", "was-a-directory"):
        put(tmp_path / name, 1)
    for link in ("last", "was-a-directory"):
        for name in ("one", "two"):
            put_link(tmp_path / link, tmp_path / name)
            assert os.readlink(tmp_path / link) == name
    with pytest.raises(InputError, match="was not written by lowrank_dist"):
        put_link(thesis_in(tmp_path), tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["last", "one", "thesis", "two", "was-a-directory"]


def test_files_that_a_user_names(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_report(path, {"value": 1}, overwrite=False)
    with pytest.raises(InputError, match="exists; choose another path or pass overwrite"):
        write_report(path, {"value": 2}, overwrite=False)
    with pytest.raises(RuntimeError, match="half-way"), atomic_file(path, overwrite=True) as fresh:
        fresh.write_text("half")
        raise RuntimeError("half-way")
    write_report(path, json.loads(path.read_text()) | {"more": 2}, overwrite=True)
    assert json.loads(path.read_text()) == {"value": 1, "more": 2}
    path.with_name("link").symlink_to(path)
    for taken in ("link", "."):
        with pytest.raises(InputError, match="is not a regular file"):
            write_report(path.parent / taken, {}, overwrite=True)
    assert sorted(os.listdir(path.parent)) == ["link", "report.json"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        put(tmp_path / "out", 1)
        write_report(tmp_path / "report.json", {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [*tmp_path.rglob("*")]}
    assert modes == {"out": 0o750, MANIFEST: 0o640, "a.json": 0o640, "report.json": 0o640}


def test_removing(tmp_path: Path) -> None:
    put(tmp_path / "out", 1)
    (tmp_path / "link").symlink_to("out")
    remove_directory(tmp_path / "link")
    assert value_of(tmp_path / "out") == 1
    remove_directory(tmp_path / "out")
    remove_directory(tmp_path / "out")
    assert os.listdir(tmp_path) == []
