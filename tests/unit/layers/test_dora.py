"""DoRA's layer of one autograd Function against PEFT's own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.adapted import fuse_adapters
from lowrank_dist.layers.dora import DoraLinear, row_norms
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.nf4 import NF4

IN, OUT, RANK = 128, 80, 4
SINGLE = ShardGroup.single()


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    scaling=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_norms_of_a_sum_need_no_sum(shape: tuple[int, int, int], scaling: float, seed: int) -> None:
    outputs, inputs, rank = shape
    torch.manual_seed(seed)
    weight, a, b = torch.randn(outputs, inputs), torch.randn(rank, inputs), torch.randn(outputs, rank)
    expected = (weight.double() + scaling * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, scaling).double(), expected, rtol=1e-4, atol=1e-3)


def layers(residual: Any, *, input_first: bool) -> tuple[Any, Any]:
    """PEFT's DoRA layer over a dense layer, and the same over a frozen one, with A, B and magnitude off their start."""
    torch.manual_seed(0)
    owner = nn.Module()
    owner.linear = Conv1D(OUT, IN) if input_first else nn.Linear(IN, OUT)
    nn.init.normal_(owner.linear.bias)
    weight = owner.linear.weight.detach().clone()
    partition = RowPartition(rows=weight.shape[0], columns=weight.shape[1], world_size=1, block=residual.block)
    encoded = residual.encode(weight.clone(), partition, SINGLE)
    with torch.no_grad():
        owner.linear.weight.copy_(encoded.decoded)
    config = LoraConfig(r=RANK, lora_alpha=6, fan_in_fan_out=input_first, use_dora=True, target_modules=["linear"])
    inject_adapter_in_model(config, owner)
    for name, parameter in owner.linear.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, mean=float("magnitude" in name))
    ours = copy.deepcopy(owner)
    frozen = FrozenLinear(partition, residual, compute_dtype=torch.float32, input_first=input_first)
    for name, shard in encoded.shards.items():
        setattr(frozen, name, nn.Parameter(shard, requires_grad=False))
    frozen.bias = ours.linear.base_layer.bias
    ours.linear.base_layer = frozen
    fuse_adapters(ours, "never")
    assert type(ours.linear) is DoraLinear
    return owner.linear, ours.linear


@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("residual", [Dense(dtype=torch.float32), NF4()], ids=["dense", "nf4"])
def test_the_same_as_peft(residual: Any, input_first: bool) -> None:
    """Output and every gradient, fp32."""
    theirs, ours = layers(residual, input_first=input_first)
    x = torch.randn(3, 7, IN)
    results = []
    for layer in (theirs, ours):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        trained = {name: p.grad for name, p in layer.named_parameters() if "lora" in name}
        assert len(trained) == 3
        results.append((y.detach(), inputs.grad, trained))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-3)


def test_no_matrix_of_the_shape_of_the_weight_is_saved() -> None:
    _, ours = layers(NF4(), input_first=False)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(torch.randn(2, IN, requires_grad=True))
    assert sum(tensor.numel() for tensor in saved) <= 2 * IN + 3 * OUT + 2 * OUT


def test_dropout_goes_to_peft() -> None:
    theirs, ours = layers(NF4(), input_first=False)
    for layer in (theirs, ours):
        layer.lora_dropout["default"] = nn.Dropout(0.5)
    x = torch.randn(2, IN)
    for training in (True, False):
        outputs = []
        for layer in (theirs, ours):
            torch.manual_seed(1)
            outputs.append(layer.train(training)(x))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-3)
