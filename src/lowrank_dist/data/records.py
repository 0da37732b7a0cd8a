"""Iterators over the records of one file, and of one Hugging Face data set."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowrank_dist.data.splits import WHOLE, slices
from lowrank_dist.errors import InputError, is_passing
from lowrank_dist.storage.parse import load_json, open_regular, printable

MAX_LINE = 2**28  # bytes

Records = Iterator[tuple[str, dict[str, Any]]]
"""Records, each with where it stands."""

BadRecord = Callable[[InputError], None]
"""What is done with the error of a record that cannot be read, if it does not end the reading."""

#: Last parts of the names of files that are read; JSON and text may be compressed.
COMPRESSED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": ",", ".tsv": "\t"}
COLUMNAR = {".parquet": "parquet", ".arrow": "arrow"}


def kind_of(name: str) -> str:
    """The last part of the name that says what a file holds: ``.jsonl`` for ``a.jsonl.gz``; "" if none is known."""
    path = Path(name)
    inner = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    known = (*LINES, *TABLES) if path.suffix in COMPRESSED else (*LINES, *TABLES, *COLUMNAR)
    return inner if inner in known else ""


def read_file(path: Path, bad: BadRecord | None = None) -> Records:
    """Yield the records of a file of any kind; one of an unknown kind is read as JSON lines.

    Raises
    ------
    InputError
        If the file cannot be read or, without `bad`, a record in it.
    """
    kind = kind_of(path.name)
    if kind in TABLES:
        return read_table(path, bad, delimiter=TABLES[kind])
    if kind in COLUMNAR:
        return read_columnar(path, COLUMNAR[kind])
    if kind == ".json" and _begins_with(path, b"["):
        return read_json(path, bad)
    return read_jsonl(path, bad)


def read_jsonl(path: Path, bad: BadRecord | None = None) -> Records:
    """Yield ``("file:line", record)`` for every line of a JSONL file. Empty lines may stand at its end.

    Raises
    ------
    InputError
        If the path is no regular file; and for a line, unless `bad` takes it, that is empty, is not UTF-8 JSON, is not
        an object, has an entry twice or one with control characters in its name, nests deeper than 64 or is longer than
        256 MB.
    """
    with _opened(path) as lines:
        empty: list[int] = []
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise InputError(f"{path}:{number}: longer than {MAX_LINE} bytes; every line must hold one JSON object")
            if not line.strip():
                empty.append(number)
                continue
            for hole in empty:
                _refuse(InputError(f"{path}:{hole}: empty line; every line must hold one JSON object"), bad)
            empty = []
            where = f"{path}:{number}"
            try:
                record = _object(_loaded(line, where), where, "every line must hold one JSON object")
            except InputError as error:
                _refuse(error, bad)
                continue
            yield where, record


def read_json(path: Path, bad: BadRecord | None = None) -> Records:
    """Yield ``("file[i]", record)`` for every object of a JSON file that holds a list."""
    with _opened(path) as file:
        data = file.read(MAX_LINE + 1)
    if len(data) > MAX_LINE:
        raise InputError(f"{path}: longer than {MAX_LINE} bytes; write a list of this length as JSON lines")
    records = _loaded(data, str(path))
    for index, record in enumerate(records if isinstance(records, list) else [records]):
        where = f"{path}[{index}]"
        try:
            _object(record, where, "the list must hold objects")
        except InputError as error:
            _refuse(error, bad)
            continue
        yield where, record


def read_table(path: Path, bad: BadRecord | None = None, *, delimiter: str = ",") -> Records:
    """Yield ``("file:line", record)`` for every row of a CSV file, by the names in its first row; all is text."""
    before = csv.field_size_limit(MAX_LINE)
    try:
        with _opened(path) as file:
            text = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
            rows = csv.reader(text, delimiter=delimiter, strict=True)
            line = 1
            try:
                names = next(rows, [])
                if len(set(names)) < len(names):
                    raise InputError(f"{path}:1: a column is there twice: {', '.join(names)}")
                line = rows.line_num + 1
                for row in rows:
                    where, line = f"{path}:{line}", rows.line_num + 1
                    if not row:
                        continue
                    if len(row) != len(names):
                        error = InputError(f"{where}: {len(row)} fields, and the first row has {len(names)}")
                        _refuse(error, bad)
                        continue
                    yield where, _object(dict(zip(names, row, strict=True)), where, "")
            except (csv.Error, UnicodeError) as error:
                raise InputError(f"{path}:{line}: cannot be read as a table: {error}") from error
    finally:
        csv.field_size_limit(before)


def read_columnar(path: Path, kind: str) -> Records:
    """Yield ``("file row i", record)`` for every row of a Parquet or an Arrow file."""
    datasets = _library(str(path))
    with _naming(str(path)):
        # `datasets` takes names for patterns
        rows = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
        yield from _rows(rows, f"{path} row")


def read_saved(path: Path, split: str, *, alias: str = WHOLE) -> Records:
    """Yield ``("directory[split] row i", record)`` for a data set written by ``save_to_disk``.

    A single set is the split ``train``, which may be called `alias` too.

    Raises
    ------
    InputError
        If it cannot be read, or has no such split.
    """
    datasets = _library(str(path))
    with _naming(str(path)):
        saved = datasets.load_from_disk(str(path))
        sets = dict(saved) if isinstance(saved, Mapping) else dict.fromkeys((WHOLE, alias), saved)
        parts = slices(split, {name: len(part) for name, part in sets.items()}, str(path))
        chosen = datasets.concatenate_datasets([sets[name].select(range(begin, end)) for name, begin, end in parts])
        yield from _rows(chosen, f"{path}[{split}] row")


def read_hub(name: str, subset: str | None, split: str, *, streaming: bool = False) -> Records:
    """Yield ``("id[split] row i", record)`` for every row of a Hugging Face data set.

    Raises
    ------
    ImportError
        If the `datasets` library is missing.
    InputError
        If the data set, its subset or its split cannot be loaded.
    """
    yield from _rows(_loaded_set(name, subset, split, streaming=streaming), f"{name}[{split}] row")


def hub_identity(name: str, subset: str | None, split: str) -> str:
    """What tells the rows of a Hugging Face data set from others: its files in the cache, by name, size and time."""
    rows = _loaded_set(name, subset, split)
    files = [Path(entry["filename"]) for entry in getattr(rows, "cache_files", [])]
    return repr([len(rows), *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)])


def sliced(read: Callable[[BadRecord], Records], begin: int, end: int, bad: BadRecord | None) -> Records:
    """Records `begin` to `end` of those that `read` gives, among which those that cannot be read count."""
    number = 0

    def count(error: InputError) -> None:
        nonlocal number
        number += 1
        if begin < number <= end:
            _refuse(error, bad)

    for where, record in read(count):
        if number >= end:
            return
        number += 1
        if begin < number:
            yield where, record


def count_of(read: Callable[[BadRecord], Records]) -> int:
    """Number of the records that `read` gives, those that cannot be read included."""
    unread: list[InputError] = []
    return sum(1 for _ in read(unread.append)) + len(unread)


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _loaded_set(name: str, subset: str | None, split: str, *, streaming: bool = False) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a file, and data sets of the Hugging Face hub need the `datasets` library: "
            "`pip install lowrank-dist[datasets]`, or give the path of a .jsonl file"
        ) from error
    try:
        return datasets.load_dataset(name, subset, split=split, **({"streaming": True} if streaming else {}))
    except (ValueError, OSError) as error:  # unknown id, subset or split; no network
        if is_passing(error):
            raise
        raise InputError(
            f"{name!r} is not a file, and the Hugging Face data set of this name (subset={subset!r}, split={split!r}) "
            f"cannot be loaded: {error}"
        ) from error


def _rows(rows: Any, where: str) -> Records:
    for index, record in enumerate(rows):
        yield f"{where} {index}", {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    """`value` without the entries that Arrow adds: objects of one column all have the entries of any of them."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} needs the `datasets` library: `pip install lowrank-dist[datasets]`, or convert it to .jsonl"
        ) from error
    return datasets


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the file in errors of Arrow and of the `datasets` library, which are of many classes."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        if is_passing(error):
            raise
        raise InputError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A regular file for reading, decompressed."""
    with open(open_regular(path), "rb") as file:
        if path.suffix == ".gz":
            with _damage(path, EOFError, gzip.BadGzipFile, zlib.error), gzip.open(file) as inner:
                yield inner
        elif path.suffix == ".zst":
            zstd = _zstd(path)
            with _damage(path, EOFError, zstd.ZstdError), io.BufferedReader(zstd.open(file)) as inner:
                yield inner
        else:
            yield file


@contextmanager
def _damage(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise InputError(f"{path}: cannot be decompressed: {error}") from error


def _zstd(path: Path) -> Any:
    for name in ("compression.zstd", "zstandard"):  # the first is part of Python 3.14
        with suppress(ImportError):
            return importlib.import_module(name)
    raise InputError(f"{path}: needs the package `zstandard`: `pip install lowrank-dist[datasets]`")


def _begins_with(path: Path, start: bytes) -> bool:
    with _opened(path) as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start)


def _loaded(data: bytes, where: str) -> Any:
    try:
        value = load_json(data)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except ValueError as error:  # JSONDecodeError or UnicodeError
        raise InputError(f"{where}: not valid JSON ({error}); every line must hold one JSON object") from error
    return value


def _object(value: Any, where: str, rule: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON {type(value).__name__}; {rule}")
    odd = next((name for name in value if not name.isprintable()), None)
    if odd is not None:
        raise InputError(
            f"{where}: a column is called {printable(repr(odd), 80)}; choose a name without control characters"
        )
    return value


def _refuse(error: InputError, bad: BadRecord | None) -> None:
    if bad is None:
        raise error
    bad(error)
