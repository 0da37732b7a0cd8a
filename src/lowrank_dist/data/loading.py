"""Records to tokenized examples, with an account of what was left out and why."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial

from tqdm import tqdm

from lowrank_dist.data.chunks import Chunk, OnBadRecord, OnLongExample, Preparer, Transform, chunks_of
from lowrank_dist.data.classes import LabelledEncoder, LabelledRenderer
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.data.rendering import Renderer
from lowrank_dist.data.shapes import NAMES
from lowrank_dist.data.sources import Source
from lowrank_dist.data.tokenizing import Encoder

Prepare = Callable[[Iterable[Chunk]], Iterator[Loaded]]
"""What makes examples of chunks, in their order: in this process or in others."""


def load(
    source: Source,
    renderer: Renderer | LabelledRenderer,
    encoder: Encoder | LabelledEncoder,
    *,
    max_length: int,
    names: Sequence[str] = NAMES,
    limit: int | None = None,
    transform: Transform | None = None,
    on_bad_record: OnBadRecord = "error",
    on_long_example: OnLongExample = "cut",
    progress: bool = False,
) -> Loaded:
    """Read, render and tokenize a source in this process.

    Parameters
    ----------
    source
        What is read.
    renderer, encoder, max_length, names, transform, on_bad_record, on_long_example
        See `lowrank_dist.data.chunks.Preparer`.
    limit
        Number of records to read. None: all.
    progress
        Show a progress bar, if standard error is a terminal.

    Raises
    ------
    InputError
        For a bad record, unless they are skipped, and if nothing can be read; the message names the file and the line.
    """
    preparer = Preparer(
        renderer=renderer,
        encoder=encoder,
        max_length=max_length,
        names=names,
        transform=transform,
        on_bad_record=on_bad_record,
        on_long_example=on_long_example,
    )
    return prepared(source, partial(map, preparer), limit=limit, on_bad_record=on_bad_record, progress=progress)


def prepared(
    source: Source,
    prepare: Prepare,
    *,
    limit: int | None = None,
    on_bad_record: OnBadRecord = "error",
    progress: bool = False,
    sink: Callable[[Loaded], None] | None = None,
) -> Loaded:
    """Read a source, and hand its chunks to `prepare`.

    Parameters
    ----------
    source, limit, on_bad_record, progress
        As of `load`.
    prepare
        What makes examples of chunks.
    sink
        Takes the examples of each chunk, in order, so that they need not all be in memory; what is returned then holds
        the account alone. None: all of them are returned.

    Raises
    ------
    InputError
        As `load`.
    """
    loaded = Loaded()
    # disable=None: only on a terminal
    with tqdm(desc=f"Tokenizing {source.role}", unit=" records", disable=None if progress else True) as bar:
        parts = prepare(chunks_of(source, limit=limit, on_bad_record=on_bad_record))
        try:
            for part in parts:
                if sink is not None:
                    sink(part)
                loaded.add(part if sink is None else part.without_examples())
                bar.update(part.records)
        finally:
            if isinstance(parts, Generator):  # which may have processes
                parts.close()
    return loaded
