"""Matrices decoded by rows are those that the owners of the formats decode whole, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.models import save_checkpoint
from helpers.quantized import (
    BITSANDBYTES,
    KINDS,
    Kind,
    fp8_blocks,
    quantize,
    quantize_experts,
    quantize_with_bitsandbytes,
    write_dense,
)
from lowrank_dist.decoding import reader as decoding_reader
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.model.plan import open_plan
from lowrank_dist.storage.reader import CheckpointReader

SHAPES = ((80, 64), (48, 160), (144, 96))  # of what a word of two bits holds
ONE_FILE: Any = {"max_shard_size": "1GB"}


def write(directory: Path, tensors: dict[str, Tensor], kind: Kind) -> None:
    import json

    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"dtype": "float32", "quantization_config": kind.config}))


def weights(shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"layers.{index}.proj": torch.randn(shape, generator=generator) * torch.linspace(0.1, 3, shape[1])
        for index, shape in enumerate(shapes)
    }


def check_by_rows(reader: CheckpointReader, expected: dict[str, Tensor]) -> None:
    """Decode every matrix by the rows of 1, 2 and 3 ranks, and by single rows; compare, and count the bytes."""
    for name, whole in expected.items():
        info = reader.info(name)
        assert info.shape == tuple(whole.shape)
        for size in (1, 2, 3):
            before = reader.bytes_read
            partition = RowPartition(rows=info.shape[0], columns=info.shape[1], world_size=size, block=64)
            parts = [reader.rows(name, *partition.bounds(rank)) for rank in range(size)]
            found = torch.cat(parts)
            assert found.dtype == whole.dtype
            assert torch.equal(found, whole), (name, size, (found.float() - whole.float()).abs().max())
            if size == 1:
                assert reader.bytes_read - before == info.nbytes
        for row in (0, 1, info.shape[0] - 1):
            assert torch.equal(reader.rows(name, row, row + 1), whole[row : row + 1])
        middle = whole.numel() // 3
        assert torch.equal(reader.flat(name, middle, middle + 77), whole.flatten()[middle : middle + 77])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_that_the_owner_decodes(kind: str, tmp_path: Path) -> None:
    tensors, expected = {"norm.weight": torch.ones(8)}, {}
    for layer, weight in weights().items():
        stored, decoded = KINDS[kind].encode(weight)
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in stored.items()}
        expected[f"{layer}.weight"] = decoded
    write(tmp_path, tensors, KINDS[kind])
    reader = open_reader(tmp_path)
    assert set(reader) == {"norm.weight", *expected}
    check_by_rows(reader, expected)
    assert torch.equal(reader.rows("norm.weight", 0, 8), torch.ones(8))
    reader.close()


@pytest.mark.parametrize("kind", BITSANDBYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_transformers_writes_with_bitsandbytes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = save_checkpoint(tmp_path / "dense", dtype=dtype, hidden_size=96, intermediate_size=136, num_hidden_layers=1)
    expected = quantize_with_bitsandbytes(dense, tmp_path / "quantized", kind, dtype)
    reader = open_reader(tmp_path / "quantized")
    assert set(reader) == set(expected)
    matrices = {name: whole for name, whole in expected.items() if reader.decodes(name)}
    assert len(matrices) == 7
    check_by_rows(reader, matrices)
    reader.close()


def test_stacked_experts_in_mxfp4(tmp_path: Path) -> None:
    dense = save_checkpoint(
        tmp_path / "dense", "gpt_oss", dtype=torch.bfloat16, intermediate_size=96, num_hidden_layers=1, **ONE_FILE
    )
    expected = quantize_experts(dense, tmp_path / "quantized")
    reader = open_reader(tmp_path / "quantized")
    assert set(reader) == set(expected)
    stacks = {name: whole for name, whole in expected.items() if reader.decodes(name)}
    assert sorted(map(tuple, (whole.shape for whole in stacks.values()))) == [(4, 64, 192), (4, 96, 64)]
    for name, whole in stacks.items():
        assert torch.equal(reader.rows(name, 1, 3), whole[1:3])
        before, info, half = reader.bytes_read, reader.info(name), whole[0].numel() + 32 * whole.shape[2]
        both = [reader.flat(name, 0, half), reader.flat(name, half, whole.numel())]
        assert torch.equal(torch.cat(both), whole.flatten())
        assert reader.bytes_read - before == info.nbytes  # also where a rank's part begins inside an expert
        entries = {reader.entry(name, index): whole[index] for index in range(4)}
        check_by_rows(reader, entries)
    reader.close()


def test_blocks_of_128(tmp_path: Path) -> None:
    """The published size, on a matrix whose last blocks are cut: the scales of 3 ranks are read once, and two twice."""
    (weight,) = weights(((576, 320),)).values()
    stored, decoded = fp8_blocks(128).encode(weight)
    write(tmp_path, {f"proj.{suffix}": tensor for suffix, tensor in stored.items()}, fp8_blocks(128))
    reader = open_reader(tmp_path)
    assert reader.encoding == "FP8 with block scales of 128 x 128"
    check_by_rows(reader, {"proj.weight": decoded})
    before, info = reader.bytes_read, reader.info("proj.weight")
    for start in range(0, 576, 192):
        reader.rows("proj.weight", start, start + 192)
    assert reader.bytes_read - before == info.nbytes + 3 * 4  # rows 192 are inside a block, rows 384 at its edge
    reader.close()


def test_a_stack_of_experts_in_fp8(tmp_path: Path) -> None:
    each = [fp8_blocks(32).encode(weight) for weight in weights(((64, 96),) * 3).values()]
    stored = {suffix: torch.stack([part[0][suffix] for part in each]) for suffix in each[0][0]}
    tensors = {"experts.up_proj": stored["weight"], "experts.up_proj_scale_inv": stored["weight_scale_inv"]}
    write(tmp_path, tensors, fp8_blocks(32))
    reader = open_reader(tmp_path)
    whole = torch.stack([part[1] for part in each])
    assert torch.equal(reader.rows("experts.up_proj", 0, 3), whole)
    check_by_rows(reader, {reader.entry("experts.up_proj", index): whole[index] for index in range(3)})
    reader.close()


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """As exponents in a byte, which torch knows as a dtype."""
    (weight,) = weights(((64, 96),)).values()
    codes = weight.to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 1.0, 4.0], [2.0, 0.25, 8.0]])
    tensors = {"proj.weight": codes, "proj.weight_scale_inv": scales.to(torch.float8_e8m0fnu)}
    write(tmp_path, tensors, fp8_blocks(32))
    reader = open_reader(tmp_path)
    whole = codes.float() * scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    check_by_rows(reader, {"proj.weight": whole})
    reader.close()


@pytest.mark.parametrize(("architecture", "kind"), [("qwen3_moe", "fp8-tensor"), ("mixtral", "gptq-4-act-order")])
def test_experts_that_are_stored_one_by_one(architecture: str, kind: str, tmp_path: Path) -> None:
    """They are stacked and fused as those of the dense checkpoint are."""
    sizes = {"intermediate_size": 64} if architecture == "mixtral" else {"moe_intermediate_size": 32}
    dense = save_checkpoint(tmp_path / "dense", architecture, num_hidden_layers=1, **sizes, **ONE_FILE)
    decoded = quantize(dense, tmp_path / "quantized", KINDS[kind], is_quantized=lambda n: ".experts." in n)
    write_dense(tmp_path / "quantized", tmp_path / "decoded", decoded)
    adapter = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    readers = open_reader(tmp_path / "quantized"), open_reader(tmp_path / "decoded")
    plans = [open_plan(reader, copy.deepcopy(adapter)).plan for reader in readers]
    assert len(plans[0].matrices) == len(plans[1].matrices) > 0
    for planned, other in zip(plans[0].matrices, plans[1].matrices, strict=True):
        found, expected = readers[0].rows(planned.key, 0, planned.rows), readers[1].rows(other.key, 0, other.rows)
        assert torch.equal(found, expected)
        parts = [readers[0].rows(planned.key, *bounds) for bounds in ((0, 7), (7, 40), (40, planned.rows))]
        assert torch.equal(torch.cat(parts), expected)
        assert readers[0].decodes(planned.key)
    stack = next(matrix for matrix in plans[0].matrices if matrix.expert == 1)
    assert readers[0].info(stack.key).nbytes < readers[1].info(stack.key).nbytes


def test_weights_in_fp64(tmp_path: Path) -> None:
    """They are rounded to fp32; those of a Conv1D too, as this is no quantization."""
    dense = save_checkpoint(tmp_path / "dense", "gpt2", n_layer=1, **ONE_FILE)
    weights = load_file(dense / "model.safetensors")
    wide = {name: weight.double() + 1e-12 for name, weight in weights.items()}
    wide |= {"conv": torch.randn(4, 3, 2, 5, dtype=torch.float64)}
    save_file(wide, dense / "model.safetensors", metadata={"format": "pt"})
    reader = open_reader(dense)
    assert reader.encoding == "fp64, rounded to fp32"
    for name, weight in wide.items():
        assert reader.info(name).dtype == "F32"
        before = reader.bytes_read
        found = torch.cat([reader.flat(name, 0, 7), reader.flat(name, 7, weight.numel())]).view(weight.shape)
        assert torch.equal(found, weight.float())
        assert weight.nbytes <= reader.bytes_read - before <= weight.nbytes + 8 * weight.shape[-1] * 2
    open_plan(reader, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    reader.close()


@pytest.mark.parametrize("kind", ["fp8-blocks", "gptq-4-act-order", "awq", "ct-packed-int4-asymmetric", "ct-nvfp4"])
def test_many_rows_are_decoded_some_at_a_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_reader, "CHUNK", 128 * 64)
    (weight,) = weights(((720, 64),)).values()
    stored, decoded = KINDS[kind].encode(weight)
    write(tmp_path, {f"proj.{suffix}": tensor for suffix, tensor in stored.items()}, KINDS[kind])
    reader = open_reader(tmp_path)
    for start, stop in ((0, 720), (100, 500), (128, 256), (129, 640)):
        assert torch.equal(reader.rows("proj.weight", start, stop), decoded[start:stop])
    reader.close()


@pytest.mark.parametrize("used", [True, False])
def test_groups_of_columns_in_an_order(used: bool, tmp_path: Path) -> None:
    """``weight_g_idx`` of compressed-tensors: column j has the scale of group ``weight_g_idx[j]``."""
    kind = KINDS["ct-packed-int4"]
    (weight,) = weights(((48, 64),)).values()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    stored, decoded = kind.encode(weight[:, order] if used else weight)
    groups = torch.full((64,), -1, dtype=torch.int32)
    if used:
        groups[order] = torch.arange(64, dtype=torch.int32) // 8
        back = torch.argsort(order)
        stored["weight_packed"] = pack_to_int32(
            unpack_from_int32(stored["weight_packed"], 4, torch.Size([48, 64]))[:, back], 4
        )
        decoded = decoded[:, back]
    tensors = {f"proj.{suffix}": tensor for suffix, tensor in stored.items()}
    write(tmp_path, {**tensors, "proj.weight_g_idx": groups}, kind)
    reader = open_reader(tmp_path)
    check_by_rows(reader, {"proj.weight": decoded})
    reader.close()
