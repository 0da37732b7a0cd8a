"""Weights in files of torch.save become safetensors, the same in every bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint, stored
from lowrank_dist import cli
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.export.import_pickled import import_checkpoint
from lowrank_dist.export.merge import merge_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=1, tie_word_embeddings=True)


def directory_of(model: Path, directory: Path) -> Path:
    """A copy without weights."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    return directory


def test_a_single_file_with_shared_tensors(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers 4 wrote them: the tied head is in the file too, and shares the memory of the embedding."""
    weights, source = stored(model), directory_of(model, tmp_path / "pickled")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, source / "pytorch_model.bin")
    assert cli.main(["import", str(source), "--output", str(tmp_path / "out"), "--max-shard-size", "0.0001"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ids = torch.arange(3, 20)[None]
    expected = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, expected)


def test_files_with_an_index_and_old_ones(model: Path, tmp_path: Path) -> None:
    weights, source = stored(model), directory_of(model, tmp_path / "pickled")
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[:4], "pytorch_model-00002-of-00002.bin": names[4:]}
    for index, (file, of_file) in enumerate(parts.items()):
        part = {name: weights[name] for name in of_file}
        torch.save(part, source / file, _use_new_zipfile_serialization=index == 0)
    weight_map = {name: file for file, of_file in parts.items() for name in of_file}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = stored(import_checkpoint(source, tmp_path / "out"))
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="00002.bin is missing"):
        import_checkpoint(source, tmp_path / "other")


def test_a_state_inside_of_another_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(3, dtype=torch.int64)}
    torch.save({"state_dict": weights, "step": 5}, tmp_path / "last.pt")
    found = stored(import_checkpoint(tmp_path / "last.pt", tmp_path / "out"))
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert caplog.text.count("the weights are those of its entry 'state_dict'; not written: step") == 1


def test_an_index_that_is_stale_or_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The single file is read, as of safetensors; without it the index must name what is there."""
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"a": torch.zeros(2)}, tmp_path / "part.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"a": "part.bin", "b": "part.bin"}})
    )
    assert torch.equal(stored(import_checkpoint(tmp_path, tmp_path / "out"))["a"], torch.ones(2))
    assert "pytorch_model.bin is read, and pytorch_model.bin.index.json beside it is not" in caplog.text
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"index.json: names b, which no file holds \(1 such tensors\)"):
        import_checkpoint(tmp_path, tmp_path / "other")


def test_an_adapter(model: Path, tmp_path: Path) -> None:
    """It is one afterwards: merge refuses the old file, names this command, and takes what it wrote."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"which only pickle reads.*`lowrank-dist import .*adapter --output"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    for number, source in enumerate((tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.bin")):
        out = import_checkpoint(source, tmp_path / str(number), max_file_bytes=1)
        assert {path.name for path in out.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
        found = stored(out)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    merge_checkpoint(tmp_path / "0", tmp_path / "merged")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter_config.json is missing, without which nothing loads"):
        import_checkpoint(tmp_path / "adapter", tmp_path / "2")


class Other(nn.Module):
    pass


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (Other(), "are not opened"),
        ([torch.ones(2)], "holds a list"),
        ({"a": torch.ones(2), "b": 3}, "b is a int, not a tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a is torch.complex64"),
    ],
)
def test_what_holds_more_than_tensors(content: dict[str, Tensor], text: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=text):
        import_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_which_file_is_meant(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt", "optimizer.pt"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(InputError, match=r"2 other files of weights \(a.pt, b.pt\); pass the file itself"):
        import_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(InputError):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "out")
