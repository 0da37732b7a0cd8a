"""`LazyWeight`: a frozen, encoded weight as a tensor whose values are decoded when an operator needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lowrank_dist.errors import InputError
from lowrank_dist.zero3.partition import gathered, is_gathered

if TYPE_CHECKING:
    from lowrank_dist.layers.frozen import FrozenLinear

_aten = torch.ops.aten


class LazyWeight(Tensor):
    """The weight of a `FrozenLinear`, ``[out, in]``: its shape, dtype and device are known, its values are not held.

    Transposing, detaching and casting it give another lazy weight. Every other operator gets the decoded values, which
    live as long as it keeps them. Autograd saves this object and not the values, so that a product with the weight
    decodes it again in backward. Outside the forward and the backward of its layer the stored shards are gathered for
    the operator; that is collective, so all ranks must compute with the weight together.

    Parameters
    ----------
    layer
        The layer.
    dtype
        Dtype of the values.
    transposed
        Whether this is the transposed weight, ``[in, out]``.

    Raises
    ------
    InputError
        If the weight is assigned or changed in place: the residual is frozen, and a change of decoded values would be
        lost.
    """

    # results of operators are ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: FrozenLinear, dtype: torch.dtype, *, transposed: bool = False) -> LazyWeight:
        shape = (layer.out_features, layer.in_features)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape[::-1] if transposed else shape, dtype=dtype, device=layer.stored()[0].device
        )

    def __init__(self, layer: FrozenLinear, dtype: torch.dtype, *, transposed: bool = False) -> None:
        self.layer, self.transposed = layer, transposed

    def values(self) -> Tensor:
        """Decode the weight. Collective unless its layer computes."""
        stored = self.layer.stored()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if all(map(is_gathered, stored)):
                return self._decoded(stored)
            with gathered(stored):
                return self._decoded(stored).clone()  # it may be a view of what is released here

    def _decoded(self, stored: list[Tensor]) -> Tensor:
        weight = self.layer.matrix([parameter.detach() for parameter in stored], self.dtype)  # [in, out]
        return weight if self.transposed else weight.mT

    @property
    def data(self) -> LazyWeight:
        """The weight itself."""
        return LazyWeight(self.layer, self.dtype, transposed=self.transposed)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise InputError(_FROZEN)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.values().clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, LazyWeight):
            if func in (_aten.detach.default, _aten.alias.default):
                return LazyWeight(first.layer, first.dtype, transposed=first.transposed)
            if _transposes(func, args):
                return LazyWeight(first.layer, first.dtype, transposed=not first.transposed)
            if func is _aten._to_copy.default and set(kwargs) == {"dtype"}:
                return LazyWeight(first.layer, kwargs["dtype"], transposed=first.transposed)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, LazyWeight) and argument.alias_info is not None and argument.alias_info.is_write:
                raise InputError(_FROZEN)

        def decoded(value: Any) -> Any:
            return value.values() if isinstance(value, LazyWeight) else value

        return func(*tree_map(decoded, args), **tree_map(decoded, kwargs))


_FROZEN = (
    "the weight of a frozen, encoded layer cannot be changed; initialise from the weights by PiSSAStrategy(init=...), "
    "or leave the layer out of the adapter's targets"
)


def _transposes(func: Any, args: Any) -> bool:
    """Whether an operator on a matrix is its transposition."""
    if func is _aten.t.default:
        return True
    if func is _aten.transpose.int:
        return {args[1] % 2, args[2] % 2} == {0, 1}
    return func is _aten.permute.default and [dim % 2 for dim in args[1]] == [1, 0]
