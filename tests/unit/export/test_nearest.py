"""The nearest LoRA to adapters of other types: the truncated SVD of what stock PEFT's merge adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint
from lowrank_dist.adapters.files import read_adapter, write_adapter
from lowrank_dist.cli import convert as command
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.export.convert import convert_checkpoint
from lowrank_dist.export.merge import merge_checkpoint
from lowrank_dist.export.refit import refit_checkpoint
from unit.export.test_tuned import TUNERS, draw, stock

# PEFT warns of tied weights and of rounding in merges
pytestmark = pytest.mark.filterwarnings("ignore")

K = 6


def save_run(base: Path, directory: Path, config: PeftConfig) -> Path:
    """A checkpoint of a tuner, optimizer aside."""
    draw(base, directory / "adapter", config)
    manifest = {"base": str(base), "starts_at_zero": True, "matrices": [], "method": "tuned", "step": 7}
    (directory / "lowrank_dist.json").write_text(json.dumps(manifest))
    return directory


def original(base: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights: dict[str, Tensor] = model.state_dict()
    return weights


RUNS: dict[str, tuple[str, Callable[[], PeftConfig]]] = {
    "dora": ("llama", TUNERS["dora"]),
    "vera": ("llama", TUNERS["vera"]),
    "ia3": ("llama", TUNERS["ia3"]),
    "oft": ("llama", TUNERS["oft"]),
    "dora+norms": ("llama", TUNERS["dora+norms"]),
    "conv1d": ("gpt2", lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], use_dora=True)),
    "biases": ("qwen2", lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_dora=True, bias="all")),
    "some of a kind": ("llama", lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1])),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_truncated_svd(tmp_path: Path, name: str) -> None:
    """Every update is the best of its rank, and the energy is what the singular values say; modules go along whole."""
    architecture, make = RUNS[name]
    base = save_checkpoint(tmp_path / "base", architecture)
    run = save_run(base, tmp_path / "run", make())
    done = convert_checkpoint(run, tmp_path / "lora", rank=K)
    before, merged = original(base), stock(base, run / "adapter")
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), done.path)
    assert {config.r for config in found.peft_config.values()} == {K}  # type: ignore[attr-defined]
    assert done.energy is not None
    assert (done.uniform, done.rank) == (True, K)
    whole: Any = found.merge_and_unload()
    changed = [key for key, weight in merged.items() if not torch.equal(weight, before[key])]
    total = lost = 0.0
    for key, weight in whole.state_dict().items():
        if key not in changed or weight.ndim == 1 or "lm_head" in key:
            assert torch.equal(weight, merged[key]), key
            continue
        update = (merged[key] - before[key]).double()
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        best = (u[:, :K] * s[:K]) @ vh[:K]
        error = float((weight.double() - before[key] - best).norm())
        assert error < 2e-2 * float(update.norm()), key
        energy, tail = float(s.square().sum()), float(s[K:].square().sum())
        kept = done.energy.matrices[key.removesuffix(".weight")]
        assert kept == pytest.approx(1 - tail / energy, abs=1e-4)
        total, lost = total + energy, lost + tail
    assert len(done.energy.matrices) == sum(before[key].ndim == 2 and "lm_head" not in key for key in changed)
    assert done.energy.overall == pytest.approx(1 - lost / total, abs=1e-4)
    manifest = json.loads((done.path / "lowrank_dist.json").read_text())
    assert (manifest["kind"], manifest["rank"], manifest["step"]) == ("lora", K, 7)
    assert manifest["energy_kept"]["overall"] == done.energy.overall


def test_an_update_of_low_rank_is_kept_whole(llama: Path, tmp_path: Path) -> None:
    run = save_run(llama, tmp_path / "run", TUNERS["vera"]())  # r = 8
    done = convert_checkpoint(run, tmp_path / "lora", rank=8)
    assert done.energy is not None
    assert done.energy.least > 1 - 1e-6
    assert convert_checkpoint(run, tmp_path / "half", rank=4, dtype=torch.bfloat16).energy is not None


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (TUNERS["trainable_tokens"](), "of type TRAINABLE_TOKENS that changes model.embed_tokens.weight"),
        (TUNERS["ln_tuning"](), "of type LN_TUNING that changes model.layers.0.input_layernorm.weight"),
        (TUNERS["lora+tokens"](), "that changes model.embed_tokens.weight"),
        (TUNERS["prompt_tuning"](), "virtual tokens are not weights"),
        (peft.BeftConfig(target_modules=["q_proj"]), "changes model.layers.0.self_attn.q_proj.bias"),
    ],
    ids=["tokens", "norms", "lora+tokens", "prompt", "biases"],
)
def test_updates_that_no_lora_holds(tmp_path: Path, config: PeftConfig, text: str) -> None:
    base = save_checkpoint(tmp_path / "base", "qwen2")
    run = save_run(base, tmp_path / "run", config)
    with pytest.raises(ModelError, match=text):
        convert_checkpoint(run, tmp_path / "lora", rank=4)
    assert not (tmp_path / "lora").exists()


def test_what_is_asked_for_must_exist(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(llama, tmp_path / "run", TUNERS["lora+bdlora"]())
    for text in (
        "is of type LORA with use_bdlora=.* and has no exact LoRA",
        f"{run}/adapter is for the original model",
    ):
        with pytest.raises(InputError, match=text):
            convert_checkpoint(run, tmp_path / "lora")
    prompt = save_run(llama, tmp_path / "prompt", TUNERS["prompt_tuning"]())
    with pytest.raises(InputError, match="type PROMPT_TUNING and has no exact LoRA.* virtual tokens are in no weight"):
        convert_checkpoint(prompt, tmp_path / "lora")
    with pytest.raises(InputError, match="rank=65: the updates of .* have at most rank 64"):
        convert_checkpoint(run, tmp_path / "lora", rank=65)
    assert command.run([str(run), "--output", str(tmp_path / "lora"), "--rank", "8"]) == 0
    assert "Rank 8 of 64 keeps " in capsys.readouterr().out


def test_a_dora_from_zero(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its exact conversion is itself; the fit of a LoRA's factors would pass its magnitudes over."""
    run = save_run(llama, tmp_path / "run", TUNERS["dora"]())
    assert command.run([str(run), "--output", str(tmp_path / "lora")]) == 0
    assert "It is a DoRA, which vLLM, SGLang and llama.cpp refuse; --rank" in capsys.readouterr().out
    tensors, config = read_adapter(tmp_path / "lora")
    before, _ = read_adapter(run / "adapter")
    assert config.use_dora
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    with pytest.raises(InputError, match=r"fits the factors of a LoRA, but .* is of type LORA with use_dora=True"):
        refit_checkpoint(run, tmp_path / "fitted", rank=4, base="nf4")


def test_a_dora_from_other_factors(llama: Path, tmp_path: Path) -> None:
    """Trained on a residual: the DoRA of twice the rank is merged, and its update is approximated."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_dora=True)
    run = save_run(llama, tmp_path / "run", config)
    tensors, config = read_adapter(draw(llama, tmp_path / "start", config))
    factors = {n: t for n, t in tensors.items() if ".lora_A" in n or ".lora_B" in n}
    write_adapter(run / "adapter_init", {n: t + 0.02 * torch.randn(t.shape) for n, t in factors.items()}, config)
    manifest = json.loads((run / "lowrank_dist.json").read_text())
    (run / "lowrank_dist.json").write_text(json.dumps(manifest | {"starts_at_zero": False}))
    doubled = convert_checkpoint(run, run / "lora")
    assert (doubled.rank, doubled.is_dora) == (8, True)
    expected = stock(llama, run / "lora")
    found = AutoModelForCausalLM.from_pretrained(merge_checkpoint(run, tmp_path / "merged")).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    near = convert_checkpoint(run, tmp_path / "near", rank=64)
    assert near.energy is not None
    assert near.energy.least > 1 - 1e-5
    for name, weight in stock(llama, near.path).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
