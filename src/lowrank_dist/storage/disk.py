"""Directories on a disk: room in them, permission to write, who else may, and their way to the disk."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from lowrank_dist.errors import InputError, is_passing


def check_free(target: Path, nbytes: int) -> None:
    """Raise InputError if the disk of `target` has fewer than `nbytes` free; `target` need not exist yet."""
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise InputError(
            f"{target}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free there; make room or choose "
            "another disk"
        )


def flush_directory(directory: Path) -> None:
    """Flush `directory` and everything below it to disk."""
    for path in sorted(directory.rglob("*")):
        if not path.is_symlink():
            fsync(path)
    fsync(directory)


def fsync(path: Path) -> None:
    """Flush one file, or the entries of one directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(directory: Path, option: str) -> None:
    """Make `directory` and see that files can be made in it.

    Raises
    ------
    InputError
        If not; the message names `option`. Errors that may pass are raised as they are.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=directory))
    except OSError as error:
        if is_passing(error):
            raise
        raise InputError(
            f"{option}={str(directory)!r}: nothing can be written there ({error}); choose another directory"
        ) from error


def private_directory(directory: Path, *, uses_contents: bool) -> None:
    """Make `directory`, or take one that is there and close it to other users.

    Parameters
    ----------
    directory
        Directory for what is executed or unpickled, or is secret. Its parent exists.
    uses_contents
        Whether files that are there already will be used. Then one that others could write to until now is refused.

    Raises
    ------
    InputError
        If it is a link or no directory, belongs to another user, or may hold what others have put there.
    """
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise InputError(f"{directory}: is a link, no directory, or of another user; remove it")
    if uses_contents and status.st_mode & 0o022 and any(directory.iterdir()):
        raise InputError(f"{directory}: other users can write to it, and it is not empty; remove it")
    directory.chmod(0o700)
