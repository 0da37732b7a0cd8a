"""From what a user names to the files and data sets that are read: files, patterns, directories, hub ids."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lowrank_dist.data.records import (
    BadRecord,
    Records,
    file_digest,
    hub_identity,
    kind_of,
    read_file,
    read_hub,
    read_saved,
)
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
    streaming
        Read the data sets of the hub as they come, without keeping them on the disk.
    """

    role: str
    names: str | Sequence[str]
    split: str = "train"
    subset: str | None = None
    streaming: bool = False

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
        return chain.from_iterable(self._open(part, bad) for part in self._parts())

    def digests(self) -> Iterator[str]:
        """Digests of all that `records` reads, in order."""
        for part in self._parts():
            if isinstance(part, str):
                yield f"{part} {self.subset} {self.split} {hub_identity(part, self.subset, self.split)}"
            elif part.is_dir():
                yield self.split
                yield from (file_digest(file) for file in sorted(part.rglob("*")) if file.is_file())
            else:
                yield f"{kind_of(part.name)} {file_digest(part)}"

    def _open(self, part: Path | str, bad: BadRecord | None) -> Records:
        if isinstance(part, str):
            return read_hub(part, self.subset, self.split, streaming=self.streaming)
        return read_saved(part, self.split) if part.is_dir() else read_file(part, bad)

    def _parts(self) -> list[Path | str]:
        """Files, directories written by ``save_to_disk``, and hub ids (str), in order."""
        if not self._listed:
            raise InputError(f"{self}: an empty list; name at least one file")
        return [part for name in self._listed for part in self._parts_of(name)]

    def _parts_of(self, name: str) -> Sequence[Path | str]:
        path = Path(name).expanduser()
        if _is_pattern(name) and not path.exists():
            files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
            if not files:
                raise InputError(f"{self.role}={name!r}: no file matches the pattern")
            return files
        if path.is_dir():
            if any((path / file).is_file() for file in _SAVED):
                return [path]
            files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file.name))
            if not files:
                raise InputError(
                    f"{self.role}={name!r}: the directory holds no data (.jsonl, .json, .csv, .parquet or .arrow files)"
                )
            return files
        if _is_hub_id(name):
            return [name]
        if not path.is_file():
            raise InputError(
                f"{self.role}={name!r} does not exist; give the path of a .jsonl file, or the id of a Hugging Face "
                "data set"
            )
        return [path]


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _is_hub_id(name: str) -> bool:
    """Whether `name` denotes a data set of the hub rather than files."""
    return not (kind_of(name) or _is_pattern(name) or Path(name).expanduser().exists())
