"""Merged models against stock PEFT: the same logits, the bound of rounding, and one named error for what does not fit.

Checkpoints of this package are made here of adapters that PEFT drew;
`tests/distributed/initialization/test_materialize.py` merges those that were trained.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import lowrank_dist.export.merge as merge
from helpers.command import lowrank_dist
from helpers.models import save_checkpoint
from lowrank_dist import cli
from lowrank_dist.adapters.files import read_adapter, write_adapter
from lowrank_dist.cli import merge as command
from lowrank_dist.errors import CheckpointError, InputError, ModelError
from lowrank_dist.export.convert import convert_checkpoint
from lowrank_dist.export.merge import merge_checkpoint
from lowrank_dist.storage.beside import exclusive
from lowrank_dist.storage.reader import CheckpointReader

FP32, BF16 = torch.float32, torch.bfloat16

pytestmark = [
    # of PEFT about the models of these tests, which it handles
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


@dataclass(frozen=True)
class Case:
    """A model, and what of it is adapted."""

    architecture: str
    adapter: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)


def experts(prefix: str) -> dict[str, Any]:
    parameters = [f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"]
    return {"target_modules": ["q_proj"], "target_parameters": parameters}


TIED = {"tie_word_embeddings": True}
CASES = {
    "llama": Case("llama", {"target_modules": "all-linear", "lora_alpha": 7}),
    "patterns": Case(
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 6},
            "alpha_pattern": {"q_proj": 5},
            "use_rslora": True,
        },
    ),
    "more than full rank": Case("llama", {"target_modules": ["k_proj"], "r": 70}),  # of a 32 x 64 matrix
    "conv1d": Case("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "tied positions": Case("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "tied untouched": Case("llama", {"target_modules": ["v_proj"]}, TIED),
    "tied embedding": Case("llama", {"target_modules": ["embed_tokens", "q_proj"]}, TIED),
    "tied head": Case("gpt2", {"target_modules": ["lm_head"]}),
    "tied both": Case("llama", {"target_modules": ["embed_tokens", "lm_head"]}, TIED),
    "whole head": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, TIED),
    "whole embedding": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, TIED),
    "whole both": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, TIED),
    "whole block": Case("llama", {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "norm"]}),
    "mixtral": Case("mixtral", experts("mlp")),
    "mixtral fused": Case("mixtral", experts("mlp"), {"save_original_format": False}),
    "whole experts": Case("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "granitemoe": Case("granitemoe", experts("block_sparse_moe")),
    "gpt_oss": Case("gpt_oss", experts("mlp")),  # experts stored as [in, out]
    "parameter": Case("llama", {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]}),
}


def draw(base: Path, case: Case, seed: int, auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Stock PEFT's model over `base` in fp32, everything that it trains drawn at random."""
    model = auto_class.from_pretrained(base, dtype=FP32, **options)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **case.adapter}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape) + (0 if "lora_" in name else parameter))
    return model.eval()


def save_peft(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def save_as_checkpoint(base: Path, trained: Path, initial: Path, directory: Path, **manifest: Any) -> Path:
    """What AdapterCheckpoint writes, `lora` aside, of two adapters that PEFT wrote."""
    tensors, config = read_adapter(trained)
    start, _ = read_adapter(initial)
    write_adapter(directory / "adapter", tensors, config)
    factors = {name: t for name, t in start.items() if ".lora_" in name}
    write_adapter(directory / "adapter_init", factors, config)
    a_of_stacks = {n: t.shape[0] // config.r for n, t in tensors.items() if "experts" in n and "lora_A" in n}
    b_of_stacks = {n.replace("lora_A", "lora_B"): count for n, count in a_of_stacks.items()}
    values = {"base": str(base), "starts_at_zero": False, "experts": a_of_stacks | b_of_stacks, "matrices": []}
    (directory / "lowrank_dist.json").write_text(json.dumps({**values, **manifest}))
    return directory


def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def load(directory: Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Stock transformers' model, which has found everything and ignored nothing."""
    model, info = auto_class.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def load_peft(base: Path, directory: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=FP32), directory)


# -- equal to PEFT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_that_peft_wrote(tmp_path: Path, name: str) -> None:
    """fp32, several files. The unmerged model is the reference: on tied embeddings PEFT's own merge changes both."""
    case = CASES[name]
    base = save_checkpoint(tmp_path / "base", case.architecture, **case.model)
    model = draw(base, case, seed=1)
    adapter = save_peft(model, tmp_path / "adapter")
    output = merge_checkpoint(adapter, tmp_path / "merged", max_file_bytes=100_000)
    assert len(list(output.glob("*.safetensors"))) > 3
    merged, expected = logits(load(output)), logits(model)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(load(base))).abs().max() > 0.01
    if not case.model.get("tie_word_embeddings") and case.architecture != "gpt2":
        torch.testing.assert_close(merged, logits(model.merge_and_unload()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["patterns", "conv1d", "tied both", "whole head", "mixtral", "gpt_oss", "parameter"])
def test_a_checkpoint(tmp_path: Path, name: str) -> None:
    """Equal to the converted LoRA under stock PEFT: W + s (B A - B0 A0)."""
    case = CASES[name]
    base = save_checkpoint(tmp_path / "base", case.architecture, **case.model)
    trained, initial = (save_peft(draw(base, case, seed), tmp_path / f"{seed}") for seed in (1, 2))
    checkpoint = save_as_checkpoint(base, trained, initial, tmp_path / "checkpoint")
    lora = tmp_path / "lora"
    convert_checkpoint(checkpoint, lora)
    expected = logits(load_peft(base, lora))
    for source in (checkpoint, lora):
        output = merge_checkpoint(source, tmp_path / "merged", base=base, max_file_bytes=50_000, overwrite=True)
        torch.testing.assert_close(logits(load(output)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(load_peft(base, trained))).abs().max() > 0.01  # the initial product counts


@pytest.mark.parametrize("name", ["llama", "conv1d", "tied embedding", "mixtral"])
@pytest.mark.parametrize(("dtype", "unit"), [(BF16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_every_weight_is_rounded_once(tmp_path: Path, name: str, dtype: torch.dtype, unit: float) -> None:
    """|merged - exact| <= u |exact| by the unit roundoff u of the dtype, beside some fp32 rounding (and, in fp16,
    2^-25: half the spacing of subnormal numbers). The exact values are PEFT's merge of the bf16 base, in fp64.
    """
    case = CASES[name]
    base = save_checkpoint(tmp_path / "base", case.architecture, dtype=BF16, **case.model)
    adapter = save_peft(draw(base, case, seed=1), tmp_path / "adapter")
    output = merge_checkpoint(adapter, tmp_path / "merged", dtype=None if dtype == BF16 else dtype)
    assert {t.dtype for t in tensors_of(output).values()} == {dtype}
    assert json.loads((output / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if "tied" in name:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False  # else PEFT warns of its merge
    exact = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().merge_and_unload()
    found = load(output, dtype=torch.float64).state_dict()
    changed = 0
    for key, value in exact.state_dict().items():
        error, bound = (found[key] - value).abs(), unit * value.abs() + 1e-6 * value.abs().max() + 2.0**-25
        assert bool((error <= bound).all()), key
        changed += bool(error.any())
    assert changed
    # of logits there is no such bound; what one rounding of all weights gives is some multiples of u
    assert (logits(load(output, dtype=FP32)) - logits(exact.float())).abs().max() < 20 * unit


def test_fp32_of_a_bf16_base_is_exact(tmp_path: Path) -> None:
    """As the model before it was rounded: fp32 rounding of the sums only."""
    base = save_checkpoint(tmp_path / "base", "llama", dtype=BF16)
    model = draw(base, CASES["llama"], seed=1)
    adapter = save_peft(model, tmp_path / "adapter")
    output = merge_checkpoint(adapter, tmp_path / "merged", dtype=FP32)
    found = load(output)
    assert found.dtype == FP32
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


def test_what_is_not_adapted_is_copied(tmp_path: Path) -> None:
    """Names, dtypes and bytes of the base, integers and other dtypes in it too; and its other files."""
    base = save_checkpoint(tmp_path / "base", "mixtral", dtype=BF16, max_shard_size="1GB")
    adapter = save_peft(draw(base, Case("mixtral", {"target_modules": ["q_proj"]}), 1), tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors") | {"extra.steps": torch.tensor(3), "extra.f": torch.rand(2)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    secret = tmp_path / "secret"
    secret.write_text("password")
    (base / "vocab.json").symlink_to(secret)
    others = (".env", "notes.txt", "token", "pytorch_model.bin", "adapter_config.json", "modeling.py")
    for name in ("tokenizer.json", "tokenizer.model", "LICENSE", *others):
        (base / name).write_text("{}")
    output = merge_checkpoint(adapter, tmp_path / "merged")
    found = tensors_of(output)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) == ("q_proj" not in name)
    names = {path.name for path in output.iterdir()}
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "LICENSE"}
    assert names == expected | {"model.safetensors", "lowrank_dist.json"}
    assert (output / "config.json").read_text() == (base / "config.json").read_text()


def test_a_base_of_links(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its configuration is read through a link, as its weights are; one that is not followed ends it at the start."""
    base, adapter = pair
    links = tmp_path / "links"
    links.mkdir()
    for path in base.iterdir():
        (links / path.name).symlink_to(path)
    output = merge_checkpoint(adapter, tmp_path / "merged", base=links)
    assert {path.name for path in output.iterdir()} > {"config.json", "generation_config.json"}
    shutil.copy(base / "config.json", tmp_path)
    (links / "config.json").unlink()
    (links / "config.json").symlink_to(tmp_path / "config.json")
    refused(CheckpointError, adapter, tmp_path / "out", "where no weights of the model are", base=links)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.filterwarnings("ignore:.*not initialized from the model checkpoint")
def test_a_new_head(tmp_path: Path, labels: int) -> None:
    """A classifier over the encoder of a masked language model, which lacks the head and the pooler."""
    base = save_checkpoint(tmp_path / "base", "bert", auto_class=AutoModelForMaskedLM)
    case = Case(
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["pooler", "classifier"], "task_type": "SEQ_CLS"},
    )
    model = draw(base, case, 1, AutoModelForSequenceClassification, num_labels=labels)
    adapter = save_peft(model, tmp_path / "adapter")
    output = merge_checkpoint(adapter, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(output)
    assert merged.num_labels == labels
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_the_base_of_another_class_without_its_prefix(tmp_path: Path) -> None:
    """A bare encoder on disk: names without the prefix that the adapted model has."""
    full = save_checkpoint(tmp_path / "full", "llama", tie_word_embeddings=True)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(full).model.save_pretrained(base)
    config = json.loads((full / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config))
    model = draw(base, CASES["tied embedding"], seed=1)
    output = merge_checkpoint(save_peft(model, tmp_path / "adapter"), tmp_path / "merged")
    assert {"embed_tokens.weight", "lm_head.weight"} <= tensors_of(output).keys()
    torch.testing.assert_close(logits(load(output)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_names_that_transformers_changes_while_loading(tmp_path: Path, target: str) -> None:
    """A model of images and text, on disk under the names of earlier releases, its tie in two configurations."""
    sizes = {"hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = save_checkpoint(
        tmp_path / "base",
        "llava",
        auto_class=AutoModelForImageTextToText,
        text_config={**sizes, "model_type": "llama", "vocab_size": 256, **TIED},
        vision_config={**sizes, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        **TIED,
    )
    assert "language_model.model.norm.weight" in CheckpointReader(base)
    model = draw(base, Case("llava", {"target_modules": [target]}), 1, AutoModelForImageTextToText)
    output = merge_checkpoint(save_peft(model, tmp_path / "adapter"), tmp_path / "merged")
    assert "language_model.model.norm.weight" in CheckpointReader(output)
    config = json.loads((output / "config.json").read_text())
    tied = target == "q_proj"
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == tied
    merged, expected = logits(load(output, AutoModelForImageTextToText)), logits(model)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(load(base, AutoModelForImageTextToText))).abs().max() > 0.01


def test_a_tied_weight_under_the_heads_name(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True, max_shard_size="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for number, name in enumerate(("tied head", "tied embedding", "tied untouched")):
        model = draw(base, Case("llama", CASES[name].adapter), seed=1)
        adapter = save_peft(model, tmp_path / f"adapter{number}")
        output = merge_checkpoint(adapter, tmp_path / f"merged{number}")
        torch.testing.assert_close(logits(load(output)), logits(model), rtol=1e-5, atol=1e-5)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in several files, and an adapter for it."""
    root = tmp_path_factory.mktemp("pair")
    base = save_checkpoint(root / "base", "llama")
    return base, save_peft(draw(base, CASES["llama"], seed=1), root / "adapter")


def refused(error: type[Exception], adapter: Path, output: Path, *texts: str, **options: Any) -> None:
    """An error with all of `texts`, and nothing half-written."""
    there = sorted(output.parent.iterdir())
    with warnings.catch_warnings(), pytest.raises(error) as caught:
        merge_checkpoint(adapter, output, **options)
    for text in texts:
        assert text in str(caught.value)
    assert sorted(output.parent.iterdir()) == there


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_damaged_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    file = base / "model-00003-of-00006.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(CheckpointError, adapter, tmp_path / "out", file.name, "truncated or corrupt", base=base)
    file.unlink()
    refused(CheckpointError, adapter, tmp_path / "out", file.name, "missing", base=base)
    tensors = load_file(pair[0] / file.name)
    name = next(iter(tensors))
    left = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(left, file, metadata={"format": "pt"})
    refused(CheckpointError, adapter, tmp_path / "out", f"names tensor {name}, which {file.name}", base=base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(ModelError, adapter, tmp_path / "out", name, "hold no such tensor", base=base)
    tensors[name].view(-1)[5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text((pair[0] / "model.safetensors.index.json").read_text())
    refused(CheckpointError, adapter, tmp_path / "out", name, "NaN or infinity", base=base)


def test_an_adapter_for_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    wider = save_checkpoint(tmp_path / "models" / "wider", "llama", intermediate_size=140)
    text = "layers.0.mlp.down_proj.lora_A.weight has shape [4, 136], but the model needs [4, 140]"
    refused(ModelError, pair[1], tmp_path / "out", text, "pass the model that it was trained from", base=wider)
    shorter = save_checkpoint(tmp_path / "models" / "shorter", "llama", num_hidden_layers=1)
    text = "layers.1.mlp.down_proj.lora_A.weight [4, 136] has no parameter in the model"
    refused(ModelError, pair[1], tmp_path / "out", text, "... and 9 more", base=shorter)
    deeper = save_checkpoint(tmp_path / "models" / "deeper", "llama", num_hidden_layers=3)
    queries = save_peft(draw(pair[0], Case("llama", {"target_modules": ["q_proj"]}), 1), tmp_path / "queries")
    text = "layers.2.self_attn.q_proj.lora_A.weight [4, 64] is missing"
    refused(ModelError, queries, tmp_path / "out", text, base=deeper)
    gpt2 = save_checkpoint(tmp_path / "models" / "gpt2", "gpt2")
    refused(ModelError, pair[1], tmp_path / "out", "for a LlamaForCausalLM", "configuration of a gpt2", base=gpt2)
    change_json(queries / "adapter_config.json", auto_mapping=None)
    refused(ModelError, queries, tmp_path / "out", "cannot be applied to GPT2LMHeadModel", base=gpt2)


def test_the_same_shapes_of_another_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A checkpoint knows the norms of the weights that it was trained from."""
    reader = CheckpointReader(pair[0])
    keys = [name for name in reader if "_proj" in name]
    norms = [
        {"name": key.removesuffix(".weight"), "norm": float(reader.rows(key, 0, reader.info(key).shape[0]).norm())}
        for key in keys
    ]
    checkpoint = save_as_checkpoint(pair[0], pair[1], pair[1], tmp_path / "checkpoint", matrices=norms)
    other = shutil.copytree(pair[0], tmp_path / "other")
    for file in other.glob("*.safetensors"):
        save_file({name: t * 1.001 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    refused(CheckpointError, checkpoint, tmp_path / "out", "another model or revision", "has norm", base=other)
    output = merge_checkpoint(checkpoint, tmp_path / "out")  # the same adapter twice: nothing is added
    torch.testing.assert_close(logits(load(output)), logits(load(pair[0])), rtol=1e-5, atol=1e-5)


def test_an_adapter_with_something_missing_or_too_much(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = pair[0]
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({key: t for key, t in whole.items() if key != name}, file)
    refused(ModelError, adapter, tmp_path / "out", f"{name} [64, 4] is missing", base=base)
    save_file(whole | {"base_model.model.vision.bias": torch.ones(2)}, file)
    refused(ModelError, adapter, tmp_path / "out", "base_model.model.vision.bias [2] has no parameter", base=base)
    save_file(whole | {name: torch.full_like(whole[name], torch.inf)}, file)
    refused(CheckpointError, adapter, tmp_path / "out", name, "NaN or infinity", base=base)
    save_file(whole | {name: whole[name].to(torch.float8_e4m3fn)}, file)
    refused(CheckpointError, adapter, tmp_path / "out", f"{name} is stored as F8_E4M3", base=base)
    file.write_bytes(file.read_bytes()[:-3])
    refused(CheckpointError, adapter, tmp_path / "out", "adapter_model.safetensors", "truncated or corrupt", base=base)
    (adapter / "adapter_config.json").write_text("{")
    refused(CheckpointError, adapter, tmp_path / "out", "adapter_config.json", "damaged", base=base)
    (adapter / "adapter_config.json").unlink()
    refused(CheckpointError, adapter, tmp_path / "out", "holds neither adapter/", "nor adapter_config.json", base=base)


@pytest.mark.parametrize(
    ("error", "values", "text"),
    [
        (CheckpointError, {"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        (ModelError, {"peft_type": "IA3", "r": None}, "lora_A.weight [4, 64] has no parameter in the model"),
        (CheckpointError, {"peft_type": "LATER"}, "the installed PEFT knows no adapters of type LATER"),
        (ModelError, {"use_dora": True}, "q_proj.lora_magnitude_vector [64] is missing"),
        (ModelError, {"lora_bias": True}, "q_proj.lora_B.bias [64] is missing"),
        (ModelError, {"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported"),
        (ModelError, {"use_qalora": True}, "use_qalora=True is not supported: PEFT computes QA-LoRA over GPTQ's"),
    ],
    ids=str,
)
def test_adapters_of_other_kinds(
    pair: tuple[Path, Path], tmp_path: Path, error: type[Exception], values: dict[str, Any], text: str
) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    if values.get("peft_type") == "IA3":
        targets = {"target_modules": ["q_proj"], "feedforward_modules": []}
        config.write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": str(pair[0]), **targets}))
    else:
        change_json(config, **values)
    refused(error, adapter, tmp_path / "out", text)


def test_how_an_adapter_was_made_does_not_matter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """PEFT leaves the options of the start in the configuration of an adapter that it has converted."""
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", lora_ga_config=asdict(LoraGAConfig()))
    merge_checkpoint(pair[1], tmp_path / "without")
    merge_checkpoint(adapter, tmp_path / "with")
    first, second = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("without", "with"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_parts_that_are_for_a_residual(pair: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = save_as_checkpoint(*pair[:1], pair[1], pair[1], tmp_path / "checkpoint")
    for part, text in (("adapter", f"pass {checkpoint}"), ("adapter_init", "for a residual")):
        refused(CheckpointError, checkpoint / part, tmp_path / "out", text, "not for the original model")
    decomposed = shutil.copytree(pair[0], tmp_path / "decomposed")
    shutil.copytree(pair[1], decomposed / "pissa_init")
    refused(CheckpointError, decomposed / "pissa_init", tmp_path / "out", "for a residual", base=pair[0])
    refused(CheckpointError, checkpoint, tmp_path / "out", "a residual model", base=decomposed)
    # what PEFT trained on the residual belongs there
    merged = merge_checkpoint(pair[1], tmp_path / "merged", base=decomposed)
    torch.testing.assert_close(logits(load(merged)), logits(load_peft(*pair)), rtol=1e-5, atol=1e-5)


def test_a_quantized_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    change_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(ModelError, pair[1], tmp_path / "out", "cannot be merged into", "is quantized already", base=base)


def test_a_base_that_is_not_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="/nowhere/model")
    text = f"{adapter} names this base model; pass base if it is elsewhere now"
    refused(CheckpointError, adapter, tmp_path / "out", "/nowhere/model", text)
    change_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    refused(CheckpointError, adapter, tmp_path / "out", "names no base model; pass base")


def test_values_that_the_dtype_cannot_hold(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = 7e4
            save_file(tensors, file, metadata={"format": "pt"})
    text = "model.norm.weight: 7e+04 is too large for torch.float16"
    refused(CheckpointError, pair[1], tmp_path / "out", text, base=base, dtype=torch.float16)


# -- the output -------------------------------------------------------------------------------------------------------


def test_what_is_in_the_way(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    output = tmp_path / "out"
    output.mkdir()
    merge_checkpoint(adapter, output)  # empty
    before = (output / "config.json").stat().st_mtime_ns
    refused(InputError, adapter, output, "exists and is not empty", "pass overwrite")
    assert (output / "config.json").stat().st_mtime_ns == before
    (output / "stale").touch()
    merge_checkpoint(adapter, output, overwrite=True)
    assert not (output / "stale").exists()
    (tmp_path / "file").touch()
    refused(InputError, adapter, tmp_path / "file", "is not a directory", overwrite=True)
    for path in (base, adapter, base.parent):
        refused(InputError, adapter, path, "is or contains what it would be made from", overwrite=True)
    refused(InputError, adapter, tmp_path / "other", "max_file_bytes=0 must be positive", max_file_bytes=0)
    with exclusive(tmp_path / "other"):
        refused(InputError, adapter, tmp_path / "other", "another run is writing it")


def test_too_small_a_disk(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=400_000))
    refused(InputError, pair[1], tmp_path / "out", "0.00 GB are needed", "make room or choose another disk")


def test_a_disk_that_fills_up(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old output stays as it was."""
    import lowrank_dist.storage.writer as tensor_files

    output = merge_checkpoint(pair[1], tmp_path / "out")
    before = {path: path.read_bytes() for path in output.iterdir()}
    with open("/dev/full", "wb") as full:
        real = tensor_files.os.pwrite
        monkeypatch.setattr(tensor_files.os, "pwrite", lambda _, data, offset: real(full.fileno(), data, 0))
        refused(CheckpointError, pair[1], output, "No space left", overwrite=True)
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_small_blocks_give_the_same(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time; sums of the same products in the same order but for the blocks of the matrix product."""
    base = save_checkpoint(tmp_path / "base", "mixtral")
    adapter = save_peft(draw(base, CASES["mixtral"], seed=1), tmp_path / "adapter")
    whole = tensors_of(merge_checkpoint(adapter, tmp_path / "whole"))
    monkeypatch.setattr(merge, "BLOCK_BYTES", 600)
    rows = tensors_of(merge_checkpoint(adapter, tmp_path / "rows"))
    for name, tensor in whole.items():
        torch.testing.assert_close(rows[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As a user runs it: a progress bar, the directory; then one line for what is wrong."""

    output = tmp_path / "out"
    done = lowrank_dist(
        "merge", pair[1], "--output", output, "--dtype", "bfloat16", "--max-shard-size", "0.0001", "--base", pair[0]
    )
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    assert "Merging: 100%" in done.stderr
    assert len(list(output.glob("*.safetensors"))) > 2
    assert load(output).dtype == BF16
    again = lowrank_dist("merge", pair[1], "--output", output)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == (
        f"lowrank-dist merge: {output}: exists and is not empty; choose another directory or pass overwrite\n"
    )


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_sizes_that_are_none(
    pair: tuple[Path, Path], tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.main(["merge", str(pair[1]), "--output", str(output), f"--max-shard-size={size}"]) == 1
    assert "must be a positive number of GB" in capsys.readouterr().err
    assert not output.exists()


def test_the_default_size_is_that_of_transformers() -> None:
    options = command.parser().parse_args(["x", "--output", "y"])
    assert options.max_shard_size * 1e9 == merge.MAX_BYTES
