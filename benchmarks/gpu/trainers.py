"""Training steps of one model on one device, each way in a process of its own: seconds, peak memory, losses."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmarks.gpu.profiles import on_streams, overlap, profiler
from lightning.pytorch.callbacks import Checkpoint
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from lowrank_dist import NF4, LoRA, PiSSAStrategy
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.adapted import FoldAdapters, fuse_adapters
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.storage.writer import write_json
from lowrank_dist.training.module import CausalLMModule
from lowrank_dist.training.optim import build_optimizer

WARM_UP = 2  # steps
QUANTIZATION = NF4(double_quant=True)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is trained, and how long.

    Attributes
    ----------
    name
        Of the model.
    checkpoint
        Directory.
    tokens
        Of a sequence.
    rank
        r, of all linears of the decoder layers; lora_alpha too.
    steps
        Timed ones.
    device
        ``cuda`` or ``cpu``.
    sequences
        Of a step.
    clock
        What seconds are measured with.
    tuner
        PEFT's configuration of the adapter; a LoRA of `rank` by default.
    """

    name: str
    checkpoint: Path
    tokens: int
    rank: int
    steps: int
    device: str
    sequences: int = 1
    clock: Callable[[], float] = time.perf_counter
    tuner: PeftConfig | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def adapter(self) -> PeftConfig:
        if self.tuner is not None:
            return self.tuner
        return LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules="all-linear", task_type="CAUSAL_LM")

    def batches(self) -> list[dict[str, Tensor]]:
        """A batch for every step; losses fall only if the model can learn the few that come again and again."""
        vocabulary = LlamaConfig.from_pretrained(self.checkpoint).vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (2, self.sequences, self.tokens), generator=generator)
        return [{"input_ids": ids[i % 2], "labels": ids[i % 2]} for i in range(WARM_UP + self.steps)]


@dataclass(kw_only=True)
class Measured:
    """Steps of one way to train.

    Attributes
    ----------
    seconds
        Of every timed step.
    losses
        Of every step.
    peak, held
        Bytes of device memory: the most that was allocated in the timed steps, and what stays between them. None off
        CUDA.
    gathers
        Seconds of one more step, profiled, on streams beside the one that computes, and how many of them it computed
        meanwhile; of ours on CUDA.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int | None = None
    held: int | None = None
    gathers: tuple[float, float] | None = None


class Meter:
    """Times steps that end with a synchronized device."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock, self.found = device, clock, Measured()
        self._started = 0.0

    def begin(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            if len(self.found.losses) == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
        self._started = self.clock()

    def end(self, loss: Tensor) -> None:
        self.found.losses.append(float(loss))  # waits for the device
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.found.peak, self.found.held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        if len(self.found.losses) > WARM_UP:
            self.found.seconds.append(self.clock() - self._started)


# ---- ours


def train_ours(
    job: RunSpec,
    *,
    fold: FoldAdapters,
    fused_loss: bool = False,
    compile_layers: str | None = None,
    quantization: BlockFormat | None = QUANTIZATION,
) -> Measured:
    """`PiSSAStrategy`; zero-start adapters, as the initialisation is not what is measured.

    `fold` says where adapters are added to the decoded weight. `fused_loss` takes the loss without logits, on CUDA.
    `compile_layers` is a backend of ``torch.compile``. `quantization` is the strategy's.
    """
    meter = Meter(job.device, job.clock)
    strategy = PiSSAStrategy(
        job.checkpoint,
        job.adapter(),
        LoRA() if isinstance(job.adapter(), LoraConfig) else None,
        quantization,
        fold_adapters=fold,
        compile_layers=compile_layers,
        show_progress=False,
    )
    module = CausalLMModule(
        str(job.checkpoint),
        scheduler="constant",
        warmup_ratio=0.0,
        optimizer="paged_adamw_8bit",
        fused_cross_entropy=fused_loss and job.device == "cuda",
    )
    trainer, batches = make_trainer(job, strategy, [Timing(meter, WARM_UP + job.steps)]), job.batches()
    trainer.fit(module, DataLoader([*batches, batches[0]], batch_size=None))  # type: ignore[arg-type]
    return meter.found


def make_trainer(
    job: RunSpec, strategy: PiSSAStrategy, callbacks: list[L.Callback], *, max_steps: int = -1
) -> L.Trainer:
    """Of the ranks that were started, or of one as torchrun would start it, without logs and checkpoints of its own."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    one |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ |= {name: value for name, value in one.items() if name not in os.environ}
    return L.Trainer(
        strategy=strategy,
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        precision="bf16-true" if job.device == "cuda" else "32-true",
        max_epochs=1,
        max_steps=max_steps,
        use_distributed_sampler=False,  # it would shuffle
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Timing(L.Callback):
    """Tells a `Meter` of the first `steps` batches, or of all; on CUDA the one after them is profiled."""

    def __init__(self, meter: Meter, steps: int | None = None) -> None:
        self.meter, self.steps = meter, math.inf if steps is None else steps
        self.profiled: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        if index < self.steps:
            self.meter.begin()
        elif self.meter.device == "cuda":
            self.profiled = profiler()
            self.profiled.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if index < self.steps:
            self.meter.end(outputs["loss"])
        elif self.profiled is not None:
            torch.cuda.synchronize()
            self.profiled.__exit__(None, None, None)
            self.meter.found.gathers = overlap(on_streams(self.profiled))


def train_unsharded(job: RunSpec, *, fused: bool) -> Measured:
    """Our layers without DeepSpeed: what sharding costs on one device is the difference."""
    model = get_peft_model(_load(job, job.device), job.adapter())
    residual, group = QUANTIZATION, ShardGroup.single()
    for module in list(model.modules()):
        if not hasattr(module, "lora_A"):
            continue
        weight = module.base_layer.weight
        partition = RowPartition(rows=weight.shape[0], columns=weight.shape[1], world_size=1, block=residual.block)
        frozen = FrozenLinear(partition, residual, compute_dtype=job.dtype)
        for name, shard in residual.encode(weight.float(), partition, group).shards.items():
            setattr(frozen, name, nn.Parameter(shard, requires_grad=False))
        module.base_layer = frozen
    fuse_adapters(model, "measured" if fused else "never")
    return _loop(job, model)


# ---- peers


def train_bitsandbytes(job: RunSpec) -> Measured:
    """PEFT over ``load_in_4bit``."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=job.dtype,
    )
    return _loop(job, get_peft_model(_load(job, job.device, quantization_config=config), job.adapter()))


def train_dense(job: RunSpec) -> Measured:
    """PEFT's LoRA over the weights as they are."""
    return _loop(job, get_peft_model(_load(job, job.device), job.adapter()))


def _load(job: RunSpec, device: str, **options: Any) -> nn.Module:
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
        job.checkpoint, dtype=job.dtype, device_map={"": device}, **options
    )


def _loop(job: RunSpec, model: Any) -> Measured:
    """Steps as transformers' Trainer takes them with ``bf16=True``: autocast, gradient checkpointing, paged AdamW."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, name="paged_adamw_8bit", lr=2e-5, device=torch.device(job.device))
    meter = Meter(job.device, job.clock)
    autocast = torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.device == "cuda")
    for batch in job.batches():
        meter.begin()
        inputs = {name: values.to(job.device) for name, values in batch.items()}
        with autocast:
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.end(loss.detach())
    return meter.found


WAYS: dict[str, Callable[[RunSpec], Measured]] = {
    "ours": lambda job: train_ours(job, fold="never"),
    "ours, adapters folded in where faster, loss without logits": lambda job: train_ours(
        job, fold="measured", fused_loss=True
    ),
    "ours, layers compiled": lambda job: train_ours(job, fold="never", compile_layers="inductor"),
    "ours without ZeRO-3": lambda job: train_unsharded(job, fused=False),
    "ours without ZeRO-3, adapters folded in where faster": lambda job: train_unsharded(job, fused=True),
    "PEFT + bitsandbytes `Linear4bit`": train_bitsandbytes,
    "PEFT, dense": train_dense,
}
SHORT = dict(
    zip(("ours", "fused", "compiled", "unsharded", "unsharded-fused", "bitsandbytes", "dense"), WAYS, strict=True)
)


def train(way: str, job: RunSpec) -> Measured | str:
    """`WAYS` by name, for a process of its own; a failure is an answer too, which costs no other row."""
    with contextlib.redirect_stdout(None):
        try:
            return WAYS[way](job)
        except Exception as error:
            traceback.print_exc()
            return repr(error).splitlines()[0]
        finally:
            gc.collect()


def in_fresh_process(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a process that inherits no memory, patches and compiled kernels.

    Of this one, which has used CUDA or OpenMP's threads, no fork would work. Off CUDA what is imported here is imported
    once for all, by a process that does nothing else.
    """
    context: Any = get_context("spawn" if device == "cuda" else "forkserver")
    if device != "cuda":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def save_model(directory: Path, config: PretrainedConfig, device: str) -> Path:
    """A bf16 checkpoint of random weights, a file for each decoder layer and one for the rest."""
    directory.mkdir(parents=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in skeleton.named_parameters():
        group = name.split(".")[2] if ".layers." in name else "rest"
        groups.setdefault(group, {})[name] = parameter
    index = {}
    for number, tensors in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        made = {
            name: _random(tuple(tensor.shape), generator, device) for name, tensor in _without_ties(tensors, config)
        }
        save_file(made, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(made, file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(directory)
    return directory


def _without_ties(tensors: dict[str, Tensor], config: PretrainedConfig) -> Iterable[tuple[str, Tensor]]:
    return [(name, t) for name, t in tensors.items() if not (config.tie_word_embeddings and name.startswith("lm_head"))]


def _random(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    return (values / math.sqrt(shape[1])).cpu()
