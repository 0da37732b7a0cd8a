"""Directories, and files, that are complete or absent: built beside their target, flushed, then renamed to it.

One rule says what a new directory may replace (`check_target`). Every command and every function that writes a
directory follows it, because all of them write through `atomic_directory`.

Names beside a target ``out``, all of them hidden, with 16 random hexadecimal digits:

- ``.out.<random>.partial`` is being built. A dead writer's is removed.
- ``.out.<random>.old`` is whole, and was about to be replaced. It is put back if there is no ``out``.
- ``.out.<random>.removed`` is being removed.
- ``.out.<random>.link`` is a link that is about to become ``out``.
- ``.out.lock`` is the lock (`lowrank_dist.storage.lock`) that is held by the writer of ``out``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_dist.errors import InputError, is_passing, naming
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.lock import Lock, held, lock_of, target_of

Kind = Literal["partial", "old", "removed", "link"]

_BESIDE = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.(?P<kind>partial|old|removed|link)", re.DOTALL)


# -- the rule ---------------------------------------------------------------------------------------------------------


def check_target(target: str | os.PathLike[str], *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise InputError unless a directory may be written at `target`.

    It may where nothing is, or an empty directory. With `overwrite` it may also replace a directory with a manifest of
    this package (`is_ours`), and a link to such a directory beside it. It never replaces a file, the working directory,
    one of the `inputs` that it is made from, or a directory that contains one of these.
    """
    path = Path(target)
    for source in inputs:
        if _is_within(source, path):
            raise InputError(f"{path}: is or contains what it would be made from ({source}); choose another directory")
    if path.name in ("", "..") or _is_within(Path.cwd(), path):
        raise InputError(f"{os.fspath(target)!r} is or contains the working directory; choose a directory of its own")
    if not os.path.lexists(path):
        return
    if not path.is_symlink() and not path.is_dir():
        raise InputError(f"{path}: exists and is not a directory; choose another path")
    if not path.is_symlink() and not any(path.iterdir()):
        return
    if not overwrite:
        what = "a link" if path.is_symlink() else "not empty"
        raise InputError(f"{path}: exists and is {what}; choose another directory or pass overwrite")
    if not _is_replaceable(path, path.parent):
        raise _not_ours(path)


def _not_ours(path: Path) -> InputError:
    return InputError(
        f"{path}: exists, and holds no {MANIFEST}, so that it was not written by lowrank_dist and is not replaced; "
        "remove it yourself, or choose another directory"
    )


def is_ours(directory: Path) -> bool:
    """Whether `directory` is a real directory, not a link to one, with a manifest of this package."""
    with suppress(OSError):
        found = stat.S_ISDIR(directory.lstat().st_mode)
        return found and stat.S_ISREG((directory / MANIFEST).lstat().st_mode)
    return False


def _is_replaceable(path: Path, parent: Path) -> bool:
    """Whether `path`, which stands or stood in `parent`, may be replaced: ours, empty, or a link to ours or nothing."""
    if not path.is_symlink():
        return is_ours(path) or (path.is_dir() and not any(path.iterdir()))
    aim = parent / os.readlink(path)
    return aim.parent.resolve() == parent.resolve() and (is_ours(aim) or not os.path.lexists(aim))


def _is_within(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_directory(
    target: str | os.PathLike[str], *, overwrite: bool = False, resumes: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield a directory to fill beside `target`; flush it and rename it to `target` at the end.

    A reader never sees part of the directory. On any error it is removed, and `target` stays as it was.

    Parameters
    ----------
    target
        The directory to write. `check_target` says what it may replace, at the beginning and at the end.
    overwrite
        Whether it may replace a directory that this package wrote.
    resumes
        Tells whether a directory that a dead writer of `target` left can be filled further. Such a directory is
        yielded again, and is kept on errors.

    Raises
    ------
    InputError
        If `target` may not be written, or another process is writing it.
    """
    target = Path(target)
    check_target(target, overwrite=overwrite)
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
            put_in_place(staging, target, overwrite=overwrite)
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
    fresh = _fresh(path, "partial")
    fresh.touch(exist_ok=False)
    try:
        with naming(fresh):
            yield fresh
        _fsync(fresh)
        check_file(path, overwrite=overwrite)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def check_writable(directory: Path, option: str) -> None:
    """Make `directory` and see that files can be made in it.

    Raises
    ------
    InputError
        If not; the message names `option`. Errors that may pass are raised as they are.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = _fresh(directory / "probe", "partial")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        if is_passing(error):
            raise
        raise InputError(
            f"{option}={str(directory)!r}: nothing can be written there ({error}); choose another directory"
        ) from error


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a file may be written at `path`: nothing is there or, with `overwrite`, a file."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path}: exists and is not a regular file; choose another path")
    if not overwrite:
        raise InputError(f"{path}: exists; choose another path or pass overwrite")


def staging_directory(target: Path, *, resumes: Callable[[Path], bool] | None = None) -> Path:
    """A directory beside `target` to build it in: one that `resumes` takes, or a new one. The others are removed.

    The caller holds the lock of `target`. The name of a new directory cannot be predicted, and nothing can be in its
    place. A directory that was about to be replaced at `target` is put back.
    """
    _restore(target)
    staging = None
    for left in _beside(target, "partial"):
        if staging is None and resumes is not None and resumes(left):
            staging = left
        else:
            shutil.rmtree(left, ignore_errors=True)
    if staging is None:
        staging = _fresh(target, "partial")
        staging.mkdir()
    return staging


def put_in_place(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Rename the flushed directory `staging` to `target`, and replace what `check_target` lets it replace.

    If the file system can exchange two directories (most local ones on Linux can), `target` exists at every instant.
    If the last rename fails, what was at `target` is there again.
    """
    check_target(target, overwrite=overwrite)
    old = None
    try:
        os.rename(staging, target)  # also onto an empty directory, but onto nothing else
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        old = _replace(staging, target)
    _fsync(target.parent)
    if old is not None:
        _discard(old, target)


def _replace(staging: Path, target: Path) -> Path:
    """Put `staging` in the place of `target`, which exists; return the path that the old one has now."""
    if exchange(staging, target):
        if not _is_replaceable(staging, target.parent):  # it has appeared since `check_target`
            exchange(staging, target)
            raise _not_ours(target)
        return staging
    old = _fresh(target, "old")
    os.rename(target, old)
    try:
        if _is_replaceable(old, target.parent):
            os.rename(staging, target)
            return old
    except OSError as error:
        _put_back(old, target, error)
        raise
    _put_back(old, target, None)
    raise _not_ours(target)


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
    fresh = _fresh(link, "link")
    os.symlink(os.path.relpath(directory, link.parent), fresh)
    try:
        if link.is_symlink() or not os.path.lexists(link):
            fresh.replace(link)
        else:
            check_target(link, overwrite=True)
            _discard(_replace(fresh, link), link)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _fsync(link.parent)


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
        _discard(directory, directory)


def _discard(old: Path, target: Path) -> None:
    """Remove `old`, which was at `target`; under a name that says so, so that a part of it is never put back."""
    if old.is_symlink():
        old.unlink()
        return
    removed = _fresh(target, "removed")
    os.rename(old, removed)
    shutil.rmtree(removed, ignore_errors=True)


# -- what dead writers left -------------------------------------------------------------------------------------------


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
            _restore(target)
            for kind in ("old", "partial", "removed", "link"):
                for left in _beside(target, kind):
                    _discard(left, target)


def restore_replaced(directory: Path) -> None:
    """Put back directories whose replacement was killed between its two renames. Several processes may call it at once.

    A directory that another process is replacing is left alone.
    """
    found = map(unfinished, directory.iterdir() if directory.is_dir() else ())
    for target in {item.target for item in found if item is not None and item.kind == "old"}:
        if not os.path.lexists(target):
            with suppress(InputError, OSError), _if_free(target) as free:
                if free:
                    _restore(target)


def _restore(target: Path) -> None:
    """Put back the newest directory that was to be replaced at `target`, if nothing is there."""
    olds = sorted(_beside(target, "old"), key=lambda path: path.stat().st_mtime)
    if olds and not os.path.lexists(target):
        os.rename(olds[-1], target)


def _beside(target: Path, kind: Kind) -> list[Path]:
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


def _fresh(target: Path, kind: Kind) -> Path:
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


# -- the disk ---------------------------------------------------------------------------------------------------------


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
            _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
