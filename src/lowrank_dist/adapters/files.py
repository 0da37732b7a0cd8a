"""Adapters on disk: the files of a checkpoint, written and read under PEFT's names."""

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
    from peft import LoraConfig


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, in `directory`."""
    if not tensors:
        raise ValueError(f"{directory}: refusing to write an adapter without tensors")
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    write_tensors(directory / WEIGHTS, tensors)


def open_adapter(directory: Path) -> tuple[CheckpointReader, LoraConfig]:
    """Tensors, to be read as they are needed, and configuration of a LoRA adapter written by PEFT or `write_adapter`.

    Raises
    ------
    CheckpointError
        Where `directory` holds no adapter, a damaged one, or one of another kind.
    """
    from peft import LoraConfig

    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory}: holds no {file}; pass a directory that an adapter was saved to")
    values = read_json(directory / CONFIG)
    try:
        config = LoraConfig.from_peft_type(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory / CONFIG}: cannot be read ({error!r}); it is damaged") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory}: a {config.peft_type} adapter, not a LoRA")
    return CheckpointReader(directory, stem=Path(WEIGHTS).stem), config


def whole_tensor(reader: CheckpointReader, name: str) -> Tensor:
    """Tensor `name`, in its shape and dtype."""
    shape = reader.info(name).shape
    return reader.flat(name, 0, math.prod(shape)).view(shape)


def read_adapter(directory: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """All of what `open_adapter` opens."""
    reader, config = open_adapter(directory)
    return {name: whole_tensor(reader, name) for name in reader}, config


def changed_config(config: LoraConfig, **changes: Any) -> LoraConfig:
    """A copy of `config` with `changes`, for an adapter that is done."""
    from peft import LoraConfig

    values = {**config.to_dict(), "init_lora_weights": True, "inference_mode": True, **changes}
    for derived in ("peft_type", "auto_mapping", "peft_version"):
        values.pop(derived, None)
    return LoraConfig(**values)
