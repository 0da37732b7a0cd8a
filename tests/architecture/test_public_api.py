"""What is public is listed, importable, documented, and stays small."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from io import StringIO
from pathlib import Path

import pytest

import lowrank_dist
from helpers.ranks import alone, run_ranks

MODULES = ("methods", "quantization", "linalg", "storage", "export", "callbacks", "errors")


def test_the_root_says_what_is_public() -> None:
    text = lowrank_dist.__doc__ or ""
    assert all(f"`lowrank_dist.{module}`" in text for module in MODULES)


@pytest.mark.parametrize("module", ["lowrank_dist", *(f"lowrank_dist.{name}" for name in MODULES)])
def test_public_names_are_there_and_documented(module: str) -> None:
    found = importlib.import_module(module)
    for name in found.__all__:
        value = getattr(found, name)
        if callable(value):
            text = inspect.getdoc(value) or ""
            assert text, f"{module}.{name} has no docstring"
            missing = [section for section in ("Examples", "See Also") if section not in text]
            assert not missing, f"the docstring of {module}.{name} has no {' and no '.join(missing)}"


@alone
def failing_examples() -> list[str]:
    """What doctest reports of the public names, in a process of its own: an example registers a method."""
    modules = map(importlib.import_module, ["lowrank_dist", *(f"lowrank_dist.{name}" for name in MODULES)])
    values = {id(value): value for module in modules for value in (getattr(module, name) for name in module.__all__)}
    reports = []
    for value in filter(callable, values.values()):
        for test in doctest.DocTestFinder(recurse=False).find(value, value.__name__):
            report = StringIO()
            if doctest.DocTestRunner(verbose=False).run(test, out=report.write).failed:
                reports.append(report.getvalue())
    return reports


def test_the_examples_run() -> None:
    """Those that need a trained checkpoint are marked ``+SKIP``; the others print what they say."""
    (reports,) = run_ranks(1, failing_examples)
    assert not reports, "\n".join(reports)


@pytest.mark.parametrize("module", ["lowrank_dist", "lowrank_dist.export", "lowrank_dist.storage"])
def test_type_checkers_see_what_is_imported_lazily(module: str) -> None:
    found = importlib.import_module(module)
    tree = ast.parse(Path(str(found.__file__)).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(found.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lowrank_dist' has no attribute 'PiSA'"):
        lowrank_dist.PiSA  # noqa: B018
