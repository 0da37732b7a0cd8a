"""What a task finds and says: the interface of a route, lines with their origin."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lowrank_dist.slurm.environment import PrefixedStream, interface_to


def test_lines_begin_with_their_origin(capsys: pytest.CaptureFixture[str]) -> None:
    stream: Any = PrefixedStream(sys.stdout, "[n 1] ")
    for text in ("one\ntw", "o\n", "\n", "three"):
        print(text, end="", file=stream)
    assert capsys.readouterr().out == "[n 1] one\n[n 1] two\n[n 1] \n[n 1] three"


def test_the_interface_of_a_route() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("::1") is None  # IPv4 only
