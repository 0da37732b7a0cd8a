"""Optimizers and learning rates of `CausalLMModule` on ranks, against one process without Lightning or DeepSpeed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint
from helpers.ranks import run_ranks
from helpers.training import STEPS, initial_factors, make_strategy, make_trainer, tokens
from lowrank_dist import AdapterCheckpoint, CausalLMModule, LoRA
from lowrank_dist.errors import InputError

CUT = 5
PLAIN: dict[str, Any] = {"init": LoRA(), "quantization": None}
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
RUNS: dict[str, dict[str, Any]] = {
    "LoRA+": {"loraplus_lr_ratio": 4.0, "embedding_lr": 5e-4, "norm_lr": 4e-3, "weight_decay": 0.1},
    "LoRA+ with Adagrad": {"optimizer": "torch.optim.Adagrad", "loraplus_lr_ratio": 0.5, "lr": 2e-3},
    "NAdam": {"optimizer": "torch.optim.NAdam", "optimizer_options": {"betas": [0.8, 0.99]}},
    "ASGD": {"optimizer": "torch.optim.ASGD", "optimizer_options": {"t0": 2}, "lr": 0.05},
    "Lion": {"optimizer": "bitsandbytes.optim.Lion", "lr": 2e-4},
    "Muon": {"optimizer": "muon", "loraplus_lr_ratio": 2.0, "weight_decay": 0.1, "lr": 2e-3},
    "AdEMAMix": {"optimizer": "bitsandbytes.optim.AdEMAMix", "optimizer_options": {"t_alpha": 6, "t_beta3": 6}},
}


def adapter(options: dict[str, Any]) -> LoraConfig:
    """With trained norms, unless only matrices can be trained."""
    saved = None if options.get("optimizer") == "muon" else ["norm"]
    return LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, modules_to_save=saved)


class Tuned(CausalLMModule):
    """Keeps the losses of its steps."""

    def __init__(self, pretrained: Path, options: dict[str, Any]) -> None:
        super().__init__(str(pretrained), **{"lr": 1e-3, "warmup_ratio": 0.25, **options})
        self.losses: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["train_loss"]))


def batches(rank: int, world_size: int, first: int = 0) -> DataLoader:
    mine = tokens().roll(-first, dims=0).unflatten(1, (world_size, -1))[:, rank]
    return DataLoader([{"input_ids": ids, "labels": ids} for ids in mine], batch_size=None)


@torch.compiler.set_stance("force_eager")  # DeepSpeed's Muon is compiled, for which not every machine has a compiler
def begin(pretrained: Path, output: Path) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Every run to its end, with a checkpoint at the cut: losses, and A and B as they were before."""
    found = {}
    for name, options in RUNS.items():
        callback = AdapterCheckpoint(dirpath=output / name, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
        module = Tuned(pretrained, options)
        strategy = make_strategy(pretrained, adapter=adapter(options), **PLAIN)
        trainer = make_trainer(strategy, callbacks=[callback], enable_checkpointing=True)
        trainer.fit(module, batches(trainer.global_rank, trainer.world_size))
        found[name] = (module.losses, initial_factors(strategy))
    return found


@torch.compiler.set_stance("force_eager")
def go_on(pretrained: Path, output: Path) -> dict[str, list[float]]:
    """Every run from its checkpoint: the losses of the remaining steps."""
    found = {}
    for name, options in RUNS.items():
        module = Tuned(pretrained, options)
        trainer = make_trainer(make_strategy(pretrained, adapter=adapter(options), **PLAIN))
        rest = batches(trainer.global_rank, trainer.world_size, first=CUT)
        trainer.fit(module, rest, ckpt_path=output / name / f"step={CUT}")
        found[name] = module.losses
    return found


@torch.compiler.set_stance("force_eager")
def in_one_process(pretrained: Path, options: dict[str, Any], factors: dict[str, Tensor]) -> list[float]:
    """The same factors in stock transformers and PEFT, with the optimizer that the module makes for them."""
    module = Tuned(pretrained, options)
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    inject_adapter_in_model(adapter(options), model)
    assert len(factors) == len([name for name, _ in model.named_parameters() if "lora_" in name])
    assert not model.load_state_dict(factors, strict=False).unexpected_keys
    module.model = model
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SimpleNamespace(root_device=torch.device("cpu")), estimated_stepping_batches=STEPS
    )
    made = module.configure_optimizers()
    losses = []
    for ids in tokens():
        made["optimizer"].zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        losses.append(loss.item())
    return losses


def test_every_run_is_that_of_one_process_and_resumes(tmp_path: Path) -> None:
    """To fp32 rounding of sums over other numbers of ranks."""
    pretrained = save_checkpoint(tmp_path / "llama", "llama", tie_word_embeddings=False)
    found = run_ranks(2, begin, pretrained, tmp_path, timeout=600)[0]
    resumed = {ranks: run_ranks(ranks, go_on, pretrained, tmp_path, timeout=600)[0] for ranks in (1, 2)}
    for name, (losses, factors) in found.items():
        assert losses == pytest.approx(in_one_process(pretrained, RUNS[name], factors), rel=1e-5), name
        for ranks, rest in resumed.items():
            assert rest[name] == pytest.approx(losses[CUT:], rel=1e-5), (name, ranks)
    last = sorted(losses[-1] for losses, _ in found.values())
    assert min(later - one for one, later in pairwise(last)) > 1e-4  # settings without effect would make two equal


MUON = {"optimizer": "muon", "lr": 2e-3, "optimizer_options": {"momentum": 0.9}}


@torch.compiler.set_stance("force_eager")
def in_bf16(pretrained: Path, output: Path, checkpoint: Path | None) -> list[float]:
    module = Tuned(pretrained, MUON)
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    strategy = make_strategy(pretrained, adapter=adapter(MUON))
    trainer = make_trainer(strategy, callbacks=[callback], enable_checkpointing=True, precision="bf16-true")
    first = 0 if checkpoint is None else CUT
    trainer.fit(module, batches(trainer.global_rank, trainer.world_size, first), ckpt_path=checkpoint)
    return module.losses


def test_momentum_in_bf16_resumes(tmp_path: Path) -> None:
    """The engine keeps Muon's in the dtype of reductions. On as many ranks nothing is rounded otherwise."""
    pretrained = save_checkpoint(tmp_path / "llama", "llama", tie_word_embeddings=False)
    whole = run_ranks(2, in_bf16, pretrained, tmp_path / "whole", None)[0]
    rest = run_ranks(2, in_bf16, pretrained, tmp_path / "rest", tmp_path / "whole" / f"step={CUT}")[0]
    assert rest == whole[CUT:]


class NormScaled(torch.optim.SGD):
    """Scales every tensor's step by its norm, under a name that says nothing."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])


class Idle(torch.optim.SGD):
    """Steps elsewhere, as optimizers do that step in hooks of the backward."""

    def step(self, closure: Any = None) -> None: ...


class Own(Tuned):
    """A user's module with an optimizer of its own."""

    kind: Any = NormScaled

    def configure_optimizers(self) -> Any:
        return self.kind([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class OwnIdle(Own):
    kind = Idle


def refuse(pretrained: Path) -> None:
    reads = []
    for module, message in (
        (Tuned(pretrained, {"optimizer": "torch.optim.Adafactor"}), "Adafactor would silently train differently here"),
        (Tuned(pretrained, {"optimizer": "torch.optim.Muon"}), "it orthogonalizes whole matrices"),
        (
            Tuned(pretrained, {"optimizer": "muon"}),
            r"orthogonalizes matrices, but a trained parameter has the shape \[64\]; train matrices only",
        ),
        (Own(pretrained, {}), "NormScaled would silently train differently here: on a trial its steps on shards"),
        (OwnIdle(pretrained, {}), "Idle would train nothing: on a trial its steps move nothing"),
    ):
        strategy = make_strategy(pretrained, adapter=adapter({}), untie_embeddings=True, **PLAIN)
        with pytest.raises(InputError, match=message):
            make_trainer(strategy).fit(module, batches(0, 1))
        reads.append(strategy.init_report is not None)
    assert reads == [False, False, True, True, True]  # classes given by path before weights are read


def test_optimizers_that_look_at_whole_tensors_are_refused(llama: Path) -> None:
    run_ranks(1, refuse, llama)
