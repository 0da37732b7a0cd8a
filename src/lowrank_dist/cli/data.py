"""``lowrank-dist data``: show what a run would train on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.data.sources import Source
from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError, is_passing
from lowrank_dist.storage.parse import printable

TRAINED, PROMPT, RESET = "\033[1;32m", "\033[2m", "\033[0m"
BINS = 12
SHOWN = 5  # reasons and duplicates that are shown

# arguments of SFTDataModule that the command sets by its own options, or that change no example
_NOT_OFFERED = {
    *("tokenizer", "train", "validation", "test", "validation_split", "test_split", "eval_limit"),
    *("stopping_strategy", "streaming", "shuffle_buffer"),
    *("batch_size", "tokens_per_batch", "packing", "padding_free", "group_by_length"),
    *("num_workers", "seed", "cache_dir", "num_proc"),
}


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist data``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    settings = {
        name: value for name, value in vars(options).items() if name not in ("data", "tokenizer", "examples", "color")
    }
    limit = settings.pop("limit")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} must be at least 1; leave it out for all records")
    if options.examples < 0:
        raise InputError(f"--examples {options.examples} must not be negative")
    names, split = list(options.data), settings["train_split"]
    module = SFTDataModule(options.tokenizer, names, **settings)
    source = Source(role="data", names=names if len(names) > 1 else names[0], split=split, subset=settings["subset"])
    tokenizer = _tokenizer(options.tokenizer)
    try:
        loaded = module.read(tokenizer, source, limit)
    except ImportError as error:  # the library that reads such files is not installed
        raise InputError(str(error)) from error
    color = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for line in report(loaded, tokenizer, module.max_length, examples=options.examples, color=color):
        print(line)
    return 0


def parser() -> ArgumentParser:
    """The parser of ``lowrank-dist data``: its own options, and those of `SFTDataModule` that change examples."""
    parser = ArgumentParser(
        prog="lowrank-dist data",
        description="Read data as a run does, and show examples with their trained tokens, a histogram of lengths, "
        "what was dropped and why, duplicates, and examples of which nothing or everything is trained.",
    )
    parser.add_argument("data", nargs="+", help="files, patterns, directories, or ids of Hugging Face data sets")
    parser.add_argument("--tokenizer", required=True, help="directory or hub id of the tokenizer")
    parser.add_argument("--examples", type=int, default=3, help="number of examples to show")
    parser.add_argument(
        "--color",
        choices=["auto", "always", "never"],
        default="auto",
        help="show trained tokens in green; without color they stand between [[ and ]]",
    )
    parser.add_class_arguments(SFTDataModule, None, skip=_NOT_OFFERED)
    return parser


def report(loaded: Loaded, tokenizer: Any, max_length: int, *, examples: int, color: bool) -> Iterator[str]:
    """The lines that the command prints."""
    for index in _spread(len(loaded.examples), examples):
        tokens, labels = loaded.examples[index]
        count = int((labels != IGNORE_INDEX).sum())
        yield f"== {loaded.wheres[index]}: {len(tokens)} tokens, {count} trained"
        yield shown(tokens, labels, tokenizer, color=color)
        yield ""
    trained = sum(int((example[1, 1:] != IGNORE_INDEX).sum()) for example in loaded.examples)
    total = sum(example.shape[1] for example in loaded.examples)
    yield (
        f"{loaded.records:,} records, {len(loaded.examples):,} examples, {total:,} tokens, {trained:,} of them trained "
        f"({trained / total:.0%})"
    )
    yield ""
    yield "tokens of an example, before it is cut"
    yield from histogram(loaded.lengths, max_length)
    yield ""
    for line in loaded.lines(max_length):
        yield printable(line, 10_000)
    for error in loaded.skipped[1:SHOWN]:
        yield f"  {printable(error, 10_000)}"
    if len(loaded.skipped) > SHOWN:
        yield f"  and {len(loaded.skipped) - SHOWN} more"
    yield from _duplicates(loaded)
    if loaded.unused:
        yield f"columns that are not used: {', '.join(printable(name) for name in sorted(loaded.unused))}"


def shown(tokens: Tensor, labels: Tensor, tokenizer: Any, *, color: bool) -> str:
    """An example as text, with its trained stretches marked."""
    begin, end, dim, reset = (TRAINED, RESET, PROMPT, RESET) if color else ("[[", "]]", "", "")
    text = ""
    for trained, stretch in groupby(
        zip(tokens.tolist(), labels.tolist(), strict=True), lambda pair: pair[1] != IGNORE_INDEX
    ):
        piece = tokenizer.decode([token for token, _ in stretch], clean_up_tokenization_spaces=False)
        piece = "\n".join(printable(line, 10**9) for line in piece.split("\n"))
        text += f"{begin}{piece}{end}" if trained else f"{dim}{piece}{reset}"
    return text


def histogram(lengths: Sequence[int], max_length: int) -> Iterator[str]:
    """Bars of equal steps, and the quantiles."""
    step = max(1, -(-(max(lengths) + 1) // BINS))
    counts = torch.bincount(torch.tensor(lengths) // step).tolist()
    width = max(20, shutil.get_terminal_size().columns - 30)
    for place, count in enumerate(counts):
        bar = "#" * -(-count * width // max(counts))
        mark = "  < max_length" if place == max_length // step else ""
        yield f"{place * step:>7}-{(place + 1) * step - 1:<7}{count:>8} {bar}{mark}"
    quantiles = torch.tensor(lengths).double().quantile(torch.tensor([0.5, 0.9, 0.99, 1.0]).double()).tolist()
    names = ("median", "90 %", "99 %", "longest")
    yield "  ".join(f"{name} {value:.0f}" for name, value in zip(names, quantiles, strict=True))


def _duplicates(loaded: Loaded) -> Iterator[str]:
    first: dict[bytes, str] = {}
    repeated = []
    for where, example in zip(loaded.wheres, loaded.examples, strict=True):
        key = example.numpy().tobytes()
        if key in first:
            repeated.append(f"{where} repeats {first[key]}")
        first.setdefault(key, where)
    if repeated:
        yield f"{len(repeated)} examples are duplicates; the first: {printable(repeated[0], 10_000)}"


def _spread(total: int, count: int) -> list[int]:
    """Up to `count` positions from 0 to `total`, the first one first."""
    count = min(count, total)
    return [place * total // count for place in range(count)]


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if is_passing(error):
            raise
        raise InputError(f"--tokenizer {name}: cannot be loaded: {error}") from error
