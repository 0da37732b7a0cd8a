"""`LazyWeight`: an encoded weight as a tensor whose values are decoded when an operator needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lowrank_dist.errors import InputError

_aten = torch.ops.aten


class LazyWeight(Tensor):
    """A frozen, encoded matrix ``[m, n]``: its shape, dtype and device are known, its values are not held.

    Transposing, detaching and casting it give another lazy weight. Every other operator gets the decoded values, which
    live as long as it keeps them. Autograd saves this object and not the values, so that a product with the weight
    decodes it again in backward.

    Parameters
    ----------
    decode
        Returns the values ``[m, n]`` in a dtype.
    shape
        ``(m, n)``.
    dtype, device
        Dtype and device of the values.
    transposed
        Whether this is the transposed matrix, ``[n, m]``.

    Raises
    ------
    InputError
        If the weight is assigned or changed in place: a change of decoded values would be lost.
    """

    # results of operators are ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[torch.dtype], Tensor],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        transposed: bool = False,
    ) -> LazyWeight:
        return torch.Tensor._make_wrapper_subclass(
            cls, shape[::-1] if transposed else shape, dtype=dtype, device=device
        )

    def __init__(
        self,
        decode: Callable[[torch.dtype], Tensor],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        transposed: bool = False,
    ) -> None:
        self._decode, self._matrix_shape, self._transposed = decode, shape, transposed

    def values(self) -> Tensor:
        """Decode the weight."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            values = self._decode(self.dtype)
        return values.mT if self._transposed else values

    def _like(self, *, dtype: torch.dtype | None = None, transpose: bool = False) -> LazyWeight:
        return LazyWeight(
            self._decode,
            self._matrix_shape,
            dtype=dtype or self.dtype,
            device=self.device,
            transposed=self._transposed != transpose,
        )

    @property
    def data(self) -> LazyWeight:
        """The weight itself."""
        return self._like()

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
                return first._like()
            if _transposes(func, args):
                return first._like(transpose=True)
            if func is _aten._to_copy.default and set(kwargs) == {"dtype"}:
                return first._like(dtype=kwargs["dtype"])
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
