"""Gathers of whole decoder layers: every gradient against an unsharded model, and what a step communicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from lightning.pytorch import Callback
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.covering import covering
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.traffic import Traffic
from helpers.training import CausalLM, dense_state, loader, make_strategy, make_trainer, tokens
from lowrank_dist import LoRA
from lowrank_dist.forecast.job import ModelShapes
from lowrank_dist.zero3.partition import gathered

CHECKPOINTING = {
    "off": {"gradient_checkpointing": False},
    "non-reentrant": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Gradients(Callback):
    """Whole trained parameters, and their gradients, of every step. Collective."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
        grads = {name: safe_get_full_grad(p).clone() for name, p in trained.items()}
        with gathered(list(trained.values())):
            values = {name: p.detach().clone() for name, p in trained.items()}
        self.steps.append((values, grads))


def check_every_gradient(
    pretrained: Path, steps: int, options: dict[str, Any], module: type[CausalLM] = CausalLM
) -> int | None:
    """Fit, and compare on rank 0 with stock transformers and PEFT in one process; bytes of a layer's frozen weights.

    fp32: sums over tokens and ranks in another order; 1e-4 of the largest entry of each gradient.
    """
    record = Gradients()
    trainer = make_trainer(make_strategy(pretrained, **options), steps=steps, callbacks=[record])
    trainer.fit(module(pretrained), loader(trainer.global_rank, trainer.world_size, steps))
    state = dense_state(trainer.strategy)
    if trainer.global_rank > 0:
        return None
    assert len(record.steps) == steps
    frozen = {name: t for name, t in state.items() if name not in record.steps[0][0]}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pretrained), dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), model)
    length = getattr(module, "length", None)
    for (trained, found), ids in zip(record.steps, tokens(steps)[..., :length], strict=True):
        missing, unexpected = model.load_state_dict(frozen | trained, strict=False)
        assert not missing
        assert not unexpected
        parameters = {name: p for name, p in model.named_parameters() if name in trained}
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        assert found.keys() == expected.keys()
        assert len(found) >= 2 * len(TARGETS)
        for name, gradient in found.items():
            bound = 1e-4 * float(expected[name].abs().max())
            assert float((gradient - expected[name]).abs().max()) <= bound, name
    return sum(t.nbytes for name, t in frozen.items() if ".layers.0." in name)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("deep"), "llama", num_hidden_layers=4, tie_word_embeddings=False)


@covering(2, {"world_size": [1, 2, 3], "ahead": [0, 2], "checkpointing": CHECKPOINTING})
def test_every_gradient(deep: Path, world_size: int, ahead: int, checkpointing: str) -> None:
    """In the third step the order of gathers is known, and layers are gathered ahead."""
    options = {**CHECKPOINTING[checkpointing], "live_layers": ahead}
    run_ranks(world_size, check_every_gradient, deep, 3, options)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 171 MiB in fp32."""
    return save_checkpoint(
        tmp_path_factory.mktemp("large"),
        "llama",
        spectra=False,
        dtype=torch.bfloat16,
        max_shard_size="1GB",
        hidden_size=1536,
        intermediate_size=7680,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=3,
        tie_word_embeddings=False,
    )


class Short(CausalLM):
    """The beginning of each sequence: arithmetic of large layers takes long."""

    length = 4

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return super().training_step([ids[:, : self.length] for ids in batch], index)


@pytest.mark.parametrize("checkpointing", ["non-reentrant", pytest.param("reentrant", marks=pytest.mark.matrix)])
def test_every_gradient_with_large_buffers(large: Path, checkpointing: str) -> None:
    """The memory of a layer is given to the next ones."""
    options = {**CHECKPOINTING[checkpointing], "init": LoRA(), "quantization": None}
    layer = run_ranks(2, check_every_gradient, large, 3, options, Short)[0]
    assert layer > 165 * 2**20


class Rates(CausalLM):
    """Two parameter groups, so that DeepSpeed keeps the gradients of a layer in two places."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        groups = [{"params": [p for name, p in trained.items() if factor in name]} for factor in ("lora_A", "lora_B")]
        return torch.optim.AdamW(groups, lr=1e-3)


@alone
def reduced(pretrained: Path, options: dict[str, Any], module: type[CausalLM]) -> list[int]:
    """`check_every_gradient` of three steps; bytes of each reduce-scatter."""
    traffic = Traffic()
    check_every_gradient(pretrained, 3, options, module)
    return [nbytes for name, _, nbytes in traffic.calls if name == "reduce_scatter_tensor"]


@covering(1, {("layers_at_once", "module"): [(4, Rates), (2, CausalLM), (1, Rates)], "checkpointing": CHECKPOINTING})
def test_gradients_of_layers_are_reduced_together(
    deep: Path, layers_at_once: int, module: type[CausalLM], checkpointing: str
) -> None:
    """As many at once as fit into DeepSpeed's bucket."""
    adapted = ModelShapes.of(deep, LoraConfig(r=4, target_modules=TARGETS)).plan.matrices
    numel = sum(4 * (matrix.rows + matrix.columns) for matrix in adapted) // 4
    options = {**CHECKPOINTING[checkpointing], "reduce_bucket_size": layers_at_once * numel}
    reductions, _ = run_ranks(2, reduced, deep, options, module)
    assert reductions == [4 * layers_at_once * numel] * (3 * 4 // layers_at_once)


class Twice(CausalLM):
    """Two forwards before one backward, as preference losses have."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return super().training_step(batch, index) + super().training_step(batch, index)


class Unsteady(CausalLM):
    """Before the step a forward without gradient, and one that fails within a layer."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        with torch.no_grad():
            super().training_step(batch, index)
        layers = self.model.model.layers
        hook = layers[1].mlp.register_forward_pre_hook(_fails)
        with pytest.raises(FloatingPointError):
            super().training_step(batch, index)
        hook.remove()
        return super().training_step(batch, index)


def _fails(*_: Any) -> None:
    raise FloatingPointError


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_every_gradient_of_unusual_steps(deep: Path, checkpointing: str) -> None:
    run_ranks(2, check_every_gradient, deep, 3, CHECKPOINTING[checkpointing], Unsteady)


class InferenceFirst(CausalLM):
    """Before each step a forward in inference mode, in which Lightning validates on CUDA."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (ids,) = batch
        with torch.inference_mode():
            self.model(input_ids=ids, labels=ids, use_cache=False)
        return super().training_step(batch, index)


@covering(1, {"within": ["world", "rank"], "checkpointing": CHECKPOINTING})
def test_inference_mode_leaves_nothing_behind(deep: Path, checkpointing: str, within: str) -> None:
    """What was gathered in it is saved for backward by PEFT's own layers, which compute dropout."""
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, lora_dropout=1e-9)
    options = {**CHECKPOINTING[checkpointing], "shard_within": within, "adapter": adapter}
    run_ranks(2, check_every_gradient, deep, 3, options, InferenceFirst)


@covering(1, {"world_size": [1, 2], "checkpointing": CHECKPOINTING})
def test_two_forwards_before_one_backward_are_refused(deep: Path, checkpointing: str, world_size: int) -> None:
    """DeepSpeed would overwrite the gradients of the first, or fail with an error that does not say so."""
    for _, error in run_ranks_catching(world_size, check_every_gradient, deep, 3, CHECKPOINTING[checkpointing], Twice):
        assert "a decoder layer ran twice before one backward" in str(error)


class Watch(Callback):
    """Where each step begins among the collectives, and the modules that were visited in it."""

    def __init__(self) -> None:
        self.traffic, self.begun, self.visited = Traffic(), [], 0

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.begun.append(len(self.traffic.calls))
        if trainer.global_step == 2:
            named_modules = nn.Module.named_modules

            def counted(*args: Any, **kwargs: Any) -> Any:
                for found in named_modules(*args, **kwargs):
                    self.visited += 1
                    yield found

            self._patch = pytest.MonkeyPatch()
            self._patch.setattr(nn.Module, "named_modules", counted)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self._patch.undo()


@alone
def watched(pretrained: Path, options: dict[str, Any]) -> tuple[list[tuple[str, int]], int, int]:
    watch, module = Watch(), CausalLM(pretrained)
    trainer = make_trainer(make_strategy(pretrained, **options), steps=4, callbacks=[watch])
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 4))
    calls = watch.traffic.calls[watch.begun[2] : watch.begun[3]]
    modules = sum(1 for _ in module.modules())
    return [(name, nbytes) for name, _, nbytes in calls], watch.visited, modules


@covering(1, {"ahead": [0, 2], "checkpointing": CHECKPOINTING})
def test_one_collective_brings_a_layer(deep: Path, ahead: int, checkpointing: str) -> None:
    """Forward and backward of each of four layers and of the norm, one for the embedding and one for the head."""
    options = {**CHECKPOINTING[checkpointing], "live_layers": ahead}
    calls, visited, modules = run_ranks(2, watched, deep, options)[0]
    gathers = [nbytes for name, nbytes in calls if name == "all_gather_into_tensor"]
    assert len(gathers) == 2 * 4 + 2 + 1 + 1
    assert visited < modules  # the tests' own loss and Lightning look at a few; a walk would visit them all


@alone
def resident(pretrained: Path) -> dict[str, Any]:
    """On one rank, parameters within a step and after it."""
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            found["traffic"] = Traffic()

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 1:  # someone gathers in between, which empties the parameters again
                with gathered(list(module.parameters())):
                    pass

        def on_after_backward(self, trainer: Any, module: Any) -> None:
            found["same"] = all(p.data_ptr() == p.ds_tensor.data_ptr() for p in module.parameters())

    trainer = make_trainer(make_strategy(pretrained), steps=3, callbacks=[Look()])
    module = CausalLM(pretrained)
    trainer.fit(module, loader(0, 1, 3))
    found["gathers"] = found.pop("traffic").nbytes("all_gather_into_tensor")
    found["after"] = sum(p.numel() for p in module.parameters())
    return found


def test_one_rank_gathers_nothing(deep: Path) -> None:
    """The data of parameters are their shards; after the run they are empty, so that nobody moves them."""
    found = run_ranks(1, resident, deep)[0]
    assert found == {"same": True, "gathers": {}, "after": 0}
