"""Opens the source that fills a model: pretrained weights, as they are stored or decomposed, or a residual model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lowrank_dist.decoding.as_stored import AsStored
from lowrank_dist.decomposition.restore import Resume
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.errors import ModelError
from lowrank_dist.initialization.source import MatrixSource, PretrainedSource
from lowrank_dist.initialization.stored import StoredSource, check_options
from lowrank_dist.methods import Method, PiSSA
from lowrank_dist.model.expansion import Expansion
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import AsStoredOption, ResidualFormat
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.source import WeightSource


def open_source(
    pretrained: str,
    directory: Path | WeightSource,
    *,
    adapter: LoraConfig | None,
    init: Method | None,
    quantization: ResidualFormat | AsStoredOption | None,
    compute_dtype: torch.dtype,
    cache: str | os.PathLike[str] | None = None,
    sharding: Sharding | None = None,
    announce: Callable[[str], object] = lambda _: None,
    resume: Resume | None = None,
    expansion: Expansion | None = None,
) -> MatrixSource:
    """Open the pretrained weights, or the residual model, at `directory`.

    Parameters
    ----------
    pretrained
        Its name as the user gave it.
    directory
        Its directory, or a weight source, which counts as pretrained weights.
    adapter, init, quantization
        The user's options; None: those that a residual model records. Pretrained weights need an `adapter`; their
        default `init` is PiSSA.
    compute_dtype
        Dtype of a dense residual.
    cache, sharding, announce, resume, expansion
        See `PretrainedSource`.

    Raises
    ------
    ModelError
        If a residual model was made with other options, or if pretrained weights come without an `adapter`.
    """
    if not isinstance(directory, Path) or not ResidualModel.is_at(directory):
        if adapter is None:
            raise ModelError(
                f"pretrained={pretrained!r} is not a residual model: pass adapter=LoraConfig(...) to say which weights "
                "to decompose"
            )
        if isinstance(quantization, str):
            check_options(init, cache)
        options: dict[str, Any] = {
            "adapter": adapter,
            "init": init or PiSSA(),
            "base": pretrained,
            "cache": cache,
            "sharding": sharding,
            "announce": announce,
            "resume": resume,
            "expansion": expansion,
        }
        if isinstance(quantization, str):
            return StoredSource(directory, residual=AsStored(dtype=compute_dtype), **options)
        source = PretrainedSource(directory, residual=quantization or Dense(dtype=compute_dtype), **options)
        if source.decoded_from is not None:
            announce(f"{directory}: {source.decoded_from}, decoded by rows as it is read; the adapter is for it")
        return source
    if isinstance(quantization, str):
        raise ModelError(
            f"quantization={quantization!r}: {directory} is a residual model, which says itself how it is stored; "
            "leave quantization out"
        )
    stored = ResidualModel(directory, Dense(dtype=compute_dtype))
    stored.check_settings(adapter=adapter, init=init, quantization=quantization)
    if adapter is not None:
        stored.adapter = adapter
    return stored
