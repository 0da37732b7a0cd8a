"""From what a user asks for to a model whose weights can be read: everything that can be refused before is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from lowrank_dist.decomposition.restore import Resume
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Calibrated
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import ModelError
from lowrank_dist.initialization.source import MatrixSource, open_source
from lowrank_dist.initialization.starting_adapter import StartingAdapter
from lowrank_dist.methods import LoRA, Method
from lowrank_dist.model.factor_layout import FactorLayout, TrainedFactors
from lowrank_dist.model.names import plain_name
from lowrank_dist.model.plan import Plan, open_plan
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.residual_model.reader import ResidualModel, starts_at_zero
from lowrank_dist.storage.reader import resolve_checkpoint
from lowrank_dist.storage.source import WeightSource


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model before its weights are read: all of it has been checked, nothing of it has memory.

    Attributes
    ----------
    backbone, plan
        The skeleton with the adapter's layers in, and what fills it.
    source
        What it is filled from.
    start
        The adapter to go on from, if there is one.
    resume
        What the run that is resumed has left, if one is.
    """

    backbone: PreTrainedModel
    plan: Plan
    source: MatrixSource
    start: StartingAdapter | None
    resume: Resume | None

    @property
    def layout(self) -> FactorLayout:
        """What of an update is trained; `start` is a LoRA."""
        return self.source.layout if self.start is None else TrainedFactors()

    @property
    def quantization(self) -> str | None:
        """Format of a quantized residual."""
        return None if self.source.residual.exact else str(self.source.residual)

    def through_cache(
        self,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device,
        advance: Callable[[int], object],
        calibrated: Calibrated | None = None,
    ) -> OpenedModel:
        """The same model, to be filled from the cache where there is one; see `MatrixSource.through_cache`."""
        source, plan = self.source.through_cache(
            self.plan, group, factor_dtype, device=device, advance=advance, calibrated=calibrated
        )
        return replace(self, source=source, plan=plan)

    def from_cache(self, factor_dtype: torch.dtype) -> OpenedModel:
        """The same model, to be filled from what the cache holds complete; see `MatrixSource.from_cache`."""
        source, plan = self.source.from_cache(self.plan, factor_dtype)
        return replace(self, source=source, plan=plan)

    def check_start(self, group: ShardGroup) -> None:
        """Raise, on every rank, where the adapter to go on from is not for this model. Collective."""
        if self.start is not None:
            self.start.check(self.backbone, self.plan, self.source.reader, group)

    def close(self) -> None:
        """Close the files."""
        self.source.close()
        if self.start is not None:
            self.start.close()


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What a model is to be made of; the options are those of `lowrank_dist.PiSSAStrategy`."""

    pretrained: str | WeightSource
    adapter: LoraConfig | str | Path | None = None
    init: Method | None = None
    quantization: ResidualFormat | None = None
    cache: str | os.PathLike[str] | None = None
    revision: str | None = None
    untie_embeddings: bool = False

    @property
    def name(self) -> str:
        """What the user called the pretrained model, or what its source is called."""
        return self.pretrained if isinstance(self.pretrained, str) else self.pretrained.name

    @property
    def location(self) -> str:
        """Directories as absolute paths, hub ids and names of sources as they are."""
        is_directory = isinstance(self.pretrained, str) and Path(self.pretrained).is_dir()
        return str(Path(self.name).absolute()) if is_directory else self.name

    def directories(self) -> tuple[Path | WeightSource, Path | None]:
        """Of the pretrained model, and of the adapter to go on from where it is to be one; fetched if need be.

        A source of weights is given back as it is.
        """
        pretrained: Path | WeightSource
        if isinstance(self.pretrained, str):
            pretrained = resolve_checkpoint(self.pretrained, revision=self.revision)
        else:
            pretrained = self.pretrained
        if self.adapter is None or isinstance(self.adapter, LoraConfig):
            return pretrained, None
        return pretrained, resolve_checkpoint(self.adapter, option="adapter")

    def open(
        self,
        backbone: PreTrainedModel,
        *,
        compute_dtype: torch.dtype,
        sharding: Sharding,
        announce: Callable[[str], object],
        resume: Resume | None,
    ) -> OpenedModel:
        """Find what `backbone`, a skeleton on meta, is filled from, and put the adapter's layers in.

        Parameters
        ----------
        backbone
            Is changed.
        compute_dtype
            Dtype of a dense residual.
        sharding, announce, resume
            See `lowrank_dist.initialization.source.PretrainedSource`.

        Raises
        ------
        CheckpointError, ModelError
            Naming what does not go together.
        """
        directory, adapter_directory = self.directories()
        start, adapter, init = None, self.adapter, self.init
        if adapter_directory is not None:
            start = self._starting_adapter(adapter_directory, directory)
            adapter, init = start.config, None if _is_decomposed(directory) else LoRA()
        source = open_source(
            self.name,
            directory,
            adapter=adapter if isinstance(adapter, LoraConfig) else None,
            init=init,
            quantization=self.quantization,
            compute_dtype=compute_dtype,
            cache=self.cache,
            sharding=sharding,
            announce=announce,
            resume=resume,
        )
        plan = open_plan(
            source.reader, source.adapter, backbone=backbone, untie=self.untie_embeddings, limit_rank=start is None
        ).plan
        source.check(plan)
        fresh = list(dict.fromkeys(plain_name(t.names[0]) for t in plan.parameters if t.key is None and t.trainable))
        if fresh and start is None and resume is None:
            more = f" and {len(fresh) - 5} more" if len(fresh) > 5 else ""
            announce(f"{source.reader.directory} holds no {', '.join(fresh[:5])}{more}: initialised anew and trained")
        return OpenedModel(backbone=backbone, plan=plan, source=source, start=start, resume=resume)

    def _starting_adapter(self, directory: Path, pretrained: Path | WeightSource) -> StartingAdapter:
        decomposed = _is_decomposed(pretrained)
        if self.init is not None and (decomposed or not isinstance(self.init, LoRA)):
            raise ModelError(
                f"init={self.init} makes an adapter of the weights, and adapter={str(self.adapter)!r} is one already; "
                "leave init out, or pass a LoraConfig"
            )
        # the residual of QLoRA is the quantized original, and adapters for it are ordinary LoRAs
        return StartingAdapter(directory, for_residual=_is_decomposed(pretrained) and not starts_at_zero(pretrained))


def _is_decomposed(pretrained: Path | WeightSource) -> TypeGuard[Path]:
    return isinstance(pretrained, Path) and ResidualModel.is_at(pretrained)
