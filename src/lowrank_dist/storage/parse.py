"""The one way in which values from files are read: regular files of bounded size, bounded JSON, typed values.

Who writes a file may be mistaken, damaged, or hostile. Every reader gets a `CheckpointError` of one line that names the
file and the entry, never a traceback, and never waits or allocates without bound. `Record` reads entries by type. An
OSError that may pass (`lowrank_dist.errors.is_passing`) is no damage and stays an OSError.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowrank_dist.errors import CheckpointError, is_passing

MAX_JSON = 16 * 2**20  #: bytes of a JSON file
MAX_MANIFEST = 64 * 2**20  #: bytes of a manifest or journal; with an entry for each of 20 000 experts it has 30 MB
LFS_POINTER = b"version https://git-lfs"  #: how a file begins that Git LFS has not fetched
MAX_HEADER = 100_000_000  #: bytes of a safetensors header, the limit of the format itself
MAX_DEPTH = 64
MAX_NUMBER = 2**63

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(value: object, limit: int = 200) -> str:
    """Text for one line of a terminal: control characters are escaped, and long text is cut."""
    text = _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], str(value))
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def is_plain(name: str) -> bool:
    """Whether a name has no control characters."""
    return _CONTROLS.search(name) is None


# -- files ------------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor.

    Raises
    ------
    CheckpointError
        If it is missing or is no regular file: pipes and devices are not waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if is_passing(error):
            raise
        raise CheckpointError(f"{printable(path)}: cannot be opened ({error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is no regular file; only these are read")
    return descriptor


def read_bytes(path: Path, limit: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: has {size} bytes, and at most {limit} are read; it is damaged")
        content = file.read(limit)
    refuse_pointer(path, content)
    return content


def refuse_pointer(path: Path, begin: bytes) -> None:
    """Raise CheckpointError if a file begins as a pointer of Git LFS, which stands where the file was not fetched."""
    if begin.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the file; run `git lfs pull` in its repository, or fetch it with "
            "`hf download`"
        )


def read_record(path: Path, limit: int = MAX_JSON) -> Record:
    """The object that a JSON file of at most `limit` bytes holds."""
    return Record(parse_object(read_bytes(path, limit), str(path)), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The object that JSON text holds.

    Raises
    ------
    CheckpointError
        If it is no JSON object, has an entry twice, or nests deeper than 64.
    """
    try:
        value = load_json(data)
    except ValueError as error:
        raise CheckpointError(f"{where}: cannot be read ({printable(error)}); it is damaged") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds no JSON object; it is damaged")
    return value


def load_json(data: bytes) -> Any:
    """The value that JSON text in UTF-8 holds.

    Raises
    ------
    ValueError
        If it is no JSON, has an entry twice, or nests deeper than 64.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError(f"nests deeper than {MAX_DEPTH}") from error
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the entry {printable(repr(name), 80)} is there twice")
        values[name] = value
    return values


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nests deeper than {MAX_DEPTH}")


# -- entries ----------------------------------------------------------------------------------------------------------

_REQUIRED: Any = object()


class Record(dict[str, Any]):
    """A JSON object whose entries are read by type.

    Parameters
    ----------
    values
        The object.
    where
        File and place, for messages.

    Methods return `default` for an entry that is absent or null. Without one, that is a `CheckpointError`, as is a
    value of another type or out of bounds. ``record[name]`` raises it too if the entry is absent.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise CheckpointError(
            f"{self.where}: has no entry {printable(name)!r}; it is damaged, or another version wrote it"
        )

    def wrong(self, name: str, must: str) -> CheckpointError:
        """The error of an entry that must be something else."""
        return CheckpointError(f"{self.where}: {printable(name)} is {_shown(self.get(name))}, must be {must}")

    def expect(self, name: str, test: Callable[[Any], bool], must: str, default: Any = _REQUIRED) -> Any:
        """The entry `name`, which must pass `test`."""
        value = self.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not test(self[name]):
            raise self.wrong(name, must)
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string without control characters."""
        return self.expect(name, is_text, "plain text", default)

    def integer(self, name: str, default: Any = _REQUIRED, *, low: int = 0, high: int = MAX_NUMBER) -> Any:
        """An integer from `low` to `high`."""
        return self.expect(name, lambda v: is_integer(v, low, high), f"an integer from {low} to {high}", default)

    def record(self, name: str) -> Record:
        """An object; an empty one if it is absent."""
        values = self.expect(name, lambda v: isinstance(v, dict), "an object", {})
        return Record(values, f"{self.where}: {printable(name)}")

    def records(self, name: str) -> list[Record]:
        """A list of objects; an empty one if it is absent."""
        values = self.expect(name, is_list_of(lambda v: isinstance(v, dict)), "a list of objects", [])
        return [Record(value, f"{self.where}: {printable(name)}[{index}]") for index, value in enumerate(values)]


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return printable(repr(value), 60)


def is_text(value: Any) -> bool:
    """Whether a value is a string without control characters."""
    return isinstance(value, str) and is_plain(value)


def is_integer(value: Any, low: int = 0, high: int = MAX_NUMBER) -> bool:
    """Whether a value is an integer from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, int):
        return is_integer(value, -MAX_NUMBER)
    return isinstance(value, float) and math.isfinite(value)


def is_figure(value: Any) -> bool:
    """Whether a value is a number; NaN and infinity are figures of a report too."""
    return is_number(value) or isinstance(value, float)


def is_flag(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Test for lists whose elements pass `test`."""
    return lambda value: isinstance(value, list) and all(map(test, value))


def is_object_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Test for objects with plain names whose values pass `test`."""
    return lambda value: isinstance(value, dict) and all(map(is_plain, value)) and all(map(test, value.values()))


def is_inside(path: Any) -> bool:
    """Whether a value is the path of something inside a directory."""
    return is_text(path) and not os.path.isabs(path) and ".." not in path.split("/") and path not in ("", ".")
