"""PEFT's tuners on a filled, sharded model: the base first, PEFT second.

For an adapter that is made from the weights, PEFT's layers are injected into the skeleton, and the walk fills them. The
other tuners of PEFT make their own parameters, and some look at the weights while they do. So the base is filled and
sharded first, its linear layers encoded (`lowrank_dist.layers.frozen.FrozenLinear` is an ``nn.Linear`` whose weight is
decoded when it is used). Then `peft.get_peft_model` puts its layers on top of it, with the same random numbers on every
rank, and every parameter that it has made becomes a ZeRO-3 parameter in place, so that what tuners share stays shared.

What a tuner trains, and which layers it adapts, is known before: it is first injected into a copy on meta.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_dist.errors import ModelError
from lowrank_dist.model.names import ADAPTER, plain_name
from lowrank_dist.model.plan import Plan, PlannedTensor
from lowrank_dist.model.skeleton import named_linears, train_also
from lowrank_dist.tuners.adalora.files import is_factor
from lowrank_dist.tuners.adalora.layers import freeze_divisors
from lowrank_dist.tuners.files import exported
from lowrank_dist.tuners.support import name_of, remark, wants_plain_layers
from lowrank_dist.zero3.partition import gathered, is_partitioned


@dataclass(frozen=True, kw_only=True)
class TunerPlan:
    """What a tuner does to a model, known before any weight is read.

    Attributes
    ----------
    adapted
        Names of the linear layers that it adapts.
    whole
        Names of the modules that it trains whole, or of which it trains rows.
    trained
        Shapes of its trained parameters, by name in the backbone; of those outside of it, by name in PEFT's model.
    in_place
        Names of parameters of the model that it trains themselves, not copies of them (biases).
    buffers
        Shapes and dtypes of the buffers that it makes, which every rank holds.
    saved
        Shapes and dtypes of what its files hold beside parameters. Virtual tokens that PEFT computes from an encoder
        are left out: their values would be needed.
    scored
        Names of the trained parameters whose elements have a smoothed importance (AdaLoRA).
    of_plain_layers
        Whether PEFT adapts layers only that are exactly ``nn.Linear``, so that they are not encoded.
    """

    adapted: tuple[str, ...]
    whole: tuple[str, ...]
    trained: Mapping[str, tuple[int, ...]]
    in_place: tuple[str, ...]
    buffers: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    scored: tuple[str, ...] = ()
    of_plain_layers: bool = False


@dataclass(frozen=True, kw_only=True)
class Injected:
    """A model with a tuner's layers.

    Attributes
    ----------
    model
        PEFT's model around the backbone.
    root
        What computes: `model`, or the backbone if PEFT's layers inside it are all that the tuner needs.
    made
        The parameters that PEFT has made, whole on every rank.
    loaded
        The parameters that it trains, or has copied, of the model itself; they are to be loaded again.
    buffers
        The buffers that PEFT has made, as (module, name).
    """

    model: PeftModel
    root: nn.Module
    made: tuple[nn.Parameter, ...]
    loaded: tuple[PlannedTensor, ...]
    buffers: tuple[tuple[nn.Module, str], ...]


class Tuner:
    """A configuration of PEFT that is injected on top of a filled model.

    Parameters
    ----------
    config
        PEFT's configuration; it is copied.
    also
        Patterns of `lowrank_dist.model.skeleton.train_also`.
    """

    def __init__(self, config: PeftConfig, *, also: Sequence[str] = ()) -> None:
        self.config, self.also = copy.deepcopy(config), tuple(also)
        self.config.inference_mode = False  # saved configurations set it, and PEFT would freeze what it makes
        if isinstance(config, AdaLoraConfig):
            self.config.rank_pattern = None  # likewise: the ranks that an earlier run has ended with

    @property
    def name(self) -> str:
        """The type of the tuner, such as ``"VERA"``."""
        return name_of(self.config)

    def plan(self, skeleton: PreTrainedModel) -> TunerPlan:
        """Inject the tuner into a copy of a model on meta.

        Raises
        ------
        ModelError
            If PEFT cannot apply the configuration to the model.
        """
        backbone = copy.deepcopy(skeleton)
        try:
            originals, buffers = _named(backbone), set(backbone.buffers())
            try:
                model = self._on(backbone, low_cpu_mem_usage=True)
            except NotImplementedError:  # PEFT needs the places of values (SHiRA's mask)
                backbone = _of_zeros(copy.deepcopy(skeleton))
                originals, buffers = _named(backbone), set(backbone.buffers())
                model = self._on(backbone, low_cpu_mem_usage=False)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ModelError(
                f"{type(self.config).__name__} cannot be applied to {type(skeleton).__name__}: {error} "
                f"{named_linears(skeleton)}"
            ) from error
        modules, inside = dict(backbone.named_modules()), _named(backbone)
        trained = {inside.get(p, name): tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        return TunerPlan(
            adapted=tuple(
                plain_name(name)
                for name, module in modules.items()
                if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), nn.Linear | Conv1D)
            ),
            whole=tuple(
                plain_name(name) for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)
            ),
            trained=trained,
            in_place=tuple(originals[p] for p in backbone.parameters() if p.requires_grad and p in originals),
            buffers=tuple((tuple(b.shape), b.dtype) for b in model.buffers() if b not in buffers),
            saved=_saved_beside(model),
            scored=tuple(filter(is_factor, trained)) if isinstance(self.config, AdaLoraConfig) else (),
            of_plain_layers=wants_plain_layers(self.config),
        )

    def says(self, planned: TunerPlan) -> str:
        """What is trained, and what users should know of it, in one line."""
        total = sum(torch.Size(shape).numel() for shape in planned.trained.values())
        text = f"{self.name}: {len(planned.trained)} parameters of {total} elements are trained"
        if planned.of_plain_layers and planned.adapted:
            text += f"; the {len(planned.adapted)} adapted layers stay dense, because PEFT's layers take no others"
        about = remark(self.config)
        return text if about is None else f"{text}; {about}"

    def _on(self, backbone: PreTrainedModel, *, low_cpu_mem_usage: bool) -> PeftModel:
        backbone.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            model = get_peft_model(backbone, copy.deepcopy(self.config), low_cpu_mem_usage=low_cpu_mem_usage)
        train_also(backbone, self.also)
        freeze_divisors(model)
        return model

    def inject(self, backbone: PreTrainedModel, base: Plan, *, seed: int) -> Injected:
        """Put the tuner on top of a filled model, in place. Collective: PEFT may compute with weights.

        Weights that it computes with are decoded one at a time, whole on every rank; input embeddings are gathered.

        Parameters
        ----------
        backbone
            The model, filled and sharded.
        base
            The plan that filled it.
        seed
            Seed of PEFT's random numbers, the same on every rank.
        """
        before, buffers = _named(backbone), set(backbone.buffers())
        keys = {backbone.get_parameter(planned.names[0]): planned.key for planned in base.parameters}
        originals = {name: parameter for parameter, name in before.items()}
        with _random_numbers(seed), gathered(_looked_at(backbone, self.config)):
            model = get_peft_model(backbone, copy.deepcopy(self.config), autocast_adapter_dtype=False)
        train_also(backbone, self.also)
        freeze_divisors(model)
        copies = dict(_copies(backbone))
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in backbone.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        made, loaded = [], []
        for parameter in model.parameters():
            source = None
            if parameter in before:
                source = parameter if parameter.requires_grad else None
            elif parameter in copies:
                source = copies[parameter]
            elif parameter.numel() == 0 and not is_partitioned(parameter):
                source = originals[_original(names[parameter][0], originals)]
            elif not is_partitioned(parameter):
                made.append(parameter)
            if source is not None:
                loaded.append(
                    PlannedTensor(names=tuple(names[parameter]), key=keys[source], trainable=parameter.requires_grad)
                )
        return Injected(
            model=model,
            root=model if _wraps(model) else backbone,
            made=tuple(made),
            loaded=tuple(loaded),
            buffers=tuple(
                (module, name)
                for module in model.modules()
                for name, buffer in module.named_buffers(recurse=False)
                if buffer not in buffers
            ),
        )


def _named(module: nn.Module) -> dict[nn.Parameter, str]:
    """Names of parameters by the parameters themselves, which stay alive: others could otherwise take their ``id``."""
    return {parameter: name for name, parameter in module.named_parameters()}


def _saved_beside(model: PeftModel) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    parameters = set(model.parameters())
    try:
        found = exported(model)
    except NotImplementedError:  # PEFT copies what an encoder computes to the CPU
        return {}
    return {key: (tuple(t.shape), t.dtype) for key, t in found.items() if t not in parameters}


def _of_zeros(backbone: PreTrainedModel) -> PreTrainedModel:
    """Give the parameters of a model on meta values on the CPU that take no memory, in place."""
    for module in backbone.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    return backbone


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _looked_at(backbone: PreTrainedModel, config: PeftConfig) -> list[Tensor]:
    """The embeddings that PEFT looks values up in while it injects."""
    rows = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
    if not (config.is_prompt_learning or rows):
        return []
    tables = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    weights = {id(table.weight): table.weight for table in tables if table is not None}
    return [weight for weight in weights.values() if is_partitioned(weight)]


def _copies(backbone: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Every parameter of a module that PEFT has copied to train it, and the original parameter."""
    for wrapper in backbone.modules():
        copied = getattr(wrapper, "modules_to_save", None)
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and isinstance(copied, nn.ModuleDict) and ADAPTER in copied:
            for name, parameter in copied[ADAPTER].named_parameters():
                yield parameter, wrapper.original_module.get_parameter(name)


def _original(name: str, originals: Collection[str]) -> str:
    """The parameter that PEFT has copied to `name`: the longest name of which every part occurs in it, in order."""
    parts = name.split(".")

    def within(original: str) -> bool:
        rest = iter(parts)
        return original.rpartition(".")[2] == parts[-1] and all(part in rest for part in original.split("."))

    found = sorted(filter(within, originals), key=len)
    if not found:
        raise ModelError(f"PEFT has made {name} without values, and the model has no parameter that it is a copy of")
    return found[-1]


def _wraps(model: PeftModel) -> bool:
    """Whether the tuner needs PEFT's model around the backbone: for a forward of its own, or hooks around it."""
    tuner = model.base_model
    if not isinstance(tuner, BaseTuner):
        return True
    if isinstance(tuner, AdaLoraModel):  # its forward computes the penalty from parameters that are not gathered
        return False
    return type(tuner).forward is not BaseTuner.forward or hasattr(tuner, "_enable_peft_forward_hooks")
