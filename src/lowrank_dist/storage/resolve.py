"""Where a model is on this machine, by what the user calls it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lowrank_dist.errors import CheckpointError, InputError, is_passing
from lowrank_dist.storage.find_weights import cached_snapshot, is_cache_of_model
from lowrank_dist.storage.small_files import SMALL_FILES

#: Files of a model on the hub that are fetched.
_FETCHED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *SMALL_FILES]


def resolve_checkpoint(
    pretrained: str | os.PathLike[str], *, revision: str | None = None, option: str = "pretrained", fetch: bool = True
) -> Path:
    """Return the local directory of a model: `pretrained` itself, or the hub's cache after fetching missing files.

    If several ranks share a host, call it on one rank first; the others then find the cache complete.

    Parameters
    ----------
    pretrained
        A directory or a hub id.
    revision
        Revision of a hub id.
    option
        Name of the option that `pretrained` comes from, for messages.
    fetch
        Whether to fetch missing files; else only the cache is used.

    Returns
    -------
    Path
        The directory. A safetensors or GGUF file is returned as it is, a directory ``models--owner--name`` of the hub's
        cache becomes that of its snapshot.

    Raises
    ------
    CheckpointError
        If `pretrained` is not a directory and cannot be fetched.
    InputError
        If a `revision` of something else than a hub id is asked for.

    See Also
    --------
    CheckpointReader : Reads the weights in it.

    Examples
    --------
    >>> import tempfile
    >>> from lowrank_dist.storage import resolve_checkpoint
    >>> resolve_checkpoint(tempfile.gettempdir()).is_dir()
    True
    """
    path = Path(pretrained)
    if path.is_dir() and is_cache_of_model(path):
        return cached_snapshot(path, revision)
    if path.is_dir() or (path.suffix in (".gguf", ".safetensors") and path.is_file()):
        if revision not in (None, commit_of(path)):
            what = "directory" if path.is_dir() else "file"
            raise InputError(
                f"{option}={str(pretrained)!r} is a {what}, which has no revisions such as {revision!r}; leave the "
                "revision out, or pass a hub id"
            )
        return path
    if not is_hub_id(pretrained):
        raise CheckpointError(f"{option}={str(pretrained)!r}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            str(pretrained), revision=revision, allow_patterns=_FETCHED, local_files_only=not fetch
        )
        return Path(found)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if is_passing(error):
            raise
        raise CheckpointError(
            f"{option}={str(pretrained)!r}: neither a directory nor a model the hub or its cache could give "
            f"({type(error).__name__}: {error}); pass a local directory, or fetch it first with `hf download`"
        ) from error


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether `name` can only be a model's id on the hub: it is no path that exists, and does not look like one."""
    text = os.fspath(name)
    looks_local = Path(text).is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    return not looks_local and not Path(text).exists()


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or the only one in the directory without safetensors that it is; None if neither.

    Raises
    ------
    CheckpointError
        If the directory holds several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: holds {len(found)} GGUF files ({names}); pass one of them, {found[0]} say")
    return found[0] if found else None


def commit_of(directory: Path) -> str | None:
    """The commit of a snapshot in the hub's cache; None for any other directory."""
    is_snapshot = directory.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", directory.name)
    return directory.name if is_snapshot else None
