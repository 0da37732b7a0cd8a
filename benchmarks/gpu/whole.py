"""A whole job on one device: a LLaMA-3-70B-shaped model is initialised, trained for some steps, saved and converted."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmarks.gpu.step import Case, flops_of_step, gemm_rate
from benchmarks.gpu.trainers import Measured, Meter, RunSpec, Timing, in_fresh_process, make_trainer
from models import MODELS_OF_CONFIGS
from reporting import table
from synthetic import SyntheticWeights
from torch.utils.data import DataLoader
from transformers import AutoConfig, LlamaConfig

from lowrank_dist import NF4, AdapterCheckpoint, CausalLMModule, PiSSA, PiSSAStrategy, convert_checkpoint
from lowrank_dist.forecast import Forecast, ModelShapes, forecast
from lowrank_dist.forecast import RunSpec as PlannedJob

RESIDUAL = NF4(double_quant=True)
OPTIMIZER = "paged_adamw_8bit"
STAGES = ("train", "save", "convert")  # what can be left out after the initialisation


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What is run.

    Attributes
    ----------
    case
        The model, tokens of a step, rank, steps after those that warm up.
    layers
        Decoder layers that are run; times are also scaled to those of `case`.
    rounds
        T of QPiSSA, a run each.
    skip
        Of `STAGES`; without a checkpoint nothing is converted.
    weights_only
        Save adapters without the state of training.
    """

    case: Case
    layers: int
    rounds: tuple[int, ...]
    skip: tuple[str, ...] = ()
    weights_only: bool = False

    @property
    def run(self) -> Case:
        """The case with as many layers as are run."""
        return with_layers(self.case, self.layers)

    def flops(self, layers: int) -> int:
        """Of a step with so many layers, which all cost the same."""
        one, two = (flops_of_step(with_layers(self.case, count)) for count in (1, 2))
        return one + (layers - 1) * (two - one)


def with_layers(case: Case, layers: int) -> Case:
    """The case with so many decoder layers."""
    config = type(case.config).from_dict(case.config.to_dict())
    config.num_hidden_layers = layers
    return replace(case, config=config)


@dataclass(kw_only=True)
class Outcome:
    """Of one run.

    Attributes
    ----------
    seconds
        By stage.
    device, host
        Bytes at most, by stage: allocated on the device within it (None off CUDA); resident on the host up to its end.
    steps
        Steps, their losses and memory.
    reduction
        Mean share of the quantization error that the initialisation saves, Frobenius norm.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    device: dict[str, int | None] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    steps: Measured = field(default_factory=Measured)
    reduction: float = 0.0

    def ended(self, stage: str, seconds: float) -> None:
        """Note what a stage took, and begin to measure the next."""
        self.seconds[stage] = seconds
        self.device[stage] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self.host[stage] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def whole(
    *, tiny: bool, layers: int | None, rounds: list[int], steps: int | None, skip: list[str], weights_only: bool
) -> Whole:
    """LLaMA-3-70B at 4096 tokens; or two of the four layers of a small model."""
    config = AutoConfig.from_pretrained(MODELS_OF_CONFIGS / "Meta-Llama-3-70B.json")
    case = Case(name="LLaMA-3-70B", config=config, tokens=4096, rank=128, steps=6)
    if tiny:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=256,
        )
        case, layers = Case(name="tiny", config=config, tokens=32, rank=4, steps=3), layers or 2
    return Whole(
        case=replace(case, steps=steps or case.steps),
        layers=layers or config.num_hidden_layers,
        rounds=tuple(rounds) or (1, 5),
        skip=tuple(skip),
        weights_only=weights_only,
    )


def whole_table(of: Whole, device: torch.device) -> str:
    """Markdown."""
    rate, parts = gemm_rate(device), ["## A whole job (`whole`)"]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the runs have the device for themselves
    flops = of.flops(of.layers)
    parts.append(_explained(of, flops, rate))
    for rounds in of.rounds:
        planned, found = in_fresh_process(device.type, run, of, rounds, device.type)
        parts.append(f"QPiSSA, T = {rounds}:")
        parts.append(_of_stages(of, planned, found) if isinstance(found, Outcome) else found)
        if isinstance(found, Outcome) and found.steps.seconds:
            parts.append(_of_steps(of, planned, found, flops / rate))
    return "\n\n".join(parts)


# ---- in a process of its own


def run(of: Whole, rounds: int, device: str) -> tuple[Forecast, Outcome | str]:
    """What was expected and what came; out of memory is an answer too."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        case, directory = of.run, Path(folder)
        case.config.architectures = ["LlamaForCausalLM"]
        case.config.save_pretrained(directory / "config")
        job = RunSpec(
            name=case.name,
            checkpoint=directory / "config",
            tokens=case.tokens,
            rank=case.rank,
            steps=case.steps,
            device=device,
        )
        planned = _planned(job, rounds)
        try:
            return planned, _measured(of, job, rounds, directory)
        except torch.OutOfMemoryError as error:
            return planned, f"Out of memory: {str(error).splitlines()[0]}"


def _planned(job: RunSpec, rounds: int) -> Forecast:
    """As ``lowrank-dist plan`` has it."""
    init = PiSSA(quantization_iterations=rounds)
    shapes = ModelShapes.of(job.checkpoint, job.adapter(), init=init)
    return forecast(
        shapes,
        PlannedJob(
            nodes=1,
            gpus_per_node=1,
            length=job.tokens,
            compute_dtype=job.dtype,
            factor_dtype=job.dtype,
            init=init,
            residual=RESIDUAL,
            optimizer=OPTIMIZER if job.device == "cuda" else "adamw",
        ),
    )


def _measured(of: Whole, job: RunSpec, rounds: int, directory: Path) -> Outcome:
    found = Outcome()
    strategy = PiSSAStrategy(
        SyntheticWeights(config=of.run.config, device=job.device, dtype=job.dtype),
        job.adapter(),
        PiSSA(quantization_iterations=rounds),
        RESIDUAL,
        fold_adapters="measured",
    )
    module = CausalLMModule(
        str(job.checkpoint),
        scheduler="constant",
        warmup_ratio=0.0,
        optimizer=OPTIMIZER,
        fused_cross_entropy=job.device == "cuda",
    )
    meter = Meter(job.device)
    callbacks: list[L.Callback] = [_Stages(found), Timing(meter)]
    save = None
    if not {"train", "save"} & set(of.skip):
        save = AdapterCheckpoint(
            directory, filename="last", every_n_train_steps=10**9, save_weights_only=of.weights_only, background=False
        )
        callbacks.append(save)
    trainer = make_trainer(job, strategy, callbacks, max_steps=0 if "train" in of.skip else -1)
    trainer.fit(module, DataLoader(job.batches(), batch_size=None))  # type: ignore[arg-type]
    found.steps = meter.found
    assert strategy.init_report is not None
    if "train" in of.skip:
        found.ended("initialise", strategy.init_report.seconds)
    reductions = [matrix.error_reduction for matrix in strategy.init_report.matrices]
    found.reduction = statistics.fmean(reductions)
    if save is not None:
        found.ended("save", save.save_seconds or 0.0)
        if "convert" not in of.skip:
            started = time.perf_counter()
            convert_checkpoint(save.best_model_path, directory / "lora")
            found.ended("convert", time.perf_counter() - started)
    return found


class _Stages(L.Callback):
    """Where one stage ends and the next begins."""

    def __init__(self, found: Outcome) -> None:
        self.found, self._began = found, 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.found.ended("initialise", strategy.init_report.seconds)
        self._began = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.found.ended("train", time.perf_counter() - self._began)


# ---- Markdown


def _explained(of: Whole, flops: int, rate: float) -> str:
    case = of.case
    return (
        f"{case.name}: {of.layers} of {case.config.num_hidden_layers} layers, weights generated on the device as they "
        f"are read (`benchmarks/synthetic.py`, sigma_i ~ i^-{SyntheticWeights.decay}), r = {case.rank} on all linears, "
        f"{RESIDUAL}, one sequence of {case.tokens} tokens a step, gradient checkpointing, `{OPTIMIZER}`, adapters "
        "folded in where faster, on CUDA the loss without logits, one rank of ZeRO-3. Expected: by the forecast of "
        "`lowrank-dist plan`, whose rates are assumed (nothing is read from disk here), and whose memory is that of a "
        "step with logits and with the paged moments, which torch does not count. All layers: not measured, but times "
        "of the layers that were run by their number, of a step by its flops. Peaks of the host: of the process, up to "
        "the end of the stage. Share: of the rate of a product of large matrices here and now, "
        f"{rate / 1e12:.3g} Tflop/s, with {flops / 1e12:.3g} Tflop a step, which count recomputation (those of PEFT's "
        "way, residual and adapter as products of their own)."
    )


def _of_stages(of: Whole, planned: Forecast, found: Outcome) -> str:
    seconds, bytes_of = {}, {}
    if planned.initialisation is not None:
        without_disk = replace(planned.initialisation, read=0.0)
        seconds["initialise"] = f"{without_disk.in_memory:.1f}"
    bytes_of["train"] = planned.memory.peak
    times = of.case.config.num_hidden_layers / of.layers
    rows = [
        [
            stage,
            f"{taken:.1f}",
            "-" if stage == "train" else f"{taken * times:.1f}",
            seconds.get(stage, "-"),
            _gigabytes(found.device[stage]),
            _gigabytes(bytes_of.get(stage)),
            _gigabytes(found.host[stage]),
        ]
        for stage, taken in found.seconds.items()
    ]
    columns = ["", "s", "all layers, s", "expected, s", "peak, GB", "expected, GB", "host peak, GB"]
    extra = (
        f"A checkpoint is expected to take {planned.checkpoint / 1e9:.3f} GB on disk, and "
        f"{planned.memory.host / 1e9:.3f} GB of the host. Mean reduction of the "
        f"quantization error (Frobenius): {found.reduction:.1%}."
    )
    return "\n\n".join([table(columns, rows), extra])


def _of_steps(of: Whole, planned: Forecast, found: Outcome, at_rate: float) -> str:
    taken, tokens = statistics.median(found.steps.seconds), of.case.tokens
    whole = taken * of.flops(of.case.config.num_hidden_layers) / of.flops(of.layers)
    rows = [
        [
            f"{1e3 * taken:.1f}",
            f"{tokens / taken:.0f}",
            f"{tokens / whole:.0f}",
            "-" if planned.step is None else f"{1e3 * planned.step.least:.1f} to {1e3 * planned.step.most:.1f}",
            f"{at_rate / taken:.3f}",
            _gigabytes(found.steps.held),
            f"{planned.memory.stays / 1e9:.3f}",
            f"{found.steps.losses[0]:.4f} {found.steps.losses[-1]:.4f}",
        ]
    ]
    columns = [
        "ms a step",
        "tokens/s",
        "all layers, tokens/s",
        "expected, ms",
        "share of the GEMM rate",
        "held, GB",
        "expected, GB",
        "loss, first and last",
    ]
    return table(columns, rows)


def _gigabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.3f}"
