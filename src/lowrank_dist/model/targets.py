"""What PEFT has adapted, compared with what the user asked for.

PEFT rewrites the targets of mixtures of experts that transformers 5 stacks: names of linear layers that experts had
(``gate_proj``, ``w1``) become stacked parameters, and the name ``gate``, or ``all-linear``, the weight of the router.
What is left out on the way is said in one line.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_dist.model.names import plain_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """The targets of a configuration before PEFT rewrites them.

    Attributes
    ----------
    linears
        Whether ``all-linear`` was asked for.
    modules
        Names of modules.
    parameters
        Names of parameters.
    patterns
        Keys of ``rank_pattern`` and ``alpha_pattern``.
    """

    linears: bool
    modules: frozenset[str]
    parameters: frozenset[str]
    patterns: frozenset[str]

    @classmethod
    def by(cls, adapter: LoraConfig) -> Asked:
        """What `adapter` asks for."""
        modules = adapter.target_modules
        return cls(
            linears=isinstance(modules, str) and modules.lower() == "all-linear",
            modules=frozenset(() if modules is None or isinstance(modules, str) else modules),
            parameters=frozenset(adapter.target_parameters or ()),
            patterns=frozenset({*(adapter.rank_pattern or ()), *(adapter.alpha_pattern or ())}),
        )


@contextmanager
def own_warning_of_patterns() -> Iterator[None]:
    """Silence PEFT's warning of patterns without a target, which does not look at parameters (`compare`)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def compare(backbone: PreTrainedModel, adapter: LoraConfig, asked: Asked) -> None:
    """Undo what ``all-linear`` does not mean, and say what is not adapted, after the injection.

    Routers whose weight PEFT has adapted as a parameter lose the adapter again, unless the user named them. One line
    each, on rank 0, names routers and stacked experts that ``all-linear`` leaves out, linear layers that were asked for
    and are not adapted, and patterns that match nothing.
    """
    unwrapped = _release_routers(backbone, adapter, asked) if asked.linears else []
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    if unwrapped:
        _say(unwrapped, "routers", "name their weights in target_parameters to adapt them")
    stacks = [name for name, p in backbone.named_parameters() if p.ndim == 3 and not _is_adapted(backbone, name)]
    if asked.linears and stacks:
        leaves = dict.fromkeys(".".join(plain_name(name).split(".")[-2:]) for name in stacks)
        _say(stacks, "stacked parameters", f"experts are adapted by target_parameters={list(leaves)}")
    left = list(_linears_left(backbone, adapter, asked))
    if left:
        log.warning(
            "PEFT takes names in target_modules for stacked experts of this model and leaves %d linear layers of these "
            "names frozen, such as %s; name their weights (%s.weight) in target_parameters to adapt them",
            len(left),
            left[0],
            ".".join(left[0].split(".")[-2:]),
        )
    layers = [(name, m) for name, m in backbone.named_modules() if isinstance(m, BaseTunerLayer)]
    names = [plain_name(n) + (f".{m.parameter_name}" if isinstance(m, ParamWrapper) else "") for n, m in layers]
    idle = sorted(p for p in asked.patterns if not any(re.match(rf"(.*\.)?({p})$", name) for name in names))
    if idle:
        log.warning("rank_pattern and alpha_pattern: nothing that is adapted matches %s", ", ".join(idle))


def _release_routers(backbone: PreTrainedModel, adapter: LoraConfig, asked: Asked) -> list[str]:
    """Names of the routers' weights that were adapted because of ``all-linear``, and are not any more."""
    released = []
    for name, layer in list(backbone.named_modules()):
        if not isinstance(layer, ParamWrapper) or layer.get_param().ndim != 2:
            continue
        weight = f"{plain_name(name)}.{layer.parameter_name}"
        if any(weight == one or weight.endswith(f".{one}") for one in asked.parameters):
            continue
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, layer.base_layer)
        released.append(weight)
    kept = {one for one in adapter.target_parameters or () if not any(w.endswith(f".{one}") for w in released)}
    if released:
        adapter.target_parameters = sorted(kept)
    return released


def _is_adapted(backbone: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to a layer of PEFT that adapts it, or to its factors."""
    path, _, leaf = name.rpartition(".")
    while path:
        module = backbone.get_submodule(path)
        if isinstance(module, ParamWrapper) and module.parameter_name == leaf:
            return True
        path = path.rpartition(".")[0]
    return False


def _linears_left(backbone: PreTrainedModel, adapter: LoraConfig, asked: Asked) -> Iterator[str]:
    """Names of linear layers that were asked for and that PEFT neither adapts nor excludes."""
    head = backbone.get_output_embeddings()
    excluded = adapter.exclude_modules or ()
    saved = tuple(adapter.modules_to_save or ())
    for name, module in backbone.named_modules():
        plain = type(module) in (nn.Linear, Conv1D) and module is not head and ".base_layer" not in f".{name}"
        if not plain or ".lora_" in name or name.endswith(saved) or isinstance(excluded, str):
            continue
        if any(name == one or name.endswith(f".{one}") for one in excluded):
            continue
        if asked.linears or any(name == one or name.endswith(f".{one}") for one in asked.modules):
            yield name


def _say(names: list[str], what: str, remedy: str) -> None:
    log.warning(
        'target_modules="all-linear" leaves %d %s out, such as %s; %s', len(names), what, plain_name(names[0]), remedy
    )
