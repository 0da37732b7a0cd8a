"""Prints pip constraints: the lowest versions that ``pyproject.toml`` admits, of what the package needs to run.

``python tests/helpers/lowest.py TORCH`` pins torch to TORCH instead: of most releases a package index has CUDA builds
only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
EXTRAS = ("slurm",)


def lowest(torch: str) -> Iterator[str]:
    project = tomllib.loads(PROJECT.read_text())["project"]
    requirements = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    for requirement in requirements:
        found = re.match(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"{PROJECT.name}: {requirement!r} has no lower bound; begin with name>=version")
        name, version = found.groups()
        yield f"{name}=={torch if name == 'torch' else version}"


if __name__ == "__main__":
    print(*lowest(sys.argv[1]), sep="\n")
