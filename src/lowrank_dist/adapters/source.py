"""Adapters on disk: of a checkpoint of this package, or of a directory that PEFT wrote; read a tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lowrank_dist.adapters.files import open_adapter
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.layout import ADAPTER_DIR, CONFIG, INITIAL_DIR, LORA_DIR, MANIFEST, read_manifest
from lowrank_dist.storage.reader import CheckpointReader

# initialisations of PEFT that leave the base as it is: the adapter is for the base
_FOR_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """An adapter for an original model.

    Attributes
    ----------
    directory
        Where it is.
    config
        PEFT's configuration, fit for putting layers into a skeleton.
    trained
        Its tensors.
    initial
        A_0 and B_0, whose product must be subtracted; None if the adapter is an ordinary LoRA.
    base
        Name of the original model, where it is known.
    has_manifest
        This package wrote it.
    norms
        Frobenius norms of the weights that were trained from, by the name of the matrix, as far as they are known.
    """

    directory: Path
    config: LoraConfig
    trained: CheckpointReader
    initial: CheckpointReader | None
    base: str | None
    has_manifest: bool
    norms: dict[str, float]

    @property
    def parts(self) -> list[CheckpointReader]:
        """The trained tensors, and the initial ones where there are any."""
        return [self.trained] if self.initial is None else [self.trained, self.initial]

    def close(self) -> None:
        """Close the files."""
        for part in self.parts:
            part.close()


def find_adapter(directory: Path, *, for_residual: bool = False) -> AdapterSource:
    """The adapter of a checkpoint, or of a directory that PEFT or `convert_checkpoint` wrote; headers are read only.

    Parameters
    ----------
    directory
        Where it is.
    for_residual
        Whether a directory that PEFT wrote is for the residual of a residual model, instead of for the original.

    Raises
    ------
    CheckpointError
        Where there is none, or it is damaged, or for another kind of base.
    """
    manifest: dict[str, Any] = read_manifest(directory) if (directory / MANIFEST).is_file() else {}
    if for_residual:
        _refuse_those_for_the_base(directory.absolute())
    if manifest and (directory / ADAPTER_DIR).is_dir():
        trained, initial = directory / ADAPTER_DIR, None if manifest["starts_at_zero"] else directory / INITIAL_DIR
    elif (directory / CONFIG).is_file():
        trained, initial = directory, None
        if not for_residual:
            _refuse_parts(directory.absolute())
    else:
        raise CheckpointError(
            f"{directory}: holds neither {ADAPTER_DIR}/ and {MANIFEST} nor {CONFIG}; pass a directory that "
            "AdapterCheckpoint or PEFT wrote"
        )
    reader, config = _open(trained)
    if config.init_lora_weights not in _FOR_THE_BASE:
        raise CheckpointError(
            f"{trained}: made with init_lora_weights={config.init_lora_weights!r}, for a residual that PEFT forms of "
            "the base; convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT"
        )
    config.init_lora_weights, config.inference_mode = True, False
    norms = {entry["name"]: entry.get("norm") for entry in manifest.get("matrices", [])}
    return AdapterSource(
        directory=directory,
        config=config,
        trained=reader,
        initial=None if initial is None else _open(initial)[0],
        base=manifest.get("base") or config.base_model_name_or_path,
        has_manifest=bool(manifest),
        norms={name: norm for name, norm in norms.items() if norm is not None},
    )


def _refuse_parts(directory: Path) -> None:
    """Refuse a part of a checkpoint, or of a residual model, that means nothing on the original model."""
    parent = directory.parent
    trained = directory.name == ADAPTER_DIR and (parent / MANIFEST).is_file()
    if (trained and not read_manifest(parent)["starts_at_zero"]) or directory.name.endswith("_init"):
        remedy = f"pass {parent}" if trained else "pass the checkpoint with what was trained from it"
        raise CheckpointError(f"{directory}: for a residual, not for the original model; {remedy}")


def _refuse_those_for_the_base(directory: Path) -> None:
    """Refuse what a manifest, its own or that of the checkpoint around it, says is for the original model."""
    parent, for_the_base = directory.parent, False
    if (directory / MANIFEST).is_file():
        for_the_base = read_manifest(directory).get("adapter_is_for", "").startswith("the base")
    elif directory.name in (ADAPTER_DIR, LORA_DIR) and (parent / MANIFEST).is_file():
        for_the_base = directory.name == LORA_DIR or read_manifest(parent)["starts_at_zero"]
    if for_the_base:
        raise CheckpointError(
            f"{directory}: for the original model, not for the residual of a decomposed one; pass the original as "
            "`pretrained`"
        )


def _open(directory: Path) -> tuple[CheckpointReader, LoraConfig]:
    """Tensors and configuration of one LoRA."""
    reader, config = open_adapter(directory)
    for name in reader:
        if reader.info(name).dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{directory}: {name} is stored as {reader.info(name).dtype}; only {', '.join(FLOAT_DTYPES)} are read"
            )
    return reader, config
