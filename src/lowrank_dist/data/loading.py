"""Records to tokenized examples, with an account of what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_dist.data.classes import Labelled, LabelledEncoder, LabelledRenderer
from lowrank_dist.data.preference import SIDES
from lowrank_dist.data.records import Records
from lowrank_dist.data.rendering import Example, Renderer
from lowrank_dist.data.shapes import NAMES
from lowrank_dist.data.sources import Source
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoded, Encoder
from lowrank_dist.errors import InputError

CHUNK = 1000

OnBadRecord = Literal["error", "skip"]
"""What is done with a record that cannot be used."""

Transform = Callable[[dict[str, Any]], Mapping[str, Any] | None]
"""A user's function from a record to one with known columns, or to None to leave it out."""


@dataclass
class Loaded:
    """Examples that were read, and what became of the others.

    Attributes
    ----------
    examples
        Token ids and labels of each example: int32, [2, length]. The two examples of a pair follow each other.
    along
        Further values of the tokens of each example (`lowrank_dist.data.tokenizing.Encoded`): fp32, [length] each.
    targets
        Class of each example; -1 if it has none.
    wheres
        Where the record of each example stands.
    lengths
        Number of tokens of each example before it was cut, those that were dropped included.
    records
        Number of records read, bad ones included.
    skipped
        Errors of the records that were skipped, in order.
    left_out
        Number of records that the user's function left out.
    cut, dropped, split
        Examples longer than `max_length` that were cut; those without a trained token in what is left, of pairs both if
        one has none; and passages that were split into several examples.
    alike
        Pairs whose two responses are the same in what is left, which were dropped.
    full
        Examples, other than passages, of which every token is trained without `train_on` having asked for it.
    silent
        Examples of which the last token alone is trained: the response is empty.
    unused
        Columns that nothing here reads.
    notes
        What else was done to examples, and to how many.
    """

    examples: list[Tensor] = field(default_factory=list)
    along: list[dict[str, Tensor]] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    records: int = 0
    skipped: list[str] = field(default_factory=list)
    left_out: int = 0
    cut: int = 0
    dropped: int = 0
    split: int = 0
    alike: int = 0
    full: int = 0
    silent: int = 0
    unused: set[str] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)

    def lines(self, max_length: int) -> list[str]:
        """What was done to the data without being asked, one line each."""
        lines = []
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} of {self.records} records; the first: {self.skipped[0]}")
        if self.left_out:
            lines.append(f"transform left out {self.left_out} of {self.records} records")
        if self.cut:
            lines.append(
                f"{self.cut} of {len(self.lengths)} examples are longer than max_length={max_length} and were cut; "
                f"{self.dropped} of them had no response left and were dropped"
            )
        if self.alike:
            lines.append(f"{self.alike} pairs were dropped: what is left of their two responses is the same")
        if self.split:
            lines.append(f"{self.split} passages are longer than max_length={max_length} and were split")
        if self.full:
            lines.append(f"{self.full} examples have no prompt: every token of them is trained")
        if self.silent:
            lines.append(f"{self.silent} examples have an empty response: only their last token is trained")
        lines += [f"{what}, in {count} turns" for what, count in self.notes.items()]
        return lines


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
    progress: bool = False,
) -> Loaded:
    """Read, render and tokenize a source.

    Parameters
    ----------
    source
        What is read.
    renderer, encoder
        From records to text, and to tokens.
    max_length
        Largest number of tokens of an example.
    names
        Columns that the renderer knows, for the account of those that nothing reads.
    limit
        Number of records to read. None: all.
    transform
        Function that every record passes through first.
    on_bad_record
        Raise the error of the first record that cannot be used, or skip such records and count them.
    progress
        Show a progress bar, if standard error is a terminal.

    Raises
    ------
    InputError
        For a bad record, unless they are skipped, and if nothing can be read; the message names the file and the line.
    """
    loaded = Loaded()

    def bad(error: InputError) -> None:
        loaded.records += 1
        if on_bad_record == "error":
            raise error
        loaded.skipped.append(str(error))

    known = set(names) if renderer.columns is None else set(renderer.columns.values())
    whole = isinstance(renderer, Renderer) and renderer.train_on == "everything"
    good = _good(source.records(bad), loaded, limit)
    # disable=None: only on a terminal
    bar = tqdm(good, desc=f"Tokenizing {source.role}", unit=" records", disable=None if progress else True)
    records = islice(bar, limit)
    while chunk := list(islice(records, CHUNK)):
        items: list[tuple[str, tuple[Any, ...]]] = []
        for where, record in chunk:
            try:
                changed = _transformed(transform, record, where)
                if changed is None:
                    loaded.left_out += 1
                else:
                    items += [(where, item) for item in renderer.items(changed, where)]
                    loaded.unused |= changed.keys() - known
            except InputError as error:
                loaded.records -= 1
                bad(error)
        for where, item, encoded in _encoded(encoder, items, loaded, on_bad_record):
            if len(item) == 2:
                _keep_pair(loaded, where, encoded, max_length)
            else:
                _keep(loaded, where, item[0], encoded[0], max_length, whole)
    bar.close()
    if isinstance(renderer, Renderer):
        loaded.notes = renderer.notes.copy()
        renderer.notes.clear()
    return loaded


def _good(records: Records, loaded: Loaded, limit: int | None) -> Records:
    """`records`, counted; bad ones count against the limit."""
    for where, record in records:
        if limit is not None and loaded.records >= limit:
            return
        loaded.records += 1
        yield where, record


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
    loaded: Loaded, where: str, example: Example | Labelled, encoded: Encoded, max_length: int, whole: bool
) -> None:
    tokens, along = _tensors(encoded)
    length = encoded.length or tokens.shape[1]
    loaded.lengths.append(length)
    if isinstance(example, Labelled):  # its encoder has cut it
        loaded.cut += length > max_length
        _append(loaded, where, tokens, along, target=encoded.target)
        return
    if example.splittable:
        loaded.split += length > max_length
        # nothing predicts the first token of a part; a last part of one token would train nothing
        parts = [part for part in tokens.split(max_length, dim=1) if part.shape[1] > 1]
    else:
        loaded.cut += length > max_length
        parts = [tokens[:, :max_length]]
        along = {name: values[:max_length] for name, values in along.items()}
    for part in parts:
        trained = part[1, 1:] != IGNORE_INDEX
        if trained.any():
            if not (example.splittable or whole):
                loaded.full += all(on or not text for text, on in example.segments)
                loaded.silent += length == part.shape[1] and int(trained.sum()) == 1
            _append(loaded, where, part, along)
        else:
            loaded.dropped += 1


def _keep_pair(loaded: Loaded, where: str, encoded: Sequence[Encoded], max_length: int) -> None:
    """Keep both examples, or none."""
    sides = [_tensors(one) for one in encoded]
    lengths = [tokens.shape[1] for tokens, _ in sides]
    loaded.lengths += lengths
    loaded.cut += sum(length > max_length for length in lengths)
    left = [tokens[:, :max_length] for tokens, _ in sides]
    if not all(bool((tokens[1, 1:] != IGNORE_INDEX).any()) for tokens in left):
        loaded.dropped += 2
    elif torch.equal(*left):
        loaded.alike += 1
    else:
        for name, tokens, (_, along) in zip(SIDES, left, sides, strict=True):
            _append(loaded, f"{where} ({name})", tokens, {k: values[:max_length] for k, values in along.items()})


def _tensors(encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.tensor([encoded.tokens, encoded.labels], dtype=torch.int32)
    return tokens, {name: torch.tensor(values, dtype=torch.float32) for name, values in encoded.along.items()}


def _append(loaded: Loaded, where: str, tokens: Tensor, along: dict[str, Tensor], *, target: int = -1) -> None:
    loaded.examples.append(tokens)
    loaded.along.append(along)
    loaded.targets.append(target)
    loaded.wheres.append(where)
