"""Adapter files in PEFT's format: writing and reading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from lowrank_dist.adapters.patterns import check_pattern
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.layout import CONFIG, WEIGHTS, read_json
from lowrank_dist.storage.parse import (
    Record,
    is_flag,
    is_integer,
    is_list_of,
    is_number,
    is_plain,
    is_text,
    printable,
)
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
    pickled = Path(WEIGHTS).with_suffix(".bin")
    if (directory / pickled).exists() and not (directory / WEIGHTS).exists():
        raise CheckpointError(
            f"{directory}: holds {pickled}, which only pickle reads, and no {WEIGHTS}; write it as safetensors first: "
            f"`lowrank-dist import {directory} --output DIRECTORY`"
        )
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).exists():
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
    return read_config_file(directory / CONFIG)


def read_config_file(path: Path) -> PeftConfig:
    """Like `read_config`, of a file with any name."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    values = read_json(path)
    kind = values.text("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: the installed PEFT knows no adapters of type {printable(kind, 40)}; update PEFT"
        )
    _check_entries(values, PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    try:
        return PeftConfig.from_peft_type(**values)
    except Exception as error:  # whatever PEFT's checks raise for entries of the right type
        raise CheckpointError(f"{path}: cannot be read ({printable(repr(error))}); it is damaged") from error


#: Entries that PEFT matches as regular expressions, or whose names are.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_OF_PATTERNS = ("rank_pattern", "alpha_pattern")
_MOST = 10_000  # elements of a list or of an object
_LARGEST = 2**31


def _check_entries(values: Record, kind: type[PeftConfig]) -> None:
    """Raise CheckpointError if an entry has a type that PEFT does not declare, or could make it hang."""
    hints = get_type_hints(kind)
    numbers = {field.name for field in fields(kind) if is_number(field.default)}
    for name, value in values.items():
        # null stands for a default, but for those that are numbers
        if name in hints and (value is not None or name in numbers):
            values.expect(name, partial(_fits, hint=hints[name]), "of the type that PEFT declares")
        if isinstance(value, list | dict) and len(value) > _MOST:
            raise values.wrong(name, f"at most {_MOST} elements")
    values.integer("r", 1, low=1 if "lora_alpha" in hints else 0, high=2**20)  # 0: not used by that type
    for name in _PATTERNS:
        if isinstance(values.get(name), str):
            check_pattern(values[name], f"{values.where}: {name}")
    for name in _OF_PATTERNS:
        for pattern in values.record(name):
            check_pattern(pattern, f"{values.where}: {name}")
    for ranks in values.record("rank_pattern").values():
        if not is_integer(ranks, 1, 2**20) and not is_list_of(is_flag)(ranks):  # AdaLoRA's: what is kept
            raise values.wrong("rank_pattern", "an object of ranks")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is one of the declared type; numbers that PEFT declares as int may be float."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one or isinstance(value, str) for one in inner)
    if origin in (list, set, tuple):
        element = inner[0] if inner and inner[0] is not Ellipsis else Any
        return isinstance(value, list) and all(_fits(item, element) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_plain(key) and _fits(item, inner[1]) for key, item in value.items())
    if hint in (int, float):
        return is_flag(value) or (is_number(value) and abs(value) <= _LARGEST)
    if hint is bool:
        return is_flag(value)
    if hint is str or (isinstance(hint, type) and issubclass(hint, Enum)):
        return is_text(value)
    if hint in (list, set, tuple):
        return isinstance(value, list) and all(is_text(item) or is_number(item) for item in value)
    return value is None if hint is NoneType else hint is Any or isinstance(value, dict)


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
