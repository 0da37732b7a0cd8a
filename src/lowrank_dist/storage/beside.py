"""Paths beside a target: where it is built, what it replaces, its lock; and what dead writers left of these.

Names beside a target ``out``, all of them hidden, with 16 random hexadecimal digits:

- ``.out.<random>.partial`` is being built. A dead writer's is removed.
- ``.out.<random>.old`` is whole, and was about to be replaced. It is put back if there is no ``out``.
- ``.out.<random>.removed`` is being removed.
- ``.out.<random>.link`` is a link that is about to become ``out``.
- ``.out.lock`` is the lock (`lowrank_dist.storage.lock`) that is held by the writer of ``out``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_dist.errors import InputError
from lowrank_dist.storage.lock import Lock, held, lock_of, target_of

Kind = Literal["partial", "old", "removed", "link"]

_BESIDE = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.(?P<kind>partial|old|removed|link)", re.DOTALL)


@dataclass(frozen=True)
class Unfinished:
    """What the name of a path beside a target says.

    Attributes
    ----------
    target
        The target.
    kind
        The last part of the name.
    """

    target: Path
    kind: Kind


def unfinished(path: Path) -> Unfinished | None:
    """What the name of `path` says if it is one of those beside a target; else None."""
    match = _BESIDE.fullmatch(path.name)
    kinds: dict[str, Kind] = {"partial": "partial", "old": "old", "removed": "removed", "link": "link"}
    return None if match is None else Unfinished(path.with_name(match["target"]), kinds[match["kind"]])


def sweep(directory: Path) -> None:
    """Remove what killed runs left in `directory`; put back what they were about to replace and have not replaced.

    Only real directories and links of this user are touched, and nothing that another process is writing.
    """
    paths = list(directory.iterdir()) if directory.is_dir() else []
    found = {item.target for item in map(unfinished, paths) if item is not None}
    for target in sorted(found | {target for target in map(target_of, paths) if target is not None}):
        with suppress(InputError, OSError), _if_free(target) as free:
            if not free:
                continue
            restore(target)
            for kind in ("old", "partial", "removed", "link"):
                for left in beside(target, kind):
                    discard(left, target)


def restore_replaced(directory: Path) -> None:
    """Put back directories whose replacement was killed between its two renames. Several processes may call it at once.

    A directory that another process is replacing is left alone.
    """
    found = map(unfinished, directory.iterdir() if directory.is_dir() else ())
    for target in {item.target for item in found if item is not None and item.kind == "old"}:
        if not os.path.lexists(target):
            with suppress(InputError, OSError), _if_free(target) as free:
                if free:
                    restore(target)


def restore(target: Path) -> None:
    """Put back the newest directory that was to be replaced at `target`, if nothing is there."""
    olds = sorted(beside(target, "old"), key=lambda path: path.stat().st_mtime)
    if olds and not os.path.lexists(target):
        os.rename(olds[-1], target)


def beside(target: Path, kind: Kind) -> list[Path]:
    """Paths of one kind beside `target`: real directories, or links, of this user."""
    is_kind = stat.S_ISLNK if kind == "link" else stat.S_ISDIR
    found = []
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if unfinished(path) == Unfinished(target, kind):
            with suppress(OSError):
                status = path.lstat()
                if is_kind(status.st_mode) and status.st_uid == os.geteuid():
                    found.append(path)
    return sorted(found)


def fresh_path(target: Path, kind: Kind) -> Path:
    """A path beside `target` that nobody can predict."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{kind}")


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Lock `target`, which need not exist, against other processes. A lock does not outlive its process.

    Raises
    ------
    InputError
        If another process has the lock; the message names it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with held(Lock(lock_of(target), str(target)), wait=False):
        yield


@contextmanager
def _if_free(target: Path) -> Iterator[bool]:
    """Lock `target` if no other process has the lock; yields whether that is so."""
    lock = Lock(lock_of(target), str(target))
    free = lock.attempt() is None
    try:
        yield free
    finally:
        lock.release()


def discard(old: Path, target: Path) -> None:
    """Remove `old`, which was at `target`; under a name that says so, so that a part of it is never put back."""
    if old.is_symlink():
        old.unlink()
        return
    removed = fresh_path(target, "removed")
    os.rename(old, removed)
    shutil.rmtree(removed, ignore_errors=True)
