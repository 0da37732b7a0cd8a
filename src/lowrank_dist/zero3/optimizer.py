"""The optimizer of a ZeRO-3 engine, parameter by parameter: what DeepSpeed lays end to end in flat fp32 sub-groups.

Uses private names of DeepSpeed's stage-3 optimizer, as `lowrank_dist.zero3.partition` does of parameters;
``tests/distributed/test_zero3.py`` is the canary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.errors import InputError

#: Name of the fp32 copy that the optimizer updates, beside the names of its moments.
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
        Where the optimizer is offloaded to NVMe, from where its state cannot be read in place.
    """

    def __init__(self, zero: Any) -> None:
        if zero.swap_optimizer:
            raise InputError(
                "The optimizer is offloaded to NVMe, whose state cannot be saved or restored; adapters are small: use "
                "offload_optimizer_device='cpu', or none"
            )
        self._zero = zero

    def shards(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Every trained parameter with this rank's shards of its fp32 copy (``MASTER``) and of its moments.

        Shards are flat, fp32, padding included, on the optimizer's device; moments under `torch.optim`'s names
        whatever the optimizer calls them, blockwise 8-bit ones dequantized (a sub-group at a time). Before the first
        step there are none. Communicates nothing.
        """
        for flat, parameters in self._sub_groups():
            states = {MASTER: flat.detach(), **expanded_state(self._zero.optimizer.state.get(flat, {}))}
            for parameter, part in parameters:
                yield parameter, {name: state[part] for name, state in states.items()}

    def load(self, shards: Callable[[Tensor], Mapping[str, Tensor]], steps: int) -> None:
        """Set fp32 copies and moments.

        Parameters
        ----------
        shards
            Gives, for a parameter, this rank's flat shards by the names of `shards`, without padding. ``MASTER`` may be
            missing: the copy then stays what it is.
        steps
            Steps that the moments have seen.
        """
        for index, (flat, parameters) in enumerate(self._sub_groups()):
            moments: dict[str, Tensor] = {}
            for parameter, part in parameters:
                for name, shard in shards(parameter).items():
                    if name != MASTER and name not in moments:
                        moments[name] = torch.zeros_like(flat, requires_grad=False)
                    into = flat.detach() if name == MASTER else moments[name]
                    into[part.start : part.start + shard.numel()] = shard.to(flat)
            if moments:
                group = self._zero.optimizer.param_groups[self._zero.sub_group_to_group_id[index]]
                fill_state(self._zero.optimizer, group, flat, moments, steps)

    @property
    def steps(self) -> int:
        """Steps taken."""
        states = (self._zero.optimizer.state.get(flat, {}) for flat, _ in self._sub_groups())
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Learning rate, betas and so on of every group of parameters."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self._zero.optimizer.param_groups]

    @settings.setter
    def settings(self, values: list[dict[str, Any]]) -> None:
        groups = self._zero.optimizer.param_groups
        if len(groups) != len(values):
            raise InputError(
                f"the optimizer has {len(groups)} parameter groups, the checkpoint's had {len(values)}; "
                "configure_optimizers must make the same ones"
            )
        for group, stored in zip(groups, values, strict=True):
            group.update({name: value for name, value in stored.items() if name in group})

    def _sub_groups(self) -> Iterator[tuple[Tensor, list[tuple[Tensor, slice]]]]:
        zero = self._zero
        for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            parts = []
            for parameter in parameters:
                _, start, numel = zero.grad_position[zero.get_param_id(parameter)]
                parts.append((parameter, slice(start, start + numel)))
            yield flat, parts


# bitsandbytes' names for what torch.optim calls:
_MOMENTS = {"state1": "exp_avg", "state2": "exp_avg_sq"}


_BLOCK = 256  # of bitsandbytes' 8-bit optimizer state


def expanded_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The per-element tensors of an optimizer's state of one parameter, in fp32.

    Parameters
    ----------
    state
        ``optimizer.state[parameter]`` of `torch.optim` or bitsandbytes (32-bit, or blockwise 8-bit).

    Returns
    -------
    dict of Tensor
        Flat, under the names of `torch.optim` (``exp_avg``, ``exp_avg_sq``, ...). 8-bit ones are dequantized copies,
        others may share memory with `state`.
    """
    found = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or name.startswith(("qmap", "absmax")):
            continue
        if value.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise

            index = name.removeprefix("state")
            absmax = state[f"absmax{index}"]
            # paged state says that it is on the CPU
            value = dequantize_blockwise(
                value.to(absmax.device), absmax=absmax, code=state[f"qmap{index}"], blocksize=_BLOCK
            )
        found[_MOMENTS.get(name, name)] = value.detach().flatten().float()
    return found


def fill_state(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: Tensor,
    moments: Mapping[str, Tensor],
    steps: int,
) -> None:
    """Make `moments` the state of `parameter`, in the format of `optimizer`.

    Parameters
    ----------
    optimizer
        Of `torch.optim` or bitsandbytes; it may have no state yet.
    group
        The entry of ``optimizer.param_groups`` that the parameter belongs to.
    parameter
        The parameter.
    moments
        What `expanded_state` gave, maybe of another optimizer of the same family. 8-bit state is quantized again, which
        is equal to 8-bit accuracy only: bitsandbytes' code for first moments reaches 1 but not -1, so that the scale of
        a block shrinks where its largest entry is negative.
    steps
        Steps they have seen.
    """
    if not hasattr(optimizer, "init_state"):  # torch.optim, DeepSpeed
        step = torch.tensor(float(steps)) if isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam) else steps
        shaped = {name: value.to(parameter).view_as(parameter) for name, value in moments.items()}
        optimizer.state[parameter] = {"step": step, **shaped}
        return
    from bitsandbytes.functional import quantize_blockwise

    # DeepSpeed empties the groups between steps; bitsandbytes looks its settings of a parameter up there
    listed, group["params"] = group["params"], [parameter]
    optimizer.init_state(group, parameter, optimizer.param_groups.index(group), 0)
    group["params"] = listed
    state = optimizer.state[parameter]
    state["step"] = steps
    for name, torch_name in _MOMENTS.items():
        if name not in state or torch_name not in moments:
            continue
        if state[name].dtype != torch.uint8:
            state[name].copy_(moments[torch_name].view_as(state[name]))
            continue
        number = name.removeprefix("state")
        code = state[f"qmap{number}"]
        packed, quantized = quantize_blockwise(moments[torch_name].to(code), code=code, blocksize=_BLOCK)
        state[name].copy_(packed.view_as(state[name]))
        state[f"absmax{number}"].copy_(quantized.absmax.view_as(state[f"absmax{number}"]))
