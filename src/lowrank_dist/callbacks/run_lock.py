"""One run at a time in a directory of checkpoints."""

from __future__ import annotations

import atexit
from pathlib import Path

from lowrank_dist.errors import InputError, is_passing
from lowrank_dist.storage.lock import HeldError, Lock

#: Name of the lock in the directory.
NAME = ".run.lock"

# locks of this process, and how many callbacks hold each
_held: dict[Path, tuple[Lock, int]] = {}


def hold(directory: Path) -> Path:
    """Make `directory` and keep other runs out of it until `let_go`; callbacks of one process share the lock.

    If it is unknown whether the owner of a lock lives, because it runs or ran on another machine, that is waited for.

    Raises
    ------
    InputError
        If a living run holds it, or nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory.resolve()
        lock, count = _held.get(path, (None, 0))
        if lock is None:
            lock = Lock(path / NAME, str(directory))
            lock.acquire(wait=False)
            atexit.register(lock.release)
    except HeldError as error:
        raise InputError(f"{error}: two runs in one dirpath would remove each other's checkpoints") from error
    except OSError as error:
        if is_passing(error):
            raise
        raise InputError(
            f"dirpath={str(directory)!r}: checkpoints cannot be written there ({error}); choose another"
        ) from error
    _held[path] = lock, count + 1
    return path


def let_go(path: Path) -> None:
    """End what `hold` returned."""
    lock, count = _held.pop(path)
    if count > 1:
        _held[path] = lock, count - 1
        return
    atexit.unregister(lock.release)
    lock.release()
