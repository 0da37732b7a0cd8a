"""The model of a checkpoint, from the checkpoint alone: the options that its run was started with."""

from __future__ import annotations

import os
from typing import get_args

from peft import AdaLoraConfig, LoraConfig

from lowrank_dist.adapters.files import read_config
from lowrank_dist.adapters.source import copied_blocks
from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.decomposition.restore import RecordedMethod
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.initialization.open import Encode, ModelRecipe
from lowrank_dist.methods import LoRA, Method
from lowrank_dist.model.factor_layout import stored_layout
from lowrank_dist.quantization.registry import format_from_dict
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.layout import ADAPTER_DIR, LORA_DIR, MANIFEST
from lowrank_dist.storage.parse import is_flag, is_list_of, is_text
from lowrank_dist.storage.resolve import is_hub_id, resolve_checkpoint
from lowrank_dist.tuners.support import needs_peft


def recorded_recipe(
    checkpoint: TrainingCheckpoint,
    *,
    pretrained: str | None = None,
    revision: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> ModelRecipe:
    """The recipe of the run that wrote `checkpoint`, to be built with `lowrank_dist.checkpoints.resuming.earlier_run`.

    Parameters
    ----------
    checkpoint
        The checkpoint; its manifest and the configuration of its adapter are read.
    pretrained
        Directory or hub id of the weights that the run began from. Default: the ones that the manifest names.
    revision
        Revision of a hub id. Default: the commit that the manifest records, if `pretrained` is not given.
    cache
        The run's ``init_cache``.

    Raises
    ------
    CheckpointError
        If the manifest lacks an entry, or the weights are not found.
    InputError
        If a revision of a directory is asked for, or if the ranks of the adapter have changed while it was trained
        (AdaLoRA).
    """
    manifest, directory = checkpoint.manifest, checkpoint.directory
    for entry in ("pretrained", "residual", "recipe"):
        if entry not in manifest:
            raise CheckpointError(
                f"{directory}: its {MANIFEST} has no {entry}; it was written by an older version: use its {LORA_DIR}/"
            )
    adapter = read_config(directory / ADAPTER_DIR)
    if isinstance(adapter, AdaLoraConfig):
        raise InputError(
            f"{directory}: the ranks of AdaLoRA change while it is trained, and only training resumes them; use "
            f"{directory / LORA_DIR}, which has the final ones"
        )
    adapter.inference_mode = False
    if isinstance(adapter, LoraConfig):
        adapter.init_lora_weights = True
    options = manifest.record("recipe")
    name = manifest.text("pretrained") if pretrained is None else pretrained
    if revision is None and pretrained is None and is_hub_id(name):
        revision = manifest.text("pretrained_commit", None)
    residual = format_from_dict(manifest.record("residual"))
    quantization = residual if isinstance(residual, str) or not residual.exact else None
    blocks = copied_blocks(manifest)
    method: Method | None = None
    if blocks is not None:
        pass  # no adapter
    elif ResidualModel.is_at(resolve_checkpoint(name, revision=revision)):
        quantization = None  # it says itself
    elif isinstance(adapter, LoraConfig):
        zero = bool(manifest["starts_at_zero"])
        method = RecordedMethod(name=manifest.text("method"), zero=zero, trained=stored_layout(options))
        if needs_peft(adapter):
            method = LoRA()
    return ModelRecipe(
        pretrained=name,
        adapter=adapter if blocks is None else None,
        init=method,
        quantization=quantization,
        encode=options.expect("encode", lambda value: value in get_args(Encode), "all-linear or adapted", None),
        train_also=tuple(options.expect("train_also", is_list_of(is_text), "a list of names")),
        cache=cache,
        revision=revision,
        untie_embeddings=options.expect("untie_embeddings", is_flag, "true or false"),
        expand_blocks=blocks,
    )
