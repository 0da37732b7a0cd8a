"""From a model on the meta device and a checkpoint's headers to a plan of the walk; every refusal happens here.

Nothing is read but headers and nothing is communicated: given the same files, all ranks come to the same plan or to
the same error.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_dist.checkpoint_io import FLOAT_DTYPES, CheckpointReader
from lowrank_dist.errors import InputError

ADAPTER = "default"

_UNSUPPORTED_OPTIONS = {
    "use_dora": "its magnitude vector reads the dense weight in every step",
    "lora_bias": "converted adapters cannot carry it",
    "layer_replication": "replicated layers would share one sharded residual",
    "target_parameters": "fused 3-D expert weights are not decomposed",
    "trainable_token_indices": "embedding rows are not sharded separately",
    "megatron_config": "tensor-parallel layers are sharded already",
}


class ModelError(InputError):
    """A model or adapter configuration that cannot be trained as asked; the message names layer and remedy."""


@dataclass(frozen=True, kw_only=True)
class PlannedMatrix:
    """One adapted weight.

    Attributes
    ----------
    layer
        Name of the PEFT layer in the backbone.
    key
        Name of the weight in the checkpoint.
    rows, columns
        Shape as stored.
    input_first
        The weight is stored ``[in, out]`` (Conv1D).
    rank, scaling
        Of its adapter.
    """

    layer: str
    key: str
    rows: int
    columns: int
    input_first: bool
    rank: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A parameter or persistent buffer that is loaded as it is.

    Attributes
    ----------
    names
        All its names in the backbone; more than one where it is tied.
    key
        Its name in the checkpoint, or None where the checkpoint lacks it and a fresh initialisation stands in (linear
        layers of a new head under ``modules_to_save``).
    trainable
        Whether it is trained (copies under ``modules_to_save``).
    """

    names: tuple[str, ...]
    key: str | None
    trainable: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the walk does, in order."""

    matrices: list[PlannedMatrix] = field(default_factory=list)
    parameters: list[PlannedTensor] = field(default_factory=list)
    buffers: list[PlannedTensor] = field(default_factory=list)


def meta_parameters() -> AbstractContextManager[None]:
    """Inside, parameters are created on the meta device; buffers (rotary frequencies, ...) are real."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def find_backbone(module: nn.Module) -> tuple[str, PreTrainedModel]:
    """The one outermost transformers model inside `module`, and its name there.

    Raises
    ------
    ModelError
        Where there is none, or more than one, or where its parameters are not on the meta device.
    """
    found: list[tuple[str, PreTrainedModel]] = []
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, child))
    owner = type(module).__name__
    if not found:
        raise ModelError(
            f"{owner} holds no transformers model after configure_model; build it there, e.g. "
            "`self.model = AutoModelForCausalLM.from_config(config)`"
        )
    if len(found) > 1:
        raise ModelError(
            f"{owner} holds {len(found)} transformers models ({', '.join(n for n, _ in found)}); one is supported"
        )
    name, backbone = found[0]
    backbone.tie_weights()  # creation on meta breaks ties
    inside = {id(p) for p in backbone.parameters()}
    for parameter_name, parameter in module.named_parameters():
        if id(parameter) not in inside:
            raise ModelError(
                f"{owner}.{parameter_name} is outside the transformers model {name!r}: no checkpoint holds it; use a "
                "model class with a head (AutoModelForSequenceClassification, ...) and list it in modules_to_save"
            )
        if parameter.device.type != "meta":
            raise ModelError(
                f"{owner}.{parameter_name} is on {parameter.device}, not on the meta device: build the model in "
                "configure_model with `from_config`, not in __init__ and not with `from_pretrained`"
            )
    return name, backbone


def inject_adapter(backbone: PreTrainedModel, adapter: LoraConfig) -> None:
    """Put PEFT's LoRA layers, on meta, into `backbone`; only what PEFT makes trainable stays trainable.

    Raises
    ------
    ModelError
        For options of `adapter` that are not supported, and for targets that match nothing.
    """
    for option, reason in _UNSUPPORTED_OPTIONS.items():
        if getattr(adapter, option, None):
            raise ModelError(
                f"LoraConfig.{option}={getattr(adapter, option)!r} is not supported: {reason}; leave it unset"
            )
    if adapter.bias != "none":
        raise ModelError(f"LoraConfig.bias={adapter.bias!r} is not supported: biases stay frozen; use bias='none'")
    if adapter.init_lora_weights not in (True, False):
        raise ModelError(
            f"LoraConfig.init_lora_weights={adapter.init_lora_weights!r}: the initialisation is chosen by "
            "PiSSAStrategy(init=PiSSA(...)), and PEFT's own would need whole weights; leave init_lora_weights unset"
        )
    backbone.requires_grad_(False)
    try:
        inject_adapter_in_model(adapter, backbone, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        linears = sorted(
            {n.rsplit(".", 1)[-1] for n, m in backbone.named_modules() if isinstance(m, nn.Linear | Conv1D)}
        )
        raise ModelError(
            f"LoraConfig.target_modules={adapter.target_modules!r} cannot be applied to {type(backbone).__name__}: "
            f"{error} Linear layers of this model: {', '.join(linears)}"
        ) from error


def plan_walk(backbone: PreTrainedModel, reader: CheckpointReader) -> Plan:
    """Match every parameter of an injected `backbone` with the checkpoint; refuse what cannot be done.

    Raises
    ------
    ModelError
        Naming the layers, their shapes and the remedy: unsupported layer types, tied or missing or misshapen weights,
        ranks above ``min(out, in)``.
    """
    if getattr(backbone.config, "quantization_config", None) is not None:
        raise ModelError(f"{reader.directory} is quantized already; pass the checkpoint it was made from")
    planner = _Planner(backbone, reader)
    planner.adapted_layers()
    planner.other_parameters()
    planner.persistent_buffers()
    problems = planner.problems
    if problems:
        shown = "\n  ".join(problems[:5])
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{type(backbone).__name__} cannot be set up from {reader.directory}:\n  {shown}{more}")
    return planner.plan


class _Planner:
    """Builds a plan, and collects everything that stands against it."""

    def __init__(self, backbone: PreTrainedModel, reader: CheckpointReader) -> None:
        self.backbone = backbone
        self.keys = _KeyResolver(backbone, reader)
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

    def _adapted_layer(self, name: str, layer: LoraLinear, base: nn.Linear) -> str | None:
        if not isinstance(layer, LoraLinear) or not isinstance(base, nn.Linear | Conv1D):
            return (
                f"{name} is a {type(base).__name__}: only Linear and Conv1D layers are decomposed; drop it from "
                "target_modules"
            )
        weight = base.weight
        self._done.add(id(weight))
        others = [other for other in self._names[id(weight)] if other != f"{name}.base_layer.weight"]
        if others:
            return f"{name}.weight is tied to {_plain(others[0])}; untie them or drop {name} from target_modules"
        key = self.keys.find(f"{name}.weight")
        problem = self.keys.check(f"{name}.weight", key, weight)
        if problem is not None or key is None:
            return problem
        (rows, columns), rank = weight.shape, layer.r[ADAPTER]
        if rank > min(rows, columns):
            return (
                f"rank={rank} exceeds min(out, in)={min(rows, columns)} of {name}; lower r (or rank_pattern) or drop "
                "it from target_modules"
            )
        self.plan.matrices.append(
            PlannedMatrix(
                layer=name,
                key=key,
                rows=rows,
                columns=columns,
                input_first=isinstance(base, Conv1D),
                rank=rank,
                scaling=layer.scaling[ADAPTER],
            )
        )
        return None

    def other_parameters(self) -> None:
        wrappers = [n for n, m in self.backbone.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        may_be_new = tuple(f"{wrapper}." for wrapper in wrappers)
        for name, parameter in self.backbone.named_parameters():
            if id(parameter) in self._done:
                continue
            key = self.keys.find(name)
            owner = self.backbone.get_submodule(name.rpartition(".")[0])
            is_new = key is None and name.startswith(may_be_new) and isinstance(owner, nn.Linear)
            problem = None if is_new else self.keys.check(name, key, parameter)
            if problem is not None:
                self.problems.append(problem)
            names = tuple(self._names[id(parameter)])
            self.plan.parameters.append(PlannedTensor(names=names, key=key, trainable=parameter.requires_grad))

    def persistent_buffers(self) -> None:
        persistent = self.backbone.state_dict(keep_vars=True)
        for name, buffer in self.backbone.named_buffers():
            if name in persistent and (key := self.keys.find(name)) is not None:
                problem = self.keys.check(name, key, buffer)
                if problem is not None:
                    self.problems.append(problem)
                self.plan.buffers.append(PlannedTensor(names=(name,), key=key))


def _plain(name: str) -> str:
    """Name of a parameter as it was before PEFT's layers were put in."""
    for inserted in (".base_layer", ".original_module", f".modules_to_save.{ADAPTER}"):
        name = name.replace(inserted, "")
    return name


class _KeyResolver:
    """Finds a parameter in a checkpoint that may hold the model with or without its head, as transformers does."""

    def __init__(self, backbone: PreTrainedModel, reader: CheckpointReader) -> None:
        self._reader = reader
        self._prefix = f"{backbone.base_model_prefix}."

    def find(self, name: str) -> str | None:
        name = _plain(name)
        for candidate in (name, self._prefix + name, name.removeprefix(self._prefix)):
            if candidate in self._reader:
                return candidate
        return None

    def check(self, name: str, key: str | None, parameter: Tensor) -> str | None:
        """What is wrong with loading `parameter` from `key`, or None."""
        shape = tuple(parameter.shape)
        if key is None:
            near = [k for k in self._reader if k.rsplit(".", 2)[-2:] == _plain(name).rsplit(".", 2)[-2:]]
            hint = f" (similar: {near[0]})" if near else ""
            return f"{_plain(name)} {list(shape)}: the checkpoint holds no such tensor{hint}"
        info = self._reader.info(key)
        if info.shape != shape:
            return f"{_plain(name)}: the model has shape {list(shape)}, the checkpoint {list(info.shape)}"
        if torch.is_floating_point(parameter) and info.dtype not in FLOAT_DTYPES:
            return f"{_plain(name)}: the checkpoint stores {info.dtype}; only {', '.join(FLOAT_DTYPES)} are read"
        return None
