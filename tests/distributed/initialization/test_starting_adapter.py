"""Training goes on from adapters that PEFT wrote: the same model at step 0, and what was trained opens in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.checkpoints import load_base, load_lora
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.training import ByStep, CausalLM, fit, loader, make_trainer
from lowrank_dist import NF4, LoRA, PiSSA, PiSSAStrategy, cli
from lowrank_dist.adapters.files import read_adapter

STEPS = 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]


def save_lora(base: Path, directory: Path, **adapter: Any) -> Path:
    """A LoRA of stock PEFT over `base`, everything that it trains drawn at random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **adapter}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape) + (0 if "lora_" in name else parameter))
    model.save_pretrained(directory)
    return directory


def save_pissa(base: Path, directory: Path) -> tuple[Path, Path]:
    """What the recipe of PEFT's documentation leaves: residual with ``pissa_init/``, and an adapter trained on it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(directory / "pissa_init")
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(directory.with_name("pissa_ft"))
    model.unload().save_pretrained(directory)
    return directory, directory.with_name("pissa_ft")


def in_peft(base: Path, adapter: Path, **options: Any) -> Tensor:
    """Logits of the stock model on the batch of `loader(0, 1, 1)`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    model = PeftModel.from_pretrained(model, adapter)
    (ids,) = loader(0, 1, 1).dataset.tensors
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


class Recorded(CausalLM):
    """Keeps the logits of the last validation batch."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def train(pretrained: Path, adapter: Path, output: Path, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits at step 0 and after training; what was trained is at `output`."""
    first = Recorded(pretrained)
    strategy = PiSSAStrategy(pretrained, str(adapter), show_progress=False, **options)
    make_trainer(strategy).validate(first, loader(0, 1, 1), verbose=False)
    last = Recorded(pretrained)
    trainer = make_trainer(PiSSAStrategy(pretrained, adapter, show_progress=False, **options), steps=STEPS)
    trainer.fit(last, loader(trainer.global_rank, trainer.world_size, STEPS), loader(0, 1, 1))
    trainer.save_checkpoint(output)
    return first.logits, last.logits


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 6},
            "alpha_pattern": {"q_proj": 5},
            "use_rslora": True,
        },
    ),
    "more than full rank": ("llama", {"target_modules": ["k_proj"], "r": 70}),  # of a 32 x 64 matrix
    "whole head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),  # PEFT saves the embedding along
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "experts": (
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_lora_that_peft_wrote(name: str, tmp_path: Path) -> None:
    """fp32: the sums of a step are in another order."""
    architecture, changes = ADAPTERS[name]
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if architecture == "gpt2" else {}
    base = save_checkpoint(tmp_path / "base", architecture, tie_word_embeddings=False, **dropout)
    adapter = save_lora(base, tmp_path / "peft", **changes)
    first, last = run_ranks(3, train, base, adapter, tmp_path / "out", {})[0]
    torch.testing.assert_close(first, in_peft(base, adapter), rtol=1e-4, atol=1e-4)
    assert (last - first).abs().max() > 1e-3
    for part in ("adapter", "lora"):
        torch.testing.assert_close(in_peft(base, tmp_path / "out" / part), last, rtol=1e-4, atol=1e-4)
    started, _ = read_adapter(adapter)
    kept, _ = read_adapter(tmp_path / "out" / "adapter_init")
    assert kept
    assert all(torch.equal(tensor, started[name]) for name, tensor in kept.items())


def test_a_pissa_adapter_with_its_residual(tmp_path: Path) -> None:
    """Trained on from ``pissa_ft/``; what becomes a LoRA for the original is measured from ``pissa_init/``."""
    base = save_checkpoint(tmp_path / "base")
    residual, trained = save_pissa(base, tmp_path / "residual")
    first, last = run_ranks(2, train, residual, trained, tmp_path / "out", {})[0]
    torch.testing.assert_close(first, in_peft(residual, trained), rtol=1e-4, atol=1e-4)
    assert (first - in_peft(residual, residual / "pissa_init")).abs().max() > 0.01
    torch.testing.assert_close(in_peft(residual, tmp_path / "out" / "adapter"), last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_peft(base, tmp_path / "out" / "lora"), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"quantization": NF4(), "init": LoRA()}], ids=["dense", "nf4"])
def test_a_converted_lora(options: dict[str, Any], tmp_path: Path) -> None:
    """A second stage on the LoRA that the first was converted to, in fp32 and over 4-bit weights."""
    base = save_checkpoint(tmp_path / "base")
    run_ranks(2, first_stage, base, tmp_path / "first")
    lora = tmp_path / "first" / "lora"
    first, last = run_ranks(2, train, base, lora, tmp_path / "second", options)[0]
    loaded = {} if not options else {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )}  # fmt: skip
    torch.testing.assert_close(first, in_peft(base, lora, **loaded), rtol=1e-4, atol=2e-4)
    assert (last - first).abs().max() > 0.01
    started, _ = read_adapter(lora)
    kept, _ = read_adapter(tmp_path / "second" / "adapter_init")
    assert started.keys() == kept.keys()
    assert all(torch.equal(tensor, started[name]) for name, tensor in kept.items())
    manifest = json.loads((tmp_path / "second" / "lowrank_dist.json").read_text())
    assert (manifest["method"], manifest["started_from"]) == ("LoRA", str(lora))


def first_stage(base: Path, output: Path) -> None:
    _, trainer = fit(base, steps=STEPS, quantization=None)
    trainer.save_checkpoint(output)


@alone
def train_from_the_hub(base: Path, cache: Path, output: Path) -> None:
    huggingface_hub.constants.HF_HUB_CACHE = str(cache)
    strategy = PiSSAStrategy(base, "someone/lora", adapter_revision=40 * "b", show_progress=False)
    trainer = make_trainer(strategy, steps=1)
    trainer.fit(CausalLM(base), loader(trainer.global_rank, trainer.world_size, 1))
    trainer.save_checkpoint(output)


def test_the_revision_of_an_adapter_from_the_hub(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    repository = tmp_path / "models--someone--lora"
    for digit, rank in (("a", 2), ("b", 4)):
        save_lora(base, repository / "snapshots" / (40 * digit), r=rank)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(40 * "a")
    run_ranks(2, train_from_the_hub, base, tmp_path, tmp_path / "out")
    started, _ = read_adapter(repository / "snapshots" / (40 * "b"))
    kept, _ = read_adapter(tmp_path / "out" / "adapter_init")
    assert all(torch.equal(tensor, started[name]) for name, tensor in kept.items())
    manifest = json.loads((tmp_path / "out" / "lowrank_dist.json").read_text())
    assert (manifest["started_from"], manifest["started_from_commit"]) == ("someone/lora", 40 * "b")


def resumed(base: Path, adapter: Path, checkpoint: Path, resume: bool) -> list[float]:
    def run(steps: int, ckpt_path: Path | None = None) -> tuple[ByStep, Any]:
        module, trainer = ByStep(base), make_trainer(PiSSAStrategy(base, adapter, show_progress=False), steps=steps)
        trainer.fit(module, loader(trainer.global_rank, trainer.world_size), ckpt_path=ckpt_path)
        return module, trainer

    if not resume:
        run(STEPS - 1)[1].save_checkpoint(checkpoint)
    return run(STEPS, checkpoint if resume else None)[0].losses


def test_resuming_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """The values of the adapter are those of the checkpoint, not of where it all began."""
    base = save_checkpoint(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "peft")
    through = run_ranks(2, resumed, base, adapter, tmp_path / "half", False)[0]
    (last,) = run_ranks(1, resumed, base, adapter, tmp_path / "half", True)[0]
    assert last == pytest.approx(through[-1], rel=1e-5)


def validate(pretrained: Path, adapter: Path, options: dict[str, Any]) -> float:
    """The loss of the model with its adapter on the first global batch."""
    strategy = PiSSAStrategy(pretrained, adapter, show_progress=False, **options)
    (found,) = make_trainer(strategy).validate(CausalLM(pretrained), loader(0, 1, 1), verbose=False)
    return found["val_loss"]


def refusal(*args: Any) -> str:
    """The one error that all ranks end with."""
    errors = [error for _, error in run_ranks_catching(2, validate, *args)]
    assert all(errors)
    return "\n".join(str(error).splitlines()[-1] if "RemoteError" in str(error) else str(error) for error in errors)


def test_adapters_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "peft")
    assert "leave init out" in refusal(base, adapter, {"init": PiSSA()})
    assert "adapter='/no/such/adapter': no such directory" in refusal(base, Path("/no/such/adapter"), {})

    other = save_checkpoint(tmp_path / "other", hidden_size=32)
    assert "but the model needs" in refusal(other, adapter, {})

    tensors = load_file(adapter / "adapter_model.safetensors")
    dropped = next(name for name in tensors if "down_proj.lora_B" in name)
    save_file({k: v for k, v in tensors.items() if k != dropped}, adapter / "adapter_model.safetensors")
    message = refusal(base, adapter, {})
    assert dropped in message
    assert "is missing" in message

    tensors[dropped][-1, 0] = float("nan")  # in the part of the last rank
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert dropped in refusal(base, adapter, {})


def test_an_embedding_that_was_trained_along_is_not_silently_dropped(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    adapter = save_lora(base, tmp_path / "peft", target_modules=["embed_tokens", "q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    tensors[name][-1] += 1  # in the part of the last rank
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refusal(base, adapter, {})
    assert name in message
    assert "merge the adapter first" in message


@pytest.mark.parametrize(
    ("base_dtype", "dtype"), [("float16", "bfloat16"), ("bfloat16", "float16"), ("float32", "float16")]
)
def test_an_embedding_saved_along_in_another_dtype(base_dtype: str, dtype: str, tmp_path: Path) -> None:
    """PEFT rounded it to the dtype of its model: it is known as that of the base, and what was trained is taken."""
    base = save_checkpoint(tmp_path / "base", dtype=getattr(torch, base_dtype))
    adapter = save_lora(base, tmp_path / "peft", target_modules=["embed_tokens", "q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(rounded, adapter / "adapter_model.safetensors")
    (ids,) = next(iter(loader(0, 1, 1)))
    with torch.no_grad():
        trained, untrained = (
            float(model(input_ids=ids, labels=ids).loss) for model in (load_lora(base, adapter), load_base(base))
        )
    found = run_ranks(2, validate, base, adapter, {"quantization": None})
    assert found == pytest.approx([trained] * 2, abs=0.1 * abs(trained - untrained))


def decompose_and_save(base: Path, output: Path) -> None:
    """A residual model in `output`/cache, and checkpoints of a PiSSA that began from it and of a LoRA."""
    fit(base, steps=1, quantization=None, init_cache=output / "cache")
    _, trainer = fit(base, steps=1, quantization=None, init=LoRA())
    trainer.save_checkpoint(output / "lora")


def test_a_lora_for_the_original_is_not_put_on_a_residual(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    run_ranks(2, decompose_and_save, base, tmp_path)
    (residual,) = (tmp_path / "cache").iterdir()
    converted = tmp_path / "converted"
    assert cli.main(["convert", str(tmp_path / "lora"), "--output", str(converted), "--rank", "4"]) == 0
    for adapter in (tmp_path / "lora", tmp_path / "lora" / "adapter", tmp_path / "lora" / "lora", converted):
        assert "for the original model, not for the residual" in refusal(residual, adapter, {})
    run_ranks(2, validate, base, tmp_path / "lora", {})


def test_parts_of_a_checkpoint_that_are_for_a_residual(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base")
    run_ranks(2, first_stage, base, tmp_path / "first")
    assert "resume with ckpt_path" in refusal(base, tmp_path / "first", {})
    assert "for a residual" in refusal(base, tmp_path / "first" / "adapter", {})
