"""Finds the adapter in a checkpoint of this package or in a directory that PEFT wrote. Tensors are read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

from lowrank_dist.adapters.files import open_adapter, open_tuned, read_config
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.layout import (
    ADAPTER_DIR,
    CONFIG,
    INITIAL_DIR,
    LORA_DIR,
    MANIFEST,
    manifest_for,
    read_manifest,
)
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.parse import is_integer, is_list_of, printable
from lowrank_dist.storage.reader import CheckpointReader

# values of init_lora_weights with which PEFT leaves the base model unchanged, so that the adapter is for the base model
_LEAVES_BASE = (True, False, "gaussian", "eva", "orthogonal")
_NORM_TOLERANCE = 1e-4  # relative; some weights were rounded before their norm was taken


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter on disk.

    Attributes
    ----------
    directory
        Its directory.
    config
        PEFT's configuration, ready for injecting the layers into a skeleton.
    trained
        Reader of the trained tensors.
    initial
        Reader of ``A_0`` and ``B_0``, whose product must be subtracted; None if the adapter is an ordinary LoRA.
    original
        The original model; None if it is unknown.
    has_manifest
        Whether this package wrote the directory.
    norms
        Frobenius norms of the original matrices, by the name of the matrix, as far as the manifest records them.
    expand_blocks
        The option of the run, if it trained copies of layers; None otherwise.
    """

    directory: Path
    config: PeftConfig
    trained: CheckpointReader
    initial: CheckpointReader | None
    original: Original | None
    has_manifest: bool
    norms: dict[str, float]
    expand_blocks: int | list[int] | None = None

    @property
    def parts(self) -> list[CheckpointReader]:
        """Readers of the trained tensors and, if there are any, of the initial ones."""
        return [self.trained] if self.initial is None else [self.trained, self.initial]

    @property
    def lora(self) -> LoraConfig:
        """The configuration of a LoRA."""
        assert isinstance(self.config, LoraConfig)
        return self.config

    def check_norm(self, name: str, norm: float, stored: str) -> None:
        """Raise CheckpointError if `norm`, of a matrix of a base model, is not the one that training started from.

        Parameters
        ----------
        name
            Name of the matrix.
        norm
            Its Frobenius norm.
        stored
            What it is and where, for the message.
        """
        known = self.norms.get(name)
        if known is not None and abs(norm - known) > _NORM_TOLERANCE * known:
            raise CheckpointError(
                f"{stored} has norm {norm:.6g}, but the weight that {self.directory} was trained from has norm "
                f"{known:.6g}: this is another model or revision; pass the right one"
            )

    def close(self) -> None:
        """Close the files."""
        for part in self.parts:
            part.close()


def find_adapter(
    directory: Path,
    *,
    for_residual: bool = False,
    any_type: bool = False,
    converted_dora: bool = False,
    copies: bool = False,
) -> AdapterSource:
    """Open the adapter of a checkpoint, or of a directory that PEFT or `convert_checkpoint` wrote.

    Only headers are read.

    Parameters
    ----------
    directory
        The checkpoint, or the directory with PEFT's files.
    for_residual
        Whether the adapter is to be used on a residual model instead of the original one.
    any_type
        Whether adapters other than LoRAs are taken too.
    converted_dora
        Whether to take the converted DoRA of a checkpoint instead of the two that it has for the residual.
    copies
        Whether the checkpoint of a run that trained copies of layers is taken too.

    Raises
    ------
    CheckpointError
        If there is no adapter, if it is damaged, not a LoRA but for `any_type`, or for another kind of base model.
    """
    manifest: dict[str, Any] = read_manifest(directory) if (directory / MANIFEST).is_file() else {}
    if not copies or not manifest:
        refuse_copies(directory)
    if for_residual:
        _refuse_if_for_original(directory.absolute())
    if manifest and (directory / ADAPTER_DIR).is_dir():
        trained, initial = directory / ADAPTER_DIR, None if manifest["starts_at_zero"] else directory / INITIAL_DIR
    elif (directory / CONFIG).is_file():
        trained, initial = directory, None
        if not for_residual:
            _refuse_if_for_residual(directory.absolute())
    else:
        raise CheckpointError(
            f"{directory}: holds neither {ADAPTER_DIR}/ and {MANIFEST} nor {CONFIG}; pass a directory that "
            "AdapterCheckpoint or PEFT wrote"
        )
    if converted_dora and initial is not None and getattr(read_config(trained), "use_dora", False):
        # what DoRA adds to a weight is no product, so that the initial one cannot be subtracted from the merged weight
        trained, initial = directory / LORA_DIR, None
    reader, config = _open(trained, any_type=any_type)
    if isinstance(config, LoraConfig) and config.init_lora_weights not in _LEAVES_BASE:
        raise CheckpointError(
            f"{trained}: made with init_lora_weights={config.init_lora_weights!r}, so it is for a residual that PEFT "
            "computes from the base model; convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if isinstance(config, LoraConfig):  # how it was made does not matter any more
        config.init_lora_weights, config.lora_ga_config = True, None
    config.inference_mode = False
    norms = {entry["name"]: entry.get("norm") for entry in manifest.get("matrices", [])}
    recorded = manifest_for(directory)
    return AdapterSource(
        directory=directory,
        config=config,
        trained=reader,
        initial=None if initial is None else _open(initial)[0],
        original=(None if recorded is None else Original.recorded(recorded)) or _named_in(config),
        has_manifest=bool(manifest),
        norms={name: norm for name, norm in norms.items() if norm is not None},
        expand_blocks=copied_blocks(manifest),
    )


def _named_in(config: PeftConfig) -> Original | None:
    name = config.base_model_name_or_path
    return Original(name=name, location=name, commit=config.revision) if name else None


def copied_blocks(manifest: Mapping[str, Any]) -> int | list[int] | None:
    """The ``expand_blocks`` of the run that wrote a manifest; None if it trained no copies of layers."""
    recipe = manifest.get("recipe")
    blocks = recipe.get("expand_blocks") if isinstance(recipe, Mapping) else None
    if blocks is not None and not (is_integer(blocks) or is_list_of(is_integer)(blocks)):
        raise CheckpointError(f"{MANIFEST}: expand_blocks={printable(blocks, 60)} must be a number or a list")
    return blocks


def refuse_copies(directory: Path) -> None:
    """Raise CheckpointError if `directory` is, or is in, the checkpoint of a run that trained copies of layers."""
    directory = directory.absolute()
    for checkpoint in (directory, directory.parent):
        if (checkpoint / MANIFEST).is_file() and copied_blocks(read_manifest(checkpoint)) is not None:
            raise CheckpointError(
                f"{directory}: its run trained copies of layers (expand_blocks), which are no adapter of the "
                f"pretrained model; `lowrank-dist merge {checkpoint}` writes the expanded model, and "
                f"ckpt_path={str(checkpoint)!r} resumes the run"
            )


def _refuse_if_for_residual(directory: Path) -> None:
    """Raise CheckpointError if `directory` is a part of a checkpoint or residual model that is for the residual."""
    parent = directory.parent
    trained = directory.name == ADAPTER_DIR and (parent / MANIFEST).is_file()
    if (trained and not read_manifest(parent)["starts_at_zero"]) or directory.name.endswith("_init"):
        remedy = f"pass {parent}" if trained else "pass the checkpoint of a run that trained it"
        raise CheckpointError(f"{directory}: for a residual, not for the original model; {remedy}")


def _refuse_if_for_original(directory: Path) -> None:
    """Raise CheckpointError if a manifest, in `directory` or beside it, says that it is for the original model."""
    parent, for_the_base = directory.parent, False
    if (directory / MANIFEST).is_file():
        for_the_base = read_manifest(directory).get("adapter_is_for", "").startswith("the base")
    elif directory.name in (ADAPTER_DIR, LORA_DIR) and (parent / MANIFEST).is_file():
        for_the_base = directory.name == LORA_DIR or read_manifest(parent)["starts_at_zero"]
    if for_the_base:
        raise CheckpointError(
            f"{directory}: for the original model, not for the residual of a residual model; pass the original model "
            "as `pretrained`"
        )


def _open(directory: Path, *, any_type: bool = False) -> tuple[CheckpointReader, PeftConfig]:
    """Open one adapter and check the dtypes of a LoRA's tensors."""
    reader, config = open_tuned(directory) if any_type else open_adapter(directory)
    for name in reader if isinstance(config, LoraConfig) else ():
        if reader.info(name).dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{directory}: {name} is stored as {reader.info(name).dtype}; only {', '.join(FLOAT_DTYPES)} are read"
            )
    return reader, config
