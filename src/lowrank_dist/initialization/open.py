"""From the user's options to a model whose weights can be read; every check that needs no weights is made here."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from lowrank_dist.decomposition.restore import Resume
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Calibrated
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import ModelError
from lowrank_dist.initialization.open_source import open_source
from lowrank_dist.initialization.source import MatrixSource
from lowrank_dist.initialization.starting_adapter import StartingAdapter
from lowrank_dist.methods import LoRA, Method
from lowrank_dist.methods.frozen import Frozen
from lowrank_dist.model.expansion import Expansion, expand
from lowrank_dist.model.factor_layout import FactorLayout, TrainedFactors
from lowrank_dist.model.names import plain_name
from lowrank_dist.model.plan import Plan, PlannedTensor, open_plan
from lowrank_dist.model.skeleton import linear_layers
from lowrank_dist.quantization.format import AsStoredOption, ResidualFormat
from lowrank_dist.residual_model.reader import ResidualModel, starts_at_zero
from lowrank_dist.storage.resolve import resolve_checkpoint
from lowrank_dist.storage.source import WeightSource
from lowrank_dist.tuners.support import is_for_peft, needs_peft
from lowrank_dist.tuners.tuner import Tuner, TunerPlan

Encode = Literal["all-linear", "adapted"]
"""Which linear layers are stored in the residual format."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A checked model before its weights are read; none of its parameters has memory.

    Attributes
    ----------
    backbone, plan
        The skeleton with the adapter's layers injected, and its plan.
    source
        The source that fills it.
    start
        The adapter that training starts from; None: a new adapter. With a `tuner`, it is loaded once that is put on.
    resume
        State of the run that is resumed; None: a new run.
    tuner, tuner_plan
        The tuner of PEFT that is put on top of the filled model, and what it does; None if the adapter is injected
        already, because it is made from the weights.
    expansion
        Copies of layers that are trained; None if there are none.
    """

    backbone: PreTrainedModel
    plan: Plan
    source: MatrixSource
    start: StartingAdapter | None
    resume: Resume | None
    tuner: Tuner | None = None
    tuner_plan: TunerPlan | None = None
    expansion: Expansion | None = None

    @property
    def layout(self) -> FactorLayout:
        """Which parameters of an update are trained; A and B if there is a `start` that is a LoRA."""
        return self.source.layout if self.start is None or self.tuner is not None else TrainedFactors()

    @property
    def quantization(self) -> str | None:
        """Format of a quantized residual; None if the residual is not quantized."""
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
        """Return this model with the source that `MatrixSource.through_cache` returns. Collective."""
        source, plan = self.source.through_cache(
            self.plan, group, factor_dtype, device=device, advance=advance, calibrated=calibrated
        )
        return replace(self, source=source, plan=plan)

    def from_cache(self, factor_dtype: torch.dtype) -> OpenedModel:
        """Return this model with the source that `MatrixSource.from_cache` returns."""
        source, plan = self.source.from_cache(self.plan, factor_dtype)
        return replace(self, source=source, plan=plan)

    def check_start(self, group: ShardGroup) -> None:
        """Raise, on every rank, if the starting adapter is damaged or does not fit this model. Collective."""
        if self.start is not None:
            self.start.verify(group)
        if self.start is not None and self.tuner is None:
            self.start.check(self.backbone, self.plan, self.source.reader, group)

    def close(self) -> None:
        """Close the files."""
        self.source.close()
        if self.start is not None:
            self.start.close()


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The user's options for a model; they are those of `lowrank_dist.PiSSAStrategy`."""

    pretrained: str | WeightSource
    adapter: PeftConfig | str | Path | None = None
    init: Method | None = None
    quantization: ResidualFormat | AsStoredOption | None = None
    encode: Encode | None = None
    train_also: Sequence[str] = ()
    cache: str | os.PathLike[str] | None = None
    revision: str | None = None
    adapter_revision: str | None = None
    untie_embeddings: bool = False
    expand_blocks: int | Sequence[int] | None = None

    @property
    def name(self) -> str:
        """The pretrained model as the user named it, or the name of its weight source."""
        return self.pretrained if isinstance(self.pretrained, str) else self.pretrained.name

    @property
    def is_bare(self) -> bool:
        """Whether the model has no adapter: it is the pretrained model, as it is, encoded or expanded."""
        return self.adapter is None and (isinstance(self.init, Frozen) or self.expand_blocks is not None)

    @property
    def location(self) -> str:
        """The name, with a directory or file made absolute; hub ids and names of weight sources are unchanged."""
        is_path = isinstance(self.pretrained, str) and Path(self.pretrained).exists()
        return str(Path(self.name).absolute()) if is_path else self.name

    def facts(self) -> dict[str, Any]:
        """The options that a checkpoint's manifest records, so that its model can be built without the run's settings.

        Those that say more than its other entries and the configuration of its adapter.
        """
        return {
            "encode": self.encode,
            "train_also": list(self.train_also),
            "untie_embeddings": self.untie_embeddings,
            **({} if self.expand_blocks is None else {"expand_blocks": _listed(self.expand_blocks)}),
        }

    def directories(self) -> tuple[Path | WeightSource, Path | None]:
        """Return the directories of the pretrained model and of the starting adapter, downloaded if necessary.

        A weight source is returned unchanged. The second is None if training starts from a new adapter.
        """
        pretrained: Path | WeightSource
        if isinstance(self.pretrained, str):
            pretrained = resolve_checkpoint(self.pretrained, revision=self.revision)
        else:
            pretrained = self.pretrained
        if self.adapter is None or isinstance(self.adapter, PeftConfig):
            return pretrained, None
        return pretrained, resolve_checkpoint(self.adapter, revision=self.adapter_revision, option="adapter")

    def open(
        self,
        backbone: PreTrainedModel,
        group: ShardGroup,
        *,
        compute_dtype: torch.dtype,
        sharding: Sharding,
        announce: Callable[[str], object],
        resume: Resume | None,
    ) -> OpenedModel:
        """Open the source that fills `backbone`, and inject the adapter's layers. Collective over `group`.

        The collectives are those of `open_plan` and two of `ShardGroup.shared_errors`.

        Parameters
        ----------
        backbone
            Skeleton on meta; changed in place.
        group
            The ranks that open the same model.
        compute_dtype
            Dtype of a dense residual.
        sharding, announce, resume
            See `lowrank_dist.initialization.source.PretrainedSource`.

        Raises
        ------
        CheckpointError, ModelError
            On every rank, if something cannot be read, or if options are incompatible; the message names them.
        """
        with group.shared_errors():
            directory, adapter_directory = self.directories()
            expansion = self._expanded(backbone, directory, announce)
            # PEFT writes what it finds into the configuration, which may be the user's for several models
            start, adapter, init = None, copy.deepcopy(self.adapter), self.init
            if adapter_directory is not None:
                start = self._starting_adapter(adapter_directory, directory)
                adapter, init = start.config, None if _is_decomposed(directory) else LoRA()
            tuner, tuner_plan = self._tuner(directory, start), None
            if self.is_bare:
                adapter = LoraConfig(target_modules=[])  # of nothing
                init = init or Frozen(adapter="block expansion")
                backbone.requires_grad_(False)
            if tuner is not None:
                adapter, init, tuner_plan = tuner.config, Frozen(adapter=tuner.name), tuner.plan(backbone)
                backbone.requires_grad_(False)
                announce(tuner.says(tuner_plan))
            source = open_source(
                self.name,
                directory,
                adapter=adapter if isinstance(adapter, PeftConfig) else None,
                init=init,
                quantization=self.quantization,
                compute_dtype=compute_dtype,
                cache=self.cache,
                sharding=sharding,
                announce=announce,
                resume=resume,
                expansion=expansion,
            )
            encode = self._encoded(backbone, tuner_plan, source)
        plan = open_plan(
            source.reader,
            None if tuner is not None or self.is_bare else source.adapter,
            backbone=backbone,
            untie=self.untie_embeddings,
            new_adapter=start is None and resume is None,
            encode=encode,
            trained_whole=() if tuner_plan is None else tuner_plan.whole,
            also=() if tuner is not None else (*self.train_also, *(() if expansion is None else expansion.trained)),
            group=group,
        ).plan
        with group.shared_errors():
            source.check(plan)
        fresh = list(dict.fromkeys(plain_name(t.names[0]) for t in plan.parameters if t.key is None and t.trainable))
        if fresh and start is None and resume is None:
            more = f" and {len(fresh) - 5} more" if len(fresh) > 5 else ""
            announce(f"{source.reader.directory} holds no {', '.join(fresh[:5])}{more}: newly initialised and trained")
        for tensor in plan.parameters:
            if tensor.key is not None and tensor.rows is not None:
                announce(_resized(plain_name(tensor.names[0]), tensor, source.reader.info(tensor.key).shape[0]))
        return OpenedModel(
            backbone=backbone,
            plan=plan,
            source=source,
            start=start,
            resume=resume,
            tuner=tuner,
            tuner_plan=tuner_plan,
            expansion=expansion,
        )

    def _expanded(
        self, backbone: PreTrainedModel, directory: Path | WeightSource, announce: Callable[[str], object]
    ) -> Expansion | None:
        """Give `backbone` the copies of layers that `expand_blocks` asks for."""
        if self.expand_blocks is None:
            return None
        if self.adapter is not None or not isinstance(self.init, Frozen | None) or self.cache is not None:
            other = next(o for o in ("adapter", "init", "cache") if getattr(self, o) is not None)
            raise ModelError(
                f"expand_blocks={self.expand_blocks!r} trains copies of layers, whole, instead of an adapter; leave "
                f"{'init_cache' if other == 'cache' else other} out"
            )
        if isinstance(self.quantization, str):
            raise ModelError(
                f"expand_blocks={self.expand_blocks!r} adds layers that are not stored, which quantization="
                f"{self.quantization!r} cannot keep; pass quantization=NF4() or another format, or None"
            )
        if _is_decomposed(directory):
            raise ModelError(
                f"expand_blocks: {self.name!r} is a residual model, whose residuals belong to its own adapter; pass "
                "the pretrained model that it was made from"
            )
        expansion = expand(backbone, self.expand_blocks)
        announce(
            f"{len(expansion.copies)} copies of layers, after {', '.join(map(str, expansion.after))}, are trained; "
            f"their {' and '.join(expansion.zeros)} start at zero"
        )
        return expansion

    def _tuner(self, directory: Path | WeightSource, start: StartingAdapter | None) -> Tuner | None:
        config = self.adapter if start is None else start.config
        if not isinstance(config, PeftConfig):
            return None
        if not (needs_peft(config) if start is not None else is_for_peft(config, self.init)):
            return None
        tuner = Tuner(config, also=self.train_also)
        if _is_decomposed(directory):
            raise ModelError(
                f"pretrained={self.name!r} is a residual model, whose residuals belong to its own adapter; with "
                f"{tuner.name}, pass the pretrained model that it was made from"
            )
        if self.cache is not None:
            raise ModelError(
                f"init_cache={str(self.cache)!r} keeps decompositions, but {tuner.name} needs none; leave it out"
            )
        return tuner

    def _encoded(self, backbone: PreTrainedModel, planned: TunerPlan | None, source: MatrixSource) -> list[str]:
        """Names of the linear layers that are encoded beside those with factors; none that a tuner trains whole."""
        if planned is None:
            # what stays as it is stored does so whether it is adapted or not, and beside copies of layers all is frozen
            asked = isinstance(self.quantization, str) or self.expand_blocks is not None
            by_default = asked and self.encode is None and self.quantization is not None
            if self.encode != "all-linear" and not by_default:
                return []
            if source.init is None or source.init.statistic is not None or self.cache is not None:
                raise ModelError(
                    "encode='all-linear' reads the pretrained weights of all layers in the run itself: it goes with no "
                    "residual model, no init_cache and no method that looks at data; leave it out, or adapt all layers"
                )
            return linear_layers(backbone)
        whole, adapted = tuple(f"{name}." for name in planned.whole), set(planned.adapted)
        taken = {name.rpartition(".")[0] for name in planned.in_place if name.endswith(".weight")}
        layers = (n for n in linear_layers(backbone) if not f"{n}.".startswith(whole) and n not in taken)
        if planned.of_plain_layers:
            layers = (name for name in layers if name not in adapted)
        return [name for name in layers if self.encode != "adapted" or name in adapted]

    def _starting_adapter(self, directory: Path, pretrained: Path | WeightSource) -> StartingAdapter:
        decomposed = _is_decomposed(pretrained)
        if self.init is not None and (decomposed or not isinstance(self.init, LoRA)):
            raise ModelError(
                f"init={self.init} makes a new adapter from the weights, but adapter={str(self.adapter)!r} is an "
                "existing adapter; leave init out, or pass a LoraConfig"
            )
        # QLoRA's residual is the quantized original model, so adapters for it are ordinary LoRAs
        return StartingAdapter(directory, for_residual=_is_decomposed(pretrained) and not starts_at_zero(pretrained))


def _listed(blocks: int | Sequence[int]) -> int | list[int]:
    return blocks if isinstance(blocks, int) else list(blocks)


def _is_decomposed(pretrained: Path | WeightSource) -> TypeGuard[Path]:
    return isinstance(pretrained, Path) and ResidualModel.is_at(pretrained)


def _resized(name: str, tensor: PlannedTensor, stored: int) -> str:
    """What happens to the rows of a vocabulary that was resized."""
    assert tensor.rows is not None
    if tensor.rows < stored:
        return f"{name}: the last {stored - tensor.rows} of {stored} stored rows are left out"
    trained = "trained" if tensor.trainable else "frozen; name the layer in modules_to_save to train them"
    return f"{name}: {tensor.rows - stored} rows beyond the {stored} stored ones start at their mean and are {trained}"
