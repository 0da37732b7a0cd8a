"""Optimizer state of a ZeRO-3 engine by parameter; DeepSpeed itself concatenates parameters in flat fp32 sub-groups.

fp32 copies and moments are read and set by DeepSpeed's functions for one parameter (``safe_get_local_fp32_param``,
``safe_set_local_optimizer_state``, ...). Those functions do not list the moments, do not create them before the first
step, cannot split blockwise 8-bit moments, whose blocks cross the boundaries of parameters, nor moments of several
entries per element (AdEMAMix). For these cases this module accesses the flat tensors by private names, which
``docs/private-names.md`` lists.

State that is not per element (a step count, the product of momenta of NAdam) is the same for all tensors of a parameter
group, since the step treats all elements alike (`lowrank_dist.zero3.elementwise`). It is read and set by group.
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
from lowrank_dist.zero3.elementwise import TRIAL_NUMEL, state_after_a_step
from lowrank_dist.zero3.muon import is_muon
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
        Moments have the names of `torch.optim`, whichever optimizer is used. Of a moment with several entries per
        element (``exp_avg`` of AdEMAMix) each is one of its own: ``exp_avg_0``, ``exp_avg_1``. Blockwise 8-bit moments
        are dequantized, one sub-group at a time. Before the first step there are no moments. Shards may share memory
        with the optimizer's state. There is no communication.
        """
        for flat, parameters in self._sub_groups():
            state = self._zero.state.get(flat, {})
            sizes = [local_shard(parameter).numel() for parameter in parameters]
            names = moment_names(state, flat.numel())
            cut: dict[str, tuple[Tensor, ...]] = {}
            for name in names:
                if is_quantized(state[name]) or state[name].numel() > flat.numel():
                    rows = dequantized(state, name) if is_quantized(state[name]) else state[name].detach()
                    for kind, row in zip(
                        _kinds(state, name, flat.numel()), rows.view(-1, flat.numel()).unbind(), strict=True
                    ):
                        cut[kind] = row.to(local_shard(parameters[0]).device).split(sizes)
            for index, parameter in enumerate(parameters):
                found = {MASTER: safe_get_local_fp32_param(parameter).detach()}
                for name in names:
                    for kind in _kinds(state, name, flat.numel()):
                        whole = cut[kind][index] if kind in cut else safe_get_local_optimizer_state(parameter, name)
                        found[kind] = whole.detach().float()
                yield parameter, found

    def masters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every trained parameter with this rank's flat shard of its fp32 copy, padding included.

        The shards are views, on the host if the optimizer is offloaded, in the order of the gradients
        (`lowrank_dist.zero3.gradients.copied_gradients`). There is no communication.
        """
        for flat, parameters in self._sub_groups():
            sizes = [local_shard(parameter).numel() for parameter in parameters]
            yield from zip(parameters, flat.detach().split(sizes), strict=True)

    @property
    def scalars(self) -> list[dict[str, Any]]:
        """State that is not per element, by name, of every parameter group; empty before the first step.

        Raises
        ------
        InputError
            If it differs between the flat tensors of a group: on another number of ranks it would belong to none.
        """
        found: list[dict[str, Any]] = [{} for _ in self._zero.param_groups]
        for index, (flat, _) in enumerate(self._sub_groups()):
            state = self._zero.state.get(flat, {})
            moments = moment_names(state, flat.numel())
            own = {name: _copied(state[name]) for name in state if name not in moments and not _is_code(name)}
            place = self._zero.sub_group_to_group_id[index]
            if not found[place]:
                found[place] = own
                continue
            for name, value in own.items():
                if not _same(value, found[place].get(name)):
                    raise InputError(
                        f"{type(self._zero.optimizer).__name__} keeps {name} of a flat tensor, and not the same of all "
                        f"tensors of parameter group {place}: it cannot be saved for another number of ranks; use an "
                        "optimizer whose state is per element, or a larger sub_group_size"
                    )
        return found

    def load(
        self,
        shards: Callable[[Tensor], Mapping[str, Tensor]],
        steps: int,
        scalars: list[dict[str, Any]] | None = None,
    ) -> None:
        """Set fp32 copies, moments and the rest of the state, without communication.

        Parameters
        ----------
        shards
            Returns this rank's flat shards of a parameter, without padding, under the names that the method `shards`
            uses. If ``MASTER`` is missing, the fp32 copy is unchanged.
        steps
            Number of steps that the moments have accumulated.
        scalars
            What the property `scalars` gave. None: there is only the number of steps.

        Raises
        ------
        InputError
            If the optimizer keeps other moments or scalars than those given.
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
            place = self._zero.sub_group_to_group_id[index]
            rest = scalars[place] if scalars else {}
            if moments or rest:
                self._set_state(flat, parameters, self._zero.param_groups[place], moments, {"step": steps, **rest})

    def begin_again(self) -> None:
        """Set fp32 copies to the parameters and forget all other state, as before the first step. No communication."""
        for parameter, master in self.masters():
            master.copy_(local_shard(parameter))
        for flat, _ in self._sub_groups():
            self._zero.state.pop(flat, None)

    def _set_state(
        self,
        flat: Tensor,
        parameters: list[Tensor],
        group: dict[str, Any],
        moments: Mapping[str, list[Tensor]],
        scalars: Mapping[str, Any],
    ) -> None:
        if is_muon(type(self._zero.optimizer)):  # its momentum is the engine's, in the dtype of reductions
            momentum = torch.zeros_like(flat, dtype=self._zero.communication_data_type, requires_grad=False)
            self._zero.state[flat] = {"momentum_buffer": momentum}
        else:
            begin_state(self._zero.optimizer, group, flat, moments, scalars)
        state = self._zero.state[flat]
        kinds = {kind: name for name in moment_names(state, flat.numel()) for kind in _kinds(state, name, flat.numel())}
        if kinds.keys() != moments.keys():
            raise InputError(
                f"the checkpoint holds the moments {_listed(moments)}, but {type(self._zero.optimizer).__name__} keeps "
                f"{_listed(kinds)}; resume with the optimizer of the run that wrote it"
            )
        for name in dict.fromkeys(kinds.values()):
            given = [moments[kind] for kind in _kinds(state, name, flat.numel())]
            if is_quantized(state[name]):
                quantize_into(state, name, torch.cat([part for row in given for part in row]))
            elif len(given) > 1:
                rows = torch.cat([part for row in given for part in row])
                state[name].copy_(rows.view_as(state[name]))
            else:
                for parameter, moment in zip(parameters, given[0], strict=True):
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
            if group.get("name") != stored.get("name"):
                raise InputError(
                    f"the parameter group {group.get('name')!r} of the optimizer was {stored.get('name')!r} in the "
                    "checkpoint; configure_optimizers must create the same groups"
                )
        for group, stored in zip(groups, values, strict=True):
            group.update({name: value for name, value in stored.items() if name in group})

    def _sub_groups(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The flat fp32 tensors that the optimizer steps, each with its parameters in the order of their shards."""
        return zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True)


# from bitsandbytes' names to those of torch.optim
_MOMENTS = {"state1": "exp_avg", "state2": "exp_avg_sq"}


_BLOCK = 256  # block size of bitsandbytes' 8-bit optimizer state


def moment_names(state: Mapping[str, Any], numel: int) -> list[str]:
    """Names of the tensors with one or more entries per element in ``optimizer.state[parameter]``.

    Parameters
    ----------
    state
        The state of one parameter in an optimizer of `torch.optim`, bitsandbytes or another library.
    numel
        Number of elements of the parameter.
    """
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and value.numel() > 0
        and value.numel() % numel == 0
        and not _is_code(name)
    ]


def _is_code(name: str) -> bool:
    """Whether a name of bitsandbytes' state belongs to the format of a moment."""
    return name.startswith(("qmap", "absmax"))


def _kinds(state: Mapping[str, Any], name: str, numel: int) -> list[str]:
    """Names of a moment in `ShardedOptimizer.shards`: one, or one for each of several entries per element."""
    kind, rows = _MOMENTS.get(name, name), state[name].numel() // numel
    return [kind] if rows == 1 else [f"{kind}_{row}" for row in range(rows)]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def is_quantized(moment: Tensor) -> bool:
    """Whether a moment is in bitsandbytes' blockwise 8-bit format."""
    return moment.dtype == torch.uint8


def dequantized(state: Mapping[str, Any], name: str) -> Tensor:
    """The 8-bit moment `name` of bitsandbytes' state of one parameter as a flat fp32 copy, one row after the other."""
    from bitsandbytes.functional import dequantize_blockwise

    index = name.removeprefix("state")
    absmax, code = state[f"absmax{index}"], state[f"qmap{index}"]
    # a paged tensor reports the CPU as its device
    packed = _rows(state[name].to(absmax.device), absmax)
    return torch.cat(
        [
            dequantize_blockwise(row, absmax=scales, code=code, blocksize=_BLOCK).flatten()
            for row, scales in zip(packed, _rows(absmax, absmax), strict=True)
        ]
    )


def quantize_into(state: Mapping[str, Any], name: str, moment: Tensor) -> None:
    """Set the 8-bit moment `name` of bitsandbytes' state of one parameter to `moment`, flat fp32, row after row.

    A moment that is dequantized and quantized again is equal to 8-bit accuracy only: bitsandbytes' code for first
    moments contains 1 but not -1, so that the scale of a block shrinks if its entry of largest magnitude is negative.
    """
    from bitsandbytes.functional import quantize_blockwise

    index = name.removeprefix("state")
    code, absmax = state[f"qmap{index}"], state[f"absmax{index}"]
    rows = zip(_rows(moment.to(code), absmax), _rows(state[name], absmax), _rows(absmax, absmax), strict=True)
    for values, stored, scales in rows:
        packed, quantized = quantize_blockwise(values, code=code, blocksize=_BLOCK)
        stored.copy_(packed.view_as(stored))
        scales.copy_(quantized.absmax.view_as(scales))


def _rows(tensor: Tensor, absmax: Tensor) -> Tensor:
    """`tensor` as rows; AdEMAMix has two of a moment, each with blocks, and a row of `absmax`, of its own."""
    return tensor.view(absmax.shape[0] if absmax.dim() > 1 else 1, -1)


def begin_state(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: Tensor,
    moments: Iterable[str],
    scalars: Mapping[str, Any],
) -> None:
    """Create the state of `parameter` as if the optimizer had stepped, with zero moments.

    Parameters
    ----------
    optimizer
        An optimizer of `torch.optim`, DeepSpeed, bitsandbytes or another library; it may have no state yet.
    group
        The parameter's entry in ``optimizer.param_groups``.
    parameter
        The parameter, or one of DeepSpeed's flat tensors.
    moments
        Names of the moments; only for optimizers with a C++ object (DeepSpeed's for CPUs). Others create their own.
    scalars
        The rest of the state: ``step``, the number of steps that the moments have accumulated, and what else there is.

    Raises
    ------
    InputError
        If the optimizer keeps something that is not in `scalars`.
    """
    if hasattr(optimizer, "init_state"):
        # DeepSpeed empties the groups between steps, but bitsandbytes looks up a parameter's settings in its group
        listed, group["params"] = group["params"], [parameter]
        optimizer.init_state(group, parameter, optimizer.param_groups.index(group), 0)
        group["params"] = listed
        state = optimizer.state[parameter]
        state |= {name: _as_in(state[name], value) for name, value in scalars.items() if name in state}
        return
    if hasattr(type(optimizer), "__del__"):
        zeros = {name: torch.zeros_like(parameter, requires_grad=False) for name in moments}
        optimizer.state[parameter] = {"step": int(scalars["step"]), **zeros}
        return
    before = optimizer.state.get(parameter)
    numel = parameter.numel() if before else TRIAL_NUMEL
    kept = before or state_after_a_step(optimizer, group, parameter)
    moment = moment_names(kept, numel)
    begun: dict[str, Any] = {}
    for name, value in kept.items():
        if name in moment:
            shape = [parameter.numel() if size == numel else size for size in value.shape]
            begun[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        elif name in scalars:
            begun[name] = _as_in(value, scalars[name])
        else:
            raise InputError(
                f"the checkpoint holds no {name}, which {type(optimizer).__name__} keeps; resume with the optimizer of "
                "the run that wrote it"
            )
    optimizer.state[parameter] = begun


def _as_in(value: Any, stored: Any) -> Any:
    """`stored`, a number or tensor, in the type of `value`: optimizers count steps as numbers or as tensors."""
    if isinstance(value, Tensor):
        return torch.as_tensor(stored).to(value, copy=True).view_as(value)
    return type(value)(stored) if isinstance(value, int | float) else stored


def keep_optimizer(engine: Any) -> None:
    """Let a ZeRO-3 engine step the optimizer that it was given, where DeepSpeed has made another one (Adagrad).

    DeepSpeed makes a new Adagrad for its flat tensors, with one group and the default settings. The groups, and the
    learning rates that schedules write to them, are in the optimizer that it was given.

    Parameters
    ----------
    engine
        A DeepSpeed engine at ZeRO stage 3 that has not stepped.
    """
    zero, given = engine.optimizer, engine.basic_optimizer
    if zero.optimizer is given:
        return
    given.state = zero.optimizer.state
    for group in given.param_groups:
        group["params"] = []
    zero.optimizer = given
