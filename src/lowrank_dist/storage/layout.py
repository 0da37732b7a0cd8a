"""Names of files and directories that this project writes, and its manifests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.parse import (
    MAX_MANIFEST,
    Record,
    is_figure,
    is_flag,
    is_inside,
    is_integer,
    is_list_of,
    is_object_of,
    is_text,
    read_record,
)

ADAPTER_DIR = "adapter"  # trained A and B, for the residual


INITIAL_DIR = "adapter_init"  # A_0 and B_0


ENCODED_DIR = "adapter_encoded"  # factors that residuals were encoded from, where these are not A_0 and B_0


LORA_DIR = "lora"  # converted, for the original model


MANIFEST = "lowrank_dist.json"


WEIGHTS = "adapter_model.safetensors"


CONFIG = "adapter_config.json"


OPTIMIZER = "optimizer"


STATE = "state"


#: Directory inside a checkpoint, and stem of the file names, of every part that consists of tensors.
PARTS = {
    ADAPTER_DIR: (ADAPTER_DIR, Path(WEIGHTS).stem),
    INITIAL_DIR: (INITIAL_DIR, Path(WEIGHTS).stem),
    ENCODED_DIR: (ENCODED_DIR, Path(WEIGHTS).stem),
    LORA_DIR: (LORA_DIR, Path(WEIGHTS).stem),
    OPTIMIZER: ("", OPTIMIZER),
    STATE: ("", STATE),
    "root": ("", Path(WEIGHTS).stem),  # a converted LoRA
}


RESIDUAL_STEM = "residual"  # of root files of residual models that stock transformers cannot load


def residual_stem(directory: Path) -> str:
    """First part of the names of the files at the root of a residual model."""
    return RESIDUAL_STEM if any(directory.glob(f"{RESIDUAL_STEM}*.safetensors")) else "model"


def parts_of(checkpoint: Path) -> list[Path]:
    """The directories of a checkpoint from which other adapters are made, the checkpoint among them."""
    return [checkpoint, *(checkpoint / part for part in (ADAPTER_DIR, INITIAL_DIR, ENCODED_DIR))]


def read_manifest(checkpoint: Path) -> Record:
    """The manifest of a checkpoint directory."""
    path = checkpoint / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{checkpoint}: holds no {MANIFEST}; pass a directory that AdapterCheckpoint wrote")
    return checked_manifest(read_record(path, MAX_MANIFEST))


def manifest_for(directory: Path) -> Record | None:
    """The manifest in `directory`, or that of the checkpoint whose adapter it is; None if there is neither."""
    directory = directory.absolute()
    of_checkpoint = [directory.parent] if directory.name in (ADAPTER_DIR, LORA_DIR) else []
    found = next((place for place in (directory, *of_checkpoint) if (place / MANIFEST).is_file()), None)
    return None if found is None else read_manifest(found)


def checked_manifest(manifest: Record) -> Record:
    """`manifest`, if its entries have the types that this project writes.

    Raises
    ------
    CheckpointError
        If an entry has another type; which entries there are differs by kind and version.
    """
    for name, (test, must) in _ENTRIES.items():
        manifest.expect(name, test, must, None)
    for entry in manifest.records("matrices"):
        check_matrix(entry)
    return manifest


def check_matrix(entry: Record) -> None:
    """Raise CheckpointError if an entry of a matrix has another type than `MatrixReport` gives it."""
    entry.text("name")
    for name in ("rows", "columns", "rank", "nbytes", "group_size"):
        entry.integer(name, 0)
    for name in _FIGURES:
        entry.expect(name, is_figure, "a number", None)
    entry.expect("singular_values", is_list_of(is_figure), "a list of numbers", None)
    for name in ("ended_on", "digest"):
        entry.text(name, None)


_FIGURES = (
    "norm",
    "error",
    "quantization_error",
    "sigma_1",
    "sigma_r",
    "captured_energy",
    "excess_residual",
    "nuclear_error",
    "nuclear_quantization_error",
    "seconds",
)
_TEXT = is_text, "plain text"
_COUNT = is_integer, "a count"
_BY_TENSOR = is_object_of(is_object_of(is_text)), "digests of tensors by file"
#: Types of the entries of all manifests; further ones are left alone.
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("lowrank_dist", "kind", "base", "method", "options", "quantization", "adapter_is_for"), _TEXT),
    **dict.fromkeys(("fingerprint", "source", "pretrained", "pretrained_fingerprint", "seal", "adapter_config"), _TEXT),
    **dict.fromkeys(("base_location", "base_commit", "pretrained_commit", "started_from_commit"), _TEXT),
    "format": _COUNT,
    "starts_at_zero": (is_flag, "true or false"),
    **dict.fromkeys(("step", "epoch", "rank"), _COUNT),
    "tuner_seed": (lambda value: is_integer(value, -(2**63)), "an integer"),
    **dict.fromkeys(("world_size", "accumulate_grad_batches"), (lambda value: is_integer(value, 1), "1 or more")),
    "experts": (is_object_of(lambda value: is_integer(value, 1, 2**20)), "numbers of experts by tensor"),
    "parameters": (is_object_of(is_text), "names of parameters by tensor"),
    "rank_by_layer": (is_object_of(lambda value: is_integer(value, 0, 2**20)), "ranks by layer"),
    "trained": (is_list_of(is_text), "a list of names"),
    "files": (lambda v: is_object_of(is_text)(v) and all(map(is_inside, v)), "digests by path in the directory"),
    "hashes": _BY_TENSOR,
    "tensors": _BY_TENSOR,
}


def read_json(path: Path) -> Record:
    """The object that a JSON file holds; see `lowrank_dist.storage.parse.read_record`."""
    return read_record(path)


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a SHA-256 of itself under ``seal``."""
    return {**manifest, "seal": seal_of(manifest)}


def seal_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its ``seal``."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


#: What follows the name of an encoded weight in the name of the tensor that describes it, by the format's name.
QUANT_STATES = {
    "nf4": ".quant_state.bitsandbytes__nf4",
    "fp4": ".quant_state.bitsandbytes__fp4",
    "int8": ".quant_state.lowrank_dist__int8",
    "fp8": ".quant_state.lowrank_dist__fp8",
    "mxfp4": ".quant_state.lowrank_dist__mxfp4",
}


def encoded_weight(name: str) -> tuple[str, str] | None:
    """The weight that a tensor called `name` describes, and the name of its format; None: it describes none."""
    for kind, suffix in QUANT_STATES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    return None
