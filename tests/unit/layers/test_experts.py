"""Stacks of experts that are decoded some at a time, against stock PEFT on the decoded weights."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.experts import (
    IMPLEMENTATIONS,
    RANK,
    TOKENS,
    TOP_K,
    block,
    encoded,
    inputs,
    outcome,
    wrapped,
    wrappers,
)
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.layers import experts as experts_module
from lowrank_dist.layers.experts import AdaptedParameter, bound_experts
from lowrank_dist.layers.grouped import Rows
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.quantization.stacks import decode_stack

SINGLE = ShardGroup.single()


class Decoded:
    """How many experts were decoded together, and the most bytes of decoded ones that were alive."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.peak = 0
        self._alive: list[tuple[Any, int]] = []

    def alive(self) -> int:
        """Bytes that are alive."""
        self._alive = [entry for entry in self._alive if entry[0]() is not None]
        return sum(nbytes for _, nbytes in self._alive)

    def __call__(self, residual: Any, stored: Any, partition: Any, dtype: torch.dtype) -> Tensor:
        weights = decode_stack(residual, stored, partition, dtype)
        self.counts.append(len(weights))
        storage = weights.untyped_storage()
        self._alive.append((weakref.ref(weights), storage.nbytes()))
        self.peak = max(self.peak, self.alive())
        return weights


@contextmanager
def decoding(patch: pytest.MonkeyPatch) -> Iterator[Decoded]:
    watched = Decoded()
    with patch.context() as context:
        context.setattr(experts_module, "decode_stack", watched)
        yield watched


def assert_same_sums(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums in fp32 in another order: what cancels is as large as the largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.fixture(params=["mixtral", "qwen3_moe", "gpt_oss"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("residual", [NF4(), NF4(double_quant=True), Dense(dtype=torch.float32)], ids=str)
def test_the_same_as_peft(architecture: str, implementation: str, residual: Any) -> None:
    """fp32: sums in another order; whatever the number that is decoded at a time, and experts that nobody chooses."""
    experts, count = block(architecture, implementation)
    own, stock = encoded(wrapped(experts), residual)
    for used in (count, TOP_K):
        args = inputs(count, used=used)
        expected = outcome(stock, args)
        for at_a_time in (1, 3, count):
            bound_experts(own, at_a_time)
            found = outcome(own, args)
            assert found.keys() == expected.keys()
            assert_same_sums(found, expected)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("at_a_time", [1, 3, 4, 6])
def test_no_more_experts_are_decoded_at_a_time(
    implementation: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in bytes that are alive; experts without tokens are never decoded, and none is alive afterwards."""
    experts, count = block("qwen3_moe", implementation)
    residual = NF4()
    own, _ = encoded(wrapped(experts), residual)
    bound_experts(own, at_a_time)
    layers = wrappers(own)
    one = max(layer.partition.padded_rows * layer.partition.columns * 4 for layer in layers)
    for used in (count, TOP_K):
        args = inputs(count, used=used)
        chosen = len(args[1].unique())
        with decoding(monkeypatch) as decoded:
            outcome(own, args)
        most = 1 if implementation == "eager" else min(at_a_time, chosen)
        assert max(decoded.counts) == most
        assert sum(decoded.counts) == 2 * 2 * chosen  # two stacks, in forward and in backward
        # of the last group of a stack while the first one of the next is decoded, nothing is left
        assert one * most >= decoded.peak > 0
        assert decoded.alive() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autograd_saves_no_weights(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, and what the activation function saves: less than one decoded expert with its neighbours."""
    experts, count = block("mixtral", implementation)
    own, _ = encoded(wrapped(experts), Dense(dtype=torch.float32))
    bound_experts(own, 2)
    weights = {p.untyped_storage().data_ptr() for p in own.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, ids, probabilities = inputs(count)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), decoding(monkeypatch) as decoded:
        own.experts(x.requires_grad_(), ids, probabilities.requires_grad_())
        assert decoded.alive() == 0
    assert not weights & saved.keys()
    of_a_row = 64 + 80 + 40 + 40 + 40 + 64  # x, gate_up, its halves and their product, y
    assert sum(saved.values()) <= 4 * TOKENS * TOP_K * (3 * of_a_row)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant: bool) -> None:
    experts, count = block("gpt_oss")
    own, stock = encoded(wrapped(experts), NF4())
    bound_experts(own, 2)
    args = inputs(count)
    expected = outcome(stock, args)

    def run(module: nn.Module, *inner: Tensor) -> Tensor:
        if not use_reentrant:
            return checkpoint(module, *inner, use_reentrant=False)
        return checkpoint(module, *inner, use_reentrant=True)

    if use_reentrant:  # which works with backward alone
        x, ids, weights = args
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = run(own.experts, x, ids, weights)
        (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
        trained = {name: p.grad for name, p in own.named_parameters() if ".lora_" in name}
        found = {"y": y.detach(), "x": x.grad, "weights": weights.grad, **trained}
    else:
        found = outcome(own, args, run)
    assert_same_sums(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_and_factors_in_fp32(implementation: str) -> None:
    """bf16 products: the error of a sum of 64 rounded terms, of which the stock model makes as much."""
    experts, count = block("mixtral", implementation)
    own, stock = encoded(wrapped(experts), Dense(dtype=torch.bfloat16), torch.bfloat16)
    args = inputs(count)
    expected = outcome(stock, args)
    bound_experts(own, 3)

    def run(module: nn.Module, *inner: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(*inner)

    found = outcome(own, args, run)
    for name, value in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(value.float(), expected[name], rtol=0, atol=0.03 * scale, msg=name)
    assert {found[name].dtype for name in found if ".lora_" in name} == {torch.float32}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("at_a_time", [2, 6])
def test_the_kernel_of_torch(implementation: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of CUDA, with torch's kernel for the CPU: all experts as one group, whose rows the host never sees."""
    monkeypatch.setattr("lowrank_dist.layers.grouped.has_grouped_mm", lambda x, *sizes: True)
    monkeypatch.setattr(experts_module, "has_grouped_mm", lambda x, *sizes: True)
    experts, count = block("qwen3_moe", implementation)
    own, stock = encoded(wrapped(experts, rank=4), NF4())  # rows of 16 bytes
    bound_experts(own, at_a_time)
    for used in (count, TOP_K):
        args = inputs(count, used=used)
        expected = outcome(stock, args)
        with monkeypatch.context() as patch:
            if at_a_time == count:
                patch.setattr(Rows, "on_host", lambda self: pytest.fail("the host waits for the device"))
            found = outcome(own, args)
        assert_same_sums(found, expected)


class Even(nn.Module):
    """As many tokens for every expert, with all weights in one product (Llama 4)."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 64, 24)), nn.Parameter(torch.randn(4, 24, 64))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        every = x.expand(4, *x.shape)
        return torch.bmm(torch.bmm(every, self.first).tanh(), self.second).sum(0) * weights.sum()


class Listed(nn.Module):
    """One expert after the other, also those without tokens; transposed weights from the left (JetMoE, DBRX)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 24, 64)), nn.Parameter(torch.randn(4, 64, 24))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert, second in enumerate(self.second):
            mine = x[(ids == expert).any(1)]
            through = torch.nn.functional.linear(mine, self.first[expert]).tanh()
            y[(ids == expert).any(1)] += (second @ through.T).T + through @ second.mT
        return y * weights.sum()


class Turned(nn.Module):
    """All weights from the left, and permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 24, 64)), nn.Parameter(torch.randn(4, 64, 24))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        through = (self.first @ x.T.expand(4, *x.T.shape)).tanh()
        return torch.bmm(through.mT, self.second.permute(0, 2, 1)).sum(0) * weights.sum()


class Unknown(nn.Module):
    """Products that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 24, 64)), nn.Parameter(torch.randn(4, 64, 24))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        through = torch.einsum("ni,eoi->eno", x, self.first).tanh()
        return torch.einsum("eno,eho->nh", through, 2 * self.second) * weights.sum()


@pytest.mark.parametrize("kind", [Even, Listed, Turned, Unknown])
def test_other_ways_to_multiply(
    kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    own, stock = encoded(wrapped(kind()), Dense(dtype=torch.float32))
    bound_experts(own, 1)
    x, _, weights = inputs(4)
    args = x / 16, torch.randint(0, 3, (TOKENS, TOP_K), generator=torch.Generator().manual_seed(2)), weights
    monkeypatch.setattr("lowrank_dist.layers.stacked_weight._said", set())
    with caplog.at_level(logging.WARNING), decoding(monkeypatch) as decoded:
        found = outcome(own, args)
        outcome(own, args)
    torch.testing.assert_close(found, outcome(stock, args), rtol=1e-4, atol=1e-3)
    if kind is Unknown:
        assert max(decoded.counts) == 4
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2  # einsum, __mul__: once each
        assert "experts.first: einsum needs the adapted weights [4, 24, 64] dense" in said[0]
    else:
        assert set(decoded.counts) == {1}
        assert not caplog.records


def test_kernels_that_need_an_address_are_refused() -> None:
    experts, count = block("mixtral")
    own, _ = encoded(wrapped(experts), NF4())

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            with torch._C.DisableTorchFunctionSubclass():
                return x @ weight[0].mT

    owner = wrappers(own)[0].owner()
    owner.forward = lambda x, ids, weights: Kernel.apply(x, owner.gate_up_proj)
    with pytest.raises(InputError, match=r"experts.gate_up_proj: .* experts_implementation='grouped_mm'"):
        own.experts(*inputs(count))


def test_a_single_matrix() -> None:
    """A parameter that is not a stack."""
    root = nn.Module()
    root.experts = nn.Linear(64, 24)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_parameters=["experts.weight"]), root)
    nn.init.normal_(root.experts.lora_B["default"].weight)
    stock = copy.deepcopy(root)
    layer = root.experts
    residual, weight = Dense(dtype=torch.float32), layer.get_param().detach().clone()
    partition = RowPartition(rows=24, columns=64, world_size=1, block=1)
    options = {"compute_dtype": torch.float32, "wrapper": layer, "adapter": "default", "parameter": "weight"}
    root.experts = AdaptedParameter(partition, residual, **options, experts=None, input_first=False)
    shards = residual.encode(weight, partition, SINGLE).shards
    root.experts.weight_rows = nn.Parameter(shards["weight_rows"], requires_grad=False)
    args = inputs(4)

    def run(module: nn.Module, x: Tensor, _: Tensor, weights: Tensor) -> Tensor:
        return module(x) * weights.sum()

    torch.testing.assert_close(outcome(root, args, run), outcome(stock, args, run), rtol=1e-5, atol=1e-5)
    assert bound_experts(root, None) == []


def test_disabled_adapters_leave_the_residual() -> None:
    experts, count = block("mixtral")
    own, stock = encoded(wrapped(experts), NF4())
    args = inputs(count)
    for layer in [*wrappers(own), *wrappers(stock)]:
        layer.enable_adapters(False)
    torch.testing.assert_close(own.experts(*args), stock.experts(*args), rtol=1e-5, atol=1e-5)
    for layer in wrappers(own):
        layer.enable_adapters(True)
    assert not torch.allclose(own.experts(*args), stock.experts(*args), atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("frozen", ["input", "lora_A", "lora_B"])
def test_gradients_that_nobody_wants_are_left_out(implementation: str, frozen: str) -> None:
    experts, count = block("mixtral", implementation)
    own, _ = encoded(wrapped(experts), NF4())
    args = inputs(count)
    expected = outcome(own, args)
    for name, parameter in own.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    x = args[0].clone().requires_grad_(frozen != "input")
    y = own.experts(x, *args[1:])
    wanted = {name: p for name, p in {"x": x, **dict(own.named_parameters())}.items() if p.requires_grad}
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[-1])).sum(), list(wanted.values()))
    for name, gradient in zip(wanted, grads, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


def test_as_many_as_take_half_a_gibibyte_unless_a_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, _ = block("mixtral")  # gate_up 80 x 64, down 64 x 40
    own, _ = encoded(wrapped(experts), NF4())
    assert {layer.experts_at_a_time for layer in wrappers(own)} == {4}
    monkeypatch.setattr("lowrank_dist.quantization.stacks.DECODED_BYTES", 3 * 80 * 64 * 4)
    lines = bound_experts(own, None)
    assert {layer.parameter: layer.experts_at_a_time for layer in wrappers(own)} == {"gate_up_proj": 3, "down_proj": 4}
    assert sorted(lines)[1] == (
        "gate_up_proj: 3 of 4 experts of 80 x 64 are decoded at a time (0.1 MiB); experts_at_a_time changes it"
    )
    assert sorted(bound_experts(own, 1)) == [
        "down_proj: 1 of 4 experts of 64 x 40 are decoded at a time (0.0 MiB)",
        "gate_up_proj: 1 of 4 experts of 80 x 64 are decoded at a time (0.0 MiB)",
    ]
    bound_experts(own, 100)
    assert {layer.experts_at_a_time for layer in wrappers(own)} == {4}


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=8), size=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_groups_hold_every_row_once(counts: list[int], size: int) -> None:
    rows = Rows(torch.tensor(counts).cumsum(0).int())
    seen = []
    for group in rows.groups(size):
        assert 0 < len(group.experts) <= size
        assert group.stop == group.start + int(group.ends(torch.device("cpu"))[-1])
        pieces = [(group.experts[place], piece.stop - piece.start) for place, piece in group.pieces()]
        assert all(counts[expert] == number for expert, number in pieces)
        seen += [expert for expert, _ in pieces]
    assert seen == [expert for expert, number in enumerate(counts) if number]
