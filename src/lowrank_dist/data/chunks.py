"""Records in chunks, and what becomes of a chunk: rendered, tokenized, cut to length, each record for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_dist.data.classes import Labelled, LabelledEncoder, LabelledRenderer
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.data.preference import SIDES
from lowrank_dist.data.records import Records
from lowrank_dist.data.rendering import Example, Renderer
from lowrank_dist.data.sources import Source
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoded, Encoder
from lowrank_dist.errors import InputError

CHUNK = 1000
"""Records that are tokenized together."""

OnBadRecord = Literal["error", "skip"]
"""What is done with a record that cannot be used."""

OnLongExample = Literal["cut", "split", "drop"]
"""What is done with an example of more than `max_length` tokens."""

Transform = Callable[[dict[str, Any]], Mapping[str, Any] | None]
"""A user's function from a record to one with known columns, or to None to leave it out."""


@dataclass
class Chunk:
    """Consecutive records, each with where it stands, and the errors of those that could not be read."""

    records: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def chunks_of(source: Source, *, limit: int | None, on_bad_record: OnBadRecord) -> Iterator[Chunk]:
    """The records of a source, up to `limit`, among which those that cannot be read count.

    Raises
    ------
    InputError
        If nothing can be read and, unless they are skipped, for a record that cannot.
    """
    chunk, count = Chunk(), 0

    def bad(error: InputError) -> None:
        nonlocal count
        count += 1
        if on_bad_record == "error":
            raise error
        chunk.unread.append(str(error))

    def good() -> Records:
        nonlocal count
        for where, record in source.records(bad):
            if limit is not None and count >= limit:
                return
            count += 1
            yield where, record

    records = good()
    while True:
        chunk = Chunk()
        chunk.records += islice(records, CHUNK if limit is None else min(CHUNK, max(0, limit - count)))
        if not (chunk.records or chunk.unread):
            return
        yield chunk


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """What makes examples of the records of a chunk.

    Attributes
    ----------
    renderer, encoder
        From records to text, and to tokens.
    max_length
        Largest number of tokens of an example.
    names
        Columns that the renderer knows, for the account of those that nothing reads.
    transform
        Function that every record passes through first.
    on_bad_record
        Raise the error of the first record that cannot be used, or skip such records and count them.
    on_long_example
        Cut examples of more than `max_length` tokens on the right, split them, or drop them. Passages are split by
        ``"cut"`` too.
    """

    renderer: Renderer | LabelledRenderer
    encoder: Encoder | LabelledEncoder
    max_length: int
    names: Sequence[str]
    transform: Transform | None = None
    on_bad_record: OnBadRecord = "error"
    on_long_example: OnLongExample = "cut"

    def __call__(self, chunk: Chunk) -> Loaded:
        """Examples of the records of a chunk, and what became of the others.

        Raises
        ------
        InputError
            For a record that cannot be used, unless they are skipped.
        """
        renderer = self.renderer
        loaded = Loaded(records=len(chunk.records) + len(chunk.unread), skipped=list(chunk.unread))
        columns = renderer.columns or {}
        known = {columns.get(name, name) for name in (*self.names, *columns)}
        whole = isinstance(renderer, Renderer) and renderer.train_on == "everything"
        items: list[tuple[str, tuple[Any, ...]]] = []
        for where, record in chunk.records:
            try:
                changed = _transformed(self.transform, record, where)
                if changed is None:
                    loaded.left_out += 1
                else:
                    items += [(where, item) for item in renderer.items(changed, where)]
                    loaded.unused |= changed.keys() - known
            except InputError as error:
                if self.on_bad_record == "error":
                    raise
                loaded.skipped.append(str(error))
        for where, item, encoded in _encoded(self.encoder, items, loaded, self.on_bad_record):
            lengths = [one.length or len(one.tokens) for one in encoded]
            loaded.lengths += lengths
            longer = sum(length > self.max_length for length in lengths)
            if longer and self.on_long_example == "drop":
                loaded.too_long += longer
            elif len(item) == 2:
                _keep_pair(loaded, where, encoded, self.max_length)
            else:
                split = self.on_long_example == "split"
                _keep(loaded, where, item[0], encoded[0], self.max_length, whole=whole, split=split)
        if isinstance(renderer, Renderer):
            loaded.notes.update(renderer.notes)
            renderer.notes.clear()
        return loaded


def _transformed(transform: Transform | None, record: dict[str, Any], where: str) -> Mapping[str, Any] | None:
    if transform is None:
        return record
    try:
        changed = transform(record)
    except Exception as error:  # whatever a user's function runs into
        raise InputError(f"{where}: transform: {type(error).__name__}: {error}") from error
    if changed is not None and not isinstance(changed, Mapping):
        raise InputError(f"{where}: transform returned a {type(changed).__name__}; it must return a dict, or None")
    return changed


def _encoded(
    encoder: Encoder | LabelledEncoder,
    items: list[tuple[str, tuple[Any, ...]]],
    loaded: Loaded,
    on_bad_record: OnBadRecord,
) -> Iterator[tuple[str, tuple[Any, ...], list[Encoded]]]:
    """Items with the tokens of their examples; those whose text is no text are named, or skipped."""
    try:
        encoded = iter(encoder([example for _, item in items for example in item]))
    except (TypeError, ValueError, OverflowError):  # half of a surrogate pair, which is valid JSON but no text
        for where, item in items:
            try:
                "".join(_texts(item)).encode()  # says what is no text better than a tokenizer
                one = encoder(list(item))
            except (TypeError, ValueError, OverflowError) as error:
                message = f"{where}: the text cannot be tokenized: {error}"
                if on_bad_record == "error":
                    raise InputError(message) from error
                loaded.skipped.append(message)
            else:
                yield where, item, one
        return
    for where, item in items:
        yield where, item, list(islice(encoded, len(item)))


def _texts(item: tuple[Any, ...]) -> Iterator[str]:
    for example in item:
        if isinstance(example, Example):
            yield from (text for text, _ in example.segments)
        else:
            yield from filter(None, (example.text, example.beside))


def _keep(
    loaded: Loaded,
    where: str,
    example: Example | Labelled,
    encoded: Encoded,
    max_length: int,
    *,
    whole: bool,
    split: bool,
) -> None:
    tokens, along = _tensors(encoded)
    if isinstance(example, Labelled):  # its encoder has cut it
        loaded.cut += (encoded.length or tokens.shape[1]) > max_length
        _append(loaded, where, tokens, along, target=encoded.target)
        return
    length = tokens.shape[1]
    starts = range(0, 1)
    if example.splittable or split:
        loaded.split += length > max_length
        # nothing predicts the first token of a part; a last part of one token would train nothing
        starts = range(0, max(1, length - 1), max_length)
    else:
        loaded.cut += length > max_length
    for start in starts:
        part = tokens[:, start : start + max_length]
        trained = part[1, 1:] != IGNORE_INDEX
        if trained.any():
            if not (example.splittable or whole):
                loaded.full += all(on or not text for text, on in example.segments)
                loaded.silent += length == part.shape[1] and int(trained.sum()) == 1
            _append(loaded, where, part, {name: values[start : start + max_length] for name, values in along.items()})
        elif length > max_length:
            loaded.dropped += 1
        else:
            loaded.empty += 1


def _keep_pair(loaded: Loaded, where: str, encoded: Sequence[Encoded], max_length: int) -> None:
    """Keep both examples, or none."""
    sides = [_tensors(one) for one in encoded]
    loaded.cut += sum(tokens.shape[1] > max_length for tokens, _ in sides)
    left = [tokens[:, :max_length] for tokens, _ in sides]
    if not all(bool((tokens[1, 1:] != IGNORE_INDEX).any()) for tokens in left):
        if any(tokens.shape[1] > max_length for tokens, _ in sides):
            loaded.dropped += 2
        else:
            loaded.empty += 2
    elif torch.equal(*left):
        loaded.alike += 1
    else:
        for name, tokens, (_, along) in zip(SIDES, left, sides, strict=True):
            _append(loaded, f"{where} ({name})", tokens, {k: values[:max_length] for k, values in along.items()})


def _tensors(encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.tensor([encoded.tokens, encoded.labels], dtype=torch.int32)
    return tokens, {name: torch.tensor(values, dtype=torch.float32) for name, values in encoded.along.items()}


def _append(loaded: Loaded, where: str, tokens: Tensor, along: dict[str, Tensor], *, target: int = -1) -> None:
    loaded.kept += 1
    loaded.examples.append(tokens)
    loaded.along.append(along)
    loaded.targets.append(target)
    loaded.wheres.append(where)
