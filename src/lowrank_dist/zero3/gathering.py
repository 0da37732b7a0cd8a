"""Gathers of ZeRO-3 parameters, one collective per decoder layer, in place of DeepSpeed's parameter coordinator.

DeepSpeed fetches and releases parameter by parameter: forward and backward of one decoder layer of a QPiSSA model visit
some 40 parameters four times, which costs the host about as much as a step of PEFT. Here a `Unit`, a decoder layer or
another module that holds parameters, has one flat buffer of bytes with this rank's shards of all its parameters. One
all-gather brings the whole unit, one copy puts the parts of each parameter together, and while a unit computes the next
ones are gathered.

A unit is gathered before its forward and released after it, and gathered again before its backward and released once
the gradient of its input is computed. Under gradient checkpointing the backward begins with another forward, and the
unit stays gathered from that forward on. The order of gathers is taken from the previous step; a unit that the order
says is needed next is not released. Every gather allocates: a view of a gathered weight that autograd has saved keeps
its memory, which costs memory, but can never show the bytes of another layer.

Parameters that one rank holds alone are not gathered at all; their data is their shard. Where every rank of several
holds all frozen parameters, trained ones are gathered once a step and stay until the optimizer changes them: then no
layer waits for a collective in the batches that follow, and adapters are small beside what the rank holds already.

Some models use the parameters of a module without calling it: they multiply by an embedding's weight, or look positions
up by a method of their own. Outside the decoder layers, such a use gathers the module's unit too, which then stays
until the next call of the model. A layer that runs several times in one call (ALBERT's are shared) keeps its gradients
until the backward ends.

All ranks must run the same units in the same order, as with DeepSpeed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.zero3.backward import in_backward, is_start
from lowrank_dist.zero3.packs import Pack, packed
from lowrank_dist.zero3.partition import (
    Partitioner,
    is_gathered,
    local_shard,
    repeated_layers,
    set_empty,
    set_whole,
    whole_shape,
)
from lowrank_dist.zero3.reduction import LayerReduction
from lowrank_dist.zero3.units import Unit, units_of


@dataclass(eq=False)
class _Stage:
    """A unit with its packs.

    Attributes
    ----------
    lasts
        All its packs last, or there are none: nothing is released in a step.
    trained
        Trained parameters of a decoder layer, whose gradients are reduced together.
    held
        It is gathered.
    pending
        It is being gathered ahead of its use.
    kept
        It was not released after its forward, because it is needed next.
    in_backward
        It stays gathered until its backward is done.
    """

    packs: list[Pack]
    lasts: bool
    trained: list[nn.Parameter]
    held: bool = False
    pending: bool = False
    kept: bool = False
    in_backward: bool = False


class Gathering:
    """Gathers the units of a model around their forward and backward.

    Parameters
    ----------
    root
        The module that DeepSpeed's engine calls; all its parameters are ZeRO-3 parameters.
    partitioner
        Its groups share them.
    ahead
        Number of units that are gathered while another computes.
    reduction
        Reduces the gradients of decoder layers; None: DeepSpeed does.

    Attributes
    ----------
    on_wait
        Called with True before a wait for the parameters of a unit, and with False after it.

    Notes
    -----
    `install` moves the frozen shards of a unit into one buffer. A parameter of several units (a tied embedding) has a
    buffer for itself.
    """

    def __init__(
        self, root: nn.Module, partitioner: Partitioner, *, ahead: int, reduction: LayerReduction | None = None
    ) -> None:
        self.on_wait: Callable[[bool], None] | None = None
        self._root, self._partitioner, self._ahead = root, partitioner, ahead
        self._reduction = reduction
        self._stages: list[_Stage] = []
        self._resident: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        self._depth = 0  # of calls of the root, whose steps call it again
        self._training = False
        self._orders: dict[bool, list[int]] = {True: [], False: []}
        self._order: list[int] = []  # of the step before
        self._taken: list[int] = []  # units in the order in which this step gathered them
        self._callback_queued = False
        self._reduced: set[int] = set()  # units whose gradients this backward has brought together
        self._ran: set[int] = set()  # units that have run in this call of the model
        self._repeated: set[int] = set()  # units that run more than once in a call
        self._used_from_outside: set[int] = set()

    # -- set-up -------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Pack the shards and add the hooks. No communication."""
        self._hooks += [
            self._root.register_forward_pre_hook(self._begins),
            self._root.register_forward_hook(self._ends, always_call=True),
        ]
        # a layer may run again within a call of the model, not in a second call before the backward
        self._hooks += [m.register_forward_pre_hook(lambda *_: self._ran.clear()) for m in self._root.children()]
        units, layers = units_of(self._root), set(repeated_layers(self._root))
        uses = Counter(parameter for unit in units for parameter in unit.parameters)
        shared: dict[nn.Parameter, Pack] = {}
        for unit in units:
            packs = list(self._packs(unit, uses, shared))
            own = (p for p in unit.parameters if p.requires_grad and uses[p] == 1)
            trained = list(own) if unit.module in layers else []
            if packs or trained:
                self._stages.append(_Stage(packs, all(pack.lasts for pack in packs), trained))
                self._watch(len(self._stages) - 1, unit.module)
                if packs and unit.module not in layers:
                    for member in unit.members:
                        member._parameters = _Watched(member._parameters, self, len(self._stages) - 1)
        if self._reduction is not None:
            inside = dict.fromkeys(p for unit in units if unit.module in layers for p in unit.parameters)
            self._reduction.at_the_end = [p for p in inside if p.requires_grad and uses[p] > 1]
        self._attach()

    def remove(self) -> None:
        """Remove the hooks and empty the parameters; their shards stay."""
        for hook in self._hooks:
            hook.remove()
        self.expire()
        for index in range(len(self._stages)):
            self._release(index)
        for parameter in self._resident:
            set_empty(parameter)
        for module in self._root.modules():
            if isinstance(module._parameters, _Watched):
                module._parameters = dict(module._parameters)
        self._hooks, self._stages, self._resident = [], [], []

    def _packs(self, unit: Unit, uses: Counter[nn.Parameter], shared: dict[nn.Parameter, Pack]) -> Iterator[Pack]:
        by_group: dict[ShardGroup, list[nn.Parameter]] = {}
        for parameter in unit.parameters:
            group, home = self._partitioner.group_of(parameter), local_shard(parameter).device
            if group.size == 1 and home.type == self._partitioner.device.type:
                if parameter not in shared:
                    self._resident.append(parameter)
            elif uses[parameter] == 1:
                by_group.setdefault(group, []).append(parameter)
            elif parameter in shared:
                yield shared[parameter]
            else:
                shared[parameter] = packed([parameter], group, lasts=self._lasts(group))
                yield shared[parameter]
        for group, parameters in by_group.items():
            yield packed(parameters, group, lasts=self._lasts(group))

    def _lasts(self, group: ShardGroup) -> bool:
        """Whether what `group` shares stays gathered: adapters, where every rank holds the rest."""
        return self._partitioner.frozen.size == 1 < group.size

    def expire(self) -> None:
        """Drop gathered values of trained parameters, which the optimizer has changed."""
        for index, stage in enumerate(self._stages):
            if stage.lasts and stage.held:
                self._release(index)
            for pack in stage.packs:
                pack.expire()

    def forget(self) -> None:
        """Drop all that is gathered, or is being gathered: shards have been given other values.

        Not between a forward and its backward, whose layers would be gathered with the other values.
        """
        self.expire()
        for index, stage in enumerate(self._stages):
            if stage.held or stage.pending:
                self._release(index)
        self._attach()

    def _attach(self) -> None:
        """Make the shards of parameters that this rank holds alone their data, also where DeepSpeed has moved them."""
        for parameter in self._resident:
            shard = local_shard(parameter)
            if parameter.data_ptr() != shard.data_ptr():
                shape = whole_shape(parameter)
                set_whole(parameter, shard.detach()[: shape.numel()].view(shape))

    def _watch(self, index: int, module: nn.Module) -> None:
        stage = self._stages[index]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._acquire(index)
            if (stage.lasts and not stage.trained) or not torch.is_grad_enabled():
                return None
            if not in_backward():
                self._count(index)
            tensors = [value for value in (*args, *kwargs.values()) if _wants_gradient(value)]
            if tensors:
                passed = iter(_AfterBackward.apply(self, index, *tensors))
                return (
                    tuple(next(passed) if _wants_gradient(value) else value for value in args),
                    {name: next(passed) if _wants_gradient(value) else value for name, value in kwargs.items()},
                )
            return self._nested(index, args, kwargs) if stage.trained else None

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if stage.lasts and not stage.trained:
                return
            if in_backward():
                self._before_backward(index)
                return
            if torch.is_grad_enabled():
                for tensor in _tensors(output):
                    if tensor.requires_grad and not is_start(tensor):  # as the output of a frozen embedding is made
                        tensor.register_hook(lambda _: self._before_backward(index))
            if self._training and self._next(1) == [index]:
                stage.kept = True
            elif not stage.lasts and index not in self._used_from_outside:
                self._release(index)

        self._hooks += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def is_root(self, module: nn.Module) -> bool:
        """Whether `module` is the root."""
        return module is self._root

    @contextmanager
    def entered_by(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module`, a part of the root, may be called without the root: its calls are steps, too."""
        hooks = [
            module.register_forward_pre_hook(self._begins),
            module.register_forward_hook(self._ends, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _nested(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The inputs of a layer whose backward is to be noticed although no argument itself wants a gradient.

        Tensors inside of tuples may; otherwise the first floating-point tensor is made to (the first layer of a tower
        whose embedding is not known).
        """
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, value in enumerate(leaves) if _wants_gradient(value)]
        if not places:
            places = [i for i, value in enumerate(leaves) if isinstance(value, Tensor) and value.is_floating_point()][
                :1
            ]
            for place in places:
                leaves[place] = leaves[place].detach().requires_grad_()
        if not places:
            return None
        passed = _AfterBackward.apply(self, index, *(leaves[place] for place in places))
        for place, value in zip(places, passed, strict=True):
            leaves[place] = value
        return tree_unflatten(leaves, structure)

    def _count(self, index: int) -> None:
        """Note that a unit runs; gradients of one that runs more than once in a call are complete at the end."""
        if index not in self._ran:
            self._ran.add(index)
        elif index not in self._repeated:
            self._repeated.add(index)
            if self._reduction is not None:
                self._reduction.at_the_end = [*self._reduction.at_the_end, *self._stages[index].trained]

    def use_from_outside(self, index: int) -> None:
        """Gather a unit because a parameter of it is used outside of its forward, until the next call of the root."""
        if self._depth > 0 and not self._stages[index].held:
            self._used_from_outside.add(index)
            self._acquire(index)

    # -- a step -------------------------------------------------------------------------------------------------

    def _begins(self, *_: Any) -> None:
        """A call of the root begins: release what is left from the one before, and remember the order of that one."""
        self._depth += 1
        if self._depth > 1:
            return
        if self._taken:  # nothing is, where everything has stayed gathered from an accumulated batch
            self._orders[self._training] = self._taken
        self._training = torch.is_grad_enabled()
        self._order, self._taken = self._orders[self._training], []
        self._callback_queued = False
        self._ran.clear()
        for index, stage in enumerate(self._stages):
            if (stage.held or stage.pending) and not stage.lasts:
                self._release(index)
        self._attach()

    def _ends(self, *_: Any) -> None:
        self._depth -= 1

    def _next(self, count: int) -> list[int]:
        """The units that the step before gathered after the last one."""
        return self._order[len(self._taken) : len(self._taken) + count]

    def _acquire(self, index: int) -> None:
        stage, device = self._stages[index], self._partitioner.device
        if stage.held and not stage.kept:
            return
        if self._next(1) != [index]:
            self._order = []  # the step differs from the one before: nothing more is gathered ahead in it
        self._taken.append(index)
        with _ordinary_tensors():
            for pack in stage.packs:
                pack.begin(device)
            for other in map(self._stages.__getitem__, self._next(self._ahead)):
                if not (other.held or other.pending or other is stage):
                    for pack in other.packs:
                        pack.begin(device)
                    other.pending = True
        if self.on_wait is not None:
            self.on_wait(True)
        with _ordinary_tensors():
            for pack in stage.packs:
                pack.finish(index, device)
        if self.on_wait is not None:
            self.on_wait(False)
        stage.held, stage.pending, stage.kept = True, False, False

    def _release(self, index: int) -> None:
        stage = self._stages[index]
        with _ordinary_tensors():
            for pack in stage.packs:
                pack.release(index)
        stage.held = stage.pending = stage.kept = stage.in_backward = False

    def backward_begins(self) -> None:
        """To be called before every backward."""
        self._reduced.clear()
        if self._reduction is not None:
            self._reduction.backward_begins()

    def _before_backward(self, index: int) -> None:
        """Gather a unit, or keep it, for its backward.

        Raises
        ------
        InputError
            If it is the unit's second in one backward: its gradients would overwrite those of the first.
        """
        stage = self._stages[index]
        if index in self._reduced and stage.trained and index not in self._repeated:
            raise InputError(
                "a decoder layer ran twice before one backward, and its gradients are reduced after the first time: "
                "pass both batches through the model at once (concatenated), or call manual_backward after each "
                "forward"
            )
        if not stage.lasts:
            self._acquire(index)
            self._keep_until_backward(index)

    def after_backward(self, index: int) -> None:
        """Called when the backward of a unit is done."""
        self._reduced.add(index)
        if self._reduction is not None and self._stages[index].trained and index not in self._repeated:
            self._reduction.take(self._stages[index].trained)
        if not self._stages[index].lasts and index not in self._used_from_outside:
            self._release(index)

    def _keep_until_backward(self, index: int) -> None:
        self._stages[index].in_backward = True
        if not self._callback_queued:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ends)

    def _backward_ends(self) -> None:
        """Release the units without an input that has a gradient: nothing else tells that their backward is done."""
        self._callback_queued = False
        for index, stage in enumerate(self._stages):
            if stage.in_backward and index not in self._used_from_outside:
                self._release(index)


class _Watched(dict[str, nn.Parameter | None]):
    """The parameters of a module outside the decoder layers; whoever asks for one by name gets it gathered."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], gathering: Gathering, index: int) -> None:
        super().__init__(parameters)
        self._gathering, self._index = gathering, index

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        if parameter is not None and not is_gathered(parameter):
            self._gathering.use_from_outside(self._index)
        return parameter


class _AfterBackward(torch.autograd.Function):
    """The identity; its backward runs when the gradients of all inputs of a unit are known, and releases the unit."""

    @staticmethod
    def forward(ctx: Any, gathering: Gathering, index: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.unit = gathering, index
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        gathering, index = ctx.unit
        gathering.after_backward(index)
        return None, None, *grads


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Tensors made inside are ordinary ones, also in the inference mode of validation: they may stay until training."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in the output of a module: one, or those in a tuple, a list or a dictionary (a ``ModelOutput``)."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def take_over(engine: Any) -> None:
    """Stop DeepSpeed from gathering the parameters of a ZeRO-3 engine, as its own compiler does.

    What remains is its reduction of gradients and its optimizer. The hooks that the engine has on the root module visit
    every module of the model twice a forward, to let parameters gather themselves when accessed; they go as well.
    DeepSpeed's `flops_profiler` begins in them and is not started any more.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    offload._remove_module_hooks()
    offload.partition_all_parameters = lambda: None  # before the optimizer's step; a walk over all parameters
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    if engine.wall_clock_breakdown():
        timers = engine.engine_timers.forward_timers
        engine.module.register_forward_pre_hook(lambda *_: engine._start_timers(timers))
        engine.module.register_forward_hook(lambda *_: engine._stop_timers(timers))
    for module in engine.module.modules():
        module._parameters = module._original_parameters
