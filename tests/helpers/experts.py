"""Stacked experts as PEFT has them, and the same over encoded weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import ARCHITECTURES
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.experts import AdaptedParameter

RANK, TOKENS, TOP_K = 3, 11, 2
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def peft_delta(a: Tensor, b: Tensor, experts: int) -> Tensor:
    """What stock PEFT adds to a stack of weights, ``[experts, out, in]``.

    A is ``[experts * r, in]``, B ``[out, r * experts]``; the scaling is 1.
    """
    base, rank = nn.Module(), a.shape[0] // experts
    base.stack = nn.Parameter(torch.zeros(experts, b.shape[0], a.shape[1]))
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=["stack"])
    layer = ParamWrapper(base, "default", "stack", config, r=rank, lora_alpha=rank)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
    return layer.get_delta_weight("default").detach()


def block(architecture: str, implementation: str = "grouped_mm") -> tuple[nn.Module, int]:
    """The experts of a layer with random weights, and how many there are."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    (_, experts), *_ = (
        (name, module) for name, module in model.named_modules() if any(p.ndim == 3 for p in module.parameters(False))
    )
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    stack = next(p for p in experts.parameters(False) if p.ndim == 3)
    return experts, len(stack)


def wrapped(experts: nn.Module, rank: int = RANK) -> nn.Module:
    """Stock PEFT's layers around all stacks of the experts, below a module called ``owner``."""
    root = nn.Module()
    root.experts = experts
    stacks = [name for name, p in experts.named_parameters(recurse=False) if p.ndim == 3]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=[f"experts.{name}" for name in stacks])
    inject_adapter_in_model(config, root)
    for module in root.modules():
        if isinstance(module, ParamWrapper):
            for factor in (module.lora_A, module.lora_B):
                nn.init.normal_(factor["default"].weight, std=0.2)
    return root


def encoded(root: nn.Module, residual: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same with encoded stacks, and a copy of `root` whose stacks have the decoded values."""
    stock, own = copy.deepcopy(root), copy.deepcopy(root)
    parent: Any = own
    for stock_layer, layer in zip(wrappers(stock), wrappers(own), strict=True):
        stack, weights = stock_layer.get_param(), layer.get_param().detach().clone()
        count, rows, columns = weights.shape
        partition = RowPartition(rows=rows, columns=columns, world_size=1, block=residual.block)
        shards = [residual.encode(matrix.float(), partition, ShardGroup.single()).shards for matrix in weights]
        frozen = AdaptedParameter(
            partition,
            residual,
            compute_dtype=dtype,
            wrapper=layer,
            adapter="default",
            parameter=layer.parameter_name,
            experts=count,
            input_first=getattr(layer.get_base_layer(), "is_transposed", False),
            name=f"experts.{layer.parameter_name}",
        )
        for name in shards[0]:
            whole = torch.cat([shard[name] for shard in shards])
            setattr(frozen, name, nn.Parameter(whole, requires_grad=False))
        with torch.no_grad():
            for expert, of_one in enumerate(shards):
                stack[expert] = residual.decode(of_one, partition, torch.float32)
        setattr(parent, "experts" if parent is own else "base_layer", frozen)
        parent = frozen
    return own, stock


def wrappers(root: nn.Module) -> list[Any]:
    """PEFT's layers around the experts, or those that replaced them, from the outside in."""
    found, module = [], root.experts
    while hasattr(module, "lora_A"):
        found.append(module)
        module = module.base_layer
    return found


def inputs(
    experts: int, *, seed: int = 1, used: int | None = None, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts of every token (all different, below `used`) and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=generator)
    ids = torch.rand(tokens, used or experts, generator=generator).argsort(dim=1)[:, :TOP_K]
    return x, ids, torch.rand(tokens, TOP_K, generator=generator)


def outcome(root: nn.Module, args: tuple[Tensor, Tensor, Tensor], run: Any = None) -> dict[str, Tensor]:
    """Output and every gradient."""
    x, ids, weights = args
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = root.experts(x, ids, weights) if run is None else run(root.experts, x, ids, weights)
    trained = {name: p for name, p in root.named_parameters() if ".lora_" in name}
    loss = (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype, device=y.device)).sum()
    grads = torch.autograd.grad(loss, [x, weights, *trained.values()])
    return {"y": y.detach(), **dict(zip(["x", "weights", *trained], grads, strict=True))}
