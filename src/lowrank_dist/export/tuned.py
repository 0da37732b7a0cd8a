"""Merges the layers of any tuner of PEFT, one at a time, by PEFT's own formula.

PEFT puts its layers on a model whose weights are read when they are used (`StoredWeight`), and loads the adapter. Each
of its layers then gets the real weights of the layer that it adapts, merges into them, and is let go. Host memory holds
the adapter with what the tuner makes beside it (OSF and PSOFT make singular vectors of all adapted weights), and a few
fp32 copies of the weights of one adapted module. Tuners that look at the weights while they are put on the model (DoRA
takes norms) read them once more.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from lowrank_dist.adapters.files import whole_tensor
from lowrank_dist.adapters.match import mismatch, written_twice
from lowrank_dist.adapters.source import AdapterSource
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.linalg import full_fp32
from lowrank_dist.model.names import ADAPTER, PEFT_PREFIX, plain_name
from lowrank_dist.model.plan import Plan, PlannedTensor
from lowrank_dist.storage.layout import ADAPTER_DIR
from lowrank_dist.storage.reader import CheckpointReader, check_finite
from lowrank_dist.tuners.files import exported
from lowrank_dist.tuners.support import said

#: Options of adapters that PEFT's merge does not get right, and why.
_NOT_MERGED = {
    "layer_replication": "the copies of a layer share its weights, into which PEFT merges the updates of all copies",
    "ensure_weight_tying": "tied weights share one adapter",
    "megatron_config": "tensor-parallel layers hold parts of weights",
}

_PEFTS_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError, KeyError)

_aten = torch.ops.aten


class StoredWeight(Tensor):
    """A weight that is read when an operator needs its values; fp32, on the CPU.

    Parameters
    ----------
    shape
        Its shape.
    read
        Reads the values.
    """

    # results of operators are ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape: torch.Size, read: Callable[[], Tensor]) -> StoredWeight:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=torch.device("cpu"))

    def __init__(self, shape: torch.Size, read: Callable[[], Tensor]) -> None:
        self.read = read

    def again(self) -> StoredWeight:
        """Another object for the same weight."""
        return StoredWeight(self.shape, self.read)

    @property
    def data(self) -> StoredWeight:
        """The weight itself."""
        return self.again()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, StoredWeight):
            raise ValueError(_CHANGES)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StoredWeight({list(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = nn.Parameter(self.again(), requires_grad=self.requires_grad)
        copied: Tensor = memo[id(self)]
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if isinstance(args[0], StoredWeight) and func in (_aten.detach.default, _aten.alias.default):
            return args[0].again()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, StoredWeight) and argument.alias_info is not None and argument.alias_info.is_write:
                raise ValueError(_CHANGES)

        def real(value: Any) -> Any:
            return value.read() if isinstance(value, StoredWeight) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


_CHANGES = "it takes its part off the weights of the base model when it is made"


def check_merges(adapter: AdapterSource) -> None:
    """Raise ModelError if PEFT has no merge for adapters of this type. Nothing is read."""
    config = adapter.config
    reason = next((why for option, why in _NOT_MERGED.items() if getattr(config, option, None)), None)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if config.is_prompt_learning:
        reason = "virtual tokens are not weights"
    elif not issubclass(tuner, BaseTuner):
        reason = "it wraps modules of the model with computations of its own"
    if reason is not None:
        raise _not_merged(adapter, reason)


def _not_merged(adapter: AdapterSource, reason: object) -> ModelError:
    files = adapter.directory / ADAPTER_DIR if adapter.has_manifest else adapter.directory
    text = str(reason) or "PEFT has no merge for it"
    return ModelError(
        f"{adapter.directory}: an adapter of {said(adapter.config)} cannot be merged ({text}); load {files} "
        "with PEFT on top of the base model"
    )


class TunedModel:
    """A pretrained model with the layers of a tuner of PEFT, to be merged.

    Parameters
    ----------
    adapter
        The adapter on disk; `check_merges` has passed it.
    backbone
        Skeleton on meta, without PEFT's layers; changed in place.
    plan
        Its plan.
    reader
        Reader of the pretrained weights.

    Attributes
    ----------
    changed : list of PlannedTensor
        The parameters of the model that merging may change.
    in_place : list of PlannedTensor
        Those among them that were trained themselves, outside of adapted layers (biases).
    along : dict
        Names in the adapter file of weights of the model that it holds themselves, by the first name of the parameter.
    whole : tuple of str
        Names of the modules that were trained whole, with a final dot.
    modules : dict
        Classes of the modules of the model, by name.

    Raises
    ------
    CheckpointError
        If a weight that PEFT looks at holds NaN or infinity, or is not the one that the adapter was trained from.
    ModelError
        If the adapter does not fit the model, or PEFT cannot merge it.
    """

    def __init__(self, adapter: AdapterSource, backbone: PreTrainedModel, plan: Plan, reader: CheckpointReader) -> None:
        self.adapter, self.backbone, self._reader = adapter, backbone, reader
        self.modules = {name: type(module) for name, module in backbone.named_modules()}
        self._tensors = {name: tensor for tensor in plan.parameters for name in tensor.names}
        # those that were trained, and embeddings that PEFT saves with an adapter
        plain = {plain_name(key.removeprefix(PEFT_PREFIX)): key for key in adapter.trained}
        self.along = {t.names[0]: plain[name] for t in plan.parameters for name in t.names if name in plain}
        self._shapes: dict[str, torch.Size] = {}
        for tensor in plan.parameters:
            shape = self._shapes[tensor.names[0]] = backbone.get_parameter(tensor.names[0]).shape
            value = torch.zeros(shape) if tensor.key is None else StoredWeight(shape, self._reading(tensor))
            self._set(tensor, nn.Parameter(value, requires_grad=False))
        self._model = self._with_layers()
        self._units = list(_units(backbone))
        in_place = self._make_trained_real()
        self._load()
        within = tuple(f"{name}." for name, _ in self._units)
        self.changed = [
            tensor
            for tensor in plan.parameters
            if any(name.startswith(within) or name in in_place for name in tensor.names)
        ]
        self.whole = tuple(f"{name}." for name, unit in self._units if isinstance(unit, ModulesToSaveWrapper))
        self.in_place = [tensor for tensor in self.changed if not tensor.names[0].startswith(within)]
        self._try_every_kind()

    def _set(self, tensor: PlannedTensor, parameter: nn.Parameter) -> None:
        for name in tensor.names:
            owner, _, leaf = name.rpartition(".")
            setattr(self.backbone.get_submodule(owner), leaf, parameter)

    def _with_layers(self) -> PeftModel:
        config = copy.deepcopy(self.adapter.config)
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):
                return get_peft_model(self.backbone, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
        except InputError:
            raise
        except _PEFTS_ERRORS as error:
            raise ModelError(
                f"{self.adapter.directory}: {type(config).__name__} cannot be applied to "
                f"{type(self.backbone).__name__}: {error}"
            ) from error

    def _make_trained_real(self) -> set[str]:
        """Read the weights of the model, or of copies of its modules, that were trained; names of those in place."""
        found = set()
        for owner, module in self.backbone.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad and isinstance(parameter, StoredWeight):
                    setattr(module, leaf, nn.Parameter(parameter.read().clone()))
                    found.add(plain_name(f"{owner}.{leaf}"))
        return found

    def _load(self) -> None:
        """Load the adapter's tensors, floating-point ones in fp32.

        Raises
        ------
        ModelError
            If tensors are missing, have no parameter, or have another shape. The error names them.
        """
        stored, problems = self.adapter.trained, []
        with torch.no_grad(), _quiet():
            expected = {key: tuple(tensor.shape) for key, tensor in exported(self._model).items()}
        for key in stored:
            shape = stored.info(key).shape
            if key not in expected and key not in self.along.values() and not written_twice(key, stored):
                problems.append(f"{key} {list(shape)} has no parameter in the model")
            elif expected.get(key, shape) != shape:
                problems.append(f"{key} has shape {list(shape)}, but the model needs {list(expected[key])}")
        missing = [key for key in expected if key not in stored]
        problems += [f"{key} {list(expected[key])} is missing in {stored.directory}" for key in missing]
        if problems:
            raise mismatch(self.adapter, self.backbone, self._reader.directory, problems)
        tensors = {}
        for key in expected:
            tensor = whole_tensor(stored, key)
            if tensor.is_floating_point():
                check_finite(key, tensor, 0)
                tensor = tensor.float()
            tensors[key] = tensor
        with _quiet():
            set_peft_model_state_dict(self._model, tensors, ADAPTER)

    def _try_every_kind(self) -> None:
        """Merge a copy of one layer of every kind, so that PEFT refuses before anything is written.

        Raises
        ------
        ModelError
            If PEFT cannot merge a layer.
        """
        kinds: dict[tuple[object, ...], tuple[str, nn.Module]] = {}
        for name, unit in self._units:
            names = {plain_name(inside) for inside, _ in unit.named_parameters()}
            kinds.setdefault((type(unit), name.rpartition(".")[2], *sorted(names)), (name, unit))
        for name, unit in kinds.values():
            self._merge(name, copy.deepcopy(unit))

    def _merge(self, name: str, unit: nn.Module) -> dict[str, Tensor]:
        """Merge a layer; return the parameters of the module that takes its place, by name in the model."""
        whole: Any = unit
        with self._named_errors(), _quiet(), torch.no_grad(), full_fp32():
            if not isinstance(unit, ModulesToSaveWrapper):
                _read_all(unit)
            if hasattr(unit, "unload_and_optionally_merge_module"):
                whole = whole.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                whole.merge()
                whole = whole.get_base_layer()
        found = {f"{name}.{leaf}": parameter.detach() for leaf, parameter in whole.named_parameters()}
        more = sorted(found.keys() - self._tensors.keys())
        if more or any(isinstance(module, BaseTunerLayer) for module in whole.modules()):
            raise _not_merged(self.adapter, f"merging {name} gives {more or 'a layer of PEFT'}")
        return found

    def merged(self) -> Iterator[tuple[PlannedTensor, Tensor | None]]:
        """Every tensor of `changed` with its merged values in fp32; None if they are those that are stored.

        The model is used up: a layer is let go before the next one is merged.
        """
        left = {tensor.names[0] for tensor in self.changed}

        def new(found: dict[str, Tensor]) -> Iterator[tuple[PlannedTensor, Tensor | None]]:
            for name, values in found.items():
                tensor = self._tensors[name]
                if tensor.names[0] in left:  # else tied to one that came before
                    left.remove(tensor.names[0])
                    yield tensor, None if isinstance(values, StoredWeight) else values

        yield from new({t.names[0]: self.backbone.get_parameter(t.names[0]).detach() for t in self.in_place})
        self._units.reverse()
        while self._units:
            name, unit = self._units.pop()
            yield from new(self._merge(name, unit))
            owner, _, leaf = name.rpartition(".")
            setattr(self.backbone.get_submodule(owner), leaf, nn.Identity())
        if left:
            raise _not_merged(self.adapter, f"PEFT's merge leaves out {min(left)}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the parameter `name` of the model."""
        return tuple(self._shapes[self._tensors[name].names[0]])

    def source(self, tensor: PlannedTensor) -> tuple[CheckpointReader, str]:
        """Reader, and name in it, of the values before the merge."""
        along = self.along.get(tensor.names[0])
        if along is not None:
            return self.adapter.trained, along
        assert tensor.key is not None  # new modules are in the adapter
        return self._reader, tensor.key

    def original(self, tensor: PlannedTensor) -> Tensor:
        """Values before the merge, fp32.

        Raises
        ------
        CheckpointError
            If they hold NaN or infinity, or if the norm shows that the adapter was trained from another matrix.
        """
        reader, key = self.source(tensor)
        values = reader.rows(key, 0, reader.info(key).shape[0]).float()
        check_finite(key, values, 0)
        for name in tensor.names if reader is self._reader else ():
            if name.endswith(".weight"):
                layer, norm = name.removesuffix(".weight"), float(torch.linalg.vector_norm(values))
                self.adapter.check_norm(layer, norm, f"{key} of {reader.directory}")
        return values

    def _reading(self, tensor: PlannedTensor) -> Callable[[], Tensor]:
        return lambda: self.original(tensor)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Inside, what PEFT raises becomes a ModelError that names the tuner and the remedy."""
        try:
            yield
        except InputError:
            raise
        except _PEFTS_ERRORS as error:
            raise _not_merged(self.adapter, error) from error


def _units(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """PEFT's layers and wrappers, the outermost ones, by name."""
    last = None
    for name, module in backbone.named_modules():
        inside = last is not None and name.startswith(f"{last}.")
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            last = name
            yield name, module


def _read_all(unit: nn.Module) -> None:
    """Read the weights of the layers inside `unit`."""
    for module in unit.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, StoredWeight):
                setattr(module, leaf, nn.Parameter(parameter.read().clone(), requires_grad=False))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, PEFT does not warn: of tied weights, which are not tied any more, or of rounding while merging."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
