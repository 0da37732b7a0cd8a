"""A training step of a whole model on one device, against PEFT over bitsandbytes and over dense weights."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.trainers import WAYS, Measured, RunSpec, in_fresh_process, save_model, train
from models import MODELS_OF_CONFIGS
from peft import LoraConfig, get_peft_model
from reporting import table, verdict
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from lowrank_dist.callbacks.flops import matmul_rate

SPEED_GOAL, MEMORY_GOAL, RATE_GOAL, SHARDING_GOAL = 1.3, 0.8, 0.55, 0.05
OURS, OURS_FUSED, COMPILED, UNSHARDED, UNSHARDED_FUSED, PEER, CEILING = WAYS


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of random weights, and how it is trained; see `RunSpec`."""

    name: str
    config: PretrainedConfig
    tokens: int
    rank: int
    steps: int


def cases(*, tiny: bool) -> list[Case]:
    """LLaMA-3-8B, and one layer of LLaMA-3-70B with a small vocabulary; or a model of two small layers."""
    if tiny:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=256,
        )
        return [Case(name="tiny", config=config, tokens=32, rank=4, steps=3)]
    block = AutoConfig.from_pretrained(MODELS_OF_CONFIGS / "Meta-Llama-3-70B.json")
    block.num_hidden_layers, block.vocab_size = 1, 1024
    whole = AutoConfig.from_pretrained(MODELS_OF_CONFIGS / "Meta-Llama-3-8B.json")
    return [
        Case(name="LLaMA-3-8B", config=whole, tokens=4096, rank=128, steps=10),
        Case(name="one layer of LLaMA-3-70B", config=block, tokens=4096, rank=128, steps=20),
    ]


def step_table(of: list[Case], device: torch.device, ways: Sequence[str] = tuple(WAYS)) -> str:
    """Markdown."""
    rate = gemm_rate(device)
    parts = ["## A step (`step`)", _explained(of, device, rate)]
    for case in of:
        flops = flops_of_step(case)
        with tempfile.TemporaryDirectory() as directory:
            job = RunSpec(
                name=case.name,
                checkpoint=save_model(Path(directory) / "model", case.config, device.type),
                tokens=case.tokens,
                rank=case.rank,
                steps=case.steps,
                device=device.type,
            )
            found = {way: in_fresh_process(job.device, train, way, job) for way in ways}
        parts.append(f"{case.name}, {flops / 1e12:.3g} Tflop a step:")
        rows = [_row(way, measured, case, flops / rate) for way, measured in found.items()]
        columns = ["", "ms", "tokens/s", "share of the GEMM rate", "peak MB", "held MB", "gathers, hidden"]
        columns.append("loss, first and last")
        parts += [table(columns, rows), _verdicts(found, flops / rate)]
    return "\n\n".join(parts)


def gemm_rate(device: torch.device) -> float:
    """Flops per second of a large product in the dtype of the arithmetic."""
    return matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def flops_of_step(case: Case) -> int:
    """Of PEFT's way with gradient checkpointing, counted on tensors without memory; masked attention counts."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(case.config, attn_implementation="eager")
        model = get_peft_model(model, LoraConfig(r=case.rank, target_modules="all-linear"))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
        ids = torch.zeros(1, case.tokens, dtype=torch.int64)
        mask = torch.zeros(1, 1, case.tokens, case.tokens)  # as it is: to build one, transformers looks at values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
    return int(counter.get_total_flops())


def _row(way: str, measured: Measured | str, case: Case, at_rate: float) -> list[str]:
    if isinstance(measured, str):
        return [way, measured, *6 * ["-"]]
    seconds = statistics.median(measured.seconds)
    gathers = "-"
    if measured.gathers is not None:
        all_of_them, hidden = measured.gathers
        gathers = f"{1e3 * all_of_them:.1f} ms, {hidden / max(all_of_them, 1e-9):.0%}"
    return [
        way,
        f"{1e3 * seconds:.1f}",
        f"{case.tokens / seconds:.0f}",
        f"{at_rate / seconds:.3f}",
        *("-" if nbytes is None else f"{nbytes / 1e6:.0f}" for nbytes in (measured.peak, measured.held)),
        gathers,
        f"{measured.losses[0]:.4f} {measured.losses[-1]:.4f}",
    ]


def _verdicts(found: dict[str, Measured | str], at_rate: float) -> str:
    measured = {way: m for way, m in found.items() if not isinstance(m, str)}
    seconds = {way: statistics.median(m.seconds) for way, m in measured.items()}
    lines = []
    if {OURS_FUSED, PEER} <= set(seconds):
        times = seconds[PEER] / seconds[OURS_FUSED]
        lines.append(f"tokens/s over {PEER}: {times:.2f}, goal {SPEED_GOAL}: {verdict(times >= SPEED_GOAL)}")
        peaks = [measured[way].peak for way in (OURS_FUSED, PEER)]
        if peaks[0] and peaks[1]:
            share = peaks[0] / peaks[1]
            lines.append(f"its peak memory: {share:.2f}, goal {MEMORY_GOAL}: {verdict(share <= MEMORY_GOAL)}")
    if OURS_FUSED in seconds:
        share = at_rate / seconds[OURS_FUSED]
        lines.append(f"share of the GEMM rate: {share:.2f}, goal {RATE_GOAL}: {verdict(share >= RATE_GOAL)}")
    for way, without in ((OURS, UNSHARDED), (OURS_FUSED, UNSHARDED_FUSED)):
        if {way, without} <= set(seconds):
            cost = seconds[way] / seconds[without] - 1
            lines.append(f"ZeRO-3 on one device, {way}: {cost:+.1%}, goal {SHARDING_GOAL:.0%}: "
                         f"{verdict(cost <= SHARDING_GOAL)}")  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


def _explained(of: list[Case], device: torch.device, rate: float) -> str:
    dtype = "bf16" if device.type == "cuda" else "fp32"
    return (
        f"Random weights, one sequence a step, adapters on all linears (r = {of[0].rank}), gradient checkpointing, "
        f"8-bit paged AdamW, arithmetic in {dtype}; each way in a process of its own; the median of the steps after "
        "two to warm up. The flops are those of PEFT's way, recomputation counted, for all; the rate of a product of "
        f"large matrices here and now is {rate / 1e12:.3g} Tflop/s. Held: between steps. Gathers: time of a "
        "profiled step on streams other than the one that computes, and how much of it that one was busy. PEFT trains "
        "fp32 factors under autocast, as transformers' Trainer with `bf16=True`."
    )
