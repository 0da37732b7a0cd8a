"""Bytes of quantized weights of which only the configuration is available."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lowrank_dist.errors import ModelError
from lowrank_dist.storage.source import ShapesOnly


def shapes_only(backbone: PreTrainedModel) -> ShapesOnly:
    """The weights of a model on the meta device, without adapters and without values.

    Quantized ones have the bytes of their format: FP8 with block scales (DeepSeek-V3) and MXFP4 (gpt-oss).

    Raises
    ------
    ModelError
        If they are quantized in another format: how many bytes they are is in their headers.
    """
    settings = getattr(backbone.config, "quantization_config", None)
    if settings is None:
        return ShapesOnly(backbone)
    settings = settings if isinstance(settings, Mapping) else settings.to_dict()
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    known: dict[str, int] = {}
    if method == "fp8" and block:
        for name, shape in _quantized(backbone, settings, linears=True):
            *count, rows, columns = shape
            scales = math.ceil(rows / block[0]) * math.ceil(columns / block[1])
            known[name] = math.prod(count) * (rows * columns + 4 * scales)
    elif method == "mxfp4":  # 32 codes of 4 bits share a scale of 8
        for name, shape in _quantized(backbone, settings, linears=False):
            known[name] = math.prod(shape) * 17 // 32
    else:
        raise ModelError(
            f"{ShapesOnly(backbone).name}: its configuration says that the weights are quantized by {method!r}, and "
            "only their headers say how many bytes that makes; pass a directory with the weights, or remove "
            "quantization_config from config.json to plan for dense ones"
        )
    return ShapesOnly(backbone, known)


def _quantized(
    backbone: PreTrainedModel, settings: Mapping[str, Any], *, linears: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights of linear layers (if `linears`) and of stacked experts that are quantized."""
    dense = settings.get("modules_to_not_convert") or ()
    head = backbone.get_output_embeddings()
    for name, module in backbone.named_modules():
        parts = name.split(".")
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        if module is head or any(fnmatch.fnmatch(one, pattern) for one in above for pattern in dense):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 or (linears and type(module) is nn.Linear and leaf == "weight"):
                yield f"{name}.{leaf}", tuple(parameter.shape)
