"""What servers say to a LoRA, told from its files alone.

The rules are those of vLLM's loader (0.33: ``vllm/lora/peft_helper.py`` and ``lora_model.py``). It asks for a LoRA
without DoRA, of which every tensor is a factor or of a classification head, ``score`` or ``classifier``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from lowrank_dist.storage.layout import CONFIG, WEIGHTS, read_json

#: vLLM's ``--max-lora-rank`` if none is given.
DEFAULT_RANK = 16

#: Heads that vLLM takes whole, for classification.
_HEADS = ("score", "classifier")
_FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


def objections(directory: str | os.PathLike[str]) -> list[str]:
    """Reasons, beside its ranks, for which vLLM does not load a LoRA, or loads it for some models only.

    Parameters
    ----------
    directory
        Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        names = sorted(file.keys())
    heads = {name for name in config.get("modules_to_save") or [] if name in _HEADS}
    whole = [
        name
        for name in names
        if not any(mark in name for mark in _FACTORS) and not heads.intersection(name.split(".")[-2:-1])
    ]
    embeddings = [name for name in names if ".lora_embedding_A" in name]
    stacked = config.get("target_parameters") or []
    found = []
    if whole:
        found.append(
            f"It holds {_some(whole)} whole, and vLLM refuses a LoRA with tensors that are no factors; merge instead "
            "(lowrank-dist merge)."
        )
    if embeddings:
        found.append(
            f"It adapts the embedding {_some(embeddings)}, which vLLM takes for models that declare it; else merge."
        )
    if stacked:
        found.append(
            f"It adapts experts in one tensor ({_some(stacked)}), which vLLM takes for some mixtures of experts only, "
            "and other servers do not; else merge."
        )
    return found


def _some(names: Sequence[str]) -> str:
    first = names[0].removeprefix("base_model.model.").partition(".lora_")[0]
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
