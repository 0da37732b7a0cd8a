"""Optimizer state of a ZeRO-3 engine by parameter; DeepSpeed itself concatenates parameters in flat fp32 sub-groups.

fp32 copies and moments are read and set by DeepSpeed's functions for one parameter (``safe_get_local_fp32_param``,
``safe_set_local_optimizer_state``, ...). Those functions do not list the moments, do not create them before the first
step, and cannot split blockwise 8-bit moments, whose blocks cross the boundaries of parameters. For these cases this
module accesses the flat tensors by private names, which ``docs/private-names.md`` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.zero3.partition import local_shard

#: Key of the fp32 copy that the optimizer updates, among the names of moments.
MASTER = "fp32"


class ShardedOptimizer:
    """Reads and writes optimizer state as flat fp32 shards of parameters.

    Parameters
    ----------
    zero
        ``engine.optimizer`` of a DeepSpeed engine at ZeRO stage 3.

    Raises
    ------
    InputError
        If the optimizer is offloaded to NVMe, where its state cannot be read in place.
    """

    def __init__(self, zero: Any) -> None:
        if zero.swap_optimizer:
            raise InputError(
                "The optimizer is offloaded to NVMe, and its state there cannot be saved or restored; adapters are "
                "small: use offload_optimizer_device='cpu', or do not offload"
            )
        self._zero = zero

    def shards(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Every trained parameter with this rank's shards of its fp32 copy (``MASTER``) and of its moments.

        Shards are flat, fp32, include padding, and are on the device of the engine even if the optimizer is offloaded.
        Moments have the names of `torch.optim`, whichever optimizer is used. Blockwise 8-bit moments are dequantized,
        one sub-group at a time. Before the first step there are no moments. Shards may share memory with the
        optimizer's state. There is no communication.
        """
        for flat, parameters in self._sub_groups():
            state = self._zero.state.get(flat, {})
            sizes = [local_shard(parameter).numel() for parameter in parameters]
            names = moment_names(state)
            cut = {name: dequantized(state, name).split(sizes) for name in names if is_quantized(state[name])}
            for index, parameter in enumerate(parameters):
                found = {MASTER: safe_get_local_fp32_param(parameter).detach()}
                for name in names:
                    moment = cut[name][index] if name in cut else safe_get_local_optimizer_state(parameter, name)
                    found[_MOMENTS.get(name, name)] = moment.detach().float()
                yield parameter, found

    def load(self, shards: Callable[[Tensor], Mapping[str, Tensor]], steps: int) -> None:
        """Set fp32 copies and moments, without communication.

        Parameters
        ----------
        shards
            Returns this rank's flat shards of a parameter, without padding, under the names that the method `shards`
            uses. If ``MASTER`` is missing, the fp32 copy is unchanged.
        steps
            Number of steps that the moments have accumulated.
        """
        for index, (flat, parameters) in enumerate(self._sub_groups()):
            moments: dict[str, list[Tensor]] = {}
            for place, parameter in enumerate(parameters):
                for name, shard in shards(parameter).items():
                    if name == MASTER:
                        copy = safe_get_local_fp32_param(parameter).detach().clone()
                        copy[: shard.numel()] = shard
                        safe_set_local_fp32_param(parameter, copy)
                        continue
                    if name not in moments:
                        moments[name] = [flat.new_zeros(local_shard(other).numel()) for other in parameters]
                    moments[name][place][: shard.numel()] = shard
            if moments:
                group = self._zero.param_groups[self._zero.sub_group_to_group_id[index]]
                self._set_moments(flat, parameters, group, moments, steps)

    def _set_moments(
        self,
        flat: Tensor,
        parameters: list[Tensor],
        group: dict[str, Any],
        moments: Mapping[str, list[Tensor]],
        steps: int,
    ) -> None:
        begin_state(self._zero.optimizer, group, flat, moments, steps)
        state = self._zero.state[flat]
        for name in moment_names(state):
            given = moments.get(_MOMENTS.get(name, name))
            if given is None:
                continue
            if is_quantized(state[name]):
                quantize_into(state, name, torch.cat(given))
                continue
            for parameter, moment in zip(parameters, given, strict=True):
                safe_set_local_optimizer_state(parameter, moment, name)

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return max((int(state["step"]) for state in self._zero.state.values() if "step" in state), default=0)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Learning rate, betas and other hyperparameters of every parameter group."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self._zero.param_groups]

    @settings.setter
    def settings(self, values: list[dict[str, Any]]) -> None:
        groups = self._zero.param_groups
        if len(groups) != len(values):
            raise InputError(
                f"the optimizer has {len(groups)} parameter groups, the checkpoint's had {len(values)}; "
                "configure_optimizers must create the same groups"
            )
        for group, stored in zip(groups, values, strict=True):
            group.update({name: value for name, value in stored.items() if name in group})

    def _sub_groups(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The flat fp32 tensors that the optimizer steps, each with its parameters in the order of their shards."""
        return zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True)


# from bitsandbytes' names to those of torch.optim
_MOMENTS = {"state1": "exp_avg", "state2": "exp_avg_sq"}


_BLOCK = 256  # block size of bitsandbytes' 8-bit optimizer state


def moment_names(state: Mapping[str, Any]) -> list[str]:
    """Names of the per-element tensors in ``optimizer.state[parameter]`` of `torch.optim` or bitsandbytes."""
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() > 0 and not name.startswith(("qmap", "absmax"))
    ]


def is_quantized(moment: Tensor) -> bool:
    """Whether a moment is in bitsandbytes' blockwise 8-bit format."""
    return moment.dtype == torch.uint8


def dequantized(state: Mapping[str, Any], name: str) -> Tensor:
    """The 8-bit moment `name` of bitsandbytes' state of one parameter as a flat fp32 copy."""
    from bitsandbytes.functional import dequantize_blockwise

    index = name.removeprefix("state")
    absmax = state[f"absmax{index}"]
    # a paged tensor reports the CPU as its device
    packed = state[name].to(absmax.device)
    return dequantize_blockwise(packed, absmax=absmax, code=state[f"qmap{index}"], blocksize=_BLOCK).flatten()


def quantize_into(state: Mapping[str, Any], name: str, moment: Tensor) -> None:
    """Set the 8-bit moment `name` of bitsandbytes' state of one parameter to `moment`, flat fp32.

    A moment that is dequantized and quantized again is equal to 8-bit accuracy only: bitsandbytes' code for first
    moments contains 1 but not -1, so that the scale of a block shrinks if its entry of largest magnitude is negative.
    """
    from bitsandbytes.functional import quantize_blockwise

    index = name.removeprefix("state")
    code, absmax = state[f"qmap{index}"], state[f"absmax{index}"]
    packed, quantized = quantize_blockwise(moment.to(code), code=code, blocksize=_BLOCK)
    state[name].copy_(packed.view_as(state[name]))
    absmax.copy_(quantized.absmax.view_as(absmax))


def begin_state(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: Tensor,
    moments: Iterable[str],
    steps: int,
) -> None:
    """Create the state of `parameter` as if the optimizer had stepped, with zero moments.

    Parameters
    ----------
    optimizer
        An optimizer of `torch.optim`, DeepSpeed or bitsandbytes; it may have no state yet.
    group
        The parameter's entry in ``optimizer.param_groups``.
    parameter
        The parameter, or one of DeepSpeed's flat tensors.
    moments
        Names of the moments; ignored for bitsandbytes, which creates its own.
    steps
        Number of steps that the moments have accumulated.
    """
    if not hasattr(optimizer, "init_state"):  # torch.optim, DeepSpeed
        step = torch.tensor(float(steps)) if isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam) else steps
        zeros = {name: torch.zeros_like(parameter, requires_grad=False) for name in moments}
        optimizer.state[parameter] = {"step": step, **zeros}
        return
    # DeepSpeed empties the groups between steps, but bitsandbytes looks up a parameter's settings in its group
    listed, group["params"] = group["params"], [parameter]
    optimizer.init_state(group, parameter, optimizer.param_groups.index(group), 0)
    group["params"] = listed
    optimizer.state[parameter]["step"] = steps
