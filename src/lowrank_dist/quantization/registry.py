"""The residual formats by name, and their descriptions in manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import AS_STORED, AsStoredOption, ResidualFormat
from lowrank_dist.quantization.fp4 import FP4
from lowrank_dist.quantization.fp8 import FP8
from lowrank_dist.quantization.int8 import INT8
from lowrank_dist.quantization.mxfp4 import MXFP4
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.storage.dtypes import NAMED_DTYPES
from lowrank_dist.storage.parse import Record, is_flag

#: Formats of few bits by the names that options and manifests use.
FORMATS: dict[str, type[BlockFormat]] = {fmt.name: fmt for fmt in (NF4, FP4, INT8, FP8, MXFP4)}


def format_as_dict(residual: ResidualFormat) -> dict[str, Any]:
    """Describe a residual format for a manifest, by its name and its options."""
    if isinstance(residual, BlockFormat):
        return {"format": residual.name, **asdict(residual)}
    kind = AS_STORED if str(residual).startswith(AS_STORED) else "dense"
    return {"format": kind, "dtype": str(getattr(residual, "dtype", None)).removeprefix("torch.")}


def format_from_dict(values: Mapping[str, Any]) -> ResidualFormat | AsStoredOption:
    """The residual format that `format_as_dict` described."""
    values = Record(values, "the residual format in the manifest")
    name = values.text("format")
    if name == AS_STORED:
        return AS_STORED
    if name not in FORMATS:
        dtype = values.expect("dtype", lambda name: name in NAMED_DTYPES, "a dtype")
        return Dense(dtype=NAMED_DTYPES[dtype])
    options: dict[str, Any] = {}
    if "block_size" in values:
        options["block_size"] = values.integer("block_size")
    if "double_quant" in values:
        options["double_quant"] = values.expect("double_quant", is_flag, "true or false")
    try:
        return FORMATS[name](**options)
    except TypeError:
        raise values.wrong("format", f"a format without {' and '.join(options)}") from None
