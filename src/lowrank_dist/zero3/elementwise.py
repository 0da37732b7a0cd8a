"""Whether an optimizer takes the same step on shards as on whole parameters.

DeepSpeed gives an optimizer flat tensors, in which a rank's shards of many parameters lie end to end, and steps one of
them at a time. An optimizer whose step treats every element alike does not notice. One that looks at a whole tensor,
its norm, its rows and columns or its number of dimensions, computes something else, without an error.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.zero3.muon import is_muon

# parts of class names in lower case, and what such a class looks at
_WHOLE_TENSORS = {
    "adafactor": "keeps one second moment per row and column of a matrix",
    "adamini": "keeps one second moment per block of a matrix",
    "adammini": "keeps one second moment per block of a matrix",
    "apollo": "scales the step by norms over channels of a matrix",
    "dadapt": "estimates its step size from sums over whole tensors",
    "galore": "projects the gradients of whole matrices",
    "lamb": "scales the step by the norm of each whole tensor",
    "lars": "scales the step by the norm of each whole tensor",
    "lbfgs": "needs inner products over all parameters and evaluates the loss again",
    "lorafa": "projects the gradient of B with its own A, both whole",
    "muon": "orthogonalizes whole matrices",
    "prodigy": "estimates its step size from sums over whole tensors",
    "riemannian": "preconditions A with its own B, both whole",
    "schedulefree": "evaluates and saves other weights than it trains, between which it must be switched",
    "shampoo": "keeps one matrix per dimension of a whole tensor",
}
_WHOLE_NAMES = {"came": "keeps one second moment per row and column of a matrix", "soap": "rotates whole matrices"}

_REMEDY = (
    "use an optimizer whose step treats every element alike: torch.optim.AdamW, SGD, RMSprop, Adagrad, NAdam, RAdam, "
    "Adamax, bitsandbytes.optim.Lion or AdEMAMix; or optimizer=muon of CausalLMModule"
)

_SHAPES = ((4, 6), (5,))  # of the parameters of the trial; odd, so that shards are padded
_RANKS = 2
_STEPS = 3


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raise InputError unless `optimizer` steps flat shards as it would step whole parameters. No communication.

    DeepSpeed's own Muon passes: the engine orthogonalizes whole gradients before it steps the shards.

    Classes that are known to look at whole tensors are refused by their names. Any other class is tried: a copy of the
    optimizer, with its groups and settings, steps a small matrix and a vector whole, another one steps the two shards
    of both as DeepSpeed would. `optimizer`, its parameters and its state are not changed.

    Parameters
    ----------
    optimizer
        An optimizer that has not stepped. Its parameters may be partitioned; they tell the device.

    Raises
    ------
    InputError
        If the steps differ, or cannot be taken. The message says what the optimizer looks at, if it is known.
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    check_class(type(optimizer))
    if is_muon(type(optimizer)):
        return
    if hasattr(type(optimizer), "__del__"):  # DeepSpeed's for CPUs, element-wise; a copy would free its C++ object
        return
    try:
        whole, sharded = _stepped_whole(optimizer), _stepped_in_shards(optimizer)
    except Exception as error:  # whatever foreign code raises
        raise InputError(
            f"{name} cannot be tried on flat tensors, which DeepSpeed will give it: {type(error).__name__}: {error}; "
            f"{_REMEDY}"
        ) from error
    for one, other in zip(whole, sharded, strict=True):
        largest = float(one.abs().max())
        if not largest > 0:
            raise InputError(f"{name} would train nothing: on a trial its steps move nothing; {_REMEDY}")
        difference = float((one - other).abs().max())
        if not difference <= 1e-4 * largest:
            raise _refusal(
                name,
                f"on a trial its steps on shards differ from those on whole tensors by up to {difference:.1e}, where "
                f"the largest is {largest:.1e}",
            )


def check_class(kind: type[torch.optim.Optimizer]) -> None:
    """Raise InputError if optimizers of class `kind` are known to look at whole tensors, by its name or its bases'.

    Except DeepSpeed's own Muon.
    """
    if is_muon(kind):
        return
    for base in kind.__mro__:
        name = base.__name__.lower().replace("_", "")
        reasons = [reason for part, reason in _WHOLE_TENSORS.items() if part in name]
        if name in _WHOLE_NAMES or reasons:
            reason = _WHOLE_NAMES.get(name) or reasons[0]
            raise _refusal(f"{kind.__module__}.{kind.__qualname__}", f"it {reason}")


def state_after_a_step(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """The state that `optimizer` would keep of a flat tensor like `parameter` but of `TRIAL_NUMEL` elements.

    Parameters
    ----------
    optimizer
        Any optimizer without a C++ object of its own. It is not changed.
    group
        The parameter's entry in ``optimizer.param_groups``, whose settings the trial has.
    parameter
        A flat tensor, whose dtype and device the trial has.
    """
    trial = parameter.new_zeros(TRIAL_NUMEL).requires_grad_()
    trial.grad = torch.ones_like(trial)
    stand_in = _stand_in(optimizer, [{**group, "params": [trial]}])
    stand_in.step()
    return dict(stand_in.state[trial])


#: A prime, so that only tensors of one entry per element have a multiple of it.
TRIAL_NUMEL = 7


def _refusal(name: str, why: str) -> InputError:
    return InputError(
        f"{name} would silently train differently here: {why}, but ZeRO-3 gives an optimizer flat shards of many "
        f"parameters; {_REMEDY}"
    )


def _stand_in(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of the same class and attributes over other parameters, with a state of its own."""
    if optimizer.state:  # made with the optimizer (Adagrad): so it must be for other parameters
        return type(optimizer)(groups)  # type: ignore[call-arg]
    twin = copy.copy(optimizer)  # without hooks, and what else `__getstate__` leaves out
    for name, value in vars(optimizer).items():
        if name != "step":  # learning-rate schedules put a wrapper there
            twin.__dict__.setdefault(name, copy.copy(value) if isinstance(value, dict | list | set) else value)
    twin.param_groups, twin.state = groups, defaultdict(dict)
    return twin


def _groups(optimizer: torch.optim.Optimizer, parameters: list[list[Tensor]]) -> list[dict[str, Any]]:
    """The groups of `optimizer` with other parameters, and learning rates that move them."""
    return [
        {**group, "params": own, **({"lr": _moving(group["lr"])} if "lr" in group else {})}
        for group, own in zip(optimizer.param_groups, parameters, strict=True)
    ]


def _moving(rate: Any) -> Any:
    """A learning rate of 0.01, a tensor if `rate` is one, or what else an optimizer has for a rate."""
    if isinstance(rate, Tensor):
        return torch.full_like(rate, 1e-2)
    return 1e-2 if isinstance(rate, float | int) else rate


def _stepped_whole(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """How far `_STEPS` steps move the parameters of the trial: one flat tensor for each group."""
    whole = [_drawn(optimizer, index) for index in range(len(optimizer.param_groups))]
    before = [torch.cat([parameter.detach().flatten().clone() for parameter in own]) for own in whole]
    stepping = _stand_in(optimizer, _groups(optimizer, whole))
    for step in range(_STEPS):
        for index, own in enumerate(whole):
            for parameter, gradient in zip(own, _gradients(step, index, own[0].device), strict=True):
                parameter.grad = gradient
        stepping.step()
    after = [torch.cat([parameter.detach().flatten() for parameter in own]) for own in whole]
    return [new - old for new, old in zip(after, before, strict=True)]


def _stepped_in_shards(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The same by every rank of a ZeRO-3 engine: flat tensors, one group at a time."""
    count = len(optimizer.param_groups)
    moved: list[list[list[Tensor]]] = []  # by rank, group and parameter
    for rank in range(_RANKS):
        flat = [
            torch.cat(list(_shards(_drawn(optimizer, index), rank))).detach().requires_grad_() for index in range(count)
        ]
        before = [tensor.detach().clone() for tensor in flat]
        stepping = _stand_in(optimizer, _groups(optimizer, [[tensor] for tensor in flat]))
        for group in stepping.param_groups:
            group["params"] = []
        for step in range(_STEPS):
            for index, (group, tensor) in enumerate(zip(stepping.param_groups, flat, strict=True)):
                tensor.grad = torch.cat(list(_shards(_gradients(step, index, tensor.device), rank)))
                group["params"] = [tensor]
                stepping.step()
                group["params"] = []
        sizes = [shard.numel() for shard in _shards(_drawn(optimizer, 0), rank)]
        moved.append(
            [list((new.detach() - old).split(sizes)) for new, old in zip(flat, before, strict=True)],
        )
    numels = [torch.Size(shape).numel() for shape in _SHAPES]
    return [
        torch.cat([torch.cat([one[index][place] for one in moved])[:numel] for place, numel in enumerate(numels)])
        for index in range(count)
    ]


def _drawn(optimizer: torch.optim.Optimizer, index: int) -> list[Tensor]:
    # a group may be empty
    device = next(parameter for group in optimizer.param_groups for parameter in group["params"]).device
    generator = torch.Generator().manual_seed(index)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in _SHAPES]


def _gradients(step: int, index: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + 10 * step + index)
    return [torch.randn(shape, generator=generator).to(device) for shape in _SHAPES]


def _shards(tensors: list[Tensor], rank: int) -> Iterator[Tensor]:
    """A rank's flat shards, padded with zeros."""
    for tensor in tensors:
        flat = tensor.detach().flatten()
        size = -(-flat.numel() // _RANKS)
        yield torch.nn.functional.pad(flat, (0, _RANKS * size - flat.numel()))[rank * size : (rank + 1) * size]
