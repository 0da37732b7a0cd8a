"""Quantized checkpoints in the layouts that people publish, and the dense weights that the formats' owners decode.

Every kind of `KINDS` encodes one linear weight with the owner's code, or in the published layout where the owner has no
encoder for a CPU, and decodes it with the owner's code.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Tensors of a layer by the suffix of their names, and the weight that the owner decodes them to.
Encoded = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A format: ``quantization_config``, and how a weight ``[out, in]`` becomes tensors, and these a weight again."""

    config: dict[str, Any]
    encode: Callable[[Tensor], Encoded]


def e4m3(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    found: Tensor = Fp8Dequantize(None).convert({"weight": codes, "weight_scale_inv": scales})["weight"]
    return found


def fp8_blocks(block: int) -> Kind:
    """Fine-grained FP8, decoded by transformers; blocks that the edge cuts are padded for it."""

    def encode(weight: Tensor) -> Encoded:
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
        blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        codes = e4m3(blocks / scales[:, None, :, None]).view(padded.shape)
        decoded = dequantized(codes, scales)[:rows, :columns].contiguous()
        return {"weight": codes[:rows, :columns].contiguous(), "weight_scale_inv": scales}, decoded

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return Kind(config=settings, encode=encode)


def fp8_tensor(weight: Tensor) -> Encoded:
    scale = weight.abs().max().float() / 448
    codes = e4m3(weight / scale)
    tensors = {"weight": codes, "weight_scale_inv": scale, "activation_scale": torch.tensor(1.0)}
    return tensors, dequantized(codes, scale.view(1, 1))


def modelopt_fp8(weight: Tensor) -> Encoded:
    """ModelOpt's layout; its own code, ``FP8QTensor``, is a product with the scale too."""
    scale = weight.abs().max().float() / 448
    codes = e4m3(weight / scale)
    decoded = codes.to(torch.float32) * scale
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(1.0)}, decoded


def modelopt_nvfp4(weight: Tensor) -> Encoded:
    """ModelOpt's layout, with the codes and scales of compressed-tensors, whose global scale is the inverse."""
    tensors, decoded = compressed("nvfp4-pack-quantized", NVFP4).encode(weight)
    whole = tensors["weight_global_scale"]
    codes = tensors["weight_packed"]
    values = unpack_e2m1(codes).unflatten(1, (-1, 16)) * (tensors["weight_scale"].float() * (1 / whole))[:, :, None]
    torch.testing.assert_close(values.flatten(1), decoded.float(), rtol=1e-2, atol=0)
    return {
        "weight": codes,
        "weight_scale": tensors["weight_scale"],
        "weight_scale_2": 1 / whole.reshape(()),
        "input_scale": torch.tensor(1.0),
    }, values.flatten(1)


def unpack_e2m1(packed: Tensor) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    return unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=torch.float32)


# -- compressed-tensors -----------------------------------------------------------------------------------------------

FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
NVFP4: dict[str, Any] = {
    **{"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
    "scale_dtype": "torch.float8_e4m3fn",
}
MXFP4: dict[str, Any] = {
    **{"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32},
    "scale_dtype": "torch.uint8",
}


def compressed(format: str, weights: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Kind:
    """A format of compressed-tensors, encoded and decoded by its own compressor; `dtype` is that of the scales."""

    def encode(weight: Tensor) -> Encoded:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        arguments = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        compressor = BaseCompressor.get_value_from_registry(format)
        weight = weight.to(dtype)
        state: dict[str, Tensor] = {"weight": weight}
        strategy, group = arguments.strategy, arguments.group_size
        if strategy == "tensor":
            low, high = weight.min().view(1), weight.max().view(1)
        elif strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        elif strategy == "block":
            block = arguments.block_structure[0]
            rows, columns = weight.shape
            padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
            blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
            low, high = blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
        else:
            groups = weight.unflatten(1, (-1, group))
            low, high = groups.amin(2), groups.amax(2)
        if strategy == "tensor_group":
            state["weight_global_scale"] = (448 * 6 / weight.abs().max().float()).view(1)
        scale, zero_point = calculate_qparams(low, high, arguments, global_scale=state.get("weight_global_scale"))
        state["weight_scale"] = scale
        if not arguments.symmetric:
            state["weight_zero_point"] = zero_point
        tensors = compressor.compress(state, scheme)
        decoded = compressor.decompress({n: t.clone() for n, t in tensors.items()}, scheme)["weight"]
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, decoded

    groups = {"targets": ["Linear"], "weights": weights, "format": format}
    return Kind(
        config={
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": groups},
            "ignore": ["lm_head"],
        },
        encode=encode,
    )


def ints(bits: int, strategy: str, *, symmetric: bool = True, group: int | None = None) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": group}


# -- GPTQ and AWQ -----------------------------------------------------------------------------------------------------


def pack(values: Tensor, bits: int, dim: int) -> Tensor:
    """Pack unsigned values along `dim` into int32, the first one into the lowest bits."""
    each = 32 // bits
    wide = values.to(torch.int64).unflatten(dim, (-1, each)).movedim(dim + 1, 0)
    words = sum(part << (bits * place) for place, part in enumerate(wide))
    assert isinstance(words, Tensor)
    return (((words + 2**31) % 2**32) - 2**31).to(torch.int32).contiguous()


def gptq(bits: int, group: int, *, act_order: bool = False, symmetric: bool = True, v2: bool = False) -> Kind:
    """GPTQ's layout, with the formula of AutoGPTQ's and GPTQModel's torch kernels as the decoder."""

    def encode(weight: Tensor) -> Encoded:
        outputs, inputs = weight.shape
        order = torch.arange(inputs)
        if act_order:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        indices = torch.empty(inputs, dtype=torch.int32)
        indices[order] = (torch.arange(inputs) // group).to(torch.int32)
        count = -(-inputs // group)
        scales = torch.empty(count, outputs, dtype=torch.float16)
        zeros = torch.empty(count, outputs, dtype=torch.int64)
        top = 2**bits - 1
        for index in range(count):
            of_group = weight[:, indices == index]
            if symmetric:
                zeros[index] = 2 ** (bits - 1)
                scales[index] = (of_group.abs().amax(1) * 2 / top).half()
            else:
                low, high = of_group.amin(1).clamp(max=0), of_group.amax(1).clamp(min=0)
                scales[index] = ((high - low) / top).half()
                zeros[index] = (-low / scales[index].float()).round().clamp(1, top).long()
        of_input = scales[indices.long()].float().T
        codes = ((weight / of_input).round() + zeros[indices.long()].T).clamp(0, top)
        tensors = {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": pack(zeros if v2 else zeros - 1, bits, 1),
            "scales": scales,
            "g_idx": indices,
        }
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        stored = ((tensors["qzeros"][:, :, None] >> shifts) & top).reshape(scales.shape) + (0 if v2 else 1)
        values = ((tensors["qweight"][:, None, :] >> shifts[None, :, None]) & top).reshape(inputs, outputs)
        decoded = scales[indices.long()] * (values - stored[indices.long()])
        return tensors, decoded.T.contiguous()

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    return Kind(config={**settings, "checkpoint_format": "gptq_v2" if v2 else "gptq"}, encode=encode)


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(group: int) -> Kind:
    """AWQ's layout for GEMM, with AutoAWQ's formula as the decoder."""

    def encode(weight: Tensor) -> Encoded:
        groups = weight.T.unflatten(0, (-1, group))
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15).long()
        codes = ((groups / scales[:, None].float()).round() + zeros[:, None]).clamp(0, 15).flatten(0, 1)

        def packed(values: Tensor) -> Tensor:
            return pack(values.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1), 4, 1)

        tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
        shifts, back = torch.arange(0, 32, 4, dtype=torch.int32), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
        each = [((tensors[n][:, :, None] >> shifts) & 15)[:, :, back].flatten(1) for n in ("qweight", "qzeros")]
        decoded = (each[0] - each[1].repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)
        return tensors, decoded.T.contiguous()

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Kind(config=settings, encode=encode)


KINDS: dict[str, Kind] = {
    "fp8-blocks": fp8_blocks(32),
    "fp8-tensor": Kind(
        config={"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, encode=fp8_tensor
    ),
    "modelopt-fp8": Kind(config={"quant_method": "modelopt", "quant_algo": "FP8"}, encode=modelopt_fp8),
    "modelopt-nvfp4": Kind(config={"quant_method": "modelopt", "quant_algo": "NVFP4"}, encode=modelopt_nvfp4),
    "ct-fp8-tensor": compressed("float-quantized", {**FP8, "strategy": "tensor"}),
    "ct-fp8-channel": compressed("float-quantized", {**FP8, "strategy": "channel"}),
    "ct-fp8-block": compressed("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 32]}),
    "ct-int8": compressed("int-quantized", ints(8, "channel")),
    "ct-int8-asymmetric": compressed("int-quantized", ints(8, "channel", symmetric=False)),
    "ct-packed-int4": compressed("pack-quantized", ints(4, "group", group=8)),
    "ct-packed-int4-asymmetric": compressed("pack-quantized", ints(4, "group", group=8, symmetric=False)),
    "ct-packed-int4-channel": compressed("pack-quantized", ints(4, "channel")),
    "ct-packed-int8": compressed("pack-quantized", ints(8, "channel")),
    "ct-packed-int8-asymmetric": compressed("pack-quantized", ints(8, "channel", symmetric=False)),
    "ct-nvfp4": compressed("nvfp4-pack-quantized", NVFP4),
    "ct-mxfp4": compressed("mxfp4-pack-quantized", MXFP4),
    "ct-fp8-channel-fp32": compressed("float-quantized", {**FP8, "strategy": "channel"}, torch.float32),
    "ct-packed-int4-fp32": compressed("pack-quantized", ints(4, "group", group=8), torch.float32),
    "fbgemm": Kind(
        config={"quant_method": "fbgemm_fp8"},
        encode=compressed("float-quantized", {**FP8, "strategy": "channel"}, torch.float32).encode,
    ),
    "ct-packed-int2": compressed("pack-quantized", ints(2, "group", group=16)),
    "gptq-2": gptq(2, 32),
    "gptq-4": gptq(4, 32),
    "gptq-4-act-order": gptq(4, 32, act_order=True, symmetric=False),
    "gptq-4-v2": gptq(4, 32, symmetric=False, v2=True),
    "gptq-8-act-order": gptq(8, 32, act_order=True),
    "awq": awq(8),
}


def quantize(dense: Path, output: Path, kind: Kind, *, is_quantized: Callable[[str], bool]) -> dict[str, Tensor]:
    """Write a quantized copy of a checkpoint, and return the dense weights that the owner's decoder makes of it."""
    shutil.copytree(dense, output)
    tensors, decoded = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(output / "model.safetensors").items():
        if not is_quantized(name):
            tensors[name] = decoded[name] = weight
            continue
        stored, decoded[name] = kind.encode(weight.float())
        tensors |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in stored.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    set_config(output, quantization_config=kind.config)
    return decoded


def write_dense(quantized: Path, output: Path, decoded: dict[str, Tensor]) -> None:
    """Write the checkpoint that the owner's decoder makes of a quantized one."""
    shutil.copytree(quantized, output)
    save_file({name: tensor.contiguous() for name, tensor in decoded.items()}, output / "model.safetensors")
    set_config(output, quantization_config=None)


def set_config(directory: Path, **entries: Any) -> None:
    """Set entries of ``config.json``; those that are None are removed."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# -- bitsandbytes, written by transformers ----------------------------------------------------------------------------

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "bnb-nf4-nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb-nf4-in-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "bnb-fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bnb-int8": {"load_in_8bit": True},
}


def quantize_with_bitsandbytes(dense: Path, output: Path, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Like `quantize`, by transformers' own ``save_pretrained`` of a model that it has quantized."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(**BITSANDBYTES[kind])
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=dtype)
    model.save_pretrained(output)
    return decoded_by_bitsandbytes(output, dtype)


def decoded_by_bitsandbytes(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a checkpoint, those of quantized layers decoded by bitsandbytes.

    Matrices whose rows are not whole blocks are decoded flat: with AVX-512, bitsandbytes 0.50 decodes them wrongly.
    """
    import bitsandbytes.functional as functional

    tensors = load_file(directory / "model.safetensors")
    decoded = dict[str, Tensor]()
    for name, tensor in tensors.items():
        beside = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        if beside:
            state = functional.QuantState.from_dict(beside, torch.device("cpu"))
            shape = state.shape
            if shape[1] % state.blocksize:
                state.shape = torch.Size([shape.numel()])
            decoded[name] = functional.dequantize_4bit(tensor, state).view(shape)
        elif tensor.dtype == torch.int8:
            scales = tensors[f"{name.removesuffix('weight')}SCB"]
            decoded[name] = functional.int8_vectorwise_dequant(tensor, scales).to(dtype)
        elif ".weight." not in name and not name.endswith((".SCB", ".weight_format")):
            decoded[name] = tensor
    return decoded


def quantize_experts(dense: Path, output: Path) -> dict[str, Tensor]:
    """Like `quantize`: the experts of gpt-oss in MXFP4, decoded by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shutil.copytree(dense, output)
    tensors, decoded = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in load_file(output / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = decoded[name] = weight
            continue
        groups = weight.float().mT.unflatten(2, (-1, 32))  # [experts, columns, groups, 32]
        exponents = torch.floor(torch.log2(groups.abs().amax(3))) - 2
        nearest = (groups / torch.exp2(exponents)[..., None]).unsqueeze(-1) - torch.tensor(E2M1)
        codes = nearest.abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = blocks = (codes[..., ::2] | codes[..., 1::2] << 4).contiguous()
        tensors[f"{name}_scales"] = scales = (exponents + 127).to(torch.uint8)
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=weight.dtype).contiguous()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    set_config(output, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return decoded


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


# -- GGUF, written by the gguf package --------------------------------------------------------------------------------

#: Bytes of the two fp16 scales of a block, for types that the gguf package cannot encode.
_SCALES = {"Q4_K": ((0, 2e-4), (2, 2e-4)), "Q5_K": ((0, 1e-4), (2, 1e-4)), "Q6_K": ((208, 5e-5),)}


def gguf_blocks(weight: Tensor, kind: str) -> Any:
    """A weight in blocks of a type; for types without an encoder, blocks of random codes."""
    import gguf
    import numpy as np

    type_of = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES:
        return gguf.quantize(weight.float().numpy(), type_of)
    elements, size = gguf.GGML_QUANT_SIZES[type_of]
    generator = np.random.default_rng(weight.shape[0])
    blocks = generator.integers(0, 256, (weight.shape[0], weight.shape[1] // elements, size), dtype=np.uint8)
    for place, scale in _SCALES[kind]:
        blocks[..., place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(weight.shape[0], -1)


def write_gguf(dense: Path, path: Path, kinds: list[str]) -> None:
    """Write a LLaMA checkpoint as llama.cpp's converter does; its matrices take `kinds` in turn."""
    import gguf

    config = json.loads((dense / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    turn = itertools.cycle(kinds)
    for name, weight in sorted(load_file(dense / "model.safetensors").items()):
        stem, _, suffix = name.rpartition(".")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else kv_heads
            weight = weight.unflatten(0, (count, 2, -1)).swapaxes(1, 2).reshape(weight.shape)
        kind = next(turn) if weight.ndim == 2 else "F32"
        writer.add_tensor(
            f"{names.get_name(stem)}.{suffix}", gguf_blocks(weight, kind), raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
