"""Opening of pretrained weights: dense ones, quantized ones, which are decoded as they are read, or a weight source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from lowrank_dist.decoding import bitsandbytes, compressed_tensors, fp4, packed, scaled
from lowrank_dist.decoding.encoded import Finder, refuse
from lowrank_dist.decoding.gguf import open_gguf
from lowrank_dist.decoding.reader import DecodingReader
from lowrank_dist.errors import ModelError
from lowrank_dist.storage.dtypes import NAMED_DTYPES
from lowrank_dist.storage.parse import Record, printable, read_record
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.resolve import gguf_file
from lowrank_dist.storage.source import SourceReader, WeightSource

#: Formats by the ``quant_method`` of ``config.json``.
FINDERS: dict[str, Finder] = {
    "fp8": scaled.find_fine_grained,
    "fbgemm_fp8": scaled.find_fbgemm,
    "bitsandbytes": bitsandbytes.find,
    "mxfp4": fp4.find_stacked,
    "modelopt": fp4.find_modelopt,
    "gptq": packed.find_gptq,
    "awq": packed.find_awq,
    "compressed-tensors": compressed_tensors.find,
}
_OF_MODELOPT = "hf_quant_config.json"
#: Files of AutoGPTQ and AutoAWQ, which older models have instead of an entry in ``config.json``.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def open_reader(pretrained: str | os.PathLike[str] | WeightSource) -> CheckpointReader:
    """Open the reader of a directory, of a GGUF file, or of a weight source. Only headers and settings are read.

    Raises
    ------
    CheckpointError
        If files are missing or damaged.
    ModelError
        If the weights are quantized in a way that is not decoded here. The error names what was found.
    """
    if not isinstance(pretrained, str | os.PathLike):
        return SourceReader(pretrained)
    file = gguf_file(Path(pretrained))
    if file is not None:
        return open_gguf(file)
    reader = CheckpointReader(pretrained)
    try:
        return decoded(reader)
    except Exception:
        reader.close()
        raise


def decoded(reader: CheckpointReader) -> CheckpointReader:
    """`reader` itself, or one that decodes what it reads if ``config.json`` says that the weights are quantized."""
    config = _config(reader.directory)
    settings = quantization_settings(config, reader.directory)
    if settings is None:
        wide = scaled.find_fp64(reader)
        return DecodingReader(reader, wide) if wide.matrices else reader
    method = _method(settings)
    if not isinstance(method, str) or method not in FINDERS:
        raise refuse(
            reader.directory,
            f"its weights are quantized by {printable(repr(method))} ({_shown(settings)})",
            f"known are {', '.join(FINDERS)}. Pass the model that it was quantized from, or load it with its own "
            "library and save it dense",
        )
    found = FINDERS[method](reader, settings, _dtype(config))
    if not found.matrices:
        raise ModelError(
            f"{settings.where}: says that the weights are quantized by {method!r}, but no tensor is stored so; if the "
            "weights are dense, remove quantization_config from config.json, or the file of its own"
        )
    return DecodingReader(reader, found)


def quantization_settings(config: Record, directory: Path) -> Record | None:
    """How the weights of a model are quantized, from ``config.json`` or a file beside it; None: they are dense."""
    for record in (config, config.record("text_config"), config.record("llm_config")):
        for entry in ("quantization_config", "compression_config"):
            if record.get(entry):
                return record.record(entry)
    if (directory / _OF_MODELOPT).is_file():
        settings = read_record(directory / _OF_MODELOPT).record("quantization")
        if settings:
            return Record({"quant_method": "modelopt", **settings}, settings.where)
    for name, method in _OWN_FILES.items():
        if (directory / name).is_file():
            settings = read_record(directory / name)
            return Record({"quant_method": method, **settings}, settings.where)
    return None


def _config(directory: Path) -> Record:
    path = directory / "config.json"
    return read_record(path) if path.is_file() else Record({}, str(path))


def _method(settings: Record) -> Any:
    if "quant_method" not in settings and ("load_in_4bit" in settings or "load_in_8bit" in settings):
        return "bitsandbytes"  # written before quantization methods had names
    return settings.get("quant_method")


def _dtype(config: Record) -> torch.dtype:
    """The dtype of a model, to which transformers decodes where a format does not say; bf16 if it is not stated."""
    for record in (config, config.record("text_config")):
        for entry in ("dtype", "torch_dtype"):
            name = record.get(entry)
            if isinstance(name, str) and name.removeprefix("torch.") in NAMED_DTYPES:
                return NAMED_DTYPES[name.removeprefix("torch.")]
    return torch.bfloat16


def _shown(settings: Record) -> str:
    plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
    return printable(json.dumps(plain), 300)
