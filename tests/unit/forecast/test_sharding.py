"""The smallest group of ranks within which a run fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig

from lowrank_dist import NF4, LoRA
from lowrank_dist.forecast import ModelShapes, RunSpec, forecast
from lowrank_dist.forecast.sharding import MARGIN, alternatives, choose_sharding

MODELS = Path(__file__).parents[3] / "configs" / "models"
JOB = RunSpec(nodes=4, gpus_per_node=8, init=LoRA(), residual=NF4(double_quant=True))


@pytest.fixture(scope="module")
def shapes() -> ModelShapes:
    adapter = LoraConfig(r=128, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    return ModelShapes.of(MODELS / "Meta-Llama-3-8B.json", adapter)


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [
        (4, 8, ["rank", "node", "world"]),
        (1, 8, ["rank", "world"]),
        (4, 1, ["node", "world"]),
        (1, 1, ["world"]),
    ],
)
def test_groups_of_the_same_size_are_one_alternative(nodes: int, gpus: int, expected: list[str]) -> None:
    assert alternatives(replace(JOB, nodes=nodes, gpus_per_node=gpus)) == expected


def test_the_smallest_that_fits_with_the_margin(shapes: ModelShapes) -> None:
    """With just as much memory as a group needs it is taken; with a little less, the next one."""
    peaks = choose_sharding(shapes, JOB, None).peaks
    assert list(peaks) == ["rank", "node", "world"]
    assert peaks["rank"] > peaks["node"] > peaks["world"]
    larger = {"rank": "node", "node": "world", "world": "world"}
    for within, peak in peaks.items():
        enough = int(peak / (1 - MARGIN)) + 2
        assert choose_sharding(shapes, JOB, enough).within == within
        assert choose_sharding(shapes, JOB, enough - 4).within == larger[within]
    assert choose_sharding(shapes, JOB, None).within == "world"


def test_a_peak_is_that_of_the_forecast(shapes: ModelShapes) -> None:
    choice = choose_sharding(shapes, JOB, 80 * 10**9)
    for within, peak in choice.peaks.items():
        found = forecast(shapes, replace(JOB, shard_within=within), limit=80 * 10**9)
        assert found.sharding == choice
        assert found.memory.peak == peak
        assert found.as_dict()["shard_within"] == {"used": within, "smallest": "rank", "peaks": choice.peaks}
    assert str(choice).startswith("rank (forecast peaks: rank ")
    assert str(choice).endswith("GB; 80.0 GB available, 10% kept free)")


def test_larger_groups_are_remedies(shapes: ModelShapes) -> None:
    limit = choose_sharding(shapes, JOB, None).peaks["node"]
    found = forecast(shapes, replace(JOB, shard_within="rank"), limit=limit)
    assert found.fits is False
    assert "shard_within: node" in found.remedies
