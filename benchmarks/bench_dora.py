"""A layer of DoRA beside one of LoRA: time of forward and backward, and memory that autograd keeps.

All layers are over the same NF4 weight: DoRA and LoRA of this package (one autograd function each), PEFT's own DoRA
layer on this package's frozen layer, and on bitsandbytes' ``Linear4bit``. One process, one thread, ways in turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from reporting import ROOT, header, table, verdict, write_report
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.adapted import fuse_adapters
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.quantization.nf4 import NF4

LORA, DORA = "LoRA, ours", "DoRA, ours"


def frozen(weight: Tensor) -> nn.Module:
    partition = RowPartition(rows=weight.shape[0], columns=weight.shape[1], world_size=1, block=64)
    layer = FrozenLinear(partition, NF4(), compute_dtype=torch.float32)
    for name, shard in NF4().encode(weight.clone(), partition, ShardGroup.single()).shards.items():
        setattr(layer, name, nn.Parameter(shard, requires_grad=False))
    return layer


def linear4bit(weight: Tensor) -> nn.Module:
    layer = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    return layer.to("cpu")


def adapted(base: nn.Module, rank: int, *, use_dora: bool, fused: bool) -> nn.Module:
    owner = nn.Module()
    owner.linear = base
    owner.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, use_dora=use_dora, target_modules=["linear"]), owner)
    nn.init.normal_(owner.linear.lora_B["default"].weight, std=0.02)
    if fused:
        fuse_adapters(owner, "never")
    return owner.linear  # type: ignore[no-any-return]


def ways(weight: Tensor, rank: int) -> dict[str, nn.Module]:
    return {
        LORA: adapted(frozen(weight), rank, use_dora=False, fused=True),
        DORA: adapted(frozen(weight), rank, use_dora=True, fused=True),
        "DoRA, PEFT's layer on ours": adapted(frozen(weight), rank, use_dora=True, fused=False),
        "DoRA, PEFT + bitsandbytes": adapted(linear4bit(weight), rank, use_dora=True, fused=False),
    }


def seconds(layer: nn.Module, x: Tensor) -> float:
    started = time.process_time()
    layer(x).sum().backward()
    return time.process_time() - started


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that autograd saves, each storage once, without parameters and x."""
    known = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), x]}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor and tensor.untyped_storage().data_ptr() not in known:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    del output
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "dora.md")
    parser.add_argument("--tiny", action="store_true", help="dry run with a small layer")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    width, tokens, repeats = (64, 8, 2) if options.tiny else (2048, 2048, options.repeats)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight, x = torch.randn(width, width) / width**0.5, torch.randn(tokens, width, requires_grad=True)
    layers: dict[str, nn.Module] = ways(weight, 16)
    times: dict[str, list[float]] = {name: [] for name in layers}
    run: Callable[[nn.Module, Tensor], float] = seconds
    for _ in range(repeats + 1):
        for name, layer in layers.items():
            times[name].append(run(layer, x))
    found = {name: median(of_layer[1:]) for name, of_layer in times.items()}
    rows = [
        (name, f"{1e3 * took:.0f}", f"{took / found[LORA]:.2f}", f"{kept(layers[name], x) / 2**20:.0f}")
        for name, took in found.items()
    ]
    ratio = median(dora / lora for dora, lora in zip(times[DORA][1:], times[LORA][1:], strict=True))
    notes = [f"{width} x {width}, r = 16, {tokens} tokens, fp32; medians of {repeats} rounds, CPU time of the process"]
    if options.tiny:
        notes.append("a dry run: its figures mean nothing")
    parts = [
        header("DoRA beside LoRA", "bench_dora.py", ("torch", "peft", "bitsandbytes"), "one thread", notes),
        table(("", "ms", "of LoRA", "MiB kept for backward"), rows),
        f"Goal: DoRA at most 1.1 of LoRA (median of the ratios of rounds: {ratio:.2f}): {verdict(ratio <= 1.1)}.",
    ]
    write_report(options.output, parts, dry=options.tiny)
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
