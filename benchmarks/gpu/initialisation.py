"""Decomposing the matrices of LLaMA-3-8B and 70B on the device: seconds by stage, memory, accuracy, against PEFT."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from meters import residual_norm
from models import MODELS_OF_CONFIGS
from peft import LoraConfig, get_peft_model
from reporting import table, verdict
from synthetic import SyntheticWeights
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from lowrank_dist import NF4, PiSSA
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.methods.base import Matrix
from lowrank_dist.quantization.format import Encoded
from lowrank_dist.storage.digest import digest_sums

STAGES = ("generate", "SVD", "quantize", "place")
PEER = "PEFT `pissa_niter_16`"
GOAL = 120.0  # seconds of 70B with T = 1
_LAYER = "model.layers.0."


@dataclass(frozen=True, kw_only=True)
class Model:
    """Whose matrices are decomposed, at which rank, how often."""

    name: str
    config: PretrainedConfig
    rank: int
    repeats: int


@dataclass(kw_only=True)
class Found:
    """Medians of seconds by stage, bytes of device memory at most (None off CUDA), excess residual."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: int | None = None
    excess: float | None = None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def models(*, tiny: bool) -> list[Model]:
    """LLaMA-3-8B and 70B at r = 128, or a model of a few rows."""
    if tiny:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
        )
        return [Model(name="tiny", config=config, rank=4, repeats=1)]
    return [
        Model(name=name, config=AutoConfig.from_pretrained(MODELS_OF_CONFIGS / file), rank=128, repeats=3)
        for name, file in (("LLaMA-3-8B", "Meta-Llama-3-8B.json"), ("LLaMA-3-70B", "Meta-Llama-3-70B.json"))
    ]


def initialisation_table(of: list[Model], device: torch.device) -> str:
    """Markdown."""
    rows, projections = [], []
    for model in of:
        weights = SyntheticWeights(config=model.config, dtype=torch.float32, device=device.type)
        kinds = _kinds(weights)
        ways: dict[str, Callable[[str], Found]] = {
            f"QPiSSA, T = {rounds}": lambda name, w=weights, m=model, t=rounds: _ours(w, name, m, t)  # type: ignore[misc]
            for rounds in (1, 5)
        } | {PEER: lambda name, w=weights, m=model: _peer(w, name, m)}  # type: ignore[misc]
        for way, measure in ways.items():
            found = {shape: measure(names[0]) for shape, names in kinds.items()}
            for shape, names in kinds.items():
                rows.append([model.name, f"{shape[0]} x {shape[1]}", len(names), way, *_cells(found[shape])])
            projections.append(_projection(model, way, [(len(kinds[s]), found[s].total) for s in kinds], device))
    text = (
        f"One matrix of each shape, fp32 values of sigma_i ~ i^-{SyntheticWeights.decay} generated on the device, "
        f"r = {of[0].rank}, fp32 factors, {NF4(double_quant=True)}; medians of {of[0].repeats} runs after one to warm "
        "up. Place: shards copied to where they stay, and their digests. What the walk measures for its report is left "
        "out. PEFT decomposes and subtracts (under SVD), it does not quantize. Excess: of the residual over the best "
        "of rank r, which the spectrum gives. Peak: allocated, the matrix and what is made of it included."
    )
    columns = ["", "out x in", "a layer", "", *(f"{stage}, ms" for stage in STAGES), "sum, ms", "excess", "peak MB"]
    lines = "\n".join(f"- {line}" for line in projections)
    return "\n\n".join(["## Initialisation (`initialisation`)", text, table(columns, rows), "All layers:", lines])


def _kinds(weights: SyntheticWeights) -> dict[tuple[int, ...], list[str]]:
    """Matrices of a decoder layer by shape."""
    kinds: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, info in weights.tensors.items():
        if name.startswith(_LAYER) and len(info.shape) == 2:
            kinds[info.shape].append(name)
    return dict(kinds)


def _cells(found: Found) -> list[str]:
    stages = [f"{1e3 * found.seconds[stage]:.1f}" if stage in found.seconds else "-" for stage in STAGES]
    excess = "-" if found.excess is None else f"{found.excess:.1e}"
    return [*stages, f"{1e3 * found.total:.1f}", excess, "-" if found.peak is None else f"{found.peak / 1e6:.0f}"]


def _projection(model: Model, way: str, terms: list[tuple[int, float]], device: torch.device) -> str:
    layers = model.config.num_hidden_layers
    seconds = layers * sum(count * each for count, each in terms)
    arithmetic = " + ".join(f"{count} x {each:.3f}" for count, each in terms)
    line = f"{model.name}, {way}: {layers} x ({arithmetic}) = {seconds:.1f} s"
    judged = device.type == "cuda" and model.name == "LLaMA-3-70B" and way.endswith("T = 1")
    return line + (f", goal {GOAL:.0f} s: {verdict(seconds <= GOAL)}" if judged else "")


# ---- one matrix


class _Clock:
    """Seconds by stage, the device synchronized at both ends."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[stage] += time.perf_counter() - started

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class _TimedNF4:
    """NF4 whose encodings are timed."""

    def __init__(self, clock: _Clock) -> None:
        self._format, self._clock = NF4(double_quant=True), clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._format, name)

    def encode(self, *args: Any) -> Encoded:
        with self._clock.on("quantize"):
            return self._format.encode(*args)


def _ours(weights: SyntheticWeights, name: str, model: Model, rounds: int) -> Found:
    rows, columns = weights.tensors[name].shape
    partition = RowPartition(rows=rows, columns=columns, world_size=1, block=NF4().block)

    def once(clock: _Clock) -> tuple[Tensor, Tensor]:
        with clock.on("generate"):
            block = weights.rows(name, 0, rows)
        matrix = Matrix(
            name=name,
            block=block,
            partition=partition,
            group=ShardGroup.single(),
            rank=model.rank,
            scaling=1.0,
            input_first=False,
            factor_dtype=torch.float32,
        )
        residual: Any = _TimedNF4(clock)
        with clock.on("SVD"):
            found = PiSSA(quantization_iterations=rounds).decompose(matrix, residual)
        clock.seconds["SVD"] -= clock.seconds["quantize"]  # which is inside
        with clock.on("place"):
            placed = {key: shard.clone() for key, shard in found.residual.shards.items()}
            digest_sums(placed, residual.storages(partition), 0)
        return found.factors.left, found.factors.right

    measured, factors = _medians(once, weights.device, model.repeats)
    if rounds == 1:  # else the factors are fitted to what quantization left
        measured.excess = _excess(weights, name, model.rank, *factors)
    return measured


def _peer(weights: SyntheticWeights, name: str, model: Model) -> Found:
    rows, columns = weights.tensors[name].shape
    config = LoraConfig(
        r=model.rank, lora_alpha=model.rank, target_modules=["linear"], init_lora_weights="pissa_niter_16"
    )

    def once(clock: _Clock) -> tuple[Tensor, Tensor]:
        holder, linear = nn.Module(), nn.Linear(columns, rows, bias=False, device="meta")
        with clock.on("generate"):
            linear.weight = nn.Parameter(weights.rows(name, 0, rows))
        holder.add_module("linear", linear)
        with clock.on("SVD"):
            adapted: Any = get_peft_model(holder, config)  # type: ignore[arg-type]
        layer = adapted.base_model.model.linear
        return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()

    found, factors = _medians(once, weights.device, model.repeats)
    found.seconds = {stage: found.seconds[stage] for stage in ("generate", "SVD")}
    found.excess = _excess(weights, name, model.rank, *factors)
    return found


def _medians(
    once: Callable[[_Clock], tuple[Tensor, Tensor]], device: str, repeats: int
) -> tuple[Found, tuple[Tensor, Tensor]]:
    once(_Clock(device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clocks = [_Clock(device) for _ in range(repeats)]
    factors = [once(clock) for clock in clocks][-1]
    seconds = {stage: statistics.median(clock.seconds[stage] for clock in clocks) for stage in STAGES}
    return Found(seconds=seconds, peak=torch.cuda.max_memory_allocated() if device == "cuda" else None), factors


def _excess(weights: SyntheticWeights, name: str, rank: int, left: Tensor, right: Tensor) -> float:
    rows, columns = weights.tensors[name].shape
    best = float(weights.spectrum(rows, columns)[rank:].double().norm())
    return residual_norm(lambda start, stop: weights.rows(name, start, stop), left, right) / best - 1
