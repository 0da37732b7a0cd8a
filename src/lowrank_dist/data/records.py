"""Iterators over records of training data, from files and from the Hugging Face hub."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE = 2**28  # bytes
MAX_DEPTH = 64


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("file:line", record)`` for every line of a JSONL file.

    Raises
    ------
    ValueError
        If the path is no regular file, or a line is empty, is not UTF-8 JSON, is not an object, has an entry twice or
        one with control characters in its name, nests deeper than 64 or is longer than 256 MB.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for the writer of a pipe
    with open(descriptor, "rb") as lines:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path}: is no regular file; only these are read")
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise ValueError(f"{where}: longer than {MAX_LINE} bytes; every line must hold one JSON object")
            if not line.strip():
                raise ValueError(f"{where}: empty line; every line must hold one JSON object")
            try:
                record = json.loads(line, object_pairs_hook=_object)
                if b"\\u" in line:
                    json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text
                if _depth(record) > MAX_DEPTH:
                    raise ValueError(f"nests deeper than {MAX_DEPTH}")
            except (ValueError, RecursionError) as error:  # JSONDecodeError or UnicodeError
                raise ValueError(f"{where}: not valid JSON ({error}); every line must hold one JSON object") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a JSON {type(record).__name__}; every line must hold one JSON object")
            odd = next((name for name in record if not name.isprintable()), None)
            if odd is not None:
                raise ValueError(
                    f"{where}: a column is called {ascii(odd)[:80]}; choose a name without control characters"
                )
            yield where, record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the entry {ascii(name)[:80]} is there twice")
        values[name] = value
    return values


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level, depth = [item for items in inside for item in items], depth + 1
    return depth


def read_hub(name: str, subset: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("id[split] row i", record)`` for every row of a Hugging Face data set.

    Raises
    ------
    ImportError
        If the `datasets` library is missing.
    ValueError
        If the data set, its subset or its split cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a file, and data sets of the Hugging Face hub need the `datasets` library: "
            "`pip install lowrank-dist[datasets]`, or give the path of a .jsonl file"
        ) from error
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (ValueError, OSError) as error:  # unknown id, subset or split; no network
        raise ValueError(
            f"{name!r} is not a file, and the Hugging Face data set of this name (subset={subset!r}, split={split!r}) "
            f"cannot be loaded: {error}"
        ) from error
    for index, record in enumerate(rows):
        yield f"{name}[{split}] row {index}", record
