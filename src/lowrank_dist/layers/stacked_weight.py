"""`StackedWeight`: an adapted, encoded parameter as models multiply by it, without ever being whole.

A mixture of experts multiplies by its ``[experts, rows, columns]`` parameters in one of these ways, which transformers
calls ``eager``, ``batched_mm`` and ``grouped_mm``:

- ``F.linear(x, weight[e])`` or ``x @ weight[e]``, expert after expert;
- ``torch.bmm`` with ``weight[ids]``, a matrix for every row;
- ``grouped_mm(x, weight, offs=ends)``, rows sorted by expert;
- ``torch.bmm(x, weight)``, as many rows for every expert.

All become a product of `Rows` with the stack, which decodes some experts at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_dist.errors import InputError
from lowrank_dist.layers.grouped import Rows

log = logging.getLogger(__name__)

Which = Tensor | int | None


class Stack(Protocol):
    """What a `StackedWeight` stands for."""

    name: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the weight."""

    @property
    def input_first(self) -> bool:
        """Whether matrices are ``[in, out]``."""

    def multiplied(self, x: Tensor, rows: Rows) -> Tensor:
        """``[n, in]`` to ``[n, out]``: the rows of every expert by its adapted matrix."""

    def multiplied_by(self, expert: int, x: Tensor) -> Tensor:
        """The same, all rows by one matrix."""

    def dense(self, experts: list[int]) -> Tensor:
        """The adapted matrices ``[len(experts), rows, columns]``, with gradients to the factors."""


class StackedWeight(Tensor):
    """A stack of adapted matrices, or some of it: shape, dtype and device without values.

    Products with inputs ``[n, in]`` are computed by the stack. Every other operator gets all matrices dense; a warning
    says so, once for each operator.

    Parameters
    ----------
    stack
        Computes products.
    shape
        ``(experts, rows, columns)`` of the stack.
    device
        Device of its values.
    which
        None: the whole stack. An int: the matrix of one expert, ``[rows, columns]``. A tensor ``[n]``: the matrices of
        the experts with these indices, ``[n, rows, columns]``.
    transposed
        Whether every matrix is transposed.
    """

    @staticmethod
    def __new__(
        cls,
        stack: Stack,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        which: Which = None,
        transposed: bool = False,
    ) -> StackedWeight:
        experts, rows, columns = shape
        size = (columns, rows) if transposed else (rows, columns)
        if not isinstance(which, int):
            size = (experts if which is None else len(which), *size)  # type: ignore[assignment]
        with torch._C.DisableTorchFunctionSubclass():
            return torch.Tensor._make_wrapper_subclass(cls, size, dtype=stack.compute_dtype, device=device)

    def __init__(
        self,
        stack: Stack,
        shape: tuple[int, int, int],
        device: torch.device,
        *,
        which: Which = None,
        transposed: bool = False,
    ) -> None:
        self.stack, self.whole_shape, self.home = stack, shape, device
        self.which, self.transposed = which, transposed

    def part(self, which: Which) -> StackedWeight:
        """The matrices of some experts of a whole stack."""
        return StackedWeight(self.stack, self.whole_shape, self.home, which=which, transposed=self.transposed)

    def turned(self) -> StackedWeight:
        """Every matrix transposed."""
        return StackedWeight(self.stack, self.whole_shape, self.home, which=self.which, transposed=not self.transposed)

    @property
    def from_input(self) -> bool:
        """Whether the matrices are ``[in, out]``, so that inputs are multiplied from the left."""
        return self.stack.input_first != self.transposed

    def values(self) -> Tensor:
        """The matrices, dense, with gradients to the factors."""
        experts = self.whole_shape[0]
        if isinstance(self.which, int):
            values = self.stack.dense([self.which])[0]
        else:
            values = self.stack.dense(list(range(experts)))
            values = values if self.which is None else values[self.which]
        return values.mT if self.transposed else values

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StackedWeight({self.stack.name}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN_OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is None and getattr(func, "__name__", "") == "linear":  # where DeepSpeed has replaced F.linear
            handler = _linear
        found = NotImplemented if handler is None else handler(*args, **kwargs)
        if found is not NotImplemented:
            return found
        return func(*_dense(args, func), **_dense(kwargs, func))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached only by code that passes over `__torch_function__`: it would lose the gradients of the factors."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        first = next(one for one in args if isinstance(one, StackedWeight))
        raise InputError(
            f"{first.stack.name}: {func} takes the stacked experts for an ordinary tensor; build the model with "
            "experts_implementation='grouped_mm' (or 'eager'), or drop them from target_parameters"
        )


def _product(x: Any, weight: Any) -> Any:
    """``x @ weight`` for inputs from the left, or NotImplemented."""
    if isinstance(x, StackedWeight) or not isinstance(weight, StackedWeight) or not weight.from_input:
        return NotImplemented
    stack, experts = weight.stack, weight.whole_shape[0]
    if isinstance(weight.which, int):
        if x.ndim == 0:
            return NotImplemented
        y = stack.multiplied_by(weight.which, x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])
    if x.ndim != 3 or x.shape[0] != weight.shape[0]:
        return NotImplemented
    if weight.which is None:
        y = stack.multiplied(x.reshape(-1, x.shape[-1]), Rows.even(x.shape[1], experts))
        return y.view(*x.shape[:-1], y.shape[-1])
    if x.shape[1] != 1:
        return NotImplemented
    ids, order = weight.which.sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return stack.multiplied(x[:, 0][order], Rows(ends))[place].unsqueeze(1)


def _matmul(x: Any, y: Any) -> Any:
    if isinstance(x, StackedWeight) and not isinstance(y, StackedWeight) and y.ndim > 1:
        turned = _product(y.mT, x.turned())
        return turned if turned is NotImplemented else turned.mT
    return _product(x, y)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, StackedWeight) or not isinstance(weight.which, int):
        return NotImplemented
    y = _product(x, weight.turned())
    return y if bias is None or y is NotImplemented else y + bias


def _grouped(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not isinstance(weight, StackedWeight) or weight.which is not None or not weight.from_input:
        return NotImplemented
    if x.ndim != 2 or offs is None or bias is not None or out_dtype not in (None, x.dtype):
        return NotImplemented
    return weight.stack.multiplied(x, Rows.until(offs))


def _item(weight: StackedWeight, index: Any) -> Any:
    if weight.which is not None:
        return NotImplemented
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool:
        if index.ndim == 0:
            index = int(index)  # an eager loop over experts has asked the device already
        elif index.ndim == 1:
            return weight.part(index)
    if isinstance(index, int) and not isinstance(index, bool):
        experts = weight.whole_shape[0]
        if not -experts <= index < experts:
            raise IndexError(f"expert {index} of {experts} in {weight.stack.name}")
        return weight.part(index % experts)
    return NotImplemented


def _unbind(weight: StackedWeight, dim: int = 0) -> Any:
    if weight.which is not None or dim not in (0, -3):
        return NotImplemented
    return tuple(weight.part(expert) for expert in range(weight.whole_shape[0]))


def _iterate(weight: StackedWeight) -> Any:
    parts = _unbind(weight)
    return parts if parts is NotImplemented else iter(parts)


def _transpose(weight: StackedWeight, dim0: int, dim1: int) -> Any:
    ndim = weight.ndim
    return weight.turned() if {dim0 % ndim, dim1 % ndim} == {ndim - 2, ndim - 1} else NotImplemented


def _turn(weight: StackedWeight) -> Any:
    return weight.turned()


def _turn_matrix(weight: StackedWeight) -> Any:
    return weight.turned() if weight.ndim == 2 else NotImplemented


def _permute(weight: StackedWeight, *dims: Any) -> Any:
    dims = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    last_two_swapped = [*range(weight.ndim - 2), weight.ndim - 1, weight.ndim - 2]
    return weight.turned() if [dim % weight.ndim for dim in dims] == last_two_swapped else NotImplemented


def _to(weight: StackedWeight, *args: Any, **kwargs: Any) -> Any:
    wanted = [*args, *kwargs.values()]
    return weight if all(one in (weight.dtype, weight.device) for one in wanted) else NotImplemented


def _address(weight: StackedWeight) -> int:
    if weight.device.type != "cpu":
        raise InputError(
            f"{weight.stack.name}: a kernel asks for the address of the stacked experts, which are encoded; build the "
            "model with experts_implementation='grouped_mm'"
        )
    return 0  # transformers asks for its alignment, on older versions of torch


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.linear: _linear,
    torch.bmm: _matmul,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.bmm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda weight, x: _matmul(x, weight),
    Tensor.__getitem__: _item,
    Tensor.__iter__: _iterate,
    Tensor.unbind: _unbind,
    torch.unbind: _unbind,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.t: _turn_matrix,
    torch.t: _turn_matrix,
    Tensor.mT.__get__: _turn,  # type: ignore[attr-defined]
    Tensor.T.__get__: _turn_matrix,  # type: ignore[attr-defined]
    Tensor.to: _to,
    Tensor.contiguous: lambda weight: weight,
    Tensor.data_ptr: _address,
}
for _owner, _name in ((torch.nn.functional, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_owner, _name):
        _HANDLERS[getattr(_owner, _name)] = _grouped

_KNOWN_OF_SHAPE = {
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "ndimension", "__len__", "stride")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "element_size", "is_contiguous")),
    *(getattr(Tensor, name) for name in ("__hash__", "__repr__", "storage_offset")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "grad")
    ),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_quantized", "is_sparse")),
    torch.is_floating_point,
    torch.numel,
}

_said: set[Any] = set()


def _dense(value: Any, func: Any) -> Any:
    """`value` with ordinary tensors in the place of stacked weights, and a warning."""
    if isinstance(value, StackedWeight):
        if func not in _said:
            _said.add(func)
            log.warning(
                "%s: %s needs the adapted weights %s dense, %.1f MiB at once, although experts_at_a_time bounds them "
                "in the products that are known",
                value.stack.name,
                getattr(func, "__name__", func),
                list(value.shape),
                value.numel() * value.element_size() / 2**20,
            )
        return value.values()
    if isinstance(value, tuple | list):
        return type(value)(_dense(one, func) for one in value)
    if isinstance(value, dict):
        return {name: _dense(one, func) for name, one in value.items()}
    return value
