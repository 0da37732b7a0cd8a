"""What servers say to a LoRA, and what they do not say, told from its files alone.

The rules are those of the loaders of vLLM (0.33: ``vllm/lora/peft_helper.py``, ``lora_model.py``), SGLang (0.5.23:
``sglang/srt/lora/lora.py``, ``lora_manager.py``) and llama.cpp (``convert_lora_to_gguf.py`` of October 2026).
``make test-serving`` puts LoRAs through all three.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lowrank_dist.storage.layout import CONFIG, WEIGHTS, read_json

#: vLLM's ``--max-lora-rank`` if none is given.
DEFAULT_RANK = 16

#: vLLM's ``--max-lora-rank``, which sizes its buffers, must be one of these. An adapter's rank may be smaller, but must
#: be the same for all modules.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

#: Heads that vLLM takes whole, for classification.
_HEADS = ("score", "classifier")
_FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


def objections(directory: str | os.PathLike[str]) -> list[str]:
    """Reasons for which servers do not load a LoRA as they are, or serve another model than was trained.

    Parameters
    ----------
    directory
        Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    list of str
        Sentences that name the servers and a remedy.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        names = sorted(file.keys())
    return [*_of_the_configuration(config), *_of_the_tensors(names, config)]


def _of_the_configuration(config: dict[str, Any]) -> Iterator[str]:
    if config.get("use_dora"):
        yield "It is a DoRA, which vLLM, SGLang and llama.cpp refuse; --rank of convert writes the nearest LoRA."
    else:
        yield from _of_the_rank(max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()]))
    scalings = [name for name in ("use_rslora", "alpha_pattern") if config.get(name)]
    if scalings:
        yield (
            f"Its scalings are not all lora_alpha / r ({', '.join(scalings)}). vLLM 0.33 takes that; SGLang and "
            "llama.cpp do not look, and serve a wrong update without a word; --rank of convert writes one scaling."
        )
    if config.get("rank_pattern"):
        yield (
            "Its ranks differ (rank_pattern). vLLM 0.33 and llama.cpp take that, SGLang does not; --rank of convert "
            "writes one rank."
        )
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        yield "Its target_modules are a regular expression, which SGLang refuses; name the modules in a list."


def _of_the_rank(rank: int) -> Iterator[str]:
    if rank not in SERVED_RANKS:
        larger = [served for served in SERVED_RANKS if served > rank]
        serves = f"rank {rank} needs {larger[0]}" if larger else f"rank {rank} is beyond them"
        yield f"vLLM's --max-lora-rank is one of {', '.join(map(str, SERVED_RANKS))}: {serves}."
    elif rank > DEFAULT_RANK:
        yield f"vLLM needs --max-lora-rank {rank}: by default it takes ranks up to {DEFAULT_RANK}."


def _of_the_tensors(names: Sequence[str], config: dict[str, Any]) -> Iterator[str]:
    saved = {name for name in config.get("modules_to_save") or [] if name in _HEADS}
    whole = [name for name in names if not any(mark in name for mark in _FACTORS)]
    heads = [name for name in whole if saved.intersection(name.split(".")[-2:-1])]
    whole = [name for name in whole if name not in heads]
    if whole:
        yield (
            f"It holds {_some(whole)} whole. vLLM refuses a LoRA with tensors that are no factors; SGLang and "
            "llama.cpp leave some out without a word; merge instead (lowrank-dist merge)."
        )
    if heads:
        yield f"It holds the head {_some(heads)}, which vLLM takes and SGLang leaves out without a word."
    if embeddings := [name for name in names if ".lora_embedding_A" in name]:
        yield f"It adapts the embedding {_some(embeddings)}, which vLLM takes for models that declare it; else merge."
    if stacked := config.get("target_parameters") or []:
        yield (
            f"It adapts experts in one tensor ({_some(stacked)}), which vLLM takes for some mixtures of experts only, "
            "and other servers do not; else merge."
        )
    attention: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if found := re.fullmatch(r"(.*)\.([qkv]_proj)\.lora_A\.weight", name):
            attention[found[1]].add(found[2])
    if apart := [name for name, adapted in attention.items() if not adapted.issuperset({"q_proj", "v_proj"})]:
        yield (
            f"It adapts {' and '.join(sorted(attention[apart[0]]))} of {_some(apart)}: SGLang takes them with both "
            "q_proj and v_proj only; merge for it."
        )


def _some(names: Sequence[str]) -> str:
    first = names[0].removeprefix("base_model.model.").partition(".lora_")[0]
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"
