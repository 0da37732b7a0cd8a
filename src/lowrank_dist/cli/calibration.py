"""The calibration pass of a command that runs without a Trainer: its options and its data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import ArgumentParser
from transformers import PreTrainedModel

from lowrank_dist.calibration.measure import Calibration
from lowrank_dist.calibration.walk import CalibrationPass
from lowrank_dist.cli.ranks import first_on_host
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.decomposition.walk import Walk
from lowrank_dist.errors import InputError
from lowrank_dist.methods import Method
from lowrank_dist.model.plan import Plan
from lowrank_dist.model.skeleton import build_buffers_in
from lowrank_dist.zero3.partition import Partitioner, use_cpu_accelerator

# arguments of SFTDataModule that the command sets by its own options, or that serve training and evaluation only
_NOT_OFFERED = {
    *("tokenizer", "train", "validation", "test", "validation_split", "test_split", "eval_limit"),
    *("packing", "padding_free", "stopping_strategy", "streaming", "shuffle_buffer"),
}


def add_calibration_options(parser: ArgumentParser) -> None:
    """Add the options of a calibration pass: those of `Calibration` and those of `SFTDataModule`."""
    parser.add_argument(
        "--tokenizer", type=str | None, help="directory or hub id of the tokenizer (default: --pretrained)"
    )
    parser.add_class_arguments(Calibration, "calibration", skip={"data", "step"})
    parser.add_class_arguments(SFTDataModule, "data", skip=_NOT_OFFERED)


def check_calibration(init: Method, options: Any) -> None:
    """Raise InputError if the method needs data and none is given, or the reverse."""
    if init.statistic is None and options.calibration_data is not None:
        raise InputError(
            f"--calibration_data {options.calibration_data}: {init} uses no data; leave it out, or use --method "
            "corda, eva, lora_ga, lora_one or qera"
        )
    if init.statistic is not None and options.calibration_data is None:
        raise InputError(
            f"--method {options.method} needs data; pass --calibration_data with the path of a .jsonl file or the id "
            "of a Hugging Face data set"
        )


def calibration_pass(
    options: Any, backbone: PreTrainedModel, plan: Plan, walk: Walk, source_dtype: torch.dtype
) -> CalibrationPass:
    """The calibration pass before `walk`, over the ranks of `walk`, on the first batches that training would see.

    It computes in `source_dtype`, the dtype of the pretrained weights; on CPUs, and for fp16, in fp32. Collective.

    Raises
    ------
    InputError
        On every rank, if the data cannot be read or used.
    """
    group, device = walk.group, walk.device
    if device.type == "cpu":
        use_cpu_accelerator()
    with group.shared_errors(), _naming(options.calibration_data):
        data = SFTDataModule(
            options.tokenizer or str(walk.reader.directory), options.calibration_data, **vars(options.data)
        )
        if first_on_host():
            data.prepare_data()
    with group.shared_errors(), _naming(options.calibration_data):
        data.setup("fit")
    loader = data.sharded_dataloader(num_replicas=group.size, rank=group.rank)

    def on_device() -> Iterator[Any]:
        for batch in loader:
            yield {name: values.to(device) for name, values in batch.items()}

    computed = torch.float32 if device.type == "cpu" or source_dtype == torch.float16 else source_dtype
    partitioner = Partitioner({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    with group.shared_errors():
        build_buffers_in(backbone, computed)
        return CalibrationPass(
            backbone,
            plan,
            walk.reader,
            partitioner,
            on_device(),
            calibration=Calibration(**vars(options.calibration)),
            init=walk.init,
            residual=walk.residual,
            compute_dtype=computed,
            factor_dtype=walk.factor_dtype,
            advance=walk.advance,
            thorough=walk.thorough,
        )


@contextmanager
def _naming(data: str) -> Iterator[None]:
    """Prefix errors about `data` with the option that named it."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise InputError(f"--calibration_data {data}: {error}") from error
