"""Layouts of factors: the module and the files compute with one f(B), and manifests give every layout back."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from lowrank_dist import LoRAXS
from lowrank_dist.layers.frozen import ExtendedLinear
from lowrank_dist.model import factor_layout
from lowrank_dist.model.factor_layout import FactorLayout, SparseCore, TrainedCore, TrainedFactors, stored_layout
from lowrank_dist.model.plan import PlannedMatrix

PLANNED = PlannedMatrix(
    layer="model.q", key="model.q.weight", rows=12, columns=8, input_first=False, rank=3, scaling=1.0
)
SPARSE = [
    SparseCore(pattern="plain", off_diagonal=0, seed=0),
    SparseCore(pattern="banded", off_diagonal=1, seed=0),
    SparseCore(pattern="random", off_diagonal=1, seed=3),
]
LAYOUTS: list[FactorLayout] = [TrainedFactors(), TrainedCore(std=0.5), TrainedCore(std=0.5, seed=7), *SPARSE]


def test_all_layouts_are_tested() -> None:
    classes = [cls for _, cls in inspect.getmembers(factor_layout, inspect.isclass) if not inspect.isabstract(cls)]
    assert {type(layout) for layout in LAYOUTS} == {cls for cls in classes if issubclass(cls, FactorLayout)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_module_and_files_have_one_b(layout: FactorLayout) -> None:
    generator = torch.Generator().manual_seed(0)
    b, x = torch.randn(12, 3, generator=generator), torch.randn(5, 3, generator=generator)
    further = {
        name: value + torch.randn(value.shape, generator=generator) for name, value in layout.initial(PLANNED).items()
    }
    module = ExtendedLinear(layout, nn.Parameter(b), {name: nn.Parameter(value) for name, value in further.items()})
    torch.testing.assert_close(module(x).detach(), x @ layout.folded(b, further).mT)
    assert layout.folded(b, further).shape == b.shape
    assert layout.folded(b.to("meta"), {name: value.to("meta") for name, value in further.items()}).shape == b.shape
    assert layout.folds == bool(further)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_announced_is_what_there_is(layout: FactorLayout) -> None:
    shapes = {name: tuple(value.shape) for name, value in layout.initial(PLANNED).items()}
    assert layout.shapes(PLANNED) == shapes
    assert tuple(shapes) == layout.further
    names = [f"model.q.lora_B.default.{name}" for name in shapes]
    assert layout.parameter_shapes(PLANNED) == dict(zip(names, shapes.values(), strict=True))
    for name, value in layout.initial(PLANNED).items():  # not of the process
        assert torch.equal(layout.initial(PLANNED)[name], value)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_manifests_give_it_back(layout: FactorLayout) -> None:
    assert stored_layout({"base": "a", **layout.facts()}) == layout


@pytest.mark.parametrize("layout", SPARSE, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_a_sparse_core_has_its_entries_and_no_others(layout: SparseCore, rank: int) -> None:
    """Each of them once, in the place that the pattern says; a band that is wider than the core is all of it."""
    positions = layout.positions(rank)
    entries = torch.arange(1.0, len(positions) + 1)
    m = layout.matrix(entries, rank)
    assert torch.equal(m.flatten()[positions], entries)
    assert int((m != 0).sum()) == len(positions)
    i, j = positions // rank, positions % rank
    if layout.pattern == "random":
        d = min(layout.off_diagonal, rank - 1)
        assert len(positions) == rank * (2 * d + 1) - d * (d + 1)
        assert torch.equal(positions, layout.positions(rank))
        if rank == 7:
            assert bool(((i - j).abs() > 1).any())
            other = SparseCore(pattern="random", off_diagonal=1, seed=4)
            assert not torch.equal(positions, other.positions(rank))
    else:
        assert torch.equal(m != 0, (torch.arange(rank)[:, None] - torch.arange(rank)).abs() <= layout.off_diagonal)


def test_models_of_other_origin_have_a_and_b() -> None:
    assert stored_layout({}) == TrainedFactors()


def test_the_core_is_drawn_with_its_deviation() -> None:
    planned = PlannedMatrix(layer="q", key="q.weight", rows=512, columns=512, input_first=False, rank=256, scaling=1.0)
    core = LoRAXS(core_std=1e-3).layout.initial(planned)["core"]
    assert float(core.std()) == pytest.approx(1e-3, rel=5 / math.sqrt(2 * 256**2))  # 5 deviations of the estimate


def test_the_core_is_drawn_by_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 0 draws what runs without ``seed_everything`` draw."""
    drawn = {}
    for seed in (None, "0", "1", "2"):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if seed is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        drawn[seed] = LoRAXS(core_std=0.5).layout.initial(PLANNED)["core"]
    assert torch.equal(drawn[None], drawn["0"])
    assert torch.equal(drawn[None], TrainedCore(std=0.5).initial(PLANNED)["core"])
    assert torch.equal(drawn["1"], LoRAXS(core_std=0.5, core_seed=1).layout.initial(PLANNED)["core"])
    assert not any(torch.equal(drawn[one], drawn[other]) for one, other in (("0", "1"), ("1", "2"), ("0", "2")))


def parameters_of(*layers: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"lora_A.default.weight": (3, 8), "lora_B.default.weight": (12, 3), "lora_B.default.core": (3, 3)}
    return {
        f"{layer}.{name}": torch.randn(shape, generator=generator) for layer in layers for name, shape in shapes.items()
    }


def test_adapters_hold_b_times_the_core_of_each_layer() -> None:
    parameters = parameters_of("model.q", "model.k")
    other = {"head.modules_to_save.default.core": torch.ones(2)}  # of a module that is trained whole
    adapter = TrainedCore(std=1.0).adapter(parameters | other)
    assert torch.equal(adapter.pop("base_model.model.head.core"), other["head.modules_to_save.default.core"])
    assert len(adapter) == 4
    for layer in ("model.q", "model.k"):
        a, b, core = (
            parameters[f"{layer}.lora_{end}"] for end in ("A.default.weight", "B.default.weight", "B.default.core")
        )
        assert torch.equal(adapter[f"base_model.model.{layer}.lora_A.weight"], a)
        torch.testing.assert_close(adapter[f"base_model.model.{layer}.lora_B.weight"], b @ core)


def test_what_no_adapter_holds_is_kept_beside() -> None:
    names = [*parameters_of("model.q"), "head.modules_to_save.default.core"]
    assert list(filter(TrainedCore(std=1.0).kept_beside, names)) == ["model.q.lora_B.default.core"]
    assert not any(map(TrainedFactors().kept_beside, names))
