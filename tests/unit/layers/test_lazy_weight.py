"""A weight that is decoded when it is used, against the values that it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowrank_dist.errors import InputError
from lowrank_dist.layers.lazy_weight import LazyWeight

VALUES = torch.arange(12.0).view(3, 4)


@pytest.fixture
def decoded() -> list[torch.dtype]:
    """The dtype of every decoding."""
    return []


@pytest.fixture
def weight(decoded: list[torch.dtype]) -> LazyWeight:
    def decode(dtype: torch.dtype) -> Tensor:
        decoded.append(dtype)
        return VALUES.to(dtype)

    return LazyWeight(decode, (3, 4), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w,
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: w.t(),
        lambda w: w.mT,
        lambda w: w.transpose(-1, 0),
        lambda w: w.permute(1, 0),
        lambda w: w.T.T.to(torch.float64),
    ],
)
def test_these_do_not_decode(
    weight: LazyWeight, decoded: list[torch.dtype], change: Callable[[Tensor], Tensor]
) -> None:
    changed, expected = change(weight), change(VALUES)
    assert isinstance(changed, LazyWeight)
    assert not decoded
    assert (changed.shape, changed.dtype, changed.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(changed + 0, expected)
    assert decoded == [expected.dtype]


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: nn.functional.linear(torch.ones(2, 4), w),
        lambda w: torch.ones(2, 3) @ w,
        lambda w: w[1:, ::2],
        lambda w: w.norm(dim=1),
        lambda w: torch.stack([w, w.clone()]),
        lambda w: torch.linalg.svd(w)[1],
        lambda w: w.transpose(0, 0),
        lambda w: copy.deepcopy(w),
        lambda w: torch.zeros(3, 4).copy_(w),
    ],
)
def test_whatever_computes_gets_the_values(weight: LazyWeight, compute: Callable[[Tensor], Tensor]) -> None:
    found = compute(weight)
    assert type(found) is Tensor
    torch.testing.assert_close(found, compute(VALUES), rtol=0, atol=0)


def test_autograd_keeps_no_values(weight: LazyWeight, decoded: list[torch.dtype]) -> None:
    """A product saves the weight as it is, so backward decodes it again."""
    x = torch.ones(2, 4, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = nn.functional.linear(x, weight)
    assert [type(tensor) for tensor in saved] == [LazyWeight]
    assert len(decoded) == 1
    y.sum().backward()
    assert len(decoded) == 2
    assert torch.equal(x.grad, VALUES.sum(0).expand(2, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_(1),
        lambda w: w.copy_(VALUES),
        lambda w: nn.init.zeros_(w),
        lambda w: setattr(w, "data", VALUES),
        lambda w: setattr(w.data, "data", VALUES),
    ],
)
def test_changes_that_would_be_lost_are_refused(weight: LazyWeight, change: Callable[[Tensor], object]) -> None:
    with pytest.raises(InputError, match="cannot be changed; initialise from the weights by PiSSAStrategy"):
        change(weight)
