"""A layout that no other module knows: trained, saved, resumed on other ranks, forecast, and a LoRA for stock PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.ranks import run_ranks
from helpers.training import STEPS, CausalLM, loader, make_strategy, make_trainer, tokens
from lowrank_dist import NF4, AdapterCheckpoint, LoRAXS
from lowrank_dist.decomposition.walk import Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import ModelError
from lowrank_dist.forecast.checkpoint import checkpoint_bytes
from lowrank_dist.forecast.job import ModelShapes, RunSpec, parameters
from lowrank_dist.model.factor_layout import FactorLayout
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.residual_model.create import decompose
from lowrank_dist.storage.reader import CheckpointReader

CUT = 3


@dataclass(frozen=True, kw_only=True)
class Gains(FactorLayout):
    """``B diag(g) A``: A is frozen, B and g are trained."""

    trained: ClassVar[tuple[str, ...]] = ("lora_B",)
    further: ClassVar[tuple[str, ...]] = ("gains",)
    adds_product: ClassVar[bool] = False

    def shapes(self, planned: PlannedMatrix) -> dict[str, tuple[int, ...]]:
        return {"gains": (planned.rank,)}

    def initial(self, planned: PlannedMatrix) -> dict[str, Tensor]:
        return {"gains": torch.arange(1.0, planned.rank + 1) * 1e-3}

    def multiply(self, x: Tensor, b: Tensor, further: Any) -> Tensor:
        return (x * further["gains"]) @ b.mT

    def folded(self, b: Tensor, further: Any) -> Tensor:
        return b * further["gains"]

    def facts(self) -> dict[str, Any]:
        return {"gains": True}


@dataclass(frozen=True, kw_only=True)
class WithGains(LoRAXS):
    @property
    def layout(self) -> FactorLayout:
        return Gains()


class Evaluated(CausalLM):
    logits: Tensor

    def on_train_end(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.logits = self.model(input_ids=tokens()[0], use_cache=False).logits


def train(pretrained: Path, output: Path, quantization: Any, first: int = 0) -> dict[str, Any]:
    strategy = make_strategy(pretrained, init=WithGains(), quantization=quantization)
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    trainer = make_trainer(strategy, callbacks=[callback], enable_checkpointing=True)
    module = Evaluated(pretrained)
    batches = loader(trainer.global_rank, trainer.world_size, STEPS, first=first)
    trainer.fit(module, batches, ckpt_path=output / f"step={CUT}" if first else None)
    trained = {name: tuple(p.ds_shape) for name, p in module.model.named_parameters() if p.requires_grad}
    return {"losses": module.losses, "logits": module.logits, "trained": trained}


@pytest.mark.parametrize("quantization", [None, NF4()], ids=str)
def test_a_layout_is_one_class(llama: Path, tmp_path: Path, quantization: Any) -> None:
    """Losses after resuming to the rounding of sums over other numbers of ranks."""
    whole = run_ranks(2, train, llama, tmp_path, quantization)[0]
    assert {name.rpartition(".lora_B.default.")[2] for name in whole["trained"]} == {"weight", "gains"}
    assert whole["losses"][-1] != pytest.approx(whole["losses"][0], rel=1e-4)
    checkpoint = tmp_path / f"step={CUT}"

    shapes = ModelShapes.of(llama, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    residual = NF4()
    job = RunSpec(
        nodes=1,
        gpus_per_node=2,
        factor_dtype=torch.float32,
        compute_dtype=torch.float32,
        init=WithGains(),
        residual=residual,
    )
    assert {p.name for p in parameters(shapes, job) if p.kind == "trained"} == whole["trained"].keys()
    written = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors") if path.name != "state.safetensors")
    assert checkpoint_bytes(shapes, job) == written

    rest = run_ranks(3, train, llama, tmp_path, quantization, CUT)[0]
    assert rest["losses"] == pytest.approx(whole["losses"][CUT:], rel=1e-5)
    if quantization is None:
        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / f"step={STEPS}" / "lora").eval()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens()[0]).logits, rest["logits"], rtol=1e-4, atol=1e-5)


def test_residual_models_that_could_not_say_so_are_refused(llama: Path, tmp_path: Path) -> None:
    residual = Dense(dtype=torch.float32)
    walk = Walk(
        CheckpointReader(llama), ShardGroup.single(), init=WithGains(), residual=residual, factor_dtype=torch.float32
    )
    with pytest.raises(
        ModelError, match=r"WithGains: the manifest .* has no entry for Gains\(\); train without saving"
    ):
        decompose(Plan(), walk, tmp_path / "out", adapter=LoraConfig(r=4), base=str(llama))
    assert not (tmp_path / "out").exists()
