"""Forward and backward of a sharded model without a DeepSpeed engine, for the calibration pass before training.

Every decoder layer, and every other module that holds parameters, gathers them for its forward. If gradients are
enabled, the module runs under gradient checkpointing and gathers its parameters again for its backward. Only one layer
is gathered at a time, and only the inputs of layers are kept between them. Nothing is prefetched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_dist.zero3.partition import gathered
from lowrank_dist.zero3.units import Unit, units_of


@contextmanager
def inert(backbone: PreTrainedModel) -> Iterator[None]:
    """Disable adapters, training, dropout and the key-value cache of `backbone` inside; restore them on exit."""
    training = {module: module.training for module in backbone.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
    configs = {id(config): config for config in (backbone.config, backbone.config.get_text_config())}
    caches = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    adapters = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer)]
    backbone.eval()
    for adapter in adapters:
        adapter.enable_adapters(False)
    for parameter in wanted:
        parameter.requires_grad_(False)
    for config, _ in caches:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in caches:
            config.use_cache = value
        for adapter in adapters:
            adapter.enable_adapters(True)
        for parameter, wants in wanted.items():
            parameter.requires_grad_(wants)
        for module, mode in training.items():
            module.training = mode


@contextmanager
def layer_by_layer(
    backbone: nn.Module, *, before: Callable[[Unit], object], after: Callable[[Unit], object]
) -> Iterator[None]:
    """Run `backbone` with partitioned parameters inside. Collective: all ranks run it at the same time.

    Parameters
    ----------
    backbone
        Model with ZeRO-3 parameters, which are all-gathered unit by unit in forward and again in backward.
    before, after
        Called around the forward of every unit, but not around its recomputation in backward.
    """
    with ExitStack() as stack:
        for unit in units_of(backbone):
            stack.enter_context(_gathering(unit, before, after))
        yield


@contextmanager
def _gathering(unit: Unit, before: Callable[[Unit], object], after: Callable[[Unit], object]) -> Iterator[None]:
    """Give ``unit.module`` a forward that gathers; it uses gradient checkpointing if gradients are enabled."""
    replaced = vars(unit.module).get("forward")
    original = unit.module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _whole(unit):
            return original(*args, **kwargs)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before(unit)
        if torch.is_grad_enabled():
            work = functools.partial(run, **kwargs)
            output = checkpoint(work, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            output = run(*args, **kwargs)
        after(unit)
        return output

    unit.module.forward = forward
    try:
        yield
    finally:
        del unit.module.forward
        if replaced is not None:
            unit.module.forward = replaced


@contextmanager
def _whole(unit: Unit) -> Iterator[None]:
    """Replace the parameters of the members of `unit` by whole tensors inside.

    The gathered parameters cannot be used directly: autograd and gradient checkpointing would save the parameter
    objects, which are empty again by the time of the backward. The detached tensors stay alive while they are
    referenced: until the unit's forward is done, or its backward.
    """
    values: dict[nn.Parameter, torch.Tensor] = {}
    if unit.parameters:
        with gathered(unit.parameters):
            values = {parameter: parameter.detach() for parameter in unit.parameters}
    swapped = [(member._parameters, dict(member._parameters)) for member in unit.members]
    for held, parameters in swapped:
        held.update((name, values[p]) for name, p in parameters.items() if p is not None)  # type: ignore[misc]
    del values
    try:
        yield
    finally:
        for held, parameters in swapped:
            held.update(parameters)
