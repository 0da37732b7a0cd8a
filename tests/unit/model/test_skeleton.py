"""Plans without ranks: what is refused, with its name and the remedy, and where parameters are found in checkpoints."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    conversion_mapping,
)
from transformers.core_model_loading import Chunk, WeightConverter

from helpers.families import Family
from helpers.models import save_checkpoint
from lowrank_dist.decomposition.restore import Resume
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.forecast.job import ModelShapes
from lowrank_dist.initialization.open import ModelRecipe
from lowrank_dist.model.plan import Plan, open_plan
from lowrank_dist.model.skeleton import build_buffers_in, inject_adapter, meta_parameters
from lowrank_dist.storage.reader import CheckpointReader


def skeleton(directory: Path, auto_class: Any = AutoModelForCausalLM) -> Any:
    with meta_parameters():
        model = auto_class.from_config(AutoConfig.from_pretrained(directory))
    model.tie_weights()
    return model


def plan(directory: Path, *, untie: bool = False, model: Any = None, **adapter: Any) -> Plan:
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, **adapter})
    return open_plan(CheckpointReader(directory), config, backbone=model, untie=untie).plan


def refused(directory: Path, *texts: str, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        plan(directory, **options)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_weights(llama: Path) -> None:
    for target, other in (("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")):
        refused(llama, f"is tied to {other}.weight", "PiSSAStrategy(untie_embeddings=True)", target_modules=[target])
    planned = plan(llama, untie=True, target_modules=["lm_head", "embed_tokens"])
    assert [m.key for m in planned.matrices] == ["model.embed_tokens.weight"] * 2
    assert [m.input_first for m in planned.matrices] == [True, False]
    half = plan(llama, untie=True, target_modules=["embed_tokens"])
    assert [p.key for p in half.parameters if "lm_head.weight" in p.names] == ["model.embed_tokens.weight"]


def test_a_tied_weight_under_the_heads_name(llama: Path, tmp_path: Path) -> None:
    """As transformers: whichever of the names is there."""
    tensors = {}
    for file in llama.glob("*.safetensors"):
        tensors |= load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    for untie in (False, True):
        planned = plan(tmp_path, untie=untie, target_modules=["q_proj"])
        keys = {name: p.key for p in planned.parameters for name in p.names}
        assert keys["lm_head.weight"] == keys["model.embed_tokens.weight"] == "lm_head.weight"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_copies_of_tied_weights(llama: Path, tmp_path: Path, saved: list[str], stored: str) -> None:
    """Trained copies begin with the one tensor that is there, as PEFT's do."""
    tensors = {name: tensor for file in llama.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tensors[stored] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    planned = plan(tmp_path, target_modules=["q_proj"], modules_to_save=saved)
    trained = [p for p in planned.parameters if p.trainable]
    assert sorted(p.names[0].split(".modules_to_save")[0].split(".")[-1] for p in trained) == sorted(saved)
    assert {p.key for p in trained} == {stored}
    assert all(p.key is not None for p in planned.parameters)


@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_initialised_anew_is_said(tmp_path: Path, resumed: bool) -> None:
    """One line for a new head, none where a checkpoint holds it."""
    base = save_checkpoint(tmp_path, "bert", auto_class=AutoModelForMaskedLM)
    adapter = LoraConfig(r=4, target_modules=["query"], modules_to_save=["pooler", "classifier"], task_type="SEQ_CLS")
    lines: list[str] = []
    earlier = Resume(
        checkpoint=base,
        pretrained=str(base),
        pretrained_fingerprint="",
        source="",
        method="PiSSA",
        quantization=None,
    )
    opened = ModelRecipe(pretrained=str(base), adapter=adapter).open(
        skeleton(base, AutoModelForSequenceClassification),
        ShardGroup.single(),
        compute_dtype=torch.float32,
        sharding=Sharding(),
        announce=lines.append,
        resume=earlier if resumed else None,
    )
    new = "bert.pooler.dense.weight, bert.pooler.dense.bias, classifier.weight, classifier.bias"
    assert lines == [] if resumed else [f"{base} holds no {new}: newly initialised and trained"]
    opened.source.close()


def test_one_configuration_for_two_models(tmp_path: Path) -> None:
    """PEFT writes the layers that it finds into a configuration: of one model, they are too few for a larger one."""
    adapter = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["up_proj"])
    before = copy.deepcopy(adapter.to_dict())
    for layers in (2, 4):
        base = save_checkpoint(tmp_path / str(layers), "llama", num_hidden_layers=layers)
        opened = ModelRecipe(pretrained=str(base), adapter=adapter).open(
            skeleton(base),
            ShardGroup.single(),
            compute_dtype=torch.float32,
            sharding=Sharding(),
            announce=lambda _: None,
            resume=None,
        )
        opened.close()
        shapes = ModelShapes.of(base, adapter)
        assert len(opened.plan.matrices) == len(shapes.plan.matrices) == 6 * layers
        assert isinstance(opened.source.adapter.target_modules, set)  # what adapter_config.json will name
        assert adapter.to_dict() == before


def test_encoder_decoders_stay_tied(tmp_path: Path) -> None:
    small = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": 64}
    base = save_checkpoint(tmp_path, "t5", auto_class=AutoModelForSeq2SeqLM, tie_word_embeddings=True, **small)
    model = skeleton(base, AutoModelForSeq2SeqLM)
    refused(base, "is an encoder-decoder", model=model, untie=True, target_modules=["q"])


def test_embeddings_that_are_not_plain(tmp_path: Path) -> None:
    opt = save_checkpoint(
        tmp_path / "opt",
        "opt",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
    )
    refused(opt, "embed_positions is a OPTLearnedPositionalEmbedding", "drop it", target_modules=["embed_positions"])
    llama = save_checkpoint(tmp_path / "llama", "llama", tie_word_embeddings=False)
    for option in ("max_norm", "sparse", "scale_grad_by_freq"):
        model = skeleton(llama)
        setattr(model.model.embed_tokens, option, 1)
        text = f"model.embed_tokens is an embedding with {option}=1"
        refused(llama, text, "drop it from target_modules", model=model, target_modules=["embed_tokens"])


#: Families, what all-linear leaves out of each at rank 4, and why.
LEFT_OUT = {
    "qwen2_moe": ({"num_experts": 4, "moe_intermediate_size": 24}, "shared_expert_gate", "1 x 32, of less than rank 4"),
    "phimoe": ({"num_local_experts": 8}, "router", "a PhimoeTopKRouter, with a forward of its own"),
    "llama4_text": ({"num_local_experts": 8}, "router", "a Llama4Router, with a forward of its own"),
}


@pytest.mark.parametrize("architecture", LEFT_OUT)
@pytest.mark.parametrize("given", [None, ["q_proj"], ".*q_proj"])
def test_all_linear_leaves_out_what_cannot_be_meant(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architecture: str, given: Any
) -> None:
    """One line says so, and stock PEFT takes the same layers from the configuration that is saved."""
    sizes, name, reason = LEFT_OUT[architecture]
    sizes = {**sizes, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model(architecture, **sizes, **heads)
    with meta_parameters():
        ours, stock = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    adapter = LoraConfig(r=4, target_modules="all-linear", exclude_modules=given, task_type="CAUSAL_LM")
    inject_adapter(ours, adapter)
    line, of_experts = [record.message for record in caplog.records]
    assert of_experts.startswith('target_modules="all-linear" leaves 4 stacked parameters out')
    assert line.startswith(f'target_modules="all-linear" leaves 2 layers out ({name}), such as model.layers.0.')
    assert reason in line
    adapter.save_pretrained(tmp_path)
    stock = get_peft_model(stock, LoraConfig.from_pretrained(tmp_path), low_cpu_mem_usage=True)
    adapted = {n.removesuffix(".lora_A.default") for n, _ in ours.named_modules() if n.endswith(".lora_A.default")}
    assert adapted == {
        n.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for n, _ in stock.named_modules()
        if n.endswith(".lora_A.default")
    }
    linears = {n for n, layer in AutoModelForCausalLM.from_config(config).named_modules() if type(layer) is nn.Linear}
    left = {n for n in linears if n.endswith((name, "lm_head")) or (given is not None and n.endswith("q_proj"))}
    assert adapted == linears - left


def test_parameters_that_cannot_be_taken_apart(tmp_path: Path) -> None:
    mixtral = save_checkpoint(tmp_path / "mixtral", "mixtral")
    down = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    text = "rank=41 exceeds min(out, in)=40 of model.layers.0.mlp.experts.down_proj"
    refused(mixtral, text, "drop it from target_parameters", r=41, **down)
    refused(mixtral, "does not work with lora_dropout != 0", lora_dropout=0.1, **down)
    llama = save_checkpoint(tmp_path / "llama", "llama", tie_word_embeddings=False)
    embedding = {"target_modules": [], "target_parameters": ["embed_tokens.weight"]}
    refused(llama, "model.embed_tokens.weight is the weight of an embedding", "use target_modules", **embedding)
    one = save_checkpoint(tmp_path / "one", "gpt_oss", num_local_experts=1, num_experts_per_tok=1)
    refused(one, "PEFT applies its adapter the wrong way round for a single expert", **down)


@pytest.mark.parametrize("alpha", [0, -4, math.nan, math.inf])
def test_scalings_that_are_not_positive(llama: Path, alpha: float) -> None:
    """Of all layers, or of those that alpha_pattern names; methods divide by them or take their roots."""
    refused(
        llama,
        f"lora_alpha={alpha} of model.layers.0.self_attn.q_proj makes its scaling {alpha / 4:g} (r=4)",
        "raise lora_alpha (or alpha_pattern)",
        target_modules=["q_proj"],
        lora_alpha=alpha,
    )
    named = {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.1.self_attn.v_proj": alpha}}
    refused(llama, f"lora_alpha={alpha} of model.layers.1.self_attn.v_proj", **named)


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal", "mica", "pissa"])
def test_starts_that_peft_would_choose(llama: Path, start: Any) -> None:
    """Also False, with which PEFT draws B: the model would not begin as it was pretrained."""
    says = f"LoraConfig.init_lora_weights={start!r} would have no effect"
    refused(llama, says, "with LoRA() from B = 0; leave init", target_modules=["q_proj"], init_lora_weights=start)


def test_other_layers_and_variants(tmp_path: Path, llama: Path) -> None:
    class WithConvolution(nn.Module):
        pass

    model = skeleton(llama)
    with meta_parameters():
        model.model.layers[0].conv = nn.Conv1d(4, 4, 2)
    refused(
        llama, "model.layers.0.conv is a Conv1d", "drop it from target_modules", model=model, target_modules=["conv"]
    )
    refused(llama, "ensure_weight_tying=True is not supported", target_modules=["q_proj"], ensure_weight_tying=True)
    refused(llama, "would train an ordinary LoRA here", target_modules=["q_proj"], use_qalora=True)


def test_linear_layers_with_a_forward_of_their_own(tmp_path: Path) -> None:
    """Also where they are named: what replaces them computes a plain product."""
    base = save_checkpoint(tmp_path, "llama")

    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.unflatten(-1, (2, -1))).flatten(-2)

    model = skeleton(base)
    with meta_parameters():
        model.model.layers[0].self_attn.q_proj = Grouped(64, 64, bias=False)
    text = "model.layers.0.self_attn.q_proj is a Grouped, with a forward of its own"
    refused(base, text, "drop it from target_modules", model=model, target_modules=["q_proj"])


@pytest.mark.parametrize("fused", [False, True])
def test_experts_on_disk(tmp_path: Path, fused: bool) -> None:
    """One by one or stacked: an expert's rows are its rows, read by any range, and its name is that of the model."""
    base = save_checkpoint(tmp_path, "qwen3_moe", save_original_format=not fused)
    reader, model = CheckpointReader(base), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    matrices = open_plan(reader, LoraConfig(r=4, target_modules=[], target_parameters=names)).plan.matrices
    assert len(matrices) == 2 * 2 * 6
    before = reader.bytes_read
    for planned in matrices:
        assert planned.key == planned.name
        whole = model.get_parameter(planned.name.partition("[")[0])[planned.expert]
        assert (planned.rows, planned.columns) == whole.shape
        cuts = [0, 3, 3, 21, planned.rows]
        parts = [reader.rows(planned.key, a, b) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert reader.bytes_read - before == sum(m.rows * m.columns * 4 for m in matrices)
    plain = open_plan(reader, None).plan.parameters
    (stack,) = [p.key for p in plain if p.names == ("model.layers.1.mlp.experts.gate_up_proj",)]
    whole = model.model.layers[1].mlp.experts.gate_up_proj
    assert stack is not None
    assert torch.equal(reader.flat(stack, 1000, 4321), whole.flatten()[1000:4321])
    assert reader.nbytes == sum(reader.info(name).nbytes for name in reader)


def test_experts_that_do_not_fit(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path, "mixtral", max_shard_size="100MB")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    for change, text in (
        (lambda w: w[:, :-1].contiguous(), "experts.1.w1.weight [40, 63]"),
        (lambda w: w.bfloat16(), "does not go with"),
        (lambda w: w[:-1].contiguous(), "do not make 4 equal ones"),
    ):
        save_file(tensors | {name: change(tensors[name])}, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=text.replace("[", r"\[")):
            plan(base, target_modules=["q_proj"])
    del tensors[name]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused(base, "model.layers.0.mlp.experts.gate_up_proj [4, 80, 64]", target_modules=["q_proj"])


def test_conversions_that_take_columns_apart(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = WeightConverter("self_attn.q_proj.weight", ["self_attn.a.weight", "self_attn.b.weight"], [Chunk(dim=1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [chunk])
    model = skeleton(llama)
    with meta_parameters():
        for layer in model.model.layers:
            layer.self_attn.a, layer.self_attn.b = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
            del layer.self_attn.q_proj
    text = (
        "model.layers.0.self_attn.a.weight [64, 32]: transformers makes it while loading, of model.layers.0.self_attn"
    )
    refused(llama, text, "Chunk(dim=1", "save_original_format=False", model=model, target_modules=["v_proj"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("named", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["gptj", "gemma"])
def test_buffers_are_those_of_a_model_built_in_the_dtype(kind: str, named: torch.dtype, dtype: torch.dtype) -> None:
    """Whatever the configuration names: GPT-J's fp32 table is made of rounded frequencies, Gemma rounds a scale."""
    config = Family(kind, config={"hidden_size": 48} if kind == "gemma" else {}).configuration()
    with meta_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=named)
        wanted = dict(AutoModelForCausalLM.from_config(config, dtype=dtype).named_buffers())
    build_buffers_in(model, dtype)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == wanted.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == wanted[name].dtype
        assert torch.equal(buffer, wanted[name]), name
    assert {parameter.dtype for parameter in model.parameters()} == {named}
