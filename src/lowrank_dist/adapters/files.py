"""Adapter files in PEFT's format: writing and reading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.layout import CONFIG, WEIGHTS, read_json
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.writer import write_tensors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to `directory`, as PEFT writes them.

    Raises
    ------
    ValueError
        If there are no tensors.
    """
    if not tensors:
        raise ValueError(f"{directory}: refusing to write an adapter without tensors")
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    write_tensors(directory / WEIGHTS, tensors)


def open_tuned(directory: Path) -> tuple[CheckpointReader, PeftConfig]:
    """Open an adapter of any type that PEFT wrote: a reader of its tensors, and its configuration.

    Only headers are read.

    Raises
    ------
    CheckpointError
        If `directory` holds no adapter, a damaged one, or one of a type that the installed PEFT does not know.
    """
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory}: holds no {file}; pass a directory that an adapter was saved to")
    config = read_config(directory)
    return CheckpointReader(directory, stem=Path(WEIGHTS).stem), config


def read_config(directory: Path) -> PeftConfig:
    """The configuration of an adapter of any type that PEFT wrote.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or of a type that the installed PEFT does not know.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    values = read_json(directory / CONFIG)
    kind = values.get("peft_type")
    if isinstance(kind, str) and kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(f"{directory / CONFIG}: the installed PEFT knows no adapters of type {kind}; update PEFT")
    try:
        return PeftConfig.from_peft_type(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory / CONFIG}: cannot be read ({error!r}); it is damaged") from error


def open_adapter(directory: Path) -> tuple[CheckpointReader, LoraConfig]:
    """Open a LoRA adapter that PEFT or `write_adapter` wrote: a reader of its tensors, and its configuration.

    Only headers are read.

    Raises
    ------
    CheckpointError
        If `directory` holds no adapter, a damaged one, or one that is not a LoRA.
    """
    from peft import LoraConfig

    reader, config = open_tuned(directory)
    if not isinstance(config, LoraConfig):
        reader.close()
        kind = config.peft_type.value
        raise CheckpointError(f"{directory}: an adapter of type {kind}, not a LoRA; pass a LoRA adapter")
    return reader, config


def whole_tensor(reader: CheckpointReader, name: str) -> Tensor:
    """The whole tensor `name`, in its shape and dtype; CPU."""
    shape = reader.info(name).shape
    return reader.flat(name, 0, math.prod(shape)).view(shape)


def read_adapter(directory: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """All tensors, by name, and the configuration of an adapter; see `open_adapter`."""
    reader, config = open_adapter(directory)
    return {name: whole_tensor(reader, name) for name in reader}, config


def changed_config(config: LoraConfig, **changes: Any) -> LoraConfig:
    """A copy of `config` with `changes`, for a trained adapter."""
    from peft import LoraConfig

    values = {**config.to_dict(), "init_lora_weights": True, "inference_mode": True, **changes}
    for derived in ("peft_type", "auto_mapping", "peft_version"):
        values.pop(derived, None)
    return LoraConfig(**values)
