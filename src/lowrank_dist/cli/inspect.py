"""``lowrank-dist inspect``: print a `lowrank_dist.storage.inspect.Description` as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_dist.cli.units import size
from lowrank_dist.progress import aligned
from lowrank_dist.storage.inspect import Description, inspect
from lowrank_dist.storage.parse import printable


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist inspect``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    found = inspect(options.path, verify=options.verify)
    print(json.dumps(found.as_dict(), indent=2) if options.json else as_table(found))
    return 1 if options.verify and not found.complete else 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist inspect``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist inspect",
        description="Describe a checkpoint, residual model, adapter, model, or directory of these. Only headers are "
        "read, no weights, but for --verify. Exit status 1 with --verify: something is missing or damaged.",
    )
    parser.add_argument("path", help="directory, or hub id in the cache")
    parser.add_argument("--verify", action="store_true", help="read all tensors and compare them with their hashes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def as_table(found: Description) -> str:
    """One line per fact, then one line per item of a directory."""
    facts = {"kind": found.kind, "written": _seconds(found.modified), **found.facts}
    if "bytes" not in facts:
        facts["bytes"] = found.nbytes
    facts["complete"] = "yes" if found.complete else "no: " + "; ".join(found.problems)
    rows = [[name, _value(name, value)] for name, value in facts.items()]
    lines = [found.path, *(f"  {line}" for line in aligned(rows))]
    if found.contents:
        items = []
        for item in found.contents:
            step = f"step {item.facts['step']}" if "step" in item.facts else ""
            state = "" if item.complete else "incomplete: " + "; ".join(item.problems)
            items.append([Path(item.path).name, item.kind, _seconds(item.modified), size(item.nbytes), step, state])
        lines += ["", *(f"  {line}" for line in aligned(items, right=[3]))]
    return "\n".join(printable(line, 10_000) for line in lines)


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(name, inner)}" for key, inner in value.items())
    if isinstance(value, list):  # names of layers: print the distinct last parts with their counts
        count = Counter(str(item).rpartition(".")[2] for item in value)
        return ", ".join(name if times == 1 else f"{name} ({times} times)" for name, times in count.items())
    if name == "bytes":
        return size(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _seconds(iso: str) -> str:
    return iso.partition(".")[0].replace("T", " ") + " UTC"
