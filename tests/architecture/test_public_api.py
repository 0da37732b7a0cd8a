"""What is public is listed, importable, documented, and stays small."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import lowrank_dist

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
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", ["lowrank_dist", "lowrank_dist.export"])
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
