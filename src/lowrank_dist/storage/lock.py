"""Locks between runs, on any shared file system; nothing depends on ``flock``.

A lock is a directory with one empty file, whose name says who the owner is. Three operations, each atomic on every
POSIX file system and on NFS, make it:

- **Take.** The owner prepares such a directory beside the lock and renames it to the lock. The renaming fails if a
  lock with an owner is there, since a directory that is not empty cannot be replaced.
- **Take over.** The taker renames the file of the dead owner to its own. Of several takers, the first succeeds; for the
  others the file that they found is not there any more. No taker can remove the lock of another taker.
- **Release.** The owner removes its file. A lock without a file is free.

The owner touches its file every `beat` seconds. An owner on this machine is dead once its process is; for any other,
the age of its file counts, measured by the clock of the file system, so that the clocks of hosts need not agree.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import platform
import random
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from lowrank_dist.errors import InputError

log = logging.getLogger(__name__)

BEAT = 10.0
#: Far more than the 60 s for which NFS keeps attributes.
STALE_AFTER = 180.0


class HeldError(InputError):
    """Another run holds a lock, or has taken this run's lock over; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lock.

    Attributes
    ----------
    host, pid
        Where it runs.
    started
        When the process started, as the kernel counts it; tells it from a later process with the same number.
    machine
        Digest of the running kernel and the process namespace, in which alone `pid` means anything.
    since
        When the lock was taken, in seconds since 1970.
    """

    host: str = "an unknown host"
    pid: int = 0
    started: str = ""
    machine: str = ""
    since: int = 0

    @classmethod
    def this_process(cls) -> Owner:
        """The calling process."""
        return cls(
            host=re.sub(r"[^A-Za-z0-9.-]", "-", platform.node())[:100] or "localhost",
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            machine=_machine(),
            since=int(time.time()),
        )

    @classmethod
    def named(cls, token: str) -> Owner:
        """The owner whose file is called `token`; an unknown one if no owner's file has such a name."""
        found = _TOKEN.fullmatch(token)
        if found is None:
            return cls()
        host, pid, started, machine, since = found.groups()
        return cls(host=host, pid=int(pid), started=started, machine=machine, since=int(since))

    def token(self) -> str:
        """Name of a file for this owner, another one at every call."""
        return f"{self.host}_{self.pid}_{self.started}_{self.machine}_{self.since}_{uuid.uuid4().hex}"

    @property
    def is_dead(self) -> bool | None:
        """Whether the process has ended; None if that cannot be known from this machine."""
        if self.machine != _machine():
            return None
        started = _started(self.pid)
        return started is None or started != self.started

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, timezone.utc).isoformat(timespec="seconds")
        return f"process {self.pid} on {self.host}, since {since}"


_TOKEN = re.compile(r"([A-Za-z0-9.-]{1,100})_(\d{1,10})_([a-z0-9]{0,20})_([0-9a-f]{16})_(\d{1,11})_[0-9a-f]{32}")


@dataclass(frozen=True)
class _Seen:
    """The file in a lock: its name and when it was touched last."""

    token: str
    touched: int

    @property
    def owner(self) -> Owner:
        return Owner.named(self.token)


class Lock:
    """A lock that one process at a time holds.

    Parameters
    ----------
    path
        Path of the lock, in a directory that exists.
    what
        What it protects, for messages.
    beat, stale_after
        Seconds between two signs of life, and without one until an owner on another machine counts as dead.

    See Also
    --------
    held : Takes a lock for the length of a ``with`` block.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from lowrank_dist.storage.lock import Lock
    >>> path = Path(tempfile.mkdtemp()) / "lock"
    >>> one, other = Lock(path, "the cache"), Lock(path, "the cache")
    >>> one.attempt() is None, other.attempt() is None
    (True, False)
    >>> one.release()
    >>> other.attempt() is None
    True
    >>> other.release()
    """

    def __init__(self, path: Path, what: str, *, beat: float = BEAT, stale_after: float = STALE_AFTER) -> None:
        if not 0 < 3 * beat <= stale_after:
            raise ValueError(f"stale_after={stale_after}: must be at least three beats of {beat} s")
        self.path, self.what, self.beat, self.stale_after = Path(path), what, beat, stale_after
        self._token: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._suspect: tuple[_Seen, float] | None = None

    def attempt(self) -> Owner | None:
        """Try once to take the lock; return None if this process holds it now, else the owner.

        The lock of a dead owner is taken over. That an owner on another machine is dead takes two attempts, more than
        a beat apart: in between, a living owner would have touched its file, whatever the clock did.
        """
        if self._token is not None:
            raise RuntimeError(f"{self.path}: this object holds the lock already")
        for _ in range(20):  # more only if many processes take and release it at once
            seen, token = self._look(), Owner.this_process().token()
            if seen is not None and not self._is_stale(seen):
                return seen.owner
            if self._take(token) if seen is None else self._take_over(seen, token):
                break
        else:
            return Owner()
        if seen is not None:
            log.warning("%s: the lock of %s, which has died, is taken over", self.what, seen.owner)
        self._token, self._suspect = token, None
        self._stop.clear()
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._thread.start()
        return None

    def acquire(self, *, wait: bool, announce: Callable[[str], object] = log.warning) -> bool:
        """Take the lock, and return whether another process held it meanwhile.

        Parameters
        ----------
        wait
            Wait until the owner releases the lock or has died. If False, wait only as long as it is unknown whether the
            owner lives.
        announce
            Called once with a line that names the owner, before waiting.

        Raises
        ------
        HeldError
            If a living process holds the lock and `wait` is False.
        InputError
            If something else than a lock is at its path.
        """
        first = owner = None
        while (found := self.attempt()) is not None:
            seen = self._look()
            first = first or seen
            alive = found.is_dead is False or (seen is not None and seen != first)
            if not wait and alive:
                raise HeldError(f"{self.held_by(found)}; wait for that run, or choose another directory")
            if owner is None:
                announce(f"{self.held_by(found)}; " + ("waiting for it" if wait else "seeing whether it lives"))
            owner = found
            time.sleep(min(1.0, self.beat) * random.uniform(0.3, 1))
        return owner is not None

    def held_by(self, owner: Owner) -> str:
        """Start of a message: `owner` holds this lock."""
        return f"{self.what}: another run is writing it ({owner})"

    def check(self) -> None:
        """Raise HeldError if this process does not hold the lock any more.

        That happens if the process, or its machine, stood still for longer than `stale_after`.
        """
        if self._token is None or not (self.path / self._token).exists():
            seen = self._look()
            now = "it was removed" if seen is None else f"{seen.owner} has it now"
            raise HeldError(
                f"{self.what}: this run gave no sign of life for {self.stale_after:.0f} s and lost its lock ({now}); "
                "start it again"
            )

    def release(self) -> None:
        """Release the lock; one that was taken over meanwhile stays with its new owner."""
        if self._token is None:
            return
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        with suppress(OSError):
            (self.path / self._token).unlink()
            self.path.rmdir()  # fails if another process has taken it in between
        self._token = self._thread = None

    # -- the three operations -------------------------------------------------------------------------------------

    def _take(self, token: str) -> bool:
        """Rename a prepared directory to the lock; False if another process was first."""
        prepared = self._beside()
        try:
            prepared.chmod(0o777 & ~_umask())
            (prepared / token).touch()
            prepared.rename(self.path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):  # the last: swept by another, below
                raise
            return False
        finally:
            shutil.rmtree(prepared, ignore_errors=True)
        for left in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.new"):
            with suppress(OSError):
                if all(Owner.named(name).is_dead for name in os.listdir(left)):
                    # never the file of a living process, which may rename the directory to the lock at any moment
                    shutil.rmtree(left)
        return True

    def _take_over(self, seen: _Seen, token: str) -> bool:
        """Rename the dead owner's file to `token`; False if another process was first."""
        mine = self.path / token
        try:
            with suppress(FileNotFoundError):  # also if NFS repeats a request that has succeeded
                (self.path / seen.token).rename(mine)
            os.utime(mine)
        except FileNotFoundError:
            return False
        return True

    def _beside(self) -> Path:
        """A new directory beside the lock."""
        return Path(tempfile.mkdtemp(prefix=f"{self.path.name}.", suffix=".new", dir=self.path.parent))

    # -- looking --------------------------------------------------------------------------------------------------

    def _look(self) -> _Seen | None:
        """The owner's file, or None if the lock is free.

        Raises
        ------
        InputError
            If something else is in its place: nothing in there is renamed or removed.
        """
        while True:
            try:
                if self.path.is_symlink():
                    raise InputError(f"{self.path}: is a link in the place of a lock; remove it")
                tokens = os.listdir(self.path)
            except FileNotFoundError:
                return None
            except NotADirectoryError:
                tokens = [""]
            if not tokens:
                return None
            if not all(map(_TOKEN.fullmatch, tokens)):
                raise InputError(f"{self.path}: is in the place of a lock, but holds other files; move it away")
            with suppress(FileNotFoundError):  # it has changed hands in between
                return _Seen(tokens[0], os.lstat(self.path / tokens[0]).st_mtime_ns)

    def _is_stale(self, seen: _Seen) -> bool:
        dead = seen.owner.is_dead
        if dead is not None:
            return dead
        now = time.monotonic()
        if self._age(seen) < self.stale_after:
            self._suspect = None
        elif self._suspect is None or self._suspect[0] != seen:
            self._suspect = seen, now
        else:
            return now - self._suspect[1] > 1.5 * self.beat
        return False

    def _age(self, seen: _Seen) -> float:
        """Seconds since the owner touched its file, by the clock of the file system."""
        probe = self._beside()
        try:
            return (probe.stat().st_mtime_ns - seen.touched) / 1e9
        except FileNotFoundError:  # swept by an owner, who therefore lives
            return 0.0
        finally:
            shutil.rmtree(probe, ignore_errors=True)

    def _touch(self) -> None:
        while not self._stop.wait(self.beat):
            with suppress(OSError):  # a passing error of the file system; `check` finds a lasting one
                os.utime(self.path / str(self._token))


@contextmanager
def held(lock: Lock, *, wait: bool, announce: Callable[[str], object] = log.warning) -> Iterator[bool]:
    """Hold `lock` inside; yields whether another process held it meanwhile. See `Lock.acquire`."""
    waited = lock.acquire(wait=wait, announce=announce)
    try:
        yield waited
    finally:
        lock.release()


def lock_of(target: Path) -> Path:
    """The lock beside `target` for those who write it."""
    return target.with_name(f".{target.name}.lock")


def target_of(path: Path) -> Path | None:
    """The target whose lock `path` is, if a process holds it or died with it; else None."""
    match = re.fullmatch(r"\.(.+)\.lock", path.name, re.DOTALL)
    if match is None or path.is_symlink() or not path.is_dir():
        return None
    tokens = os.listdir(path)
    return path.with_name(match[1]) if tokens and all(map(_TOKEN.fullmatch, tokens)) else None


def _started(pid: int) -> str | None:
    """When a process of this machine started; None if it has ended. Without /proc: whether it exists."""
    if not os.path.isdir("/proc/self"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return "unknown"
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *values = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]


def _machine() -> str:
    """Digest of the running kernel and the process namespace; of the host's name where these are unknown."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
