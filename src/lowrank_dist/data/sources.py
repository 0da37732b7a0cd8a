"""From what a user names to the files and data sets that are read: files, patterns, directories, hub ids."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from lowrank_dist.data.records import (
    BadRecord,
    Records,
    count_of,
    file_digest,
    hub_identity,
    kind_of,
    read_file,
    read_hub,
    read_saved,
    sliced,
)
from lowrank_dist.data.splits import WHOLE, check_split, names_of, slices, split_of
from lowrank_dist.errors import InputError

#: Files of a directory written by ``save_to_disk``, of one split and of several.
_SAVED = ("state.json", "dataset_dict.json")

#: Files of a data set of the hub that describe it.
_NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json")

_Files = dict[str, list[Path]]
"""Files by split."""

_Part = _Files | Path | str
"""What a name denotes: files, a directory written by ``save_to_disk``, or the id of a data set of the hub."""


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
        Split of the data sets, which may have a slice: ``train[:10%]``. Every name is sliced for itself. Files of a
        directory have the splits in their names; other files are the split ``train``, which may be called by the role.
    subset
        Subset (configuration) of the Hugging Face data sets; of a directory, the directory of this name in it.
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
            If a name denotes nothing, has no such split, or what it denotes cannot be read.
        """
        return chain.from_iterable(self._open(part, bad) for part in self._parts())

    def digests(self) -> Iterator[str]:
        """Digests of all that `records` reads, in order."""
        for part in self._parts():
            if isinstance(part, str):
                yield f"{part} {self.subset} {self.split} {hub_identity(part, self.subset, self.split)}"
            elif isinstance(part, Path):
                yield self.split
                yield from (file_digest(file) for file in sorted(part.rglob("*")) if file.is_file())
            else:
                if self.split not in part:
                    yield self.split
                for name in names_of(self.split):
                    yield from (f"{kind_of(file.name)} {file_digest(file)}" for file in part[name])

    def _open(self, part: _Part, bad: BadRecord | None) -> Records:
        if isinstance(part, str):
            return read_hub(part, self.subset, self.split, streaming=self.streaming)
        if isinstance(part, Path):
            return read_saved(part, self.split, alias=self._alias)
        if self.split in part:
            return _read_files(part[self.split], bad)
        sizes = {name: count_of(partial(_read_files, part[name])) for name in names_of(self.split)}
        return chain.from_iterable(
            sliced(partial(_read_files, part[name]), begin, end, bad)
            for name, begin, end in slices(self.split, sizes, str(self))
        )

    def _parts(self) -> list[_Part]:
        """What the names denote, in order."""
        if not self._listed:
            raise InputError(f"{self}: an empty list; name at least one file")
        return [self._part(name) for name in self._listed]

    def _part(self, name: str) -> _Part:
        path = Path(name).expanduser()
        if _is_hub_id(name):
            return name
        if path.is_dir():
            path = self._subset_in(path)
            if any((path / file).is_file() for file in _SAVED):
                return path
            files = self._in_directory(path)
        elif _is_pattern(name) and not path.exists():
            matching = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
            if not matching:
                raise InputError(f"{self.role}={name!r}: no file matches the pattern")
            files = self._whole(matching)
        elif path.is_file():
            files = self._whole([path])
        else:
            raise InputError(
                f"{self.role}={name!r} does not exist; give the path of a .jsonl file, or the id of a Hugging Face "
                "data set"
            )
        check_split(self.split, files, f"{self.role}={name!r}")
        return files

    def _subset_in(self, path: Path) -> Path:
        """The directory of the subset in that of a data set."""
        inner = path if self.subset is None else path / self.subset
        if not inner.is_dir():
            raise InputError(
                f"{self.role}={str(path)!r}: the directory has no subset {self.subset!r}, which would be a directory "
                "in it; give `subset` to the entries that have it"
            )
        return inner

    def _in_directory(self, path: Path) -> _Files:
        """The files below a directory, by the splits in their names if they have any."""
        named = f"{self.role}={str(path)!r}"
        found = (file for file in path.rglob("*") if kind_of(file.name) and file.name not in _NO_DATA)
        files = sorted(file for file in found if file.is_file())
        if not files:
            raise InputError(f"{named}: the directory holds no data (.jsonl, .json, .csv, .parquet or .arrow files)")
        splits: dict[str | None, list[Path]] = {}
        for file in files:
            splits.setdefault(split_of(file.relative_to(path)), []).append(file)
        others = splits.pop(None, [])
        if not splits:
            return self._whole(others)
        if others:
            raise InputError(
                f"{named}: {others[0].name} carries no split in its name, or several, and other files carry "
                f"{', '.join(map(str, splits))}; name the files that are wanted, or a pattern"
            )
        return {str(split): members for split, members in splits.items()}

    def _whole(self, files: list[Path]) -> _Files:
        return dict.fromkeys((WHOLE, self._alias), files)

    @property
    def _alias(self) -> str:
        """What a set without splits may be called beside ``train``: by its role, which is the option's default."""
        return self.role.partition("[")[0]


def _read_files(files: Sequence[Path], bad: BadRecord | None) -> Records:
    return chain.from_iterable(read_file(file, bad) for file in files)


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _is_hub_id(name: str) -> bool:
    """Whether `name` denotes a data set of the hub rather than files."""
    return not (kind_of(name) or _is_pattern(name) or Path(name).expanduser().exists())
