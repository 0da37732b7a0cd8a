"""The drawn figures of the documentation are those that their program draws."""

from __future__ import annotations

import importlib.util

import pytest

from helpers.command import ROOT


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_walk(theme: str) -> None:
    spec = importlib.util.spec_from_file_location("walk_figure", ROOT / "docs" / "_extensions" / "walk_figure.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    drawn = program.drawing(program.THEMES[theme])
    assert (ROOT / "docs" / "_static" / f"walk-{theme}.svg").read_text(encoding="utf-8") == drawn
