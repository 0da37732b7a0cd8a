"""The Triton kernel, folded layers and the loss without logits on a CUDA device, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from helpers.sft import tiny_llama
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.adapted import fuse_adapters
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.training.module import CausalLMModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and none is visible"),
]

#: Unit roundoff.
ROUNDOFF = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def encoded(rows: int, columns: int, fmt: NF4) -> tuple[RowPartition, dict[str, Tensor]]:
    partition = RowPartition(rows=rows, columns=columns, world_size=1, block=fmt.block_size)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).cuda()
    group = ShardGroup(device=torch.device("cuda")) if torch.distributed.is_initialized() else ShardGroup.single()
    return partition, fmt.encode(weight, partition, group).shards


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1024, 4096, 128), (130, 192, 20), (37, 64, 1)])
def test_decoding_in_one_pass(rows: int, columns: int, rank: int, dtype: torch.dtype, double_quant: bool) -> None:
    """Alone as bitsandbytes', to a rounding (maxima may be multiplied and added at once); with a product of rank r, r
    sums in fp32, whose roundings are independent, and one rounding of the result."""
    fmt = NF4(double_quant=double_quant)
    partition, stored = encoded(rows, columns, fmt)
    assert fmt.has_kernel(partition, torch.device("cuda"))
    plain = fmt.decode_with_bitsandbytes(stored, partition, dtype)
    alone = fmt.decode_with_kernel(stored, partition, dtype)
    torch.testing.assert_close(alone, plain, rtol=2 * ROUNDOFF[dtype], atol=0)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, rank, generator=generator).to("cuda", dtype) for n in (rows, columns))
    exact = fmt.decode_with_bitsandbytes(stored, partition, torch.float32).double() + left.double() @ right.double().mT
    found = fmt.decode(stored, partition, dtype, (left, right.mT)).double()
    tolerance = 2 * ROUNDOFF[dtype] + rank**0.5 * ROUNDOFF[torch.float32]
    assert (found - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("fold", ["never", "always", "measured"])
def test_a_layer_in_bf16(fold: Any) -> None:
    """bf16 inputs, sums in fp32, weight and result rounded once each: some 2^-8 relative, gradients too."""
    torch.manual_seed(0)
    owner = nn.Module()
    owner.linear = nn.Linear(1024, 512, bias=False)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=24, target_modules=["linear"]), owner)
    layer: Any = owner.linear
    partition, stored = encoded(512, 1024, NF4(double_quant=True))
    base = FrozenLinear(partition, NF4(double_quant=True), compute_dtype=torch.bfloat16)
    for name, shard in stored.items():
        setattr(base, name, nn.Parameter(shard, requires_grad=False))
    layer.base_layer = base
    a, b = (torch.randn(shape, device="cuda").bfloat16() / 32 for shape in ((16, 1024), (512, 16)))
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
    fuse_adapters(owner, fold)
    x, grad = (torch.randn(256, n, device="cuda").bfloat16() for n in (1024, 512))
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    weight = base.decode(base.stored(), torch.float32).double() + 1.5 * exact[2] @ exact[1]
    wanted = exact[0] @ weight.mT
    wanted.backward(grad.double())
    found = (y, x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
    for ours, theirs in zip(found, (wanted, *(t.grad for t in exact)), strict=True):
        assert (ours.double() - theirs).norm() <= 2**-7 * theirs.norm()


def test_the_loss_without_logits() -> None:
    """fp32, without tf32: sums in another order."""
    torch.manual_seed(0)
    model = tiny_llama().cuda()
    ids = torch.randint(3, model.config.vocab_size, (3, 40), device="cuda")
    found = []
    for fused in (False, True):
        module = CausalLMModule("unused", fused_cross_entropy=fused)
        module.model = model
        model.zero_grad()
        loss = module.loss({"input_ids": ids, "labels": ids})
        loss.backward()
        found.append((loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
