"""Results of the matrix of families for the documentation: ``python tests/helpers/family_table.py REPORT``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from helpers.families import FAMILIES, TASKS
from helpers.tuner_table import outcomes

DOCUMENT = Path(__file__).parents[2] / "docs" / "_extensions" / "families.json"
_TESTED = re.compile(r"test_all\[(?P<name>.+)-(?P<fmt>dense|nf4)-(?P<ranks>\d)\]")


def results(passed: dict[str, bool]) -> dict[str, dict[str, object]]:
    """By family: its class, and by format and ranks whether its test passed; only what was tried."""
    table: dict[str, dict[str, object]] = {name: {"class": TASKS[family.task][0]} for name, family in FAMILIES.items()}
    for test, ok in passed.items():
        found = _TESTED.fullmatch(test)
        if found is not None and found["name"] in table:
            table[found["name"]][f"{found['fmt']}, {found['ranks']}"] = ok
    return table


def main() -> None:
    DOCUMENT.write_text(json.dumps(results(outcomes(Path(sys.argv[1]))), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
