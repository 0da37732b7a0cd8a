"""What is not decoded is refused before a weight is read, by its name, with what was found and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.models import save_checkpoint
from helpers.quantized import KINDS, quantize, quantize_experts, quantize_with_bitsandbytes, set_config
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.model.plan import open_plan

Change = Callable[[dict[str, Tensor]], None]
LAYER = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    return save_checkpoint(directory, num_hidden_layers=1, intermediate_size=96, max_shard_size="1GB")


def made(dense: Path, kind: str, output: Path, **settings: Any) -> Path:
    quantize(dense, output, KINDS[kind], is_quantized=lambda name: name.endswith("_proj.weight"))
    set_config(output, quantization_config={**KINDS[kind].config, **settings})
    return output


def change(directory: Path, edit: Change) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def refused(directory: Path, *texts: str, error: type[InputError] = ModelError) -> None:
    with pytest.raises(error) as caught:
        open_plan(open_reader(directory), None)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "settings", "texts"),
    [
        ("fp8-blocks", {"quant_method": "vptq"}, ["quantized by 'vptq'", "known are fp8", "save it dense"]),
        ("fp8-blocks", {"weight_block_size": [64, 64]}, [".weight_scale_inv is [", "of 64 x 64 needs [1, 2]"]),
        ("fp8-blocks", {"weight_block_size": "all"}, ["weight_block_size is 'all', must be two positive integers"]),
        ("gptq-4", {"bits": 3}, ["GPTQ with 3 bits, which is not decoded here"]),
        ("gptq-4", {"checkpoint_format": "marlin"}, ["checkpoint_format='marlin'"]),
        ("gptq-4", {"group_size": 16}, [".scales is [", "needs [6, "]),
        ("awq", {"version": "gemv"}, ["AWQ with 4 bits in the layout 'gemv'"]),
        ("ct-packed-int4", {"format": "marlin-24"}, ["format='marlin-24'"]),
        ("ct-packed-int4", {"config_groups": {}}, ["config_groups have 0 settings"]),
        ("ct-packed-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity 'sparse-24-bitmask'"]),
        ("modelopt-fp8", {"quant_algo": "W4A8_AWQ"}, ["ModelOpt's 'W4A8_AWQ'"]),
    ],
)
def test_settings(kind: str, settings: dict[str, Any], texts: list[str], dense: Path, tmp_path: Path) -> None:
    error = InputError if "must be" in texts[0] else ModelError
    refused(made(dense, kind, tmp_path / "model", **settings), *texts, error=error)


@pytest.mark.parametrize(
    ("kind", "suffix", "value", "text"),
    [
        ("fp8-blocks", "weight_scale_inv", None, "the pretrained weights store F8_E4M3"),
        ("fp8-blocks", "weight_scale_inv", torch.ones(3, 3, dtype=torch.int32), "I32, but FP8 with block scales"),
        ("gptq-4-act-order", "g_idx", None, f"{LAYER}.g_idx is missing, which GPTQ"),
        ("gptq-4", "scales", torch.ones(2, 5), ".scales is [2, 5] F32"),
        ("awq", "qzeros", None, f"{LAYER}.qzeros is missing"),
        ("ct-packed-int4", "weight_shape", torch.tensor([96, 32]), "weight_packed is [96, 8] I32"),
        ("ct-packed-int4-asymmetric", "weight_zero_point", None, "weight_zero_point is missing"),
        ("ct-nvfp4", "weight_scale", torch.ones(96, 4), "weight_scale is [96, 4] F32"),
        ("ct-fp8-channel", "weight_scale", torch.ones(5, 1), "one for each of 96 rows"),
    ],
)
def test_tensors(kind: str, suffix: str, value: Tensor | None, text: str, dense: Path, tmp_path: Path) -> None:
    directory = made(dense, kind, tmp_path / "model")

    def edit(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[f"{LAYER}.{suffix}"]
        else:
            tensors[f"{LAYER}.{suffix}"] = value

    change(directory, edit)
    refused(directory, text)


def test_groups_that_do_not_exist(dense: Path, tmp_path: Path) -> None:
    directory = made(dense, "gptq-4-act-order", tmp_path / "model")
    change(directory, lambda tensors: tensors[f"{LAYER}.g_idx"].fill_(7))
    reader = open_reader(directory)
    with pytest.raises(ModelError, match="g_idx: names groups 7 to 7, but there are 2"):
        reader.rows(f"{LAYER}.weight", 0, 4)


def test_dense_weights_with_settings_of_quantization(dense: Path, tmp_path: Path) -> None:
    """transformers would quantize them while loading; whether that is meant cannot be known."""
    import shutil

    shutil.copytree(dense, tmp_path / "model")
    set_config(tmp_path / "model", quantization_config={"load_in_4bit": True})
    refused(tmp_path / "model", "no tensor is stored so", "remove quantization_config")


def test_quantized_weights_without_settings(dense: Path, tmp_path: Path) -> None:
    directory = made(dense, "fp8-blocks", tmp_path / "model")
    set_config(directory, quantization_config=None)
    refused(directory, f"{LAYER}.weight", "store F8_E4M3", "quantization_config")


def test_layers_that_are_stored_transposed(tmp_path: Path) -> None:
    """A square weight of a Conv1D, quantized as that of a linear layer, would fit with the wrong side up."""
    dense = save_checkpoint(tmp_path / "dense", "gpt2", n_layer=1, max_shard_size="1GB")
    quantize_with_bitsandbytes(dense, tmp_path / "model", "bnb-nf4", torch.float32)
    refused(tmp_path / "model", "attn.c_proj.weight: is of a Conv1D", "quantized from")


def test_the_scales_of_stacked_experts(tmp_path: Path) -> None:
    dense = save_checkpoint(
        tmp_path / "dense", "gpt_oss", intermediate_size=64, num_hidden_layers=1, max_shard_size="1GB"
    )
    quantize_experts(dense, tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj"
    change(tmp_path / "model", lambda tensors: tensors.update({f"{name}_scales": torch.ones(4, 64, 3)}))
    refused(tmp_path / "model", f"{name}_scales is [4, 64, 3] F32")


OWN_FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ModelOpt NVFP4": (
        *("modelopt-nvfp4", "hf_quant_config.json"),
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}},
    ),
    "GPTQ with 4 bits and act-order": (
        *("gptq-4-act-order", "quantize_config.json"),
        {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    ),
    "AWQ with 4 bits": (
        *("awq", "quant_config.json"),
        {"zero_point": True, "q_group_size": 8, "w_bit": 4, "version": "GEMM"},
    ),
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_settings_in_a_file_of_their_own(name: str, dense: Path, tmp_path: Path) -> None:
    kind, file, settings = OWN_FILES[name]
    directory = made(dense, kind, tmp_path / "model")
    set_config(directory, quantization_config=None)
    (directory / file).write_text(json.dumps(settings))
    reader = open_reader(directory)
    assert reader.encoding == name
    assert reader.decodes(f"{LAYER}.weight")
    reader.close()
