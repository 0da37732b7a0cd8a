"""What a new directory or file may replace: nothing, what is empty, and with ``overwrite`` what this package wrote."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lowrank_dist.errors import CheckpointError, InputError, is_passing
from lowrank_dist.storage.layout import MANIFEST, read_manifest


def check_target(
    target: str | os.PathLike[str], *, overwrite: bool, kind: str | None = None, inputs: Iterable[Path] = ()
) -> None:
    """Raise InputError unless a directory may be written at `target`.

    It may where nothing is, or an empty directory. With `overwrite` it may also replace a directory with a manifest of
    this package (`is_ours`), and a link to such a directory beside it, if its manifest names the same `kind`. It never
    replaces a file, the working directory, one of the `inputs` that it is made from, or a directory that contains one
    of these.
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
    if not is_replaceable(path, path.parent):
        raise not_ours(path)
    found = _kind_of(path)
    if None not in (kind, found) and found != kind:
        old, new = (_WORDS.get(str(one), str(one)) for one in (found, kind))
        raise InputError(
            f"{path}: holds {old}, which {new} does not replace; remove it yourself, or choose another directory"
        )


#: What manifests say a directory is.
_WORDS = {
    "checkpoint": "a checkpoint of a run",
    "decomposed": "a residual model",
    "lora": "a LoRA",
    "merged": "a merged model",
    "tokens": "tokenized data",
}


def _kind_of(directory: Path) -> str | None:
    """The kind that the manifest of a directory names; None if it names none, or cannot be read."""
    with suppress(CheckpointError):
        return read_manifest(directory).text("kind", None)
    return None


def not_ours(path: Path) -> InputError:
    """The error for a directory without a manifest of this package."""
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


def is_replaceable(path: Path, parent: Path) -> bool:
    """Whether `path`, which stands or stood in `parent`, may be replaced: ours, empty, or a link to ours or nothing."""
    if not path.is_symlink():
        return is_ours(path) or (path.is_dir() and not any(path.iterdir()))
    aim = parent / os.readlink(path)
    return aim.parent.resolve() == parent.resolve() and (is_ours(aim) or not os.path.lexists(aim))


def _is_within(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a file can be written at `path`: nothing is there or, with `overwrite`, a file."""
    if os.path.lexists(path):
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path}: exists and is not a regular file; choose another path")
        if not overwrite:
            raise InputError(f"{path}: exists; choose another path or pass overwrite")
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise InputError unless `path` can be made, whose directories need not exist yet.

    Commands call it before their work, which would be lost. It makes a directory and removes it: permissions do not say
    what file systems refuse.
    """
    place = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=place))
    except OSError as error:
        if is_passing(error):
            raise
        raise InputError(
            f"{path}: nothing can be written in {place} ({error.strerror}); choose another path"
        ) from error
