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
from lowrank_dist.training.optim import expanded_state, fill_state

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
