"""The modules whose parameters are gathered together."""

from __future__ import annotations

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
        The parameters of `members`, each once.
    """

    module: nn.Module
    members: list[nn.Module]
    parameters: list[nn.Parameter]


def units_of(backbone: nn.Module) -> list[Unit]:
    """The units of `backbone`; together they hold all of its parameters.

    Outside the decoder layers, a module with parameters is a unit. Containers without a forward of their own
    (``ParameterList``, ``ModuleDict``) and the parts of an adapted layer belong to the module around them.
    """
    stacked = repeated_layers(backbone)
    inside = {id(module) for layer in stacked for module in layer.modules()}
    units = [Unit(layer, list(layer.modules()), list(layer.parameters())) for layer in stacked]
    owners: dict[nn.Module, list[nn.Module]] = {}
    parents: dict[nn.Module, nn.Module] = {}
    for module in backbone.modules():
        if id(module) in inside:
            continue
        owner = parents.get(module, module)
        for child in module.children():
            if owner is not module or _computes_its_children(module) or not _has_forward(child):
                parents.setdefault(child, owner)
        if module._parameters:
            owners.setdefault(owner, []).append(module)
    for owner, members in owners.items():
        parameters = dict.fromkeys(p for member in members for p in member.parameters(recurse=False))
        units.append(Unit(owner, members, list(parameters)))
    return units


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.ParameterList)


def _computes_its_children(module: nn.Module) -> bool:
    """Whether the forward of `module` uses the parameters of its children, as PEFT's adapted layers do."""
    return hasattr(module, "base_layer")
