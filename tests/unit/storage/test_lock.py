"""Locks between processes: one owner at a time, whatever becomes of it, and without ``flock``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lowrank_dist.errors import InputError
from lowrank_dist.storage.lock import HeldError, Lock, Owner, held, lock_of

ELSEWHERE = Owner(host="node7", pid=1234, started="1", machine="0" * 16, since=1_700_000_000)

# Increments a counter, which is read and written in two steps, inside the lock. Some runs are killed inside.
COUNTER = """
    import fcntl, os, random, signal, sys, time
    from pathlib import Path
    from lowrank_dist.storage.lock import Lock, held

    def refused(*_):
        raise OSError(38, "no locks on this file system")

    fcntl.flock = fcntl.lockf = refused
    directory, dies = Path(sys.argv[1]), sys.argv[2] == "dies"
    for _ in range(1 if dies else 5):
        with held(Lock(directory / "lock", "the counter", beat=0.05), wait=True, announce=print):
            inside = directory / "inside"
            inside.mkdir()  # fails if another process is inside
            value = int((directory / "value").read_text())
            time.sleep(random.uniform(0, 0.01))
            (directory / "value").write_text(str(value + 1))
            inside.rmdir()
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
"""


def _start(program: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, args)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _leave(path: Path, owner: Owner, *, age: float) -> Path:
    """The lock of an owner that touched it `age` seconds ago."""
    path.mkdir()
    file = path / owner.token()
    file.touch()
    moment = file.stat().st_mtime - age
    os.utime(file, (moment, moment))
    return file


def test_of_many_processes_one_at_a_time_is_inside_though_some_are_killed(tmp_path: Path) -> None:
    """Six processes go in five times each, four more are killed with SIGKILL inside; none needs ``flock``."""
    (tmp_path / "value").write_text("0")
    runs = [_start(COUNTER, tmp_path, "dies" if number % 5 < 2 else "lives") for number in range(10)]
    done = [(run.wait(), *run.communicate()) for run in runs]
    assert [code for code, _, _ in done if code not in (0, -signal.SIGKILL)] == [], done
    assert [code for code, _, _ in done].count(0) == 6
    assert (tmp_path / "value").read_text() == str(6 * 5 + 4)
    with held(Lock(tmp_path / "lock", "the counter"), wait=False):  # a killed one may have been the last
        pass
    assert os.listdir(tmp_path) == ["value"]


def test_waiting_says_once_who_holds_the_lock(tmp_path: Path) -> None:
    path, said = lock_of(tmp_path / "out"), list[str]()
    assert path == tmp_path / ".out.lock"
    owner = Lock(path, "out")
    assert owner.attempt() is None
    timer = threading.Timer(1, owner.release)
    timer.start()
    with held(Lock(path, "out", beat=0.1), wait=True, announce=said.append) as waited:
        assert waited
    timer.join()
    assert len(said) == 1
    assert f"process {os.getpid()} on " in said[0]
    assert "waiting" in said[0]
    assert not path.exists()


def test_a_run_that_does_not_wait_is_refused_with_the_owner(tmp_path: Path) -> None:
    with (
        held(Lock(tmp_path / "lock", "the run"), wait=False) as waited,
        pytest.raises(HeldError, match=rf"the run: another run is writing it \(process {os.getpid()} on "),
        held(Lock(tmp_path / "lock", "the run"), wait=False),
    ):
        pass
    assert not waited
    assert not (tmp_path / "lock").exists()


def test_an_owner_on_another_machine_that_gives_signs_of_life_keeps_its_lock(tmp_path: Path) -> None:
    file, stop = _leave(tmp_path / "lock", ELSEWHERE, age=0), threading.Event()

    def lives() -> None:
        while not stop.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=lives)
    thread.start()
    try:
        with pytest.raises(HeldError, match="process 1234 on node7, since 2023-11-14"):
            Lock(tmp_path / "lock", "the run", beat=0.1, stale_after=60).acquire(wait=False)
    finally:
        stop.set()
        thread.join()
    assert os.listdir(tmp_path / "lock") == [file.name]


def test_a_dead_owner_on_another_machine_is_replaced_by_one_taker(tmp_path: Path) -> None:
    """Many takers at once, all of which have seen the dead owner: one wins, and the others see it."""
    _leave(tmp_path / "lock", ELSEWHERE, age=3600)
    locks = [Lock(tmp_path / "lock", "the run", beat=0.02, stale_after=1) for _ in range(8)]
    assert all(lock.attempt() == ELSEWHERE for lock in locks)
    start, results = threading.Barrier(len(locks)), list[Owner | None]()

    def take(lock: Lock) -> None:
        start.wait()
        time.sleep(0.2)
        results.append(lock.attempt())

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(None) == 1
    assert {owner.pid for owner in results if owner is not None} == {os.getpid()}
    for lock in locks:
        lock.release()
    assert not (tmp_path / "lock").exists()


def test_clocks_of_hosts_do_not_count_but_a_dead_process_of_this_machine_does(tmp_path: Path) -> None:
    """The owner's file is young, but its process has ended; and another process has its number now."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = Owner.this_process()
    for number, gone in enumerate(
        [
            Owner(host=here.host, pid=ended.pid, started="5", machine=here.machine, since=here.since),
            Owner(host=here.host, pid=here.pid, started="5", machine=here.machine, since=here.since),
        ]
    ):
        path = tmp_path / f"lock{number}"
        _leave(path, gone, age=0)
        lock = Lock(path, "the run")
        assert lock.attempt() is None
        lock.release()


def test_an_owner_that_lost_its_lock_is_told_and_leaves_the_new_owner_alone(tmp_path: Path) -> None:
    lock, path = Lock(tmp_path / "lock", "the cache"), tmp_path / "lock"
    assert lock.attempt() is None
    lock.check()
    (taken,) = path.iterdir()
    taken.rename(path / ELSEWHERE.token())
    with pytest.raises(HeldError, match="the cache: .* lost its lock .*node7"):
        lock.check()
    lock.release()
    assert [Owner.named(name) for name in os.listdir(path)] == [ELSEWHERE]


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_lock_is_left_alone(tmp_path: Path, kind: str) -> None:
    path, thesis = tmp_path / "lock", tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter").write_text("all of it")
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(thesis)
    else:
        thesis.rename(path)
    with pytest.raises(InputError, match="in the place of a lock"):
        Lock(path, "the cache").attempt()
    assert (path.read_text() if kind == "file" else (path / "chapter").read_text()) in ("mine", "all of it")
