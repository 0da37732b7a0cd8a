"""PiSSA to LoRA: from an adapter for the residual to an ordinary LoRA for the original model.

Let the trained model compute ``W_res + s B A`` with ``W_res = W - s B_0 A_0``, s the scaling and ``A_0, B_0`` the
factors before training. Then ::

    W_res + s B A = W + s (B A - B_0 A_0) = W + s [B | -B_0] [A; A_0],

a LoRA of rank 2r on W with the same scaling ([PiSSA], appendix on conversion; PEFT's
``path_initial_model_for_weight_conversion`` does the same). The scaling is ``alpha / r``, so alpha doubles with r; with
rsLoRA it is ``alpha / sqrt(r)`` and alpha grows by ``sqrt(2)``. Where the residual is quantized the model computes
``Q(W_res) + s B A``, and the identity leaves out ``Q(W_res) - W_res``, which the checkpoint's manifest records.

Pure functions on CPU tensors; no trainer, no process group.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lowrank_dist.checkpoint_io import CheckpointError, write_json, write_tensors
from lowrank_dist.directories import atomic_directory

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_DIR = "adapter"  # trained A and B, for the residual
INITIAL_DIR = "adapter_init"  # A_0 and B_0
LORA_DIR = "lora"  # converted, for the original model
MANIFEST = "lowrank_dist.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


CORE = ".core"  # LoRA-XS: the trained matrix between frozen factors

A_NAMES = (".lora_A.weight", ".lora_embedding_A")
B_NAMES = (".lora_B.weight", ".lora_embedding_B")


def to_lora(
    adapter: Mapping[str, Tensor], initial: Mapping[str, Tensor], experts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Factors of the rank-2r LoRA ``[A; A_0]``, ``[B | -B_0]``.

    Parameters
    ----------
    adapter
        Trained tensors under PEFT's names: ``....lora_A.weight`` ``[r, in]``, ``....lora_B.weight`` ``[out, r]``
        (``lora_embedding_A`` and ``_B`` of embeddings), and whole modules (``modules_to_save``), which are passed
        through.
    initial
        ``A_0`` and ``B_0`` under the same names.
    experts
        How many experts share a tensor, by name, where it is more than one: ``[experts * r, in]`` with one expert after
        the other, ``[out, r * experts]`` with the experts interleaved, as PEFT lays them out.

    Returns
    -------
    dict
        ``[2r, in]`` and ``[out, 2r]`` under the same names, same dtypes.

    Raises
    ------
    ValueError
        Where a factor has no counterpart in `initial` or another shape there.
    """
    converted = {}
    for name, tensor in adapter.items():
        if not name.endswith(A_NAMES + B_NAMES):
            converted[name] = tensor
            continue
        start = initial.get(name)
        if start is None or start.shape != tensor.shape:
            found = "is missing" if start is None else f"has shape {list(start.shape)}"
            raise ValueError(
                f"{name} {list(tensor.shape)}: its initial value {found}; adapter and adapter_init must be of one run"
            )
        if name.endswith(A_NAMES):
            stacks = [t.reshape((experts or {}).get(name, 1), -1, t.shape[1]) for t in (tensor, start)]
            converted[name] = torch.cat(stacks, dim=1).flatten(0, 1)
        else:
            converted[name] = torch.cat([tensor, -start], dim=1)
    return converted


def fold_cores(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA that stands for factors with a core between them: ``B R`` in the place of B and R."""
    folded = {name: tensor for name, tensor in adapter.items() if not name.endswith(CORE)}
    for name in adapter.keys() - folded.keys():
        b, core = name.removesuffix(CORE) + ".weight", adapter[name]
        folded[b] = (adapter[b].float() @ core.float()).to(core.dtype)
    return folded


def lora_config(config: LoraConfig) -> LoraConfig:
    """PEFT configuration of the converted adapter: r doubled everywhere, the scaling of every module unchanged."""
    from peft import LoraConfig

    grow = math.sqrt(2) if config.use_rslora else 2
    values = config.to_dict()
    values.update(
        r=2 * config.r,
        lora_alpha=config.lora_alpha * grow,
        rank_pattern={name: 2 * rank for name, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={name: alpha * grow for name, alpha in (config.alpha_pattern or {}).items()},
        init_lora_weights=True,
        inference_mode=True,
    )
    for derived in ("peft_type", "auto_mapping", "peft_version"):
        values.pop(derived, None)
    return LoraConfig(**values)


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, in `directory`."""
    if not tensors:
        raise ValueError(f"{directory}: refusing to write an adapter without tensors")
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    write_tensors(directory / WEIGHTS, tensors)


def read_adapter(directory: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors and configuration of a LoRA adapter written by PEFT or `write_adapter`."""
    from peft import LoraConfig

    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory}: holds no {file}; pass a directory that an adapter was saved to")
    try:
        tensors = load_file(directory / WEIGHTS)
        values = json.loads((directory / CONFIG).read_text())
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{directory}: cannot be read ({error}); it is truncated or no adapter") from error
    config = LoraConfig.from_peft_type(**values)
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory}: a {config.peft_type} adapter, not a LoRA")
    return tensors, config


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: holds no {MANIFEST}; pass a directory that AdapterCheckpoint wrote")
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def convert_checkpoint(checkpoint: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write the LoRA for the original model that a checkpoint's adapter stands for.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote.
    output
        Directory to write: a PEFT adapter plus the manifest. Complete or absent.

    Returns
    -------
    Path
        `output`.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    manifest = read_manifest(checkpoint)
    adapter, config = read_adapter(checkpoint / ADAPTER_DIR)
    if not manifest["starts_at_zero"]:
        initial, _ = read_adapter(checkpoint / INITIAL_DIR)
        adapter, config = to_lora(adapter, initial, manifest.get("experts")), lora_config(config)
    with atomic_directory(output) as staging:
        write_adapter(staging, adapter, config)
        write_json(staging / MANIFEST, manifest)
    return output
