"""Models in a cache of the Hugging Face hub, as `snapshot_download` leaves them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def commit(digit: str) -> str:
    """The commit of a revision, all of one digit."""
    return 40 * digit


def save_in_cache(cache: Path, name: str, revisions: Mapping[str, tuple[str, Path]]) -> Path:
    """Put the directories of `revisions` (commit and directory by branch or tag) into `cache` as the model `name`.

    Files are in ``blobs`` and snapshots hold links to them, as on the disk of a user.
    """
    root = cache / f"models--{name.replace('/', '--')}"
    for folder in ("refs", "blobs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for reference, (revision, directory) in revisions.items():
        (root / "refs" / reference).write_text(revision)
        snapshot = root / "snapshots" / revision
        for file in filter(Path.is_file, sorted(directory.rglob("*"))):
            blob = root / "blobs" / f"{revision[:8]}{len(os.listdir(root / 'blobs')):032x}"
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(directory)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return root
