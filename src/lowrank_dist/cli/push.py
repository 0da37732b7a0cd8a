"""``lowrank-dist push``: publish a LoRA or a merged model with its model card."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from lowrank_dist.cli.output import add_overwrite
from lowrank_dist.errors import InputError
from lowrank_dist.export.card import CARD, About, Scores
from lowrank_dist.export.publish import publication
from lowrank_dist.inference.scores import measured
from lowrank_dist.storage.layout import read_json
from lowrank_dist.storage.parse import Record


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist push``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    if options.output is None and options.repo_id is None:
        raise InputError("pass --output DIR to see what would be uploaded, --repo_id ORG/NAME to upload it, or both")
    if options.repo_id is None:
        for name in ("private", "revision", "commit_message"):
            if getattr(options, name):
                raise InputError(f"--{name} is for an upload; pass --repo_id")
    about = About(
        base_model=options.base_model,
        title=options.title or (options.repo_id or Path(options.source).resolve().name).rpartition("/")[2],
        datasets=tuple(options.dataset),
        license=options.license,
        scores=None if options.scores is None else read_scores(Path(options.scores)),
    )
    made = publication(options.source, about)
    if options.output is not None:
        made.write(options.output, overwrite=options.overwrite)
        print(Path(options.output, CARD))
    if options.repo_id is not None:
        message = options.commit_message or "Upload with lowrank-dist push"
        print(made.upload(options.repo_id, private=options.private, revision=options.revision, message=message))
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist push``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist push",
        description="Write a model card (base, method, what quantization lost, data, scores) beside a LoRA or a merged "
        "model, into a directory to look at, or upload both to the Hugging Face hub. Only weights, configuration, "
        "tokenizer and licence are published; names of directories of this machine are left out.",
    )
    parser.add_argument("source", help="directory that convert or merge wrote")
    parser.add_argument("--output", help="directory to write: what is, or would be, uploaded")
    add_overwrite(parser)
    parser.add_argument("--repo_id", help="repository of the hub, ORG/NAME; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument("--revision", help="branch to upload to; it is made if it is not there (default: main)")
    parser.add_argument("--commit_message", help="message of the commit")
    parser.add_argument("--base_model", help="hub id of the original model, if the run read it from a directory")
    parser.add_argument("--title", help="heading of the card (default: the name of the repository or directory)")
    parser.add_argument("--dataset", action="append", default=[], help="name of the training data; may be repeated")
    parser.add_argument("--license", help="licence of what is published, as the hub names it, such as apache-2.0")
    parser.add_argument("--scores", help="results that evaluate --output wrote")
    return parser


def read_scores(path: Path) -> Scores:
    """Scores by model, from the file that ``lowrank-dist evaluate --output`` wrote.

    Raises
    ------
    InputError, CheckpointError
        If it is another file.
    """
    stages = read_json(path).record("stages")
    if not stages:
        raise InputError(f"{path}: holds no `stages`; pass the file that evaluate --output wrote")
    return {stage: _values(stages.record(stage).record("results")) for stage in stages}


def _values(results: Record) -> dict[tuple[str, str], tuple[float, float | None]]:
    return {
        (task, metric if kind == "none" else f"{metric} ({kind})"): (value, error)
        for task in results
        for metric, kind, value, error in measured(results.record(task))
        if math.isfinite(value)
    }
