"""Parameter groups by the roles of trained parameters, each with a learning rate of its own.

Roles are told by names and modules, not by shapes: a partitioned parameter has none between its uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

ROLES = ("lora_A", "lora_B", "embedding", "norm", "vector", "other")
"""Names of the groups, in their order."""

#: Roles of parameters that are not decayed.
UNDECAYED = ("norm", "vector")


def trained_by_role(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of `model` that require grad, by role; roles without parameters are left out.

    ``lora_A`` and ``lora_B`` are factors of linear layers and experts. ``embedding``: factors of embeddings, and input
    embedding and output head where they are trained whole. ``norm``: weights and biases of normalisation layers.
    ``vector``: other parameters of one dimension, such as biases. ``other``: the rest.
    """
    tables = _embedding_names(model)
    found: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[_role(name, parameter, owners[name.rpartition(".")[0]], tables)].append(parameter)
    return {role: parameters for role, parameters in found.items() if parameters}


def parameter_groups(
    model: nn.Module, *, lr: float, rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of the trained parameters of `model`, named after their roles.

    Parameters
    ----------
    model
        The model, partitioned or not.
    lr
        Learning rate of roles that are not in `rates`.
    rates
        Learning rates by role.
    weight_decay
        Weight decay of matrices. Norms, biases and other vectors have none.

    Returns
    -------
    list of dict
        Groups with the keys ``params``, ``name``, ``lr`` and ``weight_decay``.
    """
    return [
        {
            "params": parameters,
            "name": role,
            "lr": rates.get(role, lr),
            "weight_decay": 0.0 if role in UNDECAYED else weight_decay,
        }
        for role, parameters in trained_by_role(model).items()
    ]


def _role(name: str, parameter: Tensor, owner: nn.Module, tables: tuple[str, ...]) -> str:
    from lowrank_dist.zero3.partition import whole_shape  # imports DeepSpeed, which other strategies do without

    parts = name.split(".")
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        return "embedding"
    for factor in ("lora_A", "lora_B"):
        if factor in parts:
            return factor
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if len(whole_shape(parameter)) < 2:
        return "vector"
    return "embedding" if isinstance(owner, nn.Embedding) or name.startswith(tables) else "other"


def _embedding_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of parameters in the input embedding and the output head of the models in `model`."""
    found = []
    for prefix, module in model.named_modules():
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            try:
                table = getattr(module, getter)() if hasattr(module, getter) else None
            except NotImplementedError:  # transformers' answer for models without
                continue
            found += [name for name, other in module.named_modules(prefix=prefix) if other is table]
    return tuple(f"{name}." for name in found)
