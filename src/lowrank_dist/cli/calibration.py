"""Options and data of commands whose method looks at data, without a Trainer."""

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
from lowrank_dist.zero3.partition import Partitioner, use_cpu_accelerator

# of SFTDataModule: what is an option of the command itself, or is for training and evaluation only
_NOT_ASKED = {
    *("tokenizer", "train", "validation", "test", "validation_split", "test_split", "eval_limit", "packing"),
}


def add_calibration_options(parser: ArgumentParser) -> None:
    """Add the options of a calibration pass: `Calibration`'s, and `SFTDataModule`'s under its names."""
    parser.add_argument(
        "--tokenizer", type=str | None, help="directory or hub id of the tokenizer (default: --pretrained)"
    )
    parser.add_class_arguments(Calibration, "calibration", skip={"data", "step"})
    parser.add_class_arguments(SFTDataModule, "data", skip=_NOT_ASKED)


def check_calibration(init: Method, options: Any) -> None:
    """Raise InputError where data are missing, or are given to a method that does not look at them."""
    if init.statistic is None and options.calibration_data is not None:
        raise InputError(
            f"--calibration_data {options.calibration_data}: {init} looks at no data; leave it out, or use --method "
            "corda, eva or lora_ga"
        )
    if init.statistic is not None and options.calibration_data is None:
        raise InputError(
            f"--method {options.method} looks at data; pass --calibration_data with the path of a .jsonl file, or with "
            "the id of a Hugging Face data set"
        )


def calibration_pass(
    options: Any, backbone: PreTrainedModel, plan: Plan, walk: Walk, source_dtype: torch.dtype
) -> CalibrationPass:
    """The calibration pass before `walk`, over the ranks of `walk`, with the data that training would begin with.

    It computes in the dtype of the checkpoint, `source_dtype`; on CPUs, and for fp16, in fp32. Collective.

    Raises
    ------
    InputError
        On every rank, where the data cannot be read or used.
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

    partitioner = Partitioner({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    with group.shared_errors():
        return CalibrationPass(
            backbone,
            plan,
            walk.reader,
            partitioner,
            on_device(),
            calibration=Calibration(**vars(options.calibration)),
            init=walk.init,
            residual=walk.residual,
            compute_dtype=torch.float32 if device.type == "cpu" or source_dtype == torch.float16 else source_dtype,
            factor_dtype=walk.factor_dtype,
            advance=walk.advance,
            thorough=walk.thorough,
        )


@contextmanager
def _naming(data: str) -> Iterator[None]:
    """Say of which option data are that cannot be read or used."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise InputError(f"--calibration_data {data}: {error}") from error
