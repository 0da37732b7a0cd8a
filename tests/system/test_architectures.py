"""Families of transformers models against stock transformers and PEFT: step 0, losses, the LoRA that is saved.

A fifth of the families, spread over all kinds, is tried by default, each once: dense weights on two ranks, or NF4 on
one. ``make test-matrix`` tries every family dense and in NF4, on one and on two ranks, and writes the table of
the documentation's page of compatibility anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.families import FAMILIES, Family
from helpers.family_runs import answer, apart, compare, train
from helpers.family_table import DOCUMENT
from helpers.ranks import run_ranks
from lowrank_dist import NF4

# PEFT and transformers warn of tied weights, of heads that are new, of renamed options
pytestmark = pytest.mark.filterwarnings("ignore")

FORMATS = {"dense": None, "nf4": NF4()}
#: fp32: only the order of sums differs. A step of Adam turns the sign of a gradient of rounding into one of lr.
TOLERANCES = {"step 0": 2e-5, "losses": 2e-5, "lora": 1e-4}
#: Routers choose experts by values that two orders of summation may put in another order.
ROUTED = {"phimoe": 2e-4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family; only the last one is kept."""
    last: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in last:
            for directory in last.values():
                shutil.rmtree(directory)
            last.clear()
            last[name] = FAMILIES[name].save(tmp_path_factory.mktemp("family"))
        return last[name]

    return of


def check(pretrained: Path, name: str, output: Path, quantization: NF4 | None, ranks: int) -> None:
    family = FAMILIES[name]
    runs = run_ranks(ranks, train, pretrained, family, output, quantization, "32-true", {})
    found = compare(pretrained, family, output, quantization, runs)
    for what, tolerance in TOLERANCES.items():
        assert found[what] <= max(tolerance, ROUTED.get(name, 0)), (what, found)
    assert found["learned"] > 1e-3, found


@pytest.mark.parametrize("name", list(FAMILIES)[::5])
def test_a_fifth(saved: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Every other one dense on two ranks, the others in NF4 on one."""
    dense = list(FAMILIES).index(name) % 2 == 0
    check(saved(name), name, tmp_path, None if dense else NF4(), 2 if dense else 1)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_all(saved: Callable[[str], Path], tmp_path: Path, name: str, fmt: str, ranks: int) -> None:
    check(saved(name), name, tmp_path, FORMATS[fmt], ranks)


@pytest.mark.parametrize("kind", ["minimax", "xglm"])
def test_buffers_in_bf16(tmp_path: Path, kind: str) -> None:
    """Decays and sinusoidal positions of a checkpoint in fp32 have the dtype of the arithmetic, as in transformers."""
    family = Family(kind)
    base = family.save(tmp_path / "base")
    for run in run_ranks(1, train, base, family, tmp_path / "out", None, "bf16-true", {}):
        stock = family.auto_class.from_pretrained(base, dtype=torch.bfloat16)
        batch = family.batches(stock.config, 1)[0]
        with torch.no_grad():
            assert apart(run.first, answer(stock.eval()(**batch))) < 5e-2
        assert apart(run.last, run.first) > 1e-2


@pytest.mark.parametrize(
    ("kind", "changes"), [("gptj", {"rotary_dim": 8}), ("gemma", {"hidden_size": 48}), ("xglm", {})]
)
def test_buffers_of_a_model_in_bf16(tmp_path: Path, kind: str, changes: dict[str, int]) -> None:
    """In 32-true, rotary tables, scales and positions are not those that a configuration in bf16 would have rounded."""
    family = Family(kind, config=changes)
    base = family.save(tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    (run,) = run_ranks(1, train, base, family, tmp_path / "out", None, "32-true", {})
    stock = family.auto_class.from_pretrained(base, dtype=torch.float32)
    batch = family.batches(stock.config, 1)[0]
    with torch.no_grad():
        assert apart(run.first, answer(stock.eval()(**batch))) < 1e-6


def test_the_documentation_has_a_row_for_each() -> None:
    assert list(json.loads(DOCUMENT.read_text(encoding="utf-8"))) == list(FAMILIES), "run `make test-matrix`"
