"""Adapters that only PEFT's layers compute, merged: the bits of stock PEFT's merge, or one error with the remedy."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.models import save_checkpoint
from helpers.tuners import CASES
from lowrank_dist.adapters.source import find_adapter
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.export.merge import merge_checkpoint
from lowrank_dist.export.merge_plan import plan_merge

# PEFT warns of tied weights and of rounding in merges
pytestmark = pytest.mark.filterwarnings("ignore")

QV = ["q_proj", "v_proj", "down_proj"]
TUNERS: dict[str, Callable[[], PeftConfig]] = {
    **CASES,
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "dora+norms": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=QV, use_dora=True, modules_to_save=["input_layernorm", "lm_head"]
    ),
}
#: Why PEFT has no merge for these.
REFUSED = {
    "lora_bias+norms": "the base layer has no bias",
    "lora_bias": "the base layer has no bias",
    "lora+replication": "the copies of a layer share its weights",
    "lora+alora": "aLoRA does not support merging",
    "beft": "Base layer has no bias",
    "lily": "not supported for Lily",
    "poly": "PEFT has no merge for it",
    "adaption_prompt": "computations of its own",
    "prompt_tuning": "virtual tokens are not weights",
    "p_tuning_lstm": "virtual tokens are not weights",
    "prefix_tuning": "virtual tokens are not weights",
    "cartridge": "virtual tokens are not weights",
}
VIRTUAL = ("prompt", "p_tuning", "prefix", "multitask", "cartridge", "adaption")


def draw(
    base: Path, directory: Path, config: PeftConfig, auto_class: Any = AutoModelForCausalLM, **options: Any
) -> Path:
    """An adapter that stock PEFT wrote, everything that it trains drawn at random; none of it is zero."""
    torch.manual_seed(3)
    model = get_peft_model(auto_class.from_pretrained(base, dtype=torch.float32, **options), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    return directory


def stock(base: Path, adapter: Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> dict[str, Tensor]:
    """Weights of stock PEFT's merge in fp32."""
    model = auto_class.from_pretrained(base, dtype=torch.float32, **options)
    merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    weights: dict[str, Tensor] = merged.state_dict()
    return weights


def weights(directory: Path) -> dict[str, Tensor]:
    """Weights as stock transformers loads them, in the dtypes of the files."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    found: dict[str, Tensor] = model.state_dict()
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.table
@pytest.mark.parametrize("name", [name for name in TUNERS if name not in REFUSED and not name.startswith(VIRTUAL)])
def test_every_tuner(llama: Path, tmp_path: Path, name: str) -> None:
    """The bits of stock PEFT's merge; on a model with tied embeddings."""
    adapter = draw(llama, tmp_path / "adapter", TUNERS[name]())
    output = merge_checkpoint(adapter, tmp_path / "merged", base=llama, max_file_bytes=100_000)
    found = weights(output)
    assert not differing(found, stock(llama, adapter))
    changed = [k for k, w in weights(llama).items() if not torch.equal(w, found[k])]
    assert changed
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] == (name != "dora+norms")


LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
MODELS: dict[str, tuple[str, Callable[[], PeftConfig]]] = {
    "biases of all layers": (
        "qwen2",
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="all", use_dora=True),
    ),
    "biases of adapted layers": ("qwen2", lambda: peft.LoraConfig(r=4, target_modules=["k_proj"], bias="lora_only")),
    "lora_bias": ("qwen2", lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "beft": ("qwen2", lambda: peft.BeftConfig(target_modules=["q_proj", "v_proj"])),
    "conv1d": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], use_dora=True, bias="all")),
    "ia3 conv1d": ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"])),
    "experts": (
        "mixtral",
        lambda: peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            trainable_token_indices=[3, 9],
        ),
    ),
    "whole modules": (
        "llama",
        lambda: peft.VeraConfig(r=8, target_modules=["q_proj"], modules_to_save=["up_proj", "norm"]),
    ),
    "adalora": (
        "llama",
        lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=9, target_modules=["q_proj", "up_proj"]),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_layers(tmp_path: Path, name: str) -> None:
    """Biases, Conv1D, stacked experts, whole modules: on the models that have them."""
    architecture, make = MODELS[name]
    base = save_checkpoint(tmp_path / "base", architecture)
    adapter = draw(base, tmp_path / "adapter", make())
    found = weights(merge_checkpoint(adapter, tmp_path / "merged"))
    assert not differing(found, stock(base, adapter))
    assert differing(found, weights(base))


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=ids).logits
    return result


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=True), False),
        (peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True), False),
        (peft.VeraConfig(r=8, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]), True),
    ],
    ids=["embedding", "head", "block"],
)
def test_what_pefts_merge_gets_wrong(llama: Path, tmp_path: Path, config: PeftConfig, tied: bool) -> None:
    """PEFT would change both of two tied weights, and raises for a trained block; its unmerged model is right."""
    adapter = draw(llama, tmp_path / "adapter", config)
    output = merge_checkpoint(adapter, tmp_path / "merged", base=llama)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), adapter)
    merged = logits(AutoModelForCausalLM.from_pretrained(output))
    torch.testing.assert_close(merged, logits(model), rtol=1e-5, atol=1e-5)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_new_head(tmp_path: Path) -> None:
    """A classifier over an encoder, whose names lack the prefix that they have in the classifier."""
    base = save_checkpoint(tmp_path / "base", "bert", auto_class=AutoModel)
    config = peft.VeraConfig(r=8, target_modules=["query"], task_type="SEQ_CLS")
    adapter = draw(base, tmp_path / "adapter", config, AutoModelForSequenceClassification, num_labels=3)
    output = merge_checkpoint(adapter, tmp_path / "merged")
    found = AutoModelForSequenceClassification.from_pretrained(output).state_dict()
    assert found["classifier.weight"].shape[0] == 3
    assert not differing(found, stock(base, adapter, AutoModelForSequenceClassification, num_labels=3))


def test_parameters_of_the_model_itself(llama: Path, tmp_path: Path) -> None:
    """Norms and tied embeddings that were trained beside a tuner: in the file under their own names."""
    adapter = draw(llama, tmp_path / "adapter", TUNERS["vera"]())
    file = adapter / "adapter_model.safetensors"
    own = {"model.norm.weight": torch.rand(64), "model.embed_tokens.weight": torch.randn(256, 64)}
    save_file(load_file(file) | {f"base_model.model.{name}": value for name, value in own.items()}, file)
    output = merge_checkpoint(adapter, tmp_path / "merged", base=llama)
    found = weights(output)
    assert not differing(found, stock(llama, adapter))
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_base_in_bf16_is_rounded_once(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    adapter = draw(base, tmp_path / "adapter", TUNERS["dora"]())
    found = weights(merge_checkpoint(adapter, tmp_path / "merged"))
    assert not differing(found, {name: weight.bfloat16() for name, weight in stock(base, adapter).items()})
    wide = weights(merge_checkpoint(adapter, tmp_path / "wide", dtype=torch.float32))
    assert not differing(wide, stock(base, adapter))


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_merge(llama: Path, tmp_path: Path, name: str) -> None:
    adapter = draw(llama, tmp_path / "adapter", TUNERS[name]())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError) as caught:
        merge_checkpoint(adapter, tmp_path / "merged", base=llama)
    kind = json.loads((adapter / "adapter_config.json").read_text())["peft_type"]
    for text in (f"an adapter of type {kind}", "cannot be merged", REFUSED[name], f"load {adapter} with PEFT"):
        assert text in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_one_layer_at_a_time(llama: Path, tmp_path: Path) -> None:
    """Merged weights are let go; beforehand, only one layer of every kind is read."""
    adapter = find_adapter(draw(llama, tmp_path / "adapter", TUNERS["vera"]()), any_type=True)
    plan = plan_merge(adapter, llama)
    assert plan.tuned is not None
    assert len(plan.tuned.changed) == 14
    assert plan.reader.bytes_read == sum(tensor.numel * 4 for tensor in plan.of_tuned.values()) / 2
    before: list[weakref.ref[Tensor]] = []
    for _, values in plan.tuned.merged():
        assert values is not None
        assert [ref() for ref in before[:-1]] == [None] * len(before[:-1])
        before.append(weakref.ref(values.untyped_storage()))
    plan.reader.close()
    adapter.close()


def test_weights_of_another_model(llama: Path, tmp_path: Path) -> None:
    """A checkpoint knows the norms of the weights that it was trained from."""
    adapter = draw(llama, tmp_path / "checkpoint" / "adapter", TUNERS["vera"]())
    norms = [{"name": "model.layers.1.mlp.up_proj", "norm": 1.0}]
    manifest = {"base": str(llama), "starts_at_zero": True, "matrices": norms}
    (adapter.parent / "lowrank_dist.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight of .* another model or revision"):
        merge_checkpoint(adapter.parent, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (adapter.parent / "lowrank_dist.json").write_text(json.dumps(manifest | {"matrices": []}))
    found = weights(merge_checkpoint(adapter.parent, tmp_path / "merged"))
    assert not differing(found, stock(llama, adapter))
