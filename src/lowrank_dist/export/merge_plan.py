"""Plans a merge from an adapter and the tensor headers of its base model, and makes every check that needs no weights.

Every tensor keeps its name and its shape in the base, so that whatever loads the base loads the result. A tensor gets a
new name only if the base has no tensor for it: a new head, or a head that was tied and no longer is.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedModel

from lowrank_dist.adapters.match import changes_tied, match_adapter
from lowrank_dist.adapters.source import AdapterSource
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.export.tuned import TunedModel, check_merges
from lowrank_dist.model.expansion import expand
from lowrank_dist.model.names import CheckpointKeys, peft_name, plain_name
from lowrank_dist.model.plan import Plan, PlannedMatrix, open_plan
from lowrank_dist.model.skeleton import build_skeleton, read_config
from lowrank_dist.residual_model.reader import initial_directory
from lowrank_dist.storage.original import find_original
from lowrank_dist.storage.reader import CheckpointReader, FileTensor, Piece
from lowrank_dist.storage.writer import stored_dtype
from lowrank_dist.tuners.support import adds_product

# PEFT's task types and their names in transformers; models of other tasks lack the heads of these
_HEADS = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}


@dataclass(frozen=True, kw_only=True)
class Span:
    """A contiguous part of a tensor of the merged model: tensor name, first element, number of elements."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """Values of the merged model that are computed together.

    Attributes
    ----------
    source, key
        Reader and tensor name of the values, or of the matrix to which a product is added.
    target
        Parts of the output that the values fill, in order.
    dtype
        Dtype in the merged model.
    planned
        The matrix whose product of factors is added; None: the values are copied.
    """

    source: CheckpointReader
    key: str
    target: tuple[Span, ...]
    dtype: torch.dtype
    planned: PlannedMatrix | None = None

    @property
    def numel(self) -> int:
        return sum(span.numel for span in self.target)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything that a merge writes.

    Attributes
    ----------
    reader
        Reader of the base model.
    files
        Shape and dtype of the tensors of the merged model, by name.
    tensors
        How their values are computed; every element of `files` belongs to exactly one of these or of `of_tuned`.
    config_changes
        Entries of ``config.json`` that differ from those of the base.
    tuned
        Merges the layers of adapters other than LoRAs of two factors per matrix; None for these.
    of_tuned
        The tensors that `tuned` changes, by the first name of the parameter. They are not among `tensors`.
    """

    reader: CheckpointReader
    files: dict[str, FileTensor]
    tensors: list[MergedTensor]
    config_changes: dict[str, Any]
    tuned: TunedModel | None = None
    of_tuned: Mapping[str, MergedTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the merged model."""
        return sum(tensor.numel * tensor.dtype.itemsize for tensor in self.files.values())


def find_base(
    adapter: AdapterSource,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    *,
    option: str = "base",
) -> Path:
    """Directory of the original model: `base`, or else the one that was recorded with the adapter.

    Parameters
    ----------
    adapter
        From `lowrank_dist.adapters.source.find_adapter`.
    base, revision
        What the user names.
    option
        Name of the option that `base` comes from, for messages.

    Raises
    ------
    CheckpointError
        If it is not there, or is a residual model although the adapter is for the original one.
    """
    directory = find_original(adapter.original, base, revision, of=adapter.directory, option=option)
    if adapter.has_manifest and initial_directory(directory) is not None:
        raise CheckpointError(
            f"{directory} is a residual model, but the adapter is for the original model; pass the original"
        )
    return directory


def plan_merge(adapter: AdapterSource, directory: Path, dtype: torch.dtype | None = None) -> MergePlan:
    """Match an adapter with the base model at `directory`, and plan their merge.

    Parameters
    ----------
    adapter
        From `lowrank_dist.adapters.source.find_adapter`.
    directory
        Directory of the base model.
    dtype
        Dtype of all floating-point tensors of the merged model; None: each keeps its dtype in the base.

    Raises
    ------
    CheckpointError
        If files of the base are missing or damaged.
    ModelError
        If the adapter does not fit the base (the message names tensors and shapes), or cannot be merged.
    """
    by_peft = not adds_product(adapter.config)
    if by_peft:
        check_merges(adapter)
    reader = CheckpointReader(directory)
    backbone, config_changes = _skeleton(adapter, directory)
    expansion = None if adapter.expand_blocks is None else expand(backbone, adapter.expand_blocks)
    if expansion is not None:
        reader, config_changes = expansion.reader(reader), config_changes | expansion.changes
    if dtype is not None:
        config_changes["dtype"] = str(dtype).removeprefix("torch.")
    untie = changes_tied(backbone, adapter.trained, getattr(adapter.config, "modules_to_save", None))
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 warns of patterns that match parameters although it applies them
            warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match any targeted module")
            opened = open_plan(
                reader,
                None if by_peft or expansion is not None else adapter.lora,
                backbone=backbone,
                untie=untie,
                new_adapter=False,
                trained_whole=_in_file(backbone, adapter.trained) if by_peft else (),
                also=() if expansion is None else expansion.trained,
            )
    except ModelError as error:
        raise ModelError(
            f"{adapter.directory} cannot be merged into {directory} (PEFT's merge_and_unload may support it): {error}"
        ) from error
    if opened.tied:
        config_changes["tie_word_embeddings"] = False
    planner = _MergePlanBuilder(adapter, reader, backbone, CheckpointKeys(backbone, reader, opened.tied), dtype)
    tuned = TunedModel(adapter, backbone, opened.plan, reader) if by_peft else None
    if tuned is None:
        planner.changes(opened.plan)
    else:
        planner.changes_by_peft(opened.plan, tuned)
    planner.copies()
    return MergePlan(
        reader=reader,
        files=planner.files,
        tensors=planner.tensors,
        config_changes=config_changes,
        tuned=tuned,
        of_tuned=planner.of_tuned,
    )


def _in_file(backbone: PreTrainedModel, trained: CheckpointReader) -> list[str]:
    """Modules that an adapter file holds whole, which the base may lack."""
    return [name for name, _ in backbone.named_modules() if peft_name(f"{name}.weight") in trained]


def _skeleton(adapter: AdapterSource, directory: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build the adapter's base model on meta; return it and the changes to its configuration.

    Its class is the one that the base names, unless the adapter records another.
    """
    config, changes = read_config(directory), {}
    name = _class_name(adapter.config, config)
    if name is not None and [name] != config.architectures:
        config.architectures = changes["architectures"] = [name]
    backbone = build_skeleton(directory, config)
    labels = getattr(config, "num_labels", None)
    for parameter_name, parameter in backbone.named_parameters() if "architectures" in changes else ():
        key, shape = peft_name(parameter_name), tuple(parameter.shape)
        stored = adapter.trained.info(key).shape if key in adapter.trained else shape
        if stored != shape and stored[1:] == shape[1:] and shape[0] == labels:
            config.num_labels = stored[0]
            changes |= {"id2label": config.id2label, "label2id": config.label2id}
            return build_skeleton(directory, config), changes
    return backbone, changes


def _class_name(adapter: PeftConfig, config: PretrainedConfig) -> str | None:
    """Class of the model that was adapted; None if the adapter does not record it.

    Raises
    ------
    ModelError
        If that class belongs to another configuration than the base's.
    """
    named = (adapter.auto_mapping or {}).get("base_model_class", "")
    if hasattr(transformers, named):
        if not isinstance(config, getattr(transformers, named).config_class):
            raise ModelError(
                f"the adapter is for a {named}, the base has the configuration of a {config.model_type}; pass the "
                "model that it was trained from"
            )
        return str(named)
    if adapter.task_type not in _HEADS:
        return None
    mapping = getattr(transformers, f"MODEL_FOR_{_HEADS[adapter.task_type]}_MAPPING")
    return str(mapping[type(config)].__name__) if type(config) in mapping else None


class _MergePlanBuilder:
    """Collects the tensors of the merged model."""

    def __init__(
        self,
        adapter: AdapterSource,
        reader: CheckpointReader,
        backbone: PreTrainedModel,
        keys: CheckpointKeys,
        dtype: torch.dtype | None,
    ) -> None:
        self.adapter, self.reader, self.backbone, self.keys, self.dtype = adapter, reader, backbone, keys, dtype
        # with stored experts joined, and before PEFT's layers are injected
        self._shapes = {n: tuple(p.shape) for n, p in backbone.named_parameters(remove_duplicate=False)}
        self.files = {
            name: FileTensor(shape=reader.stored(name).shape, dtype=self._dtype(name)) for name in self.reader
        }
        self.tensors: list[MergedTensor] = []
        self.of_tuned: dict[str, MergedTensor] = {}

    def _dtype(self, key: str) -> torch.dtype:
        stored = stored_dtype(key, self.reader.info(key))
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def changes(self, plan: Plan) -> None:
        """Add all tensors that differ from the base."""
        saved_along = match_adapter(self.adapter, self.backbone, plan, self.reader.directory)
        main_dtype = next((self._dtype(planned.key) for planned in plan.matrices), torch.float32)
        for planned in plan.matrices:
            name = f"{plain_name(planned.layer)}.{planned.parameter}"
            source, key = self.reader, planned.key
            if name in saved_along:
                source, key = self.adapter.trained, saved_along[name]
                key = key if planned.expert is None else source.entry(key, planned.expert)
            shape = (planned.rows, planned.columns)
            self._change(name, shape, source, key, base_key=planned.key, main_dtype=main_dtype, planned=planned)
        for tensor in plan.parameters:
            # the original module beside its trained copy is never used
            names = [plain_name(name) for name in tensor.names if ".original_module." not in name]
            if not names:
                continue
            shape = tuple(self.backbone.get_parameter(tensor.names[0]).shape)
            name = next(filter(self.keys.holds, names), names[0])
            along = next((saved_along[other] for other in names if other in saved_along), None)
            if tensor.trainable or along is not None:
                key = along or peft_name(tensor.names[0])
                self._change(name, shape, self.adapter.trained, key, base_key=tensor.key, main_dtype=main_dtype)
            elif tensor.key is not None and not self.keys.holds(name):  # was tied to a weight that is adapted
                self._change(name, shape, self.reader, tensor.key, base_key=tensor.key, main_dtype=main_dtype)

    def changes_by_peft(self, plan: Plan, tuned: TunedModel) -> None:
        """Add all tensors that differ from the base, if `tuned` merges the adapter."""
        changed = {tensor.names[0] for tensor in tuned.changed}
        matrices = (t.key for t in plan.parameters if t.key is not None and len(self.reader.info(t.key).shape) == 2)
        main_dtype = next(map(self._dtype, matrices), torch.float32)
        for tensor in plan.parameters:
            name = next(filter(self.keys.holds, tensor.names), tensor.names[0])
            shape = self._shapes[tensor.names[0]]
            if tensor.key is None:
                source, key = self.adapter.trained, peft_name(tensor.names[0])
            else:
                source, key = tuned.source(tensor)
            if tensor.names[0] in changed or source is not self.reader or not self.keys.holds(name):
                self._change(name, shape, source, key, base_key=tensor.key, main_dtype=main_dtype)
            if tensor.names[0] in changed:
                self.of_tuned[tensor.names[0]] = self.tensors.pop()

    def copies(self) -> None:
        """Add all other tensors, unchanged."""
        changes = (*self.tensors, *self.of_tuned.values())
        changed: dict[str, list[Span]] = {}
        for span in (span for tensor in changes for span in tensor.target):
            changed.setdefault(span.name, []).append(span)
        for name in self.reader:
            spans = sorted(changed.get(name, ()), key=lambda span: span.start)
            whole, shape, end = self.files[name].numel, self.files[name].shape, 0
            ends = [*spans, Span(name=name, start=whole, numel=0)] if spans else []
            if not spans:
                target = (Span(name=name, start=0, numel=whole),)
                self.tensors.append(
                    MergedTensor(source=self.reader, key=name, target=target, dtype=self.files[name].dtype)
                )
            for span in ends:  # rows between those that changed: of a projection that is stored fused
                if span.start > end and span.start <= whole:
                    width = math.prod(shape[1:])
                    key = f"{name}[{end // width}:{span.start // width}]"
                    self.reader.join(key, [Piece(key=name, start=end // width, stop=span.start // width)])
                    self.tensors.append(
                        MergedTensor(
                            source=self.reader,
                            key=key,
                            target=(Span(name=name, start=end, numel=span.start - end),),
                            dtype=self.files[name].dtype,
                        )
                    )
                end = max(end, span.start + span.numel)

    def _change(
        self,
        name: str,
        shape: tuple[int, ...],
        source: CheckpointReader,
        key: str,
        *,
        base_key: str | None,
        main_dtype: torch.dtype,
        planned: PlannedMatrix | None = None,
    ) -> None:
        """Add a tensor that fills parameter `name` from `key` of `source`.

        The base stores the parameter as `base_key`, possibly as the tensor that it is tied to; None: not at all.
        """
        dtype = main_dtype if base_key is None else self._dtype(base_key)
        if base_key is not None and self.keys.holds(name):
            target = tuple(self._spans(base_key))
        else:
            target = (Span(name=name, start=0, numel=math.prod(shape)),)
            self.files[name] = FileTensor(shape=shape, dtype=dtype)
        self.tensors.append(MergedTensor(source=source, key=key, target=target, dtype=dtype, planned=planned))

    def _spans(self, key: str) -> Iterator[Span]:
        """Parts of the stored tensors of the base that `key` refers to."""
        for piece in self.reader.pieces(key):
            shape = self.reader.stored(piece.key).shape
            if piece.transposed:
                raise ModelError(
                    f"{piece.key} is stored transposed, which merging does not write back; load the model with "
                    "transformers, save it with `save_pretrained(directory, save_original_format=False)`, merge there"
                )
            if piece.index is None:
                width = math.prod(shape[1:])
                stop = shape[0] if piece.stop is None and shape else piece.stop
                numel = math.prod(shape) if stop is None else (stop - piece.start) * width
                yield Span(name=piece.key, start=piece.start * width, numel=numel)
            else:
                numel = math.prod(shape[1:])
                yield Span(name=piece.key, start=piece.index * numel, numel=numel)
