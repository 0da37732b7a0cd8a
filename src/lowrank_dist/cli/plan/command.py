"""``lowrank-dist plan``: forecast what a run takes from its configuration."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

import lowrank_dist
from lowrank_dist.cli.plan.model import with_adapters
from lowrank_dist.cli.plan.table import as_table
from lowrank_dist.data.batching import full_rows
from lowrank_dist.data.tasks import PER_ITEM
from lowrank_dist.errors import InputError
from lowrank_dist.forecast import Cluster, Forecast, ModelShapes, RunSpec, forecast
from lowrank_dist.methods import PiSSA
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.storage.dtypes import PRECISIONS
from lowrank_dist.storage.resolve import resolve_checkpoint
from lowrank_dist.training.fit_cli import instantiated, module_class, module_settings, parse_fit
from lowrank_dist.training.preference import PreferenceModule
from lowrank_dist.training.projected import PROJECTIONS
from lowrank_dist.training.strategy import PiSSAStrategy

DOES_NOT_FIT = 3  # exit status

_ASSUMED = Cluster()
_ALL_REDUCE = "bandwidth of a large all-reduce {} nodes: bytes of the tensor over time"
#: Options that say what GPUs and their network are like: default, unit, help.
OF_GPUS = {
    "gpu_memory": (80.0, "GB", "memory of one GPU, in 1e9 bytes"),
    "reserve": (6.0, "GB", "part of it reserved for CUDA, NCCL and fragmentation"),
    "tflops": (_ASSUMED.flops / 1e12, "TFLOPS", "bf16 Tflop/s that one GPU reaches in training, assumed"),
    "bandwidth_within": (_ASSUMED.bandwidth[0] / 1e9, "GB/S", f"{_ALL_REDUCE.format('within')}, assumed"),
    "bandwidth_between": (_ASSUMED.bandwidth[1] / 1e9, "GB/S", f"{_ALL_REDUCE.format('between')}, assumed"),
}


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist plan``; `argv` excludes the command's name. Returns the exit status."""
    options, of_fit = parser().parse_known_args(list(argv))
    found = planned_run(options, of_fit)
    print(json.dumps(found.as_dict(), indent=2) if options.json else as_table(found))
    return DOES_NOT_FIT if found.fits is False else 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist plan``; arguments that it does not know belong to ``fit``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist plan",
        description="Forecast what a run takes per GPU, on the network and on disk, and whether it fits, from its "
        "configuration and the shapes of the model. Nothing is downloaded and no weight is read. Every key of "
        f"`lowrank-dist fit` is accepted too. Exit status {DOES_NOT_FIT}: it does not fit.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        required=True,
        help="configuration of fit; repeatable, later files override earlier ones",
    )
    parser.add_argument("--nodes", type=int, help="nodes (default: trainer.num_nodes)")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs, or CPU ranks, per node (default: trainer.devices)")
    for name, (default, unit, text) in OF_GPUS.items():
        parser.add_argument(_option(name), type=float, metavar=unit, help=f"{text} (default: {default:g})")
    parser.add_argument(
        "--model-config", help="config.json of the model, or its directory (default: that of `pretrained`, see below)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: bytes and seconds")
    parser.epilog = (
        "The model's dimensions come from the directory `pretrained`, else from the hub's local cache, else from "
        "models/<last part of its name>.json beside the configuration or among the package's."
    )
    return parser


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check(options: argparse.Namespace, of_fit: Sequence[str]) -> None:
    """Raise InputError for numbers that cannot be, and for a key that is given a second time."""
    for name in ("nodes", "gpus_per_node", *OF_GPUS):
        value, may_be_zero = getattr(options, name), name == "reserve"
        if value is not None and not (0 < value < math.inf or (value == 0 and may_be_zero)):
            must = "must not be negative" if may_be_zero else "must be positive"
            raise InputError(f"plan: {_option(name)} {value} {must}")
    for name, key in (("nodes", "--trainer.num_nodes"), ("gpus_per_node", "--trainer.devices")):
        if getattr(options, name) is not None and key in (argument.partition("=")[0] for argument in of_fit):
            raise InputError(f"plan: {_option(name)} and {key} are the same; leave one of them out")


def _of_gpus(options: argparse.Namespace, *, on_gpu: bool) -> dict[str, float]:
    """The options that describe GPUs, with their defaults.

    Raises
    ------
    InputError
        If one is given for a run on CPUs, or no memory is left.
    """
    given = {name: value for name in OF_GPUS if (value := getattr(options, name)) is not None}
    if given and not on_gpu:
        name, value = next(iter(given.items()))
        raise InputError(
            f"plan: {_option(name)} {value:g} has no effect, because trainer.accelerator is cpu: ranks share the "
            "memory of their host, and seconds are computed for GPUs alone; leave it out"
        )
    found = {name: default for name, (default, *_) in OF_GPUS.items()} | given
    if found["reserve"] >= found["gpu_memory"]:
        raise InputError(
            f"plan: --reserve {found['reserve']:g} leaves nothing of --gpu-memory {found['gpu_memory']:g}; lower it"
        )
    return found


def planned_run(options: argparse.Namespace, of_fit: Sequence[str]) -> Forecast:
    """The forecast for parsed `options`, with further arguments of fit."""
    _check(options, of_fit)
    overrides = []
    if options.nodes is not None:
        overrides.append(f"--trainer.num_nodes={options.nodes}")
    if options.gpus_per_node is not None:
        overrides.append(f"--trainer.devices={options.gpus_per_node}")
    settings = parse_fit([*(f"--config={path}" for path in options.config), *overrides, *of_fit])
    strategy = instantiated(settings, "trainer").strategy
    job = _job(settings, strategy)
    gpus = _of_gpus(options, on_gpu=job.on_gpu)
    beside = [Path(path).parent for path in options.config]
    if isinstance(strategy, PiSSAStrategy):
        source = _source(strategy.pretrained, strategy.revision, options.model_config, beside)
        shapes, job = with_adapters(strategy, source, job)
    else:
        shapes = ModelShapes.of(_source(module_settings(settings).pretrained, None, options.model_config, beside), None)
    limit = round((gpus["gpu_memory"] - gpus["reserve"]) * 1e9) if job.on_gpu else None
    automatic = isinstance(strategy, PiSSAStrategy) and strategy.shard_within == "auto"
    looks_at_data = job.init is not None and job.init.statistic is not None  # which needs the world
    cluster = Cluster(
        flops=gpus["tflops"] * 1e12, bandwidth=(gpus["bandwidth_within"] * 1e9, gpus["bandwidth_between"] * 1e9)
    )
    return forecast(shapes, job, limit=limit, cluster=cluster, automatic=automatic and not looks_at_data)


def _job(settings: Any, strategy: Any) -> RunSpec:
    trainer, data, precision = settings.trainer, settings.data, str(settings.trainer.precision)
    model = module_settings(settings)
    by_tokens = data.tokens_per_batch is not None
    module = module_class(settings)
    rows = PER_ITEM.get(getattr(module, "data_task", "sft"), 1)
    if precision not in PRECISIONS:
        raise InputError(f"plan: precision={precision!r} is not supported; use one of {', '.join(PRECISIONS)}")
    if not str(trainer.devices).isdecimal():  # a list, "auto", -1
        raise InputError(f"plan: trainer.devices={trainer.devices!r} is not a number; pass --gpus-per-node")
    compute_dtype, factor_dtype = PRECISIONS[precision]
    options: dict[str, Any] = {
        "nodes": trainer.num_nodes,
        "gpus_per_node": int(trainer.devices),
        "batch_size": full_rows(
            batch_size=data.batch_size,
            tokens_per_batch=data.tokens_per_batch,
            max_length=data.max_length,
            per_item=rows,
        ),
        "item_rows": rows,
        "tokens_per_batch": data.tokens_per_batch,
        "length": data.max_length,
        "accumulate": trainer.accumulate_grad_batches,
        "compute_dtype": compute_dtype,
        "factor_dtype": factor_dtype,
        # a class of a user may fix its loss, or be a function that makes the module
        "keeps_step_zero": isinstance(module, type)
        and issubclass(module, PreferenceModule)
        and model.get("loss", "dpo") == "dpo",
        "optimizer": model.get("optimizer", "adamw"),
        "optimizer_rank": _projected_rank(model),
        "fused_cross_entropy": model.get("fused_cross_entropy", False),
        "gradient_checkpointing": model.get("gradient_checkpointing", False),
        "on_gpu": trainer.accelerator != "cpu",
    }
    if isinstance(strategy, DeepSpeedStrategy):
        options |= _deepspeed_options(strategy)
    elif isinstance(strategy, DDPStrategy) or strategy in ("ddp", "auto"):
        options["stage"] = 0
    else:
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise InputError(f"plan: strategy {name} is not supported; use PiSSAStrategy, DeepSpeedStrategy or DDPStrategy")
    if isinstance(strategy, PiSSAStrategy):
        options |= {
            "init": strategy.init or PiSSA(),
            # what stays as it is stored is planned from its headers
            "residual": Dense(dtype=compute_dtype)
            if strategy.quantization is None or isinstance(strategy.quantization, str)
            else strategy.quantization,
            "gradient_checkpointing": strategy.gradient_checkpointing is not False,
            "keep_decoded": strategy.keep_decoded or strategy.compile_layers is not None,
            "live_layers": strategy.live_layers,
            "fp32_norms": strategy.fp32_norms,
            "experts_at_a_time": strategy.experts_at_a_time,
            "shard_within": "world" if strategy.shard_within == "auto" else strategy.shard_within,
        }
    elif options.get("stage") and compute_dtype == torch.bfloat16:
        options["factor_dtype"] = torch.bfloat16  # DeepSpeed's engine casts the model
    job = RunSpec(**options)
    return RunSpec(**options, steps=_steps(trainer, None if by_tokens else data.limit, job.global_batch // rows))


def _projected_rank(model: Any) -> int:
    """Rank on which the optimizer projects gradients; that of GaLore if it projects none."""
    name = model.get("optimizer", "adamw")
    rank = (model.get("optimizer_options") or {}).get("rank")
    return int(PROJECTIONS[name if name in PROJECTIONS else "galore"]["rank"] if rank is None else rank)


def _deepspeed_options(strategy: DeepSpeedStrategy) -> dict[str, Any]:
    assert isinstance(strategy.config, dict)
    zero = strategy.config.get("zero_optimization", {})
    bucket = zero.get("reduce_bucket_size")
    chosen = not isinstance(strategy, PiSSAStrategy) or "reduce_bucket_size" in strategy._chosen
    return {
        "stage": zero.get("stage", 0),
        "offload_optimizer": "offload_optimizer" in zero,
        "offload_parameters": "offload_param" in zero,
        "bucket": int(bucket) if bucket and chosen else None,
    }


def _steps(trainer: Any, limit: int | None, global_batch: int) -> int | None:
    if (trainer.max_steps or -1) > 0:
        return int(trainer.max_steps)
    if limit is None or (trainer.max_epochs or -1) < 0:
        return None
    return math.ceil(limit / global_batch) * int(trainer.max_epochs)


def _source(pretrained: str, revision: str | None, given: str | None, beside: Sequence[Path]) -> Path:
    """The file or directory with the model's dimensions; nothing is downloaded."""
    if given is not None:
        if not Path(given).exists():
            raise InputError(f"--model-config {given}: no such file or directory")
        return Path(given)
    if Path(pretrained).exists():
        return resolve_checkpoint(pretrained)
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(pretrained, "config.json", revision=revision)
    except ValueError:  # a path
        cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    package = Path(lowrank_dist.__file__).parent
    places = [*beside, *(path.parent for path in beside), package.parents[1] / "configs", package / "configs"]
    name = f"models/{Path(pretrained).name}.json"
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        raise InputError(
            f"plan: the dimensions of {pretrained!r} are unknown: it is not a directory, it is not in the hub's cache, "
            f"and {name} is neither beside the configuration nor in the package; pass --model-config"
        )
    return found
