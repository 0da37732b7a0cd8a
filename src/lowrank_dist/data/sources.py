"""From what a user names to the files and data sets that are read: files, patterns, directories, hub ids."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lowrank_dist.data.records import BadRecord, Records, kind_of, read_file, read_hub, read_saved
from lowrank_dist.errors import InputError

#: Files of a directory written by ``save_to_disk``, of one split and of several.
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where records come from, in order.

    Attributes
    ----------
    role
        What they are for, as the option is called that named them.
    names
        Paths of files and of directories, patterns with ``*``, and ids of Hugging Face data sets.
    split
        Split of the data sets, which may have a slice: ``train[:10%]``. Files have none.
    subset
        Subset (configuration) of the Hugging Face data sets.
    """

    role: str
    names: str | Sequence[str]
    split: str = "train"
    subset: str | None = None

    def __str__(self) -> str:
        return f"{self.role}={(self.names if isinstance(self.names, str) else list(self.names))!r}"

    @property
    def hub_ids(self) -> list[str]:
        """Names that denote data sets of the hub."""
        return [name for name in self._listed if _is_hub_id(name)]

    @property
    def _listed(self) -> list[str]:
        return [self.names] if isinstance(self.names, str) else list(self.names)

    def records(self, bad: BadRecord | None = None) -> Records:
        """All records, one after the other; what cannot be read is found at once if it is a name.

        Raises
        ------
        InputError
            If a name denotes nothing, or what it denotes cannot be read.
        """
        if not self._listed:
            raise InputError(f"{self}: an empty list; name at least one file")
        return chain.from_iterable([self._open(name, bad) for name in self._listed])

    def _open(self, name: str, bad: BadRecord | None) -> Records:
        path = Path(name).expanduser()
        if _is_pattern(name) and not path.exists():
            files = sorted(glob.glob(str(path), recursive=True))
            files = [file for file in files if Path(file).is_file()]
            if not files:
                raise InputError(f"{self.role}={name!r}: no file matches the pattern")
            return chain.from_iterable(read_file(Path(file), bad) for file in files)
        if path.is_dir():
            if any((path / file).is_file() for file in _SAVED):
                return read_saved(path, self.split)
            files = sorted(str(file) for file in path.rglob("*") if file.is_file() and kind_of(file.name))
            if not files:
                raise InputError(
                    f"{self.role}={name!r}: the directory holds no data (.jsonl, .json, .csv, .parquet or .arrow files)"
                )
            return chain.from_iterable(read_file(Path(file), bad) for file in files)
        if _is_hub_id(name):
            return read_hub(name, self.subset, self.split)
        if not path.is_file():
            raise InputError(
                f"{self.role}={name!r} does not exist; give the path of a .jsonl file, or the id of a Hugging Face "
                "data set"
            )
        return read_file(path, bad)


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _is_hub_id(name: str) -> bool:
    """Whether `name` denotes a data set of the hub rather than files."""
    return not (kind_of(name) or _is_pattern(name) or Path(name).expanduser().exists())
