"""The table of ``docs/tuners.md`` from a report of ``make test-matrix``: ``python tests/helpers/tuner_table.py X``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

DOCUMENT = Path(__file__).parents[2] / "docs" / "tuners.md"
HEADING = "## The table\n"

#: Columns, and the tests that stand behind them; ``{}`` is the configuration.
COLUMNS = {
    "NF4, 2 ranks, resumed on 1": "test_trains_resumes_and_reloads_as_stock_peft[{}]",
    "NF4, 1, resumed on 3": "test_on_other_ranks_and_formats[{}-nf4-1-3]",
    "NF4, 3, resumed on 2": "test_on_other_ranks_and_formats[{}-nf4-3-2]",
    "dense, 1, resumed on 3": "test_on_other_ranks_and_formats[{}-dense-1-3]",
    "dense, 3, resumed on 2": "test_on_other_ranks_and_formats[{}-dense-3-2]",
    "bf16-true": "test_in_bf16[{}-bf16-true]",
    "bf16-mixed": "test_in_bf16[{}-bf16-mixed]",
    "merge": "test_every_tuner[{}]",
}


def outcomes(report: Path) -> dict[str, bool]:
    """Whether each test of a junit report passed."""
    return {
        case.attrib["name"]: not any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        for case in ElementTree.parse(report).iter("testcase")
    }


def table(passed: dict[str, bool]) -> str:
    """Rows of the configurations that were tested."""
    first = re.escape(next(iter(COLUMNS.values()))).replace(r"\{\}", "(.+)")
    names = [found.group(1) for name in passed if (found := re.fullmatch(first, name))]

    def cell(test: str) -> str:
        return {True: "yes", False: "**no**", None: "-"}[passed.get(test)]

    lines = [f"| configuration | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in names:
        lines.append(f"| {name} | {' | '.join(cell(test.format(name)) for test in COLUMNS.values())} |")
    return "\n".join(lines)


def main() -> None:
    before, _, _ = DOCUMENT.read_text().partition(HEADING)
    text = """
Made by `make test-matrix` on tiny models (`tests/helpers/tuners.py` has the configurations). "Yes" under a number of
ranks: three steps and a checkpoint there, two more after resuming, all losses equal to those of stock PEFT in one
process on the same decoded weights to 1e-5, and `adapter/` gives the same logits in stock PEFT (Lily and PVeRA:
3e-3, VeLoRA and Poly: 1e-3, since they depend on the ranks). Under a precision: losses within 1e-2 of those in fp32.
Under merge: bit for bit PEFT's `merge_and_unload`; "-" cannot be merged.

"""
    DOCUMENT.write_text(before + HEADING + text + table(outcomes(Path(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
