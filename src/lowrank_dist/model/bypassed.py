"""Layers whose weight a model uses without calling them, so that an adapter around them would have no effect.

PEFT adapts what a layer's forward returns. Some models multiply by a layer's weight themselves: Mamba's projection of
time steps, the fused kernels of state spaces, ``nn.MultiheadAttention``. The source of their modules says which.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from typing import Any

from torch import nn

# uses of a weight that need no values: its dtype, device and shape
_NO_VALUES = r"(?!\.(?:dtype|device|shape|ndim|size|data_ptr|is_meta|requires_grad|element_size|new_\w+)\b|\w)"
_WEIGHT_OF = re.compile(r"(?<!isinstance\()(?<!hasattr\()\bself\.(\w+)\.weight\b" + _NO_VALUES)
_HANDED_OVER = re.compile(r"^\s*(?:\w+=)?self\.(\w+)\.weight,$", re.MULTILINE)
_NOT_OF_A_STEP = ("__init__", "reset_parameters", "_init_weights", "init_weights")


def bypassed_layers(backbone: nn.Module) -> dict[str, bool]:
    """Names of the linear layers whose weights other modules of `backbone` use.

    Returns
    -------
    dict
        By name, whether the model multiplies by the weight itself. If not, it hands the weight to a fused kernel on
        some path, and calls the layer on others.
    """
    found: dict[str, bool] = {}
    for name, module in backbone.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found[f"{prefix}out_proj"] = True
            continue
        kind: Any = type(module)
        for child, by_itself in _used_by(kind).items():
            if isinstance(getattr(module, child, None), nn.Linear):
                found[prefix + child] = by_itself
    return found


@functools.cache
def _used_by(kind: Any) -> dict[str, bool]:
    """The children whose weights the methods of a class of transformers use, and whether by itself."""
    if not kind.__module__.startswith("transformers.models."):
        return {}
    texts = []
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name in _NOT_OF_A_STEP or not method.__module__.startswith("transformers.models."):
            continue
        try:
            texts.append(inspect.getsource(method))
        except (OSError, TypeError):  # compiled, or without its source
            continue
    text = "\n".join(texts)
    uses, handed_over = Counter(_WEIGHT_OF.findall(text)), Counter(_HANDED_OVER.findall(text))
    return {child: count > handed_over[child] or f"self.{child}(" not in text for child, count in uses.items()}
