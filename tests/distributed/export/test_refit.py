"""LoRAs fitted to a trained model, quantization included, on the base that will carry them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.models import save_checkpoint
from helpers.ranks import run_ranks, run_ranks_catching
from helpers.training import STEPS, CausalLM, loader, make_strategy, make_trainer, tokens
from lowrank_dist import NF4, AdapterCheckpoint, LoftQ, PiSSA
from lowrank_dist.cli import main
from lowrank_dist.errors import CheckpointError, InputError, ModelError
from lowrank_dist.export.refit import Refit, refit_checkpoint

CASES: dict[str, dict[str, Any]] = {
    "qpissa": {"init": PiSSA(quantization_iterations=3)},
    "loftq, double": {"init": LoftQ(quantization_iterations=2), "quantization": NF4(double_quant=True)},
    "dense": {"quantization": None},
}


class Seen(CausalLM):
    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=tokens()[0], use_cache=False).logits


def train(pretrained: Path, output: Path, options: dict[str, Any]) -> Tensor:
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=STEPS)
    trainer = make_trainer(make_strategy(pretrained, **options), callbacks=[callback], enable_checkpointing=True)
    module = Seen(pretrained)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size), loader(0, 1, 1))
    return module.logits


@pytest.fixture(scope="module", params=CASES, ids=str)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """A base, a checkpoint of a run, and the trained model's logits."""
    directory = tmp_path_factory.mktemp("refit")
    base = save_checkpoint(directory / "base", "llama")
    logits = run_ranks(2, train, base, directory / "out", CASES[request.param])[0]
    return base, directory / "out" / f"step={STEPS}", logits


def logits_of(base: Path, lora: Path, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, lora).eval()(input_ids=tokens()[0]).logits


def test_of_full_rank_the_base_becomes_the_trained_model(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    """136 is the longer side: every matrix is met; fp32 sums over the layers remain."""
    base, checkpoint, logits = trained
    done = refit_checkpoint(checkpoint, tmp_path / "original", rank=136, base="original")
    assert done.after < 1e-5
    torch.testing.assert_close(logits_of(base, done.path), logits, rtol=1e-4, atol=1e-4)


def test_on_a_base_that_is_loaded_in_nf4(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    base, checkpoint, logits = trained
    refit_checkpoint(checkpoint, tmp_path / "nf4", rank=136, base="nf4")
    double = "double_quant=True" in (checkpoint / "lowrank_dist.json").read_text()
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    found = logits_of(base, tmp_path / "nf4", quantization_config=quantized)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=2e-4)


ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "some": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "head and embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
}


@pytest.mark.parametrize("adapted", ADAPTED)
def test_what_transformers_does_not_quantize(adapted: str, tmp_path: Path) -> None:
    """Nor does the base that is fitted to; what was dense in training is named."""
    architecture, targets = ADAPTED[adapted]
    base = save_checkpoint(tmp_path / "base", architecture)
    logits = run_ranks(2, train, base, tmp_path / "out", {"adapter": LoraConfig(r=4, lora_alpha=4, **targets)})[0]
    checkpoint = tmp_path / "out" / f"step={STEPS}"
    done = refit_checkpoint(checkpoint, tmp_path / "nf4", rank=256, base="nf4")
    assert {name.rpartition(".")[2] for name in done.not_quantized} >= {"k_proj", "v_proj", "o_proj", "lm_head"}
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=done.not_quantized,
    )  # fmt: skip
    found = logits_of(base, done.path, quantization_config=quantized)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=2e-4)


def test_a_conv1d_in_nf4_and_other_bases_are_refused(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "gpt2")
    run_ranks(1, train, base, tmp_path / "out", {})
    checkpoint = tmp_path / "out" / f"step={STEPS}"
    with pytest.raises(ModelError, match="transpose of a Conv1D"):
        refit_checkpoint(checkpoint, tmp_path / "x", rank=8, base="nf4")
    with pytest.raises(InputError, match="neither 'original' nor 'nf4'"):
        refit_checkpoint(checkpoint, tmp_path / "x", rank=8, base="NF4")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_base(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "lm_head"])
    options = {"adapter": adapter, "untie_embeddings": True}
    logits = run_ranks(2, train, base, tmp_path / "out", options)[0]
    done = refit(tmp_path / "out" / f"step={STEPS}", tmp_path / "lora", 256)
    torch.testing.assert_close(logits_of(base, done.path), logits, rtol=1e-4, atol=1e-4)


def refit(checkpoint: Path, output: Path, rank: int) -> Refit:
    return refit_checkpoint(checkpoint, output, rank=rank, base="original")


def test_a_lower_rank_is_the_best_one(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    """Eckart-Young: what is left over is the tail of the singular values of the whole difference, to the tolerance of
    the SVD; and it is less than what the exact conversion of rank 8 leaves."""
    _, checkpoint, _ = trained
    whole = load_file(refit_checkpoint(checkpoint, tmp_path / "w", rank=136, base="original").path / WEIGHTS)
    done = run_ranks(2, refit, checkpoint, tmp_path / "8", 8)[0]
    for leftover in done.leftovers:
        a, b = (whole[f"base_model.model.{leftover.name}.lora_{part}.weight"].double() for part in "AB")
        values = torch.linalg.svdvals(b @ a)
        assert leftover.norm == pytest.approx(float(values.norm()), rel=1e-4)
        assert leftover.after == pytest.approx(float(values[8:].norm()), rel=1e-2, abs=1e-5 * leftover.norm)
        assert leftover.after <= leftover.before * (1 + 1e-3) + 1e-5 * leftover.norm
    assert done.after <= done.before + 1e-5
    one = refit(checkpoint, tmp_path / "one", 8)
    assert one.after == pytest.approx(done.after, rel=1e-3, abs=1e-5)


WEIGHTS = "adapter_model.safetensors"


def decompose_and_train(base: Path, output: Path, kind: str) -> Tensor:
    """QPiSSA, T = 3, double quantization; from a residual model on disk or through a cache of them."""
    options = {**CASES["qpissa"], "quantization": NF4(double_quant=True), "init_cache": output / "cache"}
    if kind == "cache":
        return train(base, output, {**options, "init": PiSSA()})
    logits = train(base, output / "first", options)
    (decomposed,) = (output / "cache").iterdir()
    return (
        train(decomposed, output, {"adapter": None, "init": None, "quantization": None}) if kind == "model" else logits
    )


@pytest.mark.parametrize("kind", ["model", "cache"])
def test_a_run_from_a_decomposed_model(tmp_path: Path, kind: str) -> None:
    """Its residual is read where it is, or formed again from the base where that gives the same."""
    base = save_checkpoint(tmp_path / "base", "llama")
    logits = run_ranks(2, decompose_and_train, base, tmp_path / "out", kind)[0]
    checkpoint = tmp_path / "out" / f"step={STEPS}"
    done = run_ranks(2, refit, checkpoint, tmp_path / "lora", 136)[0]
    assert done.after < 1e-5
    torch.testing.assert_close(logits_of(base, done.path), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "cache"), [("mixtral", True), ("gpt_oss", False), ("llama", False)])
def test_stacked_experts_and_single_parameters(architecture: str, cache: bool, tmp_path: Path) -> None:
    """gpt_oss stores its experts as ``[in, out]``. A cache holds those in 4 bits under other names than the base."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    parameters = ["up_proj.weight"] if architecture == "llama" else experts
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters)
    base = save_checkpoint(tmp_path / "base", architecture)
    options = {"adapter": adapter} | ({"init_cache": tmp_path / "cache"} if cache else {})
    logits = run_ranks(2, train, base, tmp_path / "out", options)[0]
    done = run_ranks(2, refit, tmp_path / "out" / f"step={STEPS}", tmp_path / "lora", 136)[0]
    assert done.before > 1e-2
    assert done.after < 1e-5
    torch.testing.assert_close(logits_of(base, done.path), logits, rtol=1e-4, atol=1e-4)


def test_a_base_that_has_changed(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "llama")
    run_ranks(2, train, base, tmp_path / "out", {})
    first = next(iter(sorted(base.glob("*.safetensors"))))
    tensors = load_file(first)
    tensors[next(name for name in tensors if "proj" in name)][0, 0] += 1
    save_file(tensors, first, metadata={"format": "pt"})
    for _, error in run_ranks_catching(2, refit, tmp_path / "out" / f"step={STEPS}", tmp_path / "x", 8):
        assert "the weights have changed" in str(error)
    assert not (tmp_path / "x").exists()


def test_factors_that_were_fitted_to_the_residual_of_a_cache(tmp_path: Path) -> None:
    """The checkpoint has the factors that the residual was encoded from, so that it can be formed again."""
    base = save_checkpoint(tmp_path / "base", "llama")
    run_ranks(2, decompose_and_train, base, tmp_path / "out", "fitted")
    run_ranks(2, refit, tmp_path / "out" / "first" / f"step={STEPS}", tmp_path / "x", 8)
    assert all((tmp_path / "x" / name).is_file() for name in ("adapter_model.safetensors", "lowrank_dist.json"))


def train_in(directory: Path, output: Path) -> None:
    """A run whose base has a relative path."""
    with contextlib.chdir(directory):
        train(Path("base"), output, CASES["dense"])


def test_a_base_with_a_relative_path(tmp_path: Path) -> None:
    """It is found from another working directory; once it was moved, the user says where it is."""
    base = save_checkpoint(tmp_path / "run" / "base", "llama")
    run_ranks(1, train_in, tmp_path / "run", tmp_path / "out")
    step = tmp_path / "out" / f"step={STEPS}"
    command = ["convert", str(step), "--rank=136", "--base=original", "--output"]
    assert main([*command, str(tmp_path / "first")]) == 0
    assert main(["merge", str(step), "--output", str(tmp_path / "merged")]) == 0
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="names this base model; pass pretrained if it is elsewhere now"):
        refit(step, tmp_path / "x", 136)
    assert main([*command, str(tmp_path / "second"), "--pretrained", str(tmp_path / "moved")]) == 0
    expected = load_file(tmp_path / "first" / WEIGHTS)
    found = load_file(tmp_path / "second" / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_refused(trained: tuple[Path, Path, Tensor], tmp_path: Path) -> None:
    _, checkpoint, _ = trained
    for _, error in run_ranks_catching(2, refit, checkpoint, tmp_path / "x", 0):
        assert "rank=0 must be at least 1" in str(error)
    assert not (tmp_path / "x").exists()
