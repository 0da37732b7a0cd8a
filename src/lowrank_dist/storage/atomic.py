"""Directories, and files, that are complete or absent: built beside their target, flushed, then renamed to it.

One rule says what a new directory may replace (`lowrank_dist.storage.replacing.check_target`). Every command and every
function that writes a directory follows it, because all of them write through `atomic_directory`. The names of what is
beside a target meanwhile are those of `lowrank_dist.storage.beside`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_dist.errors import InputError, naming
from lowrank_dist.storage.beside import beside, discard, exclusive, fresh_path, restore
from lowrank_dist.storage.disk import flush_directory, fsync
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.replacing import check_file, check_target, is_ours, is_replaceable, not_ours


@contextmanager
def atomic_directory(
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    kind: str | None = None,
    resumes: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield a directory to fill beside `target`; flush it and rename it to `target` at the end.

    A reader never sees part of the directory. On any error it is removed, and `target` stays as it was.

    Parameters
    ----------
    target
        The directory to write. `check_target` says what it may replace, at the beginning and at the end.
    overwrite
        Whether it may replace a directory that this package wrote.
    kind
        The kind of directory, as its manifest names it: it replaces no other one.
    resumes
        Tells whether a directory that a dead writer of `target` left can be filled further. Such a directory is
        yielded again, and is kept on errors.

    Raises
    ------
    InputError
        If `target` may not be written, or another process is writing it.
    """
    target = Path(target)
    check_target(target, overwrite=overwrite, kind=kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(target):
        staging = staging_directory(target, resumes=resumes)
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with naming(staging):
                yield staging
            flush_directory(staging)
            if not os.path.samestat(os.fstat(descriptor), staging.lstat()):
                raise InputError(f"{staging}: another process put something else in its place; {target} is unchanged")
            put_in_place(staging, target, overwrite=overwrite, kind=kind)
        except BaseException:
            if resumes is None:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)


@contextmanager
def atomic_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new, empty file to write beside `path`; flush it and rename it to `path` at the end, remove it on errors.

    Raises
    ------
    InputError
        See `check_file`.
    """
    check_file(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = fresh_path(path, "partial")
    fresh.touch(exist_ok=False)
    try:
        with naming(fresh):
            yield fresh
        fsync(fresh)
        check_file(path, overwrite=overwrite)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def staging_directory(target: Path, *, resumes: Callable[[Path], bool] | None = None) -> Path:
    """A directory beside `target` to build it in: one that `resumes` takes, or a new one. The others are removed.

    The caller holds the lock of `target`. The name of a new directory cannot be predicted, and nothing can be in its
    place. A directory that was about to be replaced at `target` is put back.
    """
    restore(target)
    staging = None
    for left in beside(target, "partial"):
        if staging is None and resumes is not None and resumes(left):
            staging = left
        else:
            shutil.rmtree(left, ignore_errors=True)
    if staging is None:
        staging = fresh_path(target, "partial")
        staging.mkdir()
    return staging


def put_in_place(staging: Path, target: Path, *, overwrite: bool, kind: str | None = None) -> None:
    """Rename the flushed directory `staging` to `target`, and replace what `check_target` lets it replace.

    If the file system can exchange two directories (most local ones on Linux can), `target` exists at every instant.
    If the last rename fails, what was at `target` is there again.
    """
    check_target(target, overwrite=overwrite, kind=kind)
    old = None
    try:
        os.rename(staging, target)  # also onto an empty directory, but onto nothing else
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        old = _replace(staging, target)
    fsync(target.parent)
    if old is not None:
        discard(old, target)


def _replace(staging: Path, target: Path) -> Path:
    """Put `staging` in the place of `target`, which exists; return the path that the old one has now."""
    if exchange(staging, target):
        if not is_replaceable(staging, target.parent):  # it has appeared since `check_target`
            exchange(staging, target)
            raise not_ours(target)
        return staging
    old = fresh_path(target, "old")
    os.rename(target, old)
    try:
        if is_replaceable(old, target.parent):
            os.rename(staging, target)
            return old
    except OSError as error:
        _put_back(old, target, error)
        raise
    _put_back(old, target, None)
    raise not_ours(target)


def _put_back(old: Path, target: Path, error: OSError | None) -> None:
    try:
        os.rename(old, target)
    except OSError as second:
        raise OSError(
            second.errno, f"could not be renamed back to {target} ({second.strerror}); it is whole", os.fspath(old)
        ) from error


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically; return False if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def put_link(link: Path, directory: Path) -> None:
    """Make `link` a relative symbolic link to `directory`. It replaces a link, or a directory of this package.

    A link is replaced atomically. A directory is first renamed.
    """
    fresh = fresh_path(link, "link")
    os.symlink(os.path.relpath(directory, link.parent), fresh)
    try:
        if link.is_symlink() or not os.path.lexists(link):
            fresh.replace(link)
        else:
            check_target(link, overwrite=True)
            discard(_replace(fresh, link), link)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    fsync(link.parent)


def remove_directory(directory: Path) -> None:
    """Remove a directory of this package, or a link; a reader sees all of it or none of it.

    Raises
    ------
    InputError
        If the directory holds no manifest (`is_ours`).
    """
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        if not is_ours(directory):
            raise InputError(
                f"{directory}: holds no {MANIFEST}, so that it was not written by lowrank_dist and is not removed"
            )
        discard(directory, directory)
