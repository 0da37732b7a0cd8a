"""DeepSpeed's own Muon, the one optimizer of whole matrices that a ZeRO-3 engine can step.

Before the step, the engine gathers the gradient of every matrix and replaces it by the orthogonalized momentum. The
optimizer then adds it to flat shards. The engine knows the parameters by their attribute ``use_muon``.
"""

from __future__ import annotations

from typing import Any

import torch

from lowrank_dist.errors import InputError

_NAME = "deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam"


def is_muon(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether optimizers of class `kind` are DeepSpeed's own Muon."""
    return _NAME in (f"{base.__module__}.{base.__name__}" for base in kind.__mro__)


def muon(params: Any, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Make DeepSpeed's Muon over matrices.

    Parameters
    ----------
    params
        Parameters, or parameter groups, partitioned or not.
    settings
        ``lr``, ``momentum``, ``weight_decay`` and ``ns_method`` of groups without their own.

    Raises
    ------
    InputError
        If a parameter is no matrix, or a setting is unknown.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    from lowrank_dist.zero3.partition import whole_shape

    unknown = set(settings) - {"lr", "momentum", "weight_decay", "ns_method"}
    if unknown:
        raise InputError(
            f"optimizer=muon does not take {', '.join(sorted(unknown))}; it takes lr, weight_decay, and the options "
            "momentum and ns_method"
        )
    given = list(params)
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    for group in groups:
        for parameter in group["params"]:
            if len(whole_shape(parameter)) != 2:
                raise InputError(
                    f"optimizer=muon orthogonalizes matrices, but a trained parameter has the shape "
                    f"{list(whole_shape(parameter))}; train matrices only, or use optimizer=adamw"
                )
            parameter.use_muon = True
    made: torch.optim.Optimizer = MuonWithAuxAdam([{**settings, **group, "use_muon": True} for group in groups])
    return made
