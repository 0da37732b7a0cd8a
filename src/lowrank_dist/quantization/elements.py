"""Numbers of few bits: E2M1, exponents of two in a byte (E8M0), INT8 and E4M3, encoded and decoded.

Checkpoints are decoded with this arithmetic (`lowrank_dist.decoding`) and residuals are encoded and decoded with it, so
that both give the same values for the same bytes.

References
----------
Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0, 2023: E2M1 and E8M0.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Values of the codes of E2M1.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX_GROUP = 32  # elements that share an exponent
_E2M1_EXPONENT = 2  # of its largest value
_BIAS = 127  # of the exponents in a byte
#: Largest value of E4M3.
E4M3_MAX = 448.0
#: bitsandbytes' 1 / 127, which the codes of INT8 are multiplied by.
INT8_STEP = 7.874015718698502e-3
_INT8_MAX = 127.0


@cache
def _e2m1(device: torch.device) -> Tensor:
    return torch.tensor(E2M1, device=device)


def unpacked(packed: Tensor) -> Tensor:
    """Values in fp32 of ``[..., n]`` bytes with two codes of E2M1, the first in the low half: ``[..., 2 n]``."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return _e2m1(packed.device)[codes.to(torch.int32)]


def packed(values: Tensor) -> Tensor:
    """Codes of E2M1 nearest to fp32 values, ties to the even code, two to a byte: ``[..., n]`` to ``[..., n / 2]``."""
    size = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    # the bounds between the values; a tie goes to the code whose last bit is 0
    for index, bound in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        codes += (size >= bound) if index % 2 else (size > bound)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def exponential(exponents: Tensor) -> Tensor:
    """Two to the power of biased exponents in bytes, in fp32."""
    return torch.exp2(exponents.to(torch.float32) - _BIAS)


def mx_exponents(maxima: Tensor) -> Tensor:
    """Biased exponents of the scales of MXFP4 groups, given their absolute maxima in fp32.

    A maximum is rounded to a power of two, up from 1.75 times the lower one, where E2M1 would round it up too; its
    exponent less that of E2M1's largest value is the scale's. A group of zeros has the smallest scale.
    """
    bits = maxima.contiguous().view(torch.int32) + (1 << 21)  # a quarter of the distance to the next power
    return ((bits >> 23) - _E2M1_EXPONENT).clamp_(0, 254).to(torch.uint8)


def to_int8(values: Tensor, maxima: Tensor) -> Tensor:
    """Codes of INT8: 127ths of the maxima, rounded to even. `maxima` has the shape of `values`, or broadcasts to it."""
    steps = torch.where(maxima == 0, 0.0, _INT8_MAX / maxima)
    return (values * steps).round_().to(torch.int8)


def from_int8(codes: Tensor, maxima: Tensor) -> Tensor:
    """Values in fp32 of codes of INT8, in the order of bitsandbytes: the product with the maximum is rounded first."""
    return codes.to(torch.float32).mul_(maxima).mul_(INT8_STEP)


def to_e4m3(values: Tensor, scales: Tensor) -> Tensor:
    """Values divided by `scales`, rounded to E4M3."""
    return (values / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
