"""Tokenized data on disk: made once, then mapped into memory by every rank of every run that reads the same data.

The name of an entry is a digest of all that decides its content: the bytes of the files, the tokenizer, the chat
template, the settings, and the code of this package for data. So an entry is never out of date, and none is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lowrank_dist.data.packing import Tokens
from lowrank_dist.data.sources import Source
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.lock import Lock, held, lock_of
from lowrank_dist.storage.parse import is_list_of, read_record
from lowrank_dist.storage.writer import write_json, write_tensors

log = logging.getLogger(__name__)

FILE = "tokens.safetensors"

Made = tuple[Tokens, list[str]]
"""Examples, and lines that say what became of the others."""


def key_of(source: Source, tokenizer: Any, settings: Mapping[str, Any]) -> str | None:
    """The name of the entry for a source under a tokenizer and settings; None for tokenizers that are not fast.

    Parameters
    ----------
    source
        Its files are read whole, for their digests.
    tokenizer
        Tokenizer of transformers.
    settings
        All else that decides the tokens; values of JSON. ``chat_template`` is the one in place of the tokenizer's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    template = json.dumps([settings.get("chat_template"), tokenizer.chat_template])
    parts = [
        *source.digests(),
        backend.to_str(),
        json.dumps([type(tokenizer).__name__, *map(str, tokenizer.special_tokens_map.items())]),
        template,
        json.dumps(settings, sort_keys=True),
        str(date.today()) if "strftime_now" in template else "",
        *(f"{library} {version(library)}" for library in ("transformers", "tokenizers", "jinja2")),
        _code(),
    ]
    return hashlib.sha256("".join(hashlib.sha256(part.encode()).hexdigest() for part in parts).encode()).hexdigest()[
        :32
    ]


def cached(directory: Path, make: Callable[[Path], Made]) -> Made:
    """The entry in `directory`; if there is none, or a damaged one, `make` makes it while other processes wait.

    `make` is given a path for a directory of its own, which is removed once the entry is written.

    Tensors are mapped from the file, so that processes of a host share its memory.
    """
    if (found := _read(directory)) is not None:
        return found
    directory.parent.mkdir(parents=True, exist_ok=True)
    # `atomic_directory` has a lock of its own, for which nobody waits
    with held(Lock(lock_of(directory.with_name(f"{directory.name}.making")), str(directory)), wait=True):
        if (found := _read(directory)) is not None:
            return found
        with atomic_directory(directory, overwrite=True) as staging:
            tokens, lines = make(staging / "scratch")
            write_tensors(staging / FILE, tokens.stored())
            shutil.rmtree(staging / "scratch", ignore_errors=True)
            write_json(staging / MANIFEST, {"kind": "tokens", "lines": lines, "largest_token": tokens.largest})
    found = _read(directory)
    assert found is not None
    return found


def _read(directory: Path) -> Made | None:
    try:
        manifest = read_record(directory / MANIFEST)
        lines = manifest.expect("lines", is_list_of(lambda line: isinstance(line, str)), "a list of texts")
        with safe_open(directory / FILE, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Tokens.mapped(stored, largest=manifest.integer("largest_token")), lines
    except FileNotFoundError:
        return None
    except (CheckpointError, SafetensorError, ValueError) as error:
        if directory.exists():
            log.warning("%s: damaged (%s); the data are tokenized again", directory, error)
        return None


@cache
def _code() -> str:
    """Digest of the modules of this package."""
    return hashlib.sha256(
        b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    ).hexdigest()
