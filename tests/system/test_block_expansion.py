"""Copies of decoder layers with outputs of zero, trained over a frozen sharded base (LLaMA Pro)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.families import FAMILIES
from helpers.models import save_checkpoint
from helpers.ranks import run_ranks
from helpers.training import BATCHES, LR, ByStep, loader, make_trainer, tokens
from helpers.tuners import decoded
from lowrank_dist import NF4, LoRA, PiSSAStrategy, convert_checkpoint, inspect, merge_checkpoint
from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.forecast.job import ModelShapes
from lowrank_dist.model.expansion import Expansion, expand
from lowrank_dist.model.plan import open_plan
from lowrank_dist.model.skeleton import build_skeleton, meta_parameters, read_config
from lowrank_dist.storage.reader import CheckpointReader

COPIES = "model.layers.1.", "model.layers.3."  # of the tiny LLaMA's two layers


def train(pretrained: Path, quantization: NF4 | None, steps: int, save: Path, resume: Path | None) -> list[float]:
    strategy = PiSSAStrategy(pretrained, quantization=quantization, expand_blocks=2, show_progress=False)
    module, trainer = ByStep(pretrained), make_trainer(strategy, steps=steps)
    data = loader(torch.distributed.get_rank(), torch.distributed.get_world_size(), BATCHES)
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    assert module.model.config.num_hidden_layers == 4
    trainer.save_checkpoint(save)
    return module.losses


def expanded(model: PreTrainedModel, copied: PreTrainedModel) -> PreTrainedModel:
    """`model` with copies of the layers of `copied`, made by stock transformers; only they are trained."""
    config = AutoConfig.for_model(**{**model.config.to_dict(), "num_hidden_layers": 4})
    new = AutoModelForCausalLM.from_config(config)
    state = {n: p for n, p in model.state_dict().items() if ".layers." not in n}
    for place, (origin, source) in enumerate([(0, model), (0, copied), (1, model), (1, copied)]):
        for name, value in source.model.layers[origin].state_dict().items():
            zero = source is copied and name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            state[f"model.layers.{place}.{name}"] = torch.zeros_like(value) if zero else value.clone()
    new.load_state_dict(state)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(name.startswith(COPIES))
    return new


def train_stock(model: PreTrainedModel, steps: int) -> list[float]:
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR), []
    for ids in tokens(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantization", [None, NF4()], ids=["dense", "nf4"])
def test_copies_train_as_in_stock_transformers(llama: Path, tmp_path: Path, quantization: NF4 | None) -> None:
    """1, 2 and 3 ranks, resumed on others; the base is the frozen one; `merge` writes the expanded model."""
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    base = decoded(llama, quantization, "")
    model, ids = expanded(base, original), tokens(1)[0]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    expected = train_stock(model, 5)
    saves = [tmp_path / name for name in ("two", "three", "one")]
    losses = run_ranks(2, train, llama, quantization, 2, saves[0], None)[0]
    losses += run_ranks(3, train, llama, quantization, 4, saves[1], saves[0])[0]
    losses += run_ranks(1, train, llama, quantization, 5, saves[2], saves[1])[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    found = inspect(saves[2])
    assert (found.facts["type"], found.problems) == ("copies of layers (expand_blocks=2)", [])
    assert set(TrainingCheckpoint(saves[2]).manifest["hashes"]) == {"adapter", "optimizer", "state"}

    merged = AutoModelForCausalLM.from_pretrained(merge_checkpoint(saves[2], tmp_path / "merged"), dtype=torch.float32)
    assert merged.config.num_hidden_layers == 4
    stock = dict(model.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    unchanged = dict(expanded(original, again).named_parameters())
    for name, parameter in merged.named_parameters():
        if name.startswith(COPIES):
            torch.testing.assert_close(parameter, stock[name], rtol=0, atol=1e-5)
        else:
            assert torch.equal(parameter, unchanged[name]), name

    for refuses in (lambda: convert_checkpoint(saves[2], tmp_path / "lora"), lambda: start_from(llama, saves[2])):
        with pytest.raises(CheckpointError, match=r"its run trained copies of layers \(expand_blocks\).*merge"):
            refuses()


def start_from(pretrained: Path, checkpoint: Path) -> None:
    from lowrank_dist.initialization.starting_adapter import StartingAdapter

    StartingAdapter(checkpoint / "adapter", for_residual=False)


def opened(pretrained: Path, blocks: Any, auto_class: Any = AutoModelForCausalLM) -> tuple[Expansion, Any, Any]:
    with meta_parameters():
        skeleton = auto_class.from_config(read_config(pretrained))
    skeleton.tie_weights()
    expansion = expand(skeleton, blocks)
    reader = expansion.reader(CheckpointReader(pretrained))
    return expansion, reader, open_plan(reader, None, backbone=skeleton, also=expansion.trained)


#: Families of text decoders that are expanded; every other one must be refused by name.
EXPANDED = {
    *("llama", "qwen2", "qwen3", "mistral", "ministral3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2"),
    *("gpt_neox", "opt", "bloom", "falcon", "mpt", "olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2", "glm"),
    *("glm4", "smollm3", "starcoder2", "stablelm", "exaone4", "ernie4_5", "seed_oss", "apertus", "nemotron", "helium"),
    "lfm2",  # whose tiny model has attention in every layer
}
TEXT = sorted(name for name, family in FAMILIES.items() if family.task == "causal")
BY_DEFAULT = ("gpt2", "opt", "gemma2", "glm4", "gpt_oss", "deepseek_v3", "mamba")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in BY_DEFAULT else pytest.mark.matrix) for n in TEXT])
def test_an_expanded_family_computes_what_it_did_or_is_refused(name: str, tmp_path: Path) -> None:
    """Bit for bit, in stock transformers; copies and only they are trained."""
    family = FAMILIES[name]
    family.save(tmp_path)
    before = family.auto_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    if name not in EXPANDED:
        with pytest.raises(ModelError, match=r"expand_blocks: .*(Layer|Block|has|layers)"):
            opened(tmp_path, 1, family.auto_class)
        return
    expansion, reader, planned = opened(tmp_path, [0], family.auto_class)
    assert (expansion.origins, expansion.copies) == ((0, 0, 1), (1,))
    values: dict[str, Tensor] = {}
    for tensor in planned.plan.parameters:
        value = reader.rows(tensor.key, 0, reader.info(tensor.key).shape[0])
        values |= dict.fromkeys(tensor.names, value)
        assert tensor.trainable == (f"{expansion.layers}.1." in tensor.names[0])
    after = family.auto_class.from_config(planned.backbone.config, dtype=torch.float32).eval()
    after.load_state_dict({n: values.get(n, b) for n, b in buffered(before, after, values).items()})
    batch = family.batches(before.config, 1)[0]
    with torch.no_grad():
        assert torch.equal(after(**batch).logits, before(**batch).logits)


def buffered(before: PreTrainedModel, after: PreTrainedModel, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of `after`, with the buffers of layer 0 in its copy."""
    stored = before.state_dict()
    found = {}
    for name, value in after.state_dict().items():
        origin = name.replace(".1.", ".0.", 1).replace(".2.", ".1.", 1) if name not in values else name
        found[name] = stored.get(origin, value)
    return found


def test_what_is_not_expanded_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"expand_blocks": 2, "adapter": LoraConfig()}, "instead of an adapter; leave adapter out"),
        ({"expand_blocks": 2, "init": LoRA()}, "leave init out"),
        ({"expand_blocks": 2, "init_cache": tmp_path}, "leave init_cache out"),
        ({"expand_blocks": 0}, "expand_blocks=0 must be a positive number"),
        ({"expand_blocks": [1, 1]}, "names a layer twice"),
    ):
        with pytest.raises(ValueError, match=message):
            PiSSAStrategy(llama, **options)
    with pytest.raises(ModelError, match="the 2 layers of the model cannot be divided into 3 equal groups; choose one"):
        opened(llama, 3)
    with pytest.raises(ModelError, match=r"there is no model.layers.2; the model has layers 0 to 1"):
        opened(llama, [2])
    by_place = save_checkpoint(tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="has scale_attn_by_inverse_layer_idx=True"):
        opened(by_place, 1)


def test_the_plan_knows_the_copies(llama: Path) -> None:
    strategy = PiSSAStrategy(llama, quantization=NF4(), expand_blocks=1, show_progress=False)
    from lowrank_dist.decomposition.schedule import Sharding

    said: list[str] = []
    found = strategy.recipe.open(
        build_skeleton(llama),
        ShardGroup.single(),
        compute_dtype=torch.float32,
        sharding=Sharding(ranks_per_matrix=None, ranks_per_node=1),
        announce=said.append,
        resume=None,
    )
    shapes = ModelShapes.planned(found.backbone, found.plan, found.source.reader)
    trained = [t for t in shapes.plan.parameters if t.trainable]
    assert {t.names[0].rpartition("layers.2.")[2] for t in trained} == {
        name for name, _ in found.backbone.model.layers[2].named_parameters()
    }
    assert len(found.plan.matrices) == 14  # the frozen layers are encoded, the copy is not
    assert said == [
        "1 copies of layers, after 1, are trained; their self_attn.o_proj.weight and mlp.down_proj.weight start at zero"
    ]
