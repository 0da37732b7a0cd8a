"""Directories as writers make them, and what they leave beside these."""

from __future__ import annotations

import json
from pathlib import Path

from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.beside import Unfinished, unfinished
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.writer import write_json

RANDOM = "0123456789abcdef"  # a possible one of a name


def staging_of(target: Path) -> Path:
    """The directory in which `target` is being built or was left; there must be exactly one."""
    (found,) = (path for path in target.parent.iterdir() if unfinished(path) == Unfinished(target, "partial"))
    return found


def put(target: Path, value: int) -> None:
    with atomic_directory(target, overwrite=True) as staging:
        write_json(staging / MANIFEST, {})
        write_json(staging / "a.json", {"value": value})


def value_of(target: Path) -> int:
    return json.loads((target / "a.json").read_text())["value"]


def thesis_in(tmp_path: Path) -> Path:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter-1").write_text("years")
    return thesis
