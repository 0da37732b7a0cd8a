"""Layers of one autograd Function against PEFT's own forward, and the Triton kernel against bitsandbytes."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.layers.adapted import fuse_adapters
from lowrank_dist.layers.frozen import FrozenLinear, keep_decoded, multiply_plainly
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.nf4 import NF4

IN, OUT, RANK = 128, 80, 4
SINGLE = ShardGroup.single()


def adapted(residual: Any, *, input_first: bool = False, dropout: float = 0.0, scaling: float = 1.5) -> Any:
    """PEFT's layer, with a bias, over a frozen one."""
    torch.manual_seed(0)
    owner = nn.Module()
    owner.linear = Conv1D(OUT, IN) if input_first else nn.Linear(IN, OUT)
    options = {"fan_in_fan_out": input_first, "lora_dropout": dropout, "target_modules": ["linear"]}
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK * scaling, **options), owner)
    layer = owner.linear
    rows, columns = layer.base_layer.weight.shape
    partition = RowPartition(rows=rows, columns=columns, world_size=1, block=residual.block)
    frozen = FrozenLinear(partition, residual, compute_dtype=torch.float32, input_first=input_first)
    for name, shard in residual.encode(torch.randn(rows, columns) / 10, partition, SINGLE).shards.items():
        setattr(frozen, name, nn.Parameter(shard, requires_grad=False))
    frozen.bias = nn.Parameter(torch.randn(OUT), requires_grad=False)
    layer.base_layer = frozen
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor["default"].weight, std=0.1)
    return owner


def outcome(layer: nn.Module, x: Tensor, run: Any = lambda layer, x: layer(x)) -> dict[str, Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = run(layer, x)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, OUT)).sum(), [x, *trained.values()])
    return {"y": y.detach(), **dict(zip(["x", *trained], grads, strict=True))}


@pytest.mark.parametrize("residual", [NF4(), NF4(double_quant=True), Dense(dtype=torch.float32)], ids=str)
@pytest.mark.parametrize("input_first", [False, True])
@pytest.mark.parametrize("fold", ["never", "always"])
def test_the_same_as_peft(residual: Any, input_first: bool, fold: Any) -> None:
    """fp32: sums in another order."""
    owner, x = adapted(residual, input_first=input_first), torch.randn(3, 7, IN)
    expected = outcome(owner.linear, x)
    (layer,) = fuse_adapters(owner, fold)
    assert layer is owner.linear
    stored = [p.clone() for p in layer.base_layer.stored()]
    found = outcome(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found["y"], expected["y"])  # it was another computation
    assert all(map(torch.equal, stored, layer.base_layer.stored()))


def test_what_the_function_cannot_do_is_left_to_peft() -> None:
    owner, x = adapted(NF4(), dropout=0.5), torch.randn(5, IN)
    (layer,) = fuse_adapters(owner, "never")

    def called(of: nn.Module) -> list[Tensor]:
        """Outputs of `of` within a forward of the layer."""
        seen: list[Tensor] = []
        forward = of.forward
        of.forward = lambda x: (seen.append(forward(x)), seen[-1])[1]  # type: ignore[assignment]
        layer(x)
        del of.forward
        return seen

    base, factor = layer.base_layer, layer.lora_A["default"]
    assert called(base)  # dropout
    layer.eval()
    assert not called(base)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base(x))
    layer.enable_adapters(True)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    inputs: list[Tensor] = []
    hook = factor.register_forward_hook(lambda _, args, output: inputs.append(args[0]))
    layer(x)
    assert len(inputs) == 1
    hook.remove()
    assert not called(factor)


@pytest.mark.parametrize("fold", ["never", "always"])
@pytest.mark.parametrize("frozen", ["x", "lora_A.default.weight", "lora_B.default.weight"])
def test_gradients_that_nobody_wants_are_left_out(fold: Any, frozen: str) -> None:
    """The input of a first layer, or a factor that the user froze; the other gradients stay the same."""
    owner, x = adapted(NF4()), torch.randn(3, 7, IN)
    (layer,) = fuse_adapters(owner, fold)
    expected = outcome(layer, x)
    named = {"x": x.clone().requires_grad_(frozen != "x"), **dict(layer.named_parameters())}
    if frozen != "x":
        named[frozen].requires_grad_(False)
    wanted = {name: t for name, t in named.items() if t.requires_grad}
    y = layer(named["x"])
    found = torch.autograd.grad((y * torch.linspace(-1, 1, OUT)).sum(), list(wanted.values()))
    assert frozen not in wanted
    for name, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("fold", ["never", "always"])
def test_only_the_input_is_saved(fold: Any) -> None:
    """Views or products would keep gathered weights, or as much memory as the activations again."""
    owner, x = adapted(NF4(double_quant=True)), torch.randn(3, 7, IN, requires_grad=True)
    (layer,) = fuse_adapters(owner, fold)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(x)
    assert [id(t) for t in saved] == [id(x)]


@pytest.mark.parametrize("fold", ["never", "always"])
def test_backward_uses_what_the_parameters_hold_by_then(fold: Any) -> None:
    """ZeRO-3 empties them after the forward, and gathers them into other memory before the backward."""
    owner, x = adapted(NF4(double_quant=True)), torch.randn(3, 7, IN, requires_grad=True)
    (layer,) = fuse_adapters(owner, fold)
    expected = outcome(layer, x)
    y = layer(x)
    whole = {p: p.data.clone() for p in layer.parameters()}
    for p in whole:
        p.data.fill_(1)  # a view that was kept would see it
        p.data = p.data.new_empty(0)
    for p, data in whole.items():
        p.data = data
    trained = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad((y * torch.linspace(-1, 1, OUT)).sum(), list(trained.values()))
    for name, gradient in zip(trained, found, strict=True):
        assert torch.equal(gradient, expected[name])


class Operators(TorchDispatchMode):
    """Counts operators; views and other aliases do no work and are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fold", ["never", "always"])
def test_few_operators(fold: Any) -> None:
    """Of a forward, its recomputation under gradient checkpointing, and the backward: 30 at most (PEFT's way: 50)."""
    owner, x = adapted(NF4(double_quant=True)), torch.randn(3, 7, IN, requires_grad=True)
    owner.linear.base_layer.bias = None
    (layer,) = fuse_adapters(owner, fold)
    with Operators() as counted:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(counted.names) <= 30, counted.names


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("fold", ["never", "always"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_recomputation_decodes_is_kept_for_the_backward(fold: Any, reentrant: bool, dropout: float) -> None:
    """Decoded twice instead of three times, with the same bits; nothing is kept after the backward, or by a forward."""
    owner, x = adapted(NF4(double_quant=True), dropout=dropout), torch.randn(3, 7, IN)
    (layer,) = fuse_adapters(owner, fold)
    decoded: list[weakref.ref[Tensor]] = []
    decode = layer.base_layer.matrix

    def matrix(*args: Any, **options: Any) -> Tensor:
        weight = decode(*args, **options)
        decoded.append(weakref.ref(weight))
        return weight

    layer.base_layer.matrix = matrix

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)

    def step() -> tuple[dict[str, Tensor], int]:
        decoded.clear()
        torch.manual_seed(0)
        inputs = x.clone().requires_grad_()
        run(layer, inputs).sum().backward()
        grads = {name: p.grad for name, p in [("x", inputs), *layer.named_parameters()] if p.grad is not None}
        layer.zero_grad()
        assert all(weight() is None for weight in decoded)
        return grads, len(decoded)

    expected, without = step()
    keep_decoded(owner)
    found, kept = step()
    assert (without, kept) == (3, 2)
    assert found.keys() == expected.keys() == {"x", "lora_A.default.weight", "lora_B.default.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    layer(x)
    assert decoded[-1]() is None


def test_the_faster_is_used_from_then_on() -> None:
    """Times are as they come; the choice must be theirs, be made once for a shape, and survive checkpointing."""
    owner, x = adapted(NF4()), torch.randn(40, IN)
    expected = outcome(owner.linear, x)
    (layer,) = fuse_adapters(owner, "measured")
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        torch.testing.assert_close(outcome(layer, x, run), expected, rtol=1e-5, atol=1e-5)
    layer(torch.randn(64, IN))
    found = layer.folding.found
    assert list(found) == [(IN, OUT, RANK, 64)]
    assert all(milliseconds > 0 for milliseconds in found[IN, OUT, RANK, 64])
    for times in ((1.0, 2.0), (2.0, 1.0)):
        found[IN, OUT, RANK, 64] = times
        way = torch.equal(layer(x), layer.computed(x, fold=True)), torch.equal(layer(x), layer.computed(x, fold=False))
        assert way == (times[1] < times[0], times[0] < times[1])


@pytest.mark.parametrize("other", [lambda b: nn.Sequential(b), lambda b: nn.Linear(b.in_features, b.out_features)])
def test_layers_with_a_core_or_a_bias_stay_as_they_are(other: Any) -> None:
    owner = adapted(NF4())
    owner.linear.lora_B["default"] = other(owner.linear.lora_B["default"])
    assert fuse_adapters(owner, "always") == []


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton was imported with its interpreter chosen."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()
    with pool:
        yield pool


def decode_interpreted(shape: tuple[int, int], fmt: NF4, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By bitsandbytes, by the kernel, by the kernel with a product of rank 20; and that product in fp64."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    partition = RowPartition(rows=rows, columns=columns, world_size=3, block=fmt.block_size)
    whole = RowPartition(rows=partition.padded_rows, columns=columns, world_size=1, block=fmt.block_size)
    assert fmt.has_kernel(partition, torch.device("cpu"))
    weight = torch.zeros(partition.padded_rows, columns)
    weight[:rows] = torch.randn(shape, generator=generator)
    stored = fmt.encode(weight, whole, SINGLE).shards
    left, right = (torch.randn(of, generator=generator).to(dtype) for of in ((rows, 20), (columns, 20)))
    product = left, right.mT
    return (
        fmt.decode_with_bitsandbytes(stored, partition, dtype),
        fmt.decode_with_kernel(stored, partition, dtype),
        fmt.decode(stored, partition, dtype, product),
        product[0].double() @ product[1].double(),
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "block_size"), [((130, 640), 64), ((37, 192), 64), ((20, 512), 256)])
def test_the_kernel_decodes_as_bitsandbytes_does(
    interpreter: Executor, shape: tuple[int, int], block_size: int, dtype: torch.dtype, double_quant: bool
) -> None:
    """Bit for bit without a product; with one, a sum of 20 in fp32, rounded once.

    Not in bf16, which Triton's interpreter does not multiply; tests/gpu has it.
    """
    fmt = NF4(block_size=block_size, double_quant=double_quant)
    plain, alone, added, product = interpreter.submit(decode_interpreted, shape, fmt, dtype).result()
    assert torch.equal(alone, plain)
    assert alone.dtype == added.dtype == dtype
    exact = plain.double() + product
    # fp16: the plain values were rounded before, the sum was not
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(added.double(), exact, rtol=tolerance, atol=tolerance)


def compiled(capability: int, nested: bool, product: bool) -> tuple[str, int]:
    """PTX of the kernel in bf16 for a CUDA capability, and the shared memory that it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowrank_dist.quantization.nf4_triton import TILES, decode_kernel

    tile = dict(TILES[product])
    options = {"num_warps": tile.pop("num_warps"), "enable_fp_fusion": False}
    constants = {"BLOCK": 64, "GROUP": 64, "NESTED": nested, "PRODUCT": product, **tile}
    pointers = {"packed": "*u8", "absmax": "*u8" if nested else "*fp32"}
    pointers |= dict.fromkeys(("nested", "code_map", "absmax_map"), "*fp32")
    pointers |= dict.fromkeys(("left", "right", "out"), "*bf16")
    names = decode_kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "rows", "columns")}
    source = ASTSource(decode_kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return kernel.asm["ptx"], kernel.metadata.shared


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles(capability: int, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For A100 and H100, without a device: tensor cores multiply, stores are 16 bytes wide, no register is spilled."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a home may not be writable
    for product in (False, True):
        ptx, shared = compiled(capability, nested, product)
        assert ("wgmma" if capability == 90 else "mma.sync") in ptx or not product
        assert ".local" not in ptx
        assert set(re.findall(r"st\.global[.\w]*", ptx)) == {"st.global.v4.b32"}
        assert shared <= 48 * 2**10  # what every device has


#: Operators whose result the host waits for: ``.item()`` and ``if tensor``, and shapes that depend on values.
WAITS = {f"aten.{name}.default" for name in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2")}


@pytest.mark.parametrize("fold", ["never", "always"])
@pytest.mark.parametrize("residual", [NF4(), NF4(double_quant=True), Dense(dtype=torch.float32)], ids=str)
def test_a_decoder_layer_asks_the_device_nothing(residual: Any, fold: Any) -> None:
    """In its forward and backward, so that the host runs ahead, and a graph of the layer could be captured."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2, attn_implementation="sdpa")
    layer = LlamaDecoderLayer(config, 0)
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules="all-linear"), layer)
    for module in [module for module in layer.modules() if hasattr(module, "lora_A")]:
        weight = module.base_layer.weight.detach()
        partition = RowPartition(rows=weight.shape[0], columns=weight.shape[1], world_size=1, block=residual.block)
        frozen = FrozenLinear(partition, residual, compute_dtype=torch.float32)
        for name, shard in residual.encode(weight, partition, SINGLE).shards.items():
            setattr(frozen, name, nn.Parameter(shard, requires_grad=False))
        module.base_layer = frozen
    assert len(fuse_adapters(layer, fold)) == 7
    x, rotary = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 32)
    with Operators() as counted:
        output = layer(x, position_embeddings=(rotary, rotary), attention_mask=None)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
    assert not WAITS & set(counted.names)
    with Operators() as counted:
        x.sum().item()
    assert WAITS & set(counted.names)


@pytest.mark.parametrize("input_first", [False, True])
def test_a_dense_weight_held_whole_is_multiplied_plainly(input_first: bool) -> None:
    """The same bits; autograd saves the stored weight itself, and no copy of it."""
    base, x = adapted(Dense(dtype=torch.float32), input_first=input_first).linear.base_layer, torch.randn(3, 7, IN)
    expected = outcome(base, x)
    multiply_plainly(base)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        found = outcome(base, x)
    assert base.is_plain
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    weight = base.stored()[0].untyped_storage().data_ptr()
    assert [tensor.untyped_storage().data_ptr() for tensor in saved if tensor.shape == (IN, OUT)] == [weight]


@pytest.mark.parametrize("residual", [NF4(), Dense(dtype=torch.bfloat16)], ids=str)
def test_what_is_decoded_is_not(residual: Any) -> None:
    base = adapted(residual).linear.base_layer
    multiply_plainly(base)
    assert not base.is_plain
