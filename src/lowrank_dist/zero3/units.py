"""The modules whose parameters are gathered together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from lowrank_dist.zero3.partition import repeated_layers


@dataclass(frozen=True)
class Unit:
    """A module whose parameters are gathered together: a decoder layer, or another module with parameters.

    Attributes
    ----------
    module
        The module whose forward gathers.
    members
        The modules whose parameters are gathered.
    parameters
        The parameters of `members`, and those that they use (`uses`), each once.
    """

    module: nn.Module
    members: list[nn.Module]
    parameters: list[nn.Parameter]


def uses(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Have `parameters` gathered with `module`, whose forward uses them although another module holds them."""
    module.__dict__["used_parameters"] = tuple(parameters)


def units_of(backbone: nn.Module) -> list[Unit]:
    """The units of `backbone`; together they hold all of its parameters.

    Outside the decoder layers, a module with parameters is a unit. Containers without a forward of their own
    (``ParameterList``, ``ModuleDict``) and the parts of an adapted layer belong to the module around them.
    """
    stacked = repeated_layers(backbone)
    inside = {id(module) for layer in stacked for module in layer.modules()}
    units = [
        Unit(layer, list(layer.modules()), list(dict.fromkeys(p for m in layer.modules() for p in _parameters(m))))
        for layer in stacked
    ]
    owners: dict[nn.Module, list[nn.Module]] = {}
    parents: dict[nn.Module, nn.Module] = {}
    for module in backbone.modules():
        if id(module) in inside:
            continue
        owner = parents.get(module, module)
        for child in module.children():
            if _computes_its_children(owner) or not _has_forward(child):
                parents.setdefault(child, owner)
        if module._parameters or "used_parameters" in module.__dict__:
            owners.setdefault(owner, []).append(module)
    for owner, members in owners.items():
        parameters = dict.fromkeys(p for member in members for p in _parameters(member))
        units.append(Unit(owner, members, list(parameters)))
    return units


def _parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    yield from module.__dict__.get("used_parameters", ())


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.ParameterList)


def _computes_its_children(module: nn.Module) -> bool:
    """Whether the forward of `module` uses the parameters of its children, as PEFT's adapted layers do."""
    return hasattr(module, "base_layer")
