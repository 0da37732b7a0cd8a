"""A layer of experts: CPU time and peak memory of a step, by the number of experts that are decoded at a time.

The experts of one Qwen3-MoE layer over NF4, with adapters on both stacks: all experts dense at once, as this package
computed them up to 0.1 and as PEFT does over dense weights, beside some at a time. Without gradient checkpointing, so
that what waits for the backward counts. One process, one thread, ways in turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from meters import PeakMemory, free_heap
from peft import LoraConfig, inject_adapter_in_model
from reporting import ROOT, header, table, write_report
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.experts import AdaptedParameter
from lowrank_dist.quantization.nf4 import NF4

DENSE, BEFORE = "PEFT, dense weights", "NF4, all experts dense at once (before)"


class AllDense(AdaptedParameter):
    """The parameter as it was computed before: whole and dense, ``W + s B A``, and so kept for the backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        setattr(owner, self.parameter, self.dense(range(self.experts)))
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            delattr(owner, self.parameter)


def stock(config: Qwen3MoeConfig, rank: int) -> nn.Module:
    """The experts with PEFT's layers."""
    torch.manual_seed(0)
    root = nn.Module()
    root.experts = Qwen3MoeExperts(config)
    for parameter in root.experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_parameters=names), root)
    for name, parameter in root.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return root


def encoded(config: Qwen3MoeConfig, rank: int, kind: type[AdaptedParameter], at_a_time: int) -> nn.Module:
    """The same over NF4."""
    root = stock(config, rank)
    parent, name, layer = root, "experts", root.experts
    while hasattr(layer, "parameter_name"):
        weights = layer.get_param().detach()
        count, rows, columns = weights.shape
        partition = RowPartition(rows=rows, columns=columns, world_size=1, block=64)
        shards = [NF4().encode(matrix, partition, ShardGroup.single()).shards for matrix in weights]
        options = {"compute_dtype": torch.float32, "adapter": "default", "parameter": layer.parameter_name}
        frozen = kind(partition, NF4(), **options, wrapper=layer, experts=count, input_first=False)
        frozen.experts_at_a_time = at_a_time
        for storage in shards[0]:
            whole = torch.cat([shard[storage] for shard in shards])
            setattr(frozen, storage, nn.Parameter(whole, requires_grad=False))
        setattr(parent, name, frozen)
        parent, name, layer = frozen, "base_layer", frozen.base_layer
    return root


def step(root: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """CPU seconds of forward and backward."""
    started = time.process_time()
    root.experts(*inputs).square().sum().backward()
    seconds = time.process_time() - started
    for parameter in root.parameters():
        parameter.grad = None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "experts.md")
    parser.add_argument("--tiny", action="store_true", help="dry run with a small layer")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    hidden, inner, experts, tokens = (64, 32, 8, 16) if options.tiny else (1024, 512, 64, 512)
    rank, top_k, repeats = 8, 4, 1 if options.tiny else options.repeats
    torch.set_num_threads(1)
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=top_k,
        experts_implementation="grouped_mm",
    )
    torch.manual_seed(1)
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k]
    inputs = torch.randn(tokens, hidden, requires_grad=True), ids, torch.full((tokens, top_k), 1 / top_k)
    ways = {DENSE: lambda: stock(config, rank), BEFORE: lambda: encoded(config, rank, AllDense, experts)}
    for count in (experts, experts // 4, experts // 16 or 1, 1):
        ways[f"NF4, {count} at a time"] = lambda count=count: encoded(config, rank, AdaptedParameter, count)
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    layers = {name: make() for name, make in ways.items()}
    for _ in range(repeats + 1):
        for name, layer in layers.items():
            free_heap()
            with PeakMemory() as memory:
                times[name].append(step(layer, inputs))
            peaks[name] = max(peaks.get(name, 0.0), memory.private)
    stack = experts * (2 * inner + inner) * hidden * 4 / 1e6
    rows = [(name, f"{1e3 * median(took[1:]):.0f}", f"{peaks[name]:.0f}") for name, took in times.items()]
    notes = [
        f"{experts} experts of hidden size {hidden} and inner size {inner}: {stack:.0f} MB dense in fp32; r = {rank} "
        f"on both stacks, {tokens} tokens that choose {top_k} experts each; medians of {repeats} rounds",
        "MB: the most private memory of the process in a step above that before it, gradients of the adapters included",
    ]
    if options.tiny:
        notes.append("a dry run: its figures mean nothing")
    parts = [
        header("Experts decoded at a time", "bench_experts.py", ("torch", "peft", "transformers"), "one thread", notes),
        table(("", "ms of CPU", "MB at the peak"), rows),
    ]
    write_report(options.output, parts, dry=options.tiny)
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
