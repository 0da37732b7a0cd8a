"""Checkpoints as AdapterCheckpoint writes them, made with stock PEFT from random factors instead of by training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowrank_dist.adapters.files import write_adapter
from lowrank_dist.model.names import plain_name
from lowrank_dist.storage.layout import ADAPTER_DIR, INITIAL_DIR, MANIFEST
from lowrank_dist.storage.writer import write_json


@dataclass(frozen=True)
class Made:
    """A checkpoint, and what it means.

    Attributes
    ----------
    directory
        Of the checkpoint.
    updates
        What the exact LoRA adds to every adapted weight of the original model, by its name; dense fp64.
    merged
        The original model with these updates in its weights; its heads replaced by those of ``modules_to_save``.
    """

    directory: Path
    updates: dict[str, Tensor]
    merged: Any


def adapted(model: Any) -> dict[str, Any]:
    """PEFT's layers, by the name of the weight they adapt."""
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            name = plain_name(name.removeprefix("base_model.model."))
            layers[f"{name}.{getattr(layer, 'parameter_name', 'weight')}"] = layer
    return layers


def deltas(model: Any) -> dict[str, Tensor]:
    """What PEFT's layers would add to the weights, fp64."""
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in adapted(model).items()}


def load_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def load_lora(base: Path, adapter: Path) -> PeftModel:
    """Stock PEFT's model with an adapter."""
    with warnings.catch_warnings():
        # PEFT 0.21 says so of patterns that match parameters, and applies them
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match any targeted module")
        return PeftModel.from_pretrained(load_base(base), adapter).eval()


def make_checkpoint(
    directory: Path,
    base: Path,
    config: LoraConfig,
    *,
    starts_at_zero: bool = False,
    dtype: torch.dtype = torch.float32,
    change: float = 0.05,
    names_parameters: bool = True,
) -> Made:
    """A checkpoint of `base` with random factors, that have changed by `change` since step 0."""
    config.init_lora_weights, config.base_model_name_or_path = False, str(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match any targeted module")
        model = get_peft_model(load_base(base), config)
    g = torch.Generator().manual_seed(5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.copy_((torch.randn(p.shape, generator=g) * 0.1).to(dtype))
    start, before = _state(model, dtype), deltas(model)
    with torch.no_grad():
        for p in trained.values():
            p.copy_((p + change * torch.randn(p.shape, generator=g) * 0.1).to(dtype))
    after = deltas(model)
    write_adapter(directory / ADAPTER_DIR, _state(model, dtype), config)
    if not starts_at_zero:
        write_adapter(directory / INITIAL_DIR, {n: t for n, t in start.items() if "lora_" in n}, config)
    wrappers = {n: w for n, w in model.named_modules() if isinstance(w, ParamWrapper)}
    parts = {f"{n}.lora_{part}.weight": (n, w) for n, w in wrappers.items() for part in "AB"}
    manifest = {
        "format": 1,
        "starts_at_zero": starts_at_zero,
        "adapter_is_for": "the base" if starts_at_zero else "the residual",
        "experts": {name: w.num_experts for name, (_, w) in parts.items() if w.num_experts > 1},
        "parameters": {
            name: f"{plain_name(n.removeprefix('base_model.model.'))}.{w.parameter_name}"
            for name, (n, w) in parts.items()
        },
    }
    if not names_parameters:
        del manifest["parameters"]
    write_json(directory / MANIFEST, manifest)
    updates = {name: after[name] - (0 if starts_at_zero else before[name]) for name in after}
    merged = load_base(base)
    with torch.no_grad():
        for name, update in updates.items():
            weight = merged.get_parameter(name)
            weight.copy_((weight.double() + update).float())
        for name, p in trained.items():
            if ".modules_to_save." in name:
                merged.get_parameter(plain_name(name.removeprefix("base_model.model."))).copy_(p)
    return Made(directory, updates, merged)


def _state(model: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Adapter tensors under the names of PEFT's files."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to(dtype, copy=True) for name, tensor in state.items()}
