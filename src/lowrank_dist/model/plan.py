"""The plan of a walk: matches a model on the meta device with the headers of the pretrained weights.

It refuses what cannot be loaded or decomposed before the weights are read. Only headers are read, and the values of
tied parameters that are stored more than once (`lowrank_dist.model.ties`): given the same files, all ranks make the
same plan or raise the same error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from peft import LoraConfig
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import ModelError
from lowrank_dist.model.names import ADAPTER as ADAPTER
from lowrank_dist.model.names import MAGNITUDE, CheckpointKeys
from lowrank_dist.model.names import plain_name as plain_name
from lowrank_dist.model.new import is_computed, train_heads
from lowrank_dist.model.skeleton import build_skeleton, inject_adapter, read_config, train_also, untie_embeddings
from lowrank_dist.model.stacking import stacked_shapes
from lowrank_dist.model.ties import separate_ties
from lowrank_dist.storage.reader import CheckpointReader


@dataclass(frozen=True, kw_only=True)
class PlannedMatrix:
    """One weight that is encoded, adapted or not, or one matrix of a stacked weight (one expert).

    Attributes
    ----------
    layer
        Name, in the backbone, of the PEFT layer, or of the linear layer if it is not adapted.
    key
        Name of the weight in the reader of the pretrained weights.
    rows, columns
        Shape as stored.
    input_first
        Whether the weight is stored ``[in, out]`` (Conv1D, embeddings, some experts).
    rank, scaling
        Rank and scaling of its adapter; rank 0 if it has none and is encoded as it is.
    parameter
        Name of the weight in the base layer.
    lookup
        Whether the layer looks rows up instead of multiplying by the matrix (embeddings).
    wrapped
        Whether PEFT adapts the parameter, not the module that holds it (``target_parameters``).
    dora
        Whether the adapter has a magnitude ``[out]`` (DoRA).
    expert, experts
        Index of the matrix in the stack, and number of matrices; None and 1 if the weight is a single matrix.
    """

    layer: str
    key: str
    rows: int
    columns: int
    input_first: bool
    rank: int
    scaling: float
    parameter: str = "weight"
    lookup: bool = False
    wrapped: bool = False
    dora: bool = False
    expert: int | None = None
    experts: int = 1

    @property
    def name(self) -> str:
        """Name in reports: the layer, or the adapted parameter if `wrapped`, with the expert in brackets."""
        return self.weight if self.wrapped else self.layer

    @property
    def weight(self) -> str:
        """Name of the weight in the model without adapters, with the expert in brackets."""
        return f"{plain_name(self.layer)}.{self.parameter}{'' if self.expert is None else f'[{self.expert}]'}"

    @property
    def factor_names(self) -> dict[str, str]:
        """Names of the parameters that hold A (``lora_A``) and B (``lora_B``) in the backbone; none at rank 0."""
        if self.rank == 0:
            return {}
        if self.lookup:
            return {f"lora_{x}": f"{self.layer}.lora_embedding_{x}.{ADAPTER}" for x in "AB"}
        return {f"lora_{x}": f"{self.layer}.lora_{x}.{ADAPTER}.weight" for x in "AB"}

    @property
    def magnitude(self) -> str | None:
        """Name of the parameter that holds the magnitude in the backbone; None without DoRA."""
        return f"{self.layer}{MAGNITUDE}" if self.dora else None

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of A ``[r, in]`` and B ``[out, r]``; none at rank 0."""
        if self.rank == 0:
            return {}
        outputs, inputs = (self.columns, self.rows) if self.input_first else (self.rows, self.columns)
        return {"lora_A": (self.rank, inputs), "lora_B": (outputs, self.rank)}

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the parameters that hold A and B; experts of one stack share them."""
        return stacked_shapes(self.factor_shapes, self.experts)

    def row_partition(self, world_size: int, *, block: int) -> RowPartition:
        """Sharding of the rows over `world_size` ranks that hold whole blocks of `block` elements."""
        return RowPartition(rows=self.rows, columns=self.columns, world_size=world_size, block=block)


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A parameter or persistent buffer that is loaded unchanged.

    Attributes
    ----------
    names
        All its names in the backbone; more than one if it is tied.
    key
        Its name in the pretrained weights. None if they lack it and it is freshly initialised (linear layers of a new
        head under ``modules_to_save``).
    trainable
        Whether it is trained (copies under ``modules_to_save``).
    rows
        Its rows if they are more or fewer than those stored (a resized vocabulary); None if they are not.
    """

    names: tuple[str, ...]
    key: str | None
    trainable: bool = False
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The matrices to decompose and the tensors to load, in order."""

    matrices: list[PlannedMatrix] = field(default_factory=list)
    parameters: list[PlannedTensor] = field(default_factory=list)
    buffers: list[PlannedTensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model on the meta device with the adapter's layers, and the plan that loads it.

    Attributes
    ----------
    backbone
        The skeleton: on meta, adapters injected.
    tied
        From `untie_embeddings`; empty if nothing was untied.
    plan
        The plan of `backbone`.
    """

    backbone: PreTrainedModel
    tied: Mapping[str, str]
    plan: Plan


def open_plan(
    reader: CheckpointReader,
    adapter: LoraConfig | None,
    *,
    backbone: PreTrainedModel | None = None,
    untie: bool = False,
    new_adapter: bool = True,
    encode: Collection[str] = (),
    trained_whole: Collection[str] = (),
    also: Sequence[str] = (),
    group: ShardGroup | None = None,
) -> PlannedModel:
    """Inject an adapter's layers into a model on meta and match it with the pretrained weights.

    Collective over `group`, with the collectives of `separate_ties` and two of `ShardGroup.shared_errors`.

    Parameters
    ----------
    reader
        Reader of the pretrained weights.
    adapter
        PEFT's configuration; None injects nothing.
    backbone
        The model on meta, changed in place; None builds the one that the ``config.json`` of the weights names.
    untie
        Give a tied output embedding its own weight first. One that is stored with other values than the input embedding
        has its own in any case.
    new_adapter, encode, trained_whole
        See `plan_walk`.
    also
        Patterns of `lowrank_dist.model.skeleton.train_also`.
    group
        The ranks that make the same plan. Default: this process alone.

    Raises
    ------
    CheckpointError
        On every rank, from `separate_ties`.
    ModelError
        On every rank, from `build_skeleton`, `untie_embeddings`, `inject_adapter` or `plan_walk`.
    """
    group = group or ShardGroup.single()
    with group.shared_errors():
        backbone = build_skeleton(reader.directory) if backbone is None else backbone
    separate_ties(backbone, reader, group)
    with group.shared_errors():
        tied = untie_embeddings(backbone) if untie else {}
        if adapter is not None:
            train_heads(backbone, adapter, CheckpointKeys(backbone, reader, tied))
            inject_adapter(backbone, adapter)
        train_also(backbone, also)
        plan = plan_walk(backbone, reader, tied, new_adapter=new_adapter, encode=encode, trained_whole=trained_whole)
    return PlannedModel(backbone=backbone, tied=tied, plan=plan)


def plan_walk(
    backbone: PreTrainedModel,
    reader: CheckpointReader,
    tied: Mapping[str, str] | None = None,
    *,
    new_adapter: bool = True,
    encode: Collection[str] = (),
    trained_whole: Collection[str] = (),
) -> Plan:
    """Match every parameter of `backbone` with the pretrained weights, and refuse what cannot be executed.

    Parameters
    ----------
    backbone
        The skeleton: on meta, adapters injected.
    reader
        Reader of the pretrained weights.
    tied
        From `untie_embeddings`.
    new_adapter
        Refuse ranks above ``min(out, in)``, the number of directions of a matrix, and scalings that are not positive,
        by which methods divide. An existing adapter may have both.
    encode
        Names of linear layers, as they were before the injection, that are encoded although they have no adapter. The
        adapted ones among them, and those that are trained whole, are passed over.
    trained_whole
        Names of modules that will be trained whole and may be new, beside those under ``modules_to_save``.

    Raises
    ------
    ModelError
        If a layer type is unsupported, a weight is tied, missing or of another shape, or a rank exceeds
        ``min(out, in)``, or a scaling is not positive. The error names the layers, the numbers and the remedy.
    """
    quantized = getattr(backbone.config, "quantization_config", None) is not None
    if quantized and not reader.returns_values:
        raise ModelError(f"{reader.directory} is quantized already; pass the pretrained model it was made from")
    planner = _PlanBuilder(backbone, reader, CheckpointKeys(backbone, reader, tied), new_adapter)
    planner.adapted_layers()
    planner.encoded_layers(encode)
    planner.other_parameters(trained_whole)
    planner.persistent_buffers()
    problems = planner.problems
    if problems:
        shown = "\n  ".join(problems[:5])
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{type(backbone).__name__} cannot be set up from {reader.directory}:\n  {shown}{more}")
    return planner.plan


class _PlanBuilder:
    """Builds a plan, and collects every reason it cannot be executed."""

    def __init__(
        self, backbone: PreTrainedModel, reader: CheckpointReader, keys: CheckpointKeys, new_adapter: bool
    ) -> None:
        self.backbone, self.reader, self.keys, self.new_adapter = backbone, reader, keys, new_adapter
        self.plan = Plan()
        self.problems: list[str] = []
        self._done: set[int] = set()  # parameters that belong to adapted layers
        self._names: dict[int, list[str]] = {}
        for name, parameter in backbone.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)

    def adapted_layers(self) -> None:
        for name, layer in self.backbone.named_modules():
            if isinstance(layer, BaseTunerLayer):
                base = layer.get_base_layer()
                self._done |= {id(p) for p in layer.parameters()} - {id(p) for p in base.parameters()}
                problem = self._adapted_layer(name, layer, base)
                if problem is not None:
                    self.problems.append(problem)

    def _adapted_layer(self, name: str, layer: LoraLayer, base: nn.Module) -> str | None:
        problem = _unsupported_layer(layer, base)
        if problem is not None:
            return f"{plain_name(name)}{problem}"
        wrapped = isinstance(layer, ParamWrapper)
        parameter = layer.parameter_name if wrapped else "weight"
        weight, weight_name = getattr(base, parameter), f"{plain_name(name)}.{parameter}"
        self._done.add(id(weight))
        others = {plain_name(other) for other in self._names[id(weight)]} - {weight_name}
        if others:
            return (
                f"{weight_name} is tied to {min(others)}; give each its own with PiSSAStrategy(untie_embeddings=True) "
                f"or drop {plain_name(name)} from target_modules"
            )
        key = self.keys.find(weight_name)
        problem = self.keys.check(weight_name, key, weight)
        if problem is not None or key is None:
            return problem
        (rows, columns), rank = weight.shape[-2:], layer.r[ADAPTER]
        if self.new_adapter and rank > min(rows, columns):
            return (
                f"rank={rank} exceeds min(out, in)={min(rows, columns)} of {weight_name if wrapped else name}; lower r "
                f"(or rank_pattern) or drop it from {'target_parameters' if wrapped else 'target_modules'}"
            )
        scaling, alpha = layer.scaling[ADAPTER], layer.lora_alpha[ADAPTER]
        if self.new_adapter and not 0 < scaling < math.inf:
            return (
                f"lora_alpha={alpha} of {weight_name if wrapped else plain_name(name)} makes its scaling {scaling:g} "
                f"(r={rank}), which must be positive and finite; raise lora_alpha (or alpha_pattern), or drop it from "
                f"{'target_parameters' if wrapped else 'target_modules'}"
            )
        lookup = isinstance(layer, LoraEmbedding)
        stacked = weight.ndim == 3
        for expert in range(len(weight)) if stacked else [None]:
            self.plan.matrices.append(
                PlannedMatrix(
                    layer=name,
                    key=key if expert is None else self.reader.entry(key, expert),
                    rows=rows,
                    columns=columns,
                    input_first=getattr(base, "is_transposed", False)
                    if stacked
                    else isinstance(base, Conv1D) or lookup,
                    rank=rank,
                    scaling=scaling,
                    parameter=parameter,
                    lookup=lookup,
                    wrapped=wrapped,
                    dora=bool(layer.lora_variant),
                    expert=expert,
                    experts=len(weight) if stacked else 1,
                )
            )
        return None

    def encoded_layers(self, names: Collection[str]) -> None:
        for name in names:
            layer = self.backbone.get_submodule(name)
            # PEFT has layers of its own around one that is adapted or trained whole
            if not isinstance(layer, nn.Linear | Conv1D) or layer.weight.requires_grad:
                continue
            weight_name = f"{name}.weight"
            key = self.keys.find(weight_name)
            problem = self.keys.check(weight_name, key, layer.weight)
            if problem is not None or key is None:
                self.problems.append(str(problem))
                continue
            self._done.add(id(layer.weight))
            rows, columns = layer.weight.shape
            self.plan.matrices.append(
                PlannedMatrix(
                    layer=name,
                    key=key,
                    rows=rows,
                    columns=columns,
                    input_first=isinstance(layer, Conv1D),
                    rank=0,
                    scaling=1.0,
                )
            )

    def other_parameters(self, trained_whole: Collection[str]) -> None:
        wrappers = [n for n, m in self.backbone.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        wrappers += trained_whole
        may_be_new = tuple(f"{wrapper}." for wrapper in wrappers)
        for name, parameter in self.backbone.named_parameters():
            if id(parameter) in self._done:
                continue
            names = tuple(self._names[id(parameter)])
            key = next((found for found in map(self.keys.find, names) if found is not None), None)
            is_new = key is None and (name.startswith(may_be_new) or is_computed(self.backbone, plain_name(name)))
            rows = None if key is None else self._changed_rows(name, key, parameter)
            problem = None if is_new or rows is not None else self.keys.check(name, key, parameter)
            if problem is not None:
                self.problems.append(problem)
            self.plan.parameters.append(
                PlannedTensor(names=names, key=key, trainable=parameter.requires_grad, rows=rows)
            )

    def _changed_rows(self, name: str, key: str, parameter: nn.Parameter) -> int | None:
        """Rows of an embedding or head whose vocabulary was resized; None if it has as many as are stored."""
        stored, shape = self.reader.info(key).shape, tuple(parameter.shape)
        if stored == shape or stored[1:] != shape[1:] or not stored or self.reader.holds_residuals:
            return None
        ends = (self.backbone.get_input_embeddings(), self.backbone.get_output_embeddings())
        owner = plain_name(name).rpartition(".")[0]
        if owner not in {plain_name(other) for other, module in self.backbone.named_modules() if module in ends}:
            return None
        # resize_token_embeddings has set it; that beside the weights is of what is stored, unless they are damaged
        if self.backbone.config.get_text_config().vocab_size != shape[0]:
            return None
        file = self.reader.directory / "config.json"
        before = read_config(self.reader.directory).get_text_config().vocab_size if file.is_file() else None
        return None if before == shape[0] else shape[0]

    def persistent_buffers(self) -> None:
        persistent = self.backbone.state_dict(keep_vars=True)
        for name, buffer in self.backbone.named_buffers():
            if name in persistent and (key := self.keys.find(name)) is not None:
                problem = self.keys.check(name, key, buffer)
                if problem is not None:
                    self.problems.append(problem)
                self.plan.buffers.append(PlannedTensor(names=(name,), key=key))


def is_dora(layer: LoraLayer) -> bool:
    """Whether DoRA of a linear layer is the only variant of a layer of PEFT."""
    variants = list(layer.lora_variant.values())
    return bool(variants) and all(type(variant) is DoraLinearVariant for variant in variants)


def _unsupported_layer(layer: BaseTunerLayer, base: nn.Module) -> str | None:
    """Reason why a PEFT layer cannot work on a sharded residual, to be appended to its name; or None."""
    drop, kind = "; drop it from target_modules", type(base).__name__
    if getattr(layer, "lora_variant", None) and not is_dora(layer):
        return f": the variant {type(layer.lora_variant[ADAPTER]).__name__} of LoRA is not supported here; turn it off"
    if isinstance(layer, ParamWrapper):
        return _unsupported_parameter(layer, base)
    if isinstance(layer, LoraEmbedding) and isinstance(base, nn.Embedding):
        if type(base) is not nn.Embedding and not kind.endswith("ScaledWordEmbedding"):
            return f" is a {kind}, whose own forward is not known here: only plain and scaled embeddings are" + drop
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(base, option):
                return f" is an embedding with {option}={getattr(base, option)}, which is not supported" + drop
        return None
    if isinstance(layer, LoraLinear) and isinstance(base, nn.Linear | Conv1D):
        if type(base).forward not in (nn.Linear.forward, Conv1D.forward):
            return f" is a {kind}, with a forward of its own, which an adapted layer would not call" + drop
        return None
    return f" is a {kind}: only Linear, Conv1D and Embedding layers and parameters are decomposed" + drop


def _unsupported_parameter(layer: ParamWrapper, base: nn.Module) -> str | None:
    """Like `_unsupported_layer`, for a parameter under ``target_parameters``."""
    name, weight = layer.parameter_name, layer.get_param()
    drop = "; drop it from target_parameters"
    if isinstance(base, nn.Embedding):
        return f".{name} is the weight of an embedding, which a lookup cannot take apart{drop}, use target_modules"
    if name in getattr(base, "parametrizations", ()):
        return f".{name} is parametrized already{drop}"
    if weight.ndim == 3 and len(weight) == 1 and getattr(base, "is_transposed", False):
        return f".{name} {list(weight.shape)}: PEFT applies its adapter the wrong way round for a single expert{drop}"
    return None
