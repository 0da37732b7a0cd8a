"""Directories that are complete or absent: built beside their target, flushed, then renamed to it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowrank_dist.errors import InputError


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a directory to fill beside `target`; flush it and rename it to `target` at the end, remove it on any error.

    An existing `target` is replaced, see `put_in_place`. A reader never sees part of the directory.

    Raises
    ------
    InputError
        If another process is building the same directory.
    """
    target = Path(target)
    staging = staging_of(target)
    with exclusive(staging):
        empty(staging)
        try:
            yield staging
            flush_directory(staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        put_in_place(staging, target)


def empty(directory: Path) -> None:
    """Remove everything in `directory`."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_free(target: Path, nbytes: int) -> None:
    """Raise InputError if the disk of `target` has fewer than `nbytes` free; `target` need not exist yet."""
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise InputError(
            f"{target}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free there; make room or choose "
            "another disk"
        )


def put_in_place(staging: Path, target: Path) -> None:
    """Rename the flushed directory `staging` to `target`, and replace an existing one.

    If the file system can exchange two directories (most local ones on Linux can), `target` exists at every instant.
    """
    old = staging
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        staging.rename(target)
    elif not exchange(staging, target):
        old = replaced_of(target)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        staging.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically; return False if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def remove_directory(directory: Path) -> None:
    """Remove a directory; a reader sees all of it or none of it."""
    old = replaced_of(directory)
    shutil.rmtree(old, ignore_errors=True)
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        directory.rename(old)
        shutil.rmtree(old)


def sweep(directory: Path) -> None:
    """Remove directories that killed runs left unfinished, replaced or partly removed in `directory`.

    A directory that another process is writing is left alone.
    """
    restore_replaced(directory)
    for old in directory.glob(".*.old"):
        shutil.rmtree(old, ignore_errors=True)
    for link in directory.glob(".*.link"):
        link.unlink(missing_ok=True)
    for staging in directory.glob(".*.partial"):
        with suppress(InputError), exclusive(staging):
            shutil.rmtree(staging, ignore_errors=True)


def restore_replaced(directory: Path) -> None:
    """Put back directories whose replacement was killed between its two renames. Several processes may call it at once.

    A directory that another process is replacing is left alone.
    """
    for old in directory.glob(".*.old"):
        target = directory / old.name[1 : -len(".old")]
        if target.exists() or not staging_of(target).exists():
            continue
        with suppress(InputError, OSError), exclusive(staging_of(target)):
            if any(old.iterdir()):
                old.rename(target)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Make `directory` and lock it against other processes; the lock ends with its process.

    Raises
    ------
    InputError
        If another process has the lock. File systems without locks exclude nobody.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"{directory}: another run is writing it; wait for that run, or choose another directory"
                ) from None
            except OSError:
                pass  # a file system without locks
            if directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat()):
                yield
                return
        finally:
            os.close(descriptor)
        # the former owner has renamed it meanwhile: the lock is not on `directory` any more


def replaced_of(target: Path) -> Path:
    """Path that keeps `target` while it is replaced or removed."""
    return target.with_name(f".{target.name}.old")


def staging_of(target: Path) -> Path:
    """The directory in which `target` is built."""
    return target.with_name(f".{target.name}.partial")


def flush_directory(directory: Path) -> None:
    """Flush `directory` and everything below it to disk."""
    for path in sorted(directory.rglob("*")):
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
