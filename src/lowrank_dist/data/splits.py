"""Splits of data sets: those that names of files carry, and slices of them, such as ``train[:10%]``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lowrank_dist.errors import InputError

WHOLE = "train"
"""The split that files without one in their names are, as in `datasets`."""

#: Words in names of files by the split that they stand for, as `datasets` reads them.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b")


def split_of(file: Path) -> str | None:
    """The split that the path of a file in a data set carries; None for none, or several.

    ``test/a.jsonl``, ``math_test.jsonl`` and ``test-00000-of-00001.parquet`` are of the split `test`,
    ``test_sft-00000-of-00001.parquet`` is of the split `test_sft`.
    """
    shard = _SHARD.match(file.name)
    for part in file.parts:
        found = {_WORDS[word] for word in re.split(r"[-._ 0-9]+", part) if word in _WORDS}
        if found:
            if shard and part == file.name and shard[1] not in _WORDS:
                return shard[1]
            return found.pop() if len(found) == 1 else None
    return None


def names_of(split: str) -> list[str]:
    """The splits in what a user names: ``["train", "test"]`` of ``train[:10%]+test``."""
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def check_split(split: str, known: Mapping[str, object], where: str) -> None:
    """InputError if what a user names has a split that is not among those of a data set."""
    for name in names_of(split):
        if name not in known:
            asked = repr(name) if name == split else f"{name!r}, which {split!r} asks for"
            raise InputError(f"{where} has no split {asked}; valid choices: {', '.join(known)}")


def slices(split: str, sizes: Mapping[str, int], where: str) -> list[tuple[str, int, int]]:
    """Splits with the first record of each that is read, and the one after the last.

    Parameters
    ----------
    split
        What a user names, in the words of ``datasets.ReadInstruction``.
    sizes
        Number of records by split.
    where
        The data set, for a message.

    Raises
    ------
    ImportError
        If the `datasets` library is missing.
    InputError
        If a split is not known, or a slice is not understood.
    """
    check_split(split, sizes, where)
    try:
        from datasets import ReadInstruction
    except ImportError as error:
        raise ImportError(
            f"{where}: the slice {split!r} needs the `datasets` library: `pip install lowrank-dist[datasets]`, or name "
            "files that hold what is wanted"
        ) from error
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    except ValueError as error:
        raise InputError(f"{where}: the split {split!r} is not understood: {error}") from error
    return [(part.splitname, part.from_, part.to) for part in parts]
