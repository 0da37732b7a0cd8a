"""Ranks whose tokens choose different experts: the same collectives, and the gradients of stock PEFT, each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks
from helpers.traffic import Traffic
from helpers.training import CausalLM, dense_state, make_strategy, make_trainer
from lowrank_dist.layers.experts import AdaptedParameter
from lowrank_dist.layers.grouped import Group
from lowrank_dist.zero3.partition import gathered

EXPERTS, LENGTH = 8, 12
ADAPTER = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {"q_proj": 5},
}


@dataclass(frozen=True)
class Way:
    """How a model computes."""

    implementation: str
    at_a_time: int
    options: tuple[tuple[str, Any], ...] = ()


WAYS = {
    "eager": Way("eager", 1),
    "eager, without checkpointing": Way("eager", 1, (("gradient_checkpointing", False),)),
    "grouped": Way("grouped_mm", 3),
    "grouped, all, without checkpointing": Way("grouped_mm", EXPERTS, (("gradient_checkpointing", False),)),
    "batched, reentrant": Way("batched_mm", 2, (("use_reentrant", True),)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose tokens choose the experts ``t % 8`` and ``(t + 1) % 8``."""
    found = {}
    sizes = {"qwen3_moe": {"num_experts": EXPERTS}, "gpt_oss": {"num_local_experts": EXPERTS}}
    for architecture, size in sizes.items():
        base = save_checkpoint(tmp_path_factory.mktemp(architecture), architecture, tie_word_embeddings=False, **size)
        for file in base.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                    tensor.zero_()
                    for expert in range(EXPERTS):
                        tensor[expert, expert], tensor[(expert + 1) % EXPERTS, expert] = 1, 0.5
                elif name.endswith("embed_tokens.weight"):
                    tensor[torch.arange(256), torch.arange(256) % EXPERTS] += 3
            save_file(tensors, file, metadata={"format": "pt"})
        found[architecture] = base
    return found


def tokens(ranks: int) -> Tensor:
    """``[ranks, 2, LENGTH]``; those of rank r choose experts 2 r and 2 r + 1. Nobody chooses the last two."""
    ids = torch.randint(0, 31, (ranks, 2, LENGTH), generator=torch.Generator().manual_seed(3))
    return EXPERTS * ids + 2 * torch.arange(ranks)[:, None, None]


class Descending(CausalLM):
    """One step of gradient descent at a rate of 1: parameters change by their gradients."""

    def __init__(self, pretrained: Path, implementation: str) -> None:
        super().__init__(pretrained)
        self.implementation = implementation

    def configure_model(self) -> None:
        if self.model is None:
            config = AutoConfig.from_pretrained(self.pretrained)
            self.model = AutoModelForCausalLM.from_config(config, experts_implementation=self.implementation)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


@dataclass
class Outcome:
    """Of one way on one rank."""

    state: dict[str, Tensor]
    after: dict[str, Tensor]
    collectives: list[Any]
    chosen: set[int]
    most: int
    routers: dict[str, Tensor]


@alone
def descend(base: Path, ways: list[Way]) -> list[Outcome]:
    outcomes = []
    decode_experts = AdaptedParameter.decode_experts
    decoded: list[list[int]] = []

    def counted(self: AdaptedParameter, group: Group, dtype: torch.dtype) -> Tensor:
        decoded.append(list(group.experts))
        return decode_experts(self, group, dtype)

    AdaptedParameter.decode_experts = counted
    traffic = Traffic()
    for way in ways:
        module = Descending(base, way.implementation)
        strategy = make_strategy(
            base,
            adapter=LoraConfig(**ADAPTER),
            quantization=None,
            experts_at_a_time=way.at_a_time,
            **dict(way.options),
        )
        trainer = make_trainer(strategy, steps=1)
        mine = tokens(trainer.world_size)[trainer.global_rank]
        decoded.clear()
        traffic.calls.clear()
        trainer.fit(module, DataLoader(TensorDataset(mine), batch_size=len(mine)))
        calls, experts = list(traffic.calls), [one for group in decoded for one in group]
        most = max(map(len, decoded))
        assert module.model.config._experts_implementation == way.implementation
        state = dense_state(strategy)
        names = {id(one): name for name, one in module.model.named_modules()}
        for layer in module.model.modules():
            if isinstance(layer, AdaptedParameter):
                with gathered(layer.stored()):
                    weights = decode_experts(layer, Group.of(range(layer.experts)), torch.float32).clone()
                state[f"{names[id(layer.owner())]}.{layer.parameter}"] = weights
        after = {}
        for name, parameter in module.model.named_parameters():
            if parameter.requires_grad:
                with gathered([parameter]):
                    after[name] = parameter.detach().clone()
        routers = {name: value for name, value in state.items() if ".router." in name or ".gate." in name}
        state = {name: value for name, value in state.items() if "weight_rows" not in name}
        outcomes.append(Outcome(state, after, calls, set(experts), most, routers))
    return outcomes


def gradients_of_peft(base: Path, state: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Those of stock PEFT in one process, by the names of the parameters."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(**ADAPTER), model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    trained = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    loss = model(input_ids=ids, labels=ids).loss
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize(
    ("architecture", "ranks", "names"),
    [
        ("qwen3_moe", 2, list(WAYS)),
        ("qwen3_moe", 3, ["eager, without checkpointing", "grouped"]),
        ("gpt_oss", 2, ["grouped"]),
        pytest.param("qwen3_moe", 1, list(WAYS), marks=pytest.mark.matrix),
        pytest.param("qwen3_moe", 3, list(WAYS), marks=pytest.mark.matrix),
        pytest.param("gpt_oss", 1, list(WAYS), marks=pytest.mark.matrix),
        pytest.param("gpt_oss", 3, list(WAYS), marks=pytest.mark.matrix),
    ],
)
def test_every_gradient_where_ranks_choose_other_experts(
    bases: dict[str, Path], architecture: str, ranks: int, names: list[str]
) -> None:
    """fp32; also of experts that a rank, or nobody, has tokens for: these are zero. Routers stay as they are."""
    base = bases[architecture]
    ways = [WAYS[name] for name in names]
    by_rank = run_ranks(ranks, descend, base, ways)
    expected = gradients_of_peft(base, by_rank[0][0].state, tokens(ranks).flatten(0, 1))
    stored = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for index, way in enumerate(ways):
        of_ranks = [outcomes[index] for outcomes in by_rank]
        for rank, outcome in enumerate(of_ranks):
            assert outcome.chosen == {2 * rank, 2 * rank + 1}
            assert outcome.most <= way.at_a_time
            assert outcome.collectives == of_ranks[0].collectives
        first = of_ranks[0]
        assert first.after.keys() == expected.keys()
        for name, gradient in expected.items():
            found = first.state[name] - first.after[name]
            scale = float(gradient.abs().max())
            assert scale > 0
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * scale + 2e-7, msg=f"{way}: {name}")
            if ".experts." in name and "lora_A" in name:
                unused = found.unflatten(0, (EXPERTS, -1))[2 * ranks :]
                assert float(unused.abs().max()) == 0
        assert first.routers
        for name, weight in first.routers.items():
            assert torch.equal(weight, stored[name])
