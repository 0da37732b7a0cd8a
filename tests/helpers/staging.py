"""What writers leave beside a directory that they build."""

from __future__ import annotations

from pathlib import Path

from lowrank_dist.storage.atomic import Unfinished, unfinished

RANDOM = "0123456789abcdef"  # a possible one of a name


def staging_of(target: Path) -> Path:
    """The directory in which `target` is being built or was left; there must be exactly one."""
    (found,) = (path for path in target.parent.iterdir() if unfinished(path) == Unfinished(target, "partial"))
    return found
