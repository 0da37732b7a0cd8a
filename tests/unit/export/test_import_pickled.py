"""Weights in files of torch.save become safetensors, the same in every bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint, stored
from lowrank_dist import cli
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.export.import_pickled import import_checkpoint


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
