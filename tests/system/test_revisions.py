"""A run on a revision of a hub id goes on with that revision, whatever `main` is by then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.hub import commit, save_in_cache
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks
from helpers.training import CausalLM, loader, make_strategy, make_trainer
from lowrank_dist.cli import main
from lowrank_dist.errors import InputError
from lowrank_dist.inference.on_disk import ModelOnDisk
from lowrank_dist.storage.layout import read_manifest

OLD, NEW = commit("a"), commit("b")
IDS = torch.arange(5, 29).view(2, 12)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub whose model ``me/tiny`` has changed since its tag ``v1``."""
    root = tmp_path_factory.mktemp("hub")
    old = save_checkpoint(root / "old", "llama")
    new = AutoModelForCausalLM.from_pretrained(old)
    with torch.no_grad():
        new.model.layers[0].self_attn.q_proj.weight[0] += 0.1
    new.save_pretrained(root / "new")
    save_in_cache(root / "cache", "me/tiny", {"v1": (OLD, old), "main": (NEW, root / "new")})
    return root / "cache"


@pytest.fixture(autouse=True)
def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


@alone
def train(cache: Path, output: Path, pretrained: str, revision: str | None) -> None:
    huggingface_hub.constants.HF_HUB_CACHE = str(cache)
    options: dict[str, Any] = {"adapter": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}
    if revision is None:
        options = {"adapter": None, "init": None, "quantization": None}
    strategy = make_strategy(Path(pretrained), revision=revision, **options)
    trainer = make_trainer(strategy, steps=1)
    trainer.fit(CausalLM(cache / "models--me--tiny" / "snapshots" / OLD), loader(0, 1, 1))
    trainer.save_checkpoint(output)


@pytest.fixture(scope="module")
def checkpoint(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "step"
    run_ranks(1, train, cache, directory, "me/tiny", "v1")
    return directory


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def revision_of(adapter: Path) -> str | None:
    return json.loads((adapter / "adapter_config.json").read_text())["revision"]


def test_stock_peft_loads_the_right_base(checkpoint: Path, cache: Path) -> None:
    old = AutoModelForCausalLM.from_pretrained(cache / "models--me--tiny" / "snapshots" / OLD)
    expected = logits(PeftModel.from_pretrained(old, checkpoint / "lora"))
    found = logits(AutoPeftModelForCausalLM.from_pretrained(checkpoint / "lora", cache_dir=cache))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_is_exported_is_for_the_commit(checkpoint: Path, tmp_path: Path) -> None:
    for name, options in (("exact", []), ("rank", ["--rank=2"]), ("fitted", ["--rank=2", "--base=original"])):
        assert main(["convert", str(checkpoint), "--output", str(tmp_path / name), *options]) == 0
        assert revision_of(tmp_path / name) == OLD
        assert main(["push", str(tmp_path / name), "--output", str(tmp_path / f"{name}-card")]) == 0
        assert revision_of(tmp_path / f"{name}-card") == OLD
        card = (tmp_path / f"{name}-card" / "README.md").read_text()
        assert f'from_pretrained("me/tiny", revision="{OLD}")' in card
        assert f"commit `{OLD}`" in card
    assert main(["merge", str(checkpoint), "--output", str(tmp_path / "merged")]) == 0
    assert main(["merge", str(checkpoint / "lora"), "--output", str(tmp_path / "of-lora")]) == 0


def test_another_model_of_the_hub_has_other_commits(checkpoint: Path, tmp_path: Path) -> None:
    main(["convert", str(checkpoint), "--output", str(tmp_path / "lora")])
    main(["push", str(tmp_path / "lora"), "--output", str(tmp_path / "card"), "--base_model=you/tiny"])
    assert revision_of(tmp_path / "card") is None
    assert OLD not in (tmp_path / "card" / "README.md").read_text()


def test_every_stage_is_of_the_commit(checkpoint: Path) -> None:
    for stage in ("base", "step0", "trained", "converted"):
        model = ModelOnDisk(checkpoint, stage=stage)
        assert model.directory.name == OLD, stage
        assert ModelOnDisk(checkpoint, base="me/tiny", revision="v1", stage=stage).directory.name == OLD
        assert ModelOnDisk(checkpoint, revision="main", stage=stage).directory.name == NEW  # refused when it is loaded
    assert ModelOnDisk(checkpoint / "lora").directory.name == OLD
    assert ModelOnDisk("me/tiny", revision="v1").directory.name == OLD


def test_a_revision_that_says_nothing_is_refused(checkpoint: Path, cache: Path) -> None:
    local = str(cache / "models--me--tiny" / "snapshots" / OLD)
    for options in (
        {"model": local},
        {"model": checkpoint, "base": local},
        {"model": checkpoint / "lora", "base": local},
    ):
        with pytest.raises(InputError, match="is a directory, which has no revisions such as 'v2'"):
            ModelOnDisk(**options, revision="v2")
    for model in ("me/tiny", checkpoint):
        with pytest.raises(InputError, match="neither a directory nor a model the hub"):
            ModelOnDisk(model, revision="v2")


def test_through_a_residual_model(cache: Path, tmp_path: Path) -> None:
    options = ["--pretrained=me/tiny", "--revision=v1", "--rank=4"]
    assert main(["decompose", *options, "--output", str(tmp_path / "residual")]) == 0
    assert read_manifest(tmp_path / "residual")["base_commit"] == OLD
    run_ranks(1, train, cache, tmp_path / "step", str(tmp_path / "residual"), None)
    assert revision_of(tmp_path / "step" / "lora") == OLD
    assert (
        main(["convert", str(tmp_path / "step"), "--output", str(tmp_path / "r"), "--rank=2", "--base=original"]) == 0
    )
    assert main(["merge", str(tmp_path / "step"), "--output", str(tmp_path / "merged")]) == 0
    assert ModelOnDisk(tmp_path / "step", stage="base").directory.name == OLD
    assert ModelOnDisk(tmp_path / "step").directory.name == "residual"
