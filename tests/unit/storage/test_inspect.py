"""What directories hold: every kind, complete or not, compared with what the libraries say that wrote them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.models import save_checkpoint
from helpers.staging import RANDOM
from lowrank_dist import cli
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.inspect import Description, inspect


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base"), "llama", dtype=torch.bfloat16, max_shard_size="40KB")


def save_adapter(base: Path, directory: Path, config: Any = None) -> int:
    """An adapter as PEFT writes it; returns the number of its parameters."""
    config = config or LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(directory)
    return int(model.get_nb_trainable_parameters()[0])


def save_as_checkpoint(base: Path, directory: Path, **manifest: Any) -> Path:
    for part in ("adapter", "adapter_init", "lora"):
        save_adapter(base, directory / part)
    values = {"base": str(base), "method": "PiSSA", "quantization": "NF4(...)", "starts_at_zero": False}
    matrices = [{"name": f"layers.{index}", "rank": 4} for index in range(4)]
    (directory / "lowrank_dist.json").write_text(json.dumps({**values, "matrices": matrices, **manifest}))
    return directory


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def table(path: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_a_model(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert (found.kind, found.complete, found.nbytes) == ("model", True, size(base))
    assert found.facts["architecture"] == "LlamaForCausalLM"
    assert found.facts["parameters"] == model.num_parameters()
    assert found.facts["by dtype"] == {"BF16": model.num_parameters()}
    assert found.facts["files"] == len(list(base.glob("*.safetensors")))
    text = table(base, capsys)
    assert "LlamaForCausalLM" in text
    assert f"{model.num_parameters():,}" in text


def test_a_model_with_something_missing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    norm = index["weight_map"]["model.norm.weight"]
    files = sorted(file for file in model.glob("*.safetensors") if file.name != norm)
    files[0].unlink()
    whole = files[1].stat().st_size
    files[1].write_bytes(files[1].read_bytes()[:-7])
    files[2].write_bytes(b"no header")
    index["weight_map"] |= {"model.more.weight": "more.safetensors", "model.norm.bias": norm}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    found = inspect(model)
    expected = [
        f"{files[0].name} is missing",
        f"{files[1].name}: {whole - 7} bytes, truncated or corrupt",
        f"{files[2].name}: 9 bytes, truncated or corrupt",
        f"{norm} lacks model.norm.bias",
        "more.safetensors is missing",
    ]
    assert sorted(problem.partition(" (")[0] for problem in found.problems) == sorted(expected)
    assert f"no: {expected[0]}" in table(model, capsys)
    (model / "model.safetensors.index.json").write_text("{")
    assert "index.json: cannot be read" in inspect(model).problems[0]


def test_a_single_file_beside_an_index(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is read: the single file, whatever the index says; of an adapter too."""
    model = Path(shutil.copytree(base, tmp_path / "model"))
    save_file({"w": torch.zeros(3, 5)}, model / "model.safetensors")
    (model / "model.safetensors.index.json").write_text("{")
    found = inspect(model)
    assert (found.complete, found.facts["parameters"], found.facts["files"]) == (True, 15, 1)
    lines = [line.split() for line in table(model, capsys).splitlines()]
    assert ["not", "read", "model.safetensors.index.json"] in lines
    count = save_adapter(base, tmp_path / "adapter")
    assert "not read" not in inspect(tmp_path / "adapter").facts
    index = tmp_path / "adapter" / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"other": "other.safetensors"}}))
    found = inspect(tmp_path / "adapter")
    assert (found.complete, found.facts["trained parameters"], found.facts["not read"]) == (True, count, index.name)


def test_weights_in_another_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "pytorch_model.bin").touch()
    found = inspect(tmp_path)
    assert (found.kind, found.facts["weights"]) == ("model", ["pytorch_model.bin"])
    assert "no safetensors" in found.problems[0]


def test_a_peft_adapter(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    parameters = save_adapter(base, tmp_path, config)
    found = inspect(tmp_path)
    assert (found.kind, found.complete) == ("PEFT adapter", True)
    facts = found.facts
    assert (facts["type"], facts["base"], facts["target modules"]) == ("LORA", str(base), ["q_proj"])
    assert (facts["rank"], facts["alpha"], facts["scaling"], facts["rsLoRA"]) == (4, 6, 3.0, True)
    assert facts["rank pattern"] == {"q_proj": 2}
    assert (facts["trained parameters"], facts["adapter dtype"]) == (parameters, "F32")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert inspect(tmp_path).problems == [f"{tmp_path.name}/adapter_model.safetensors is missing"]


def test_an_adapter_of_another_type(base: Path, tmp_path: Path) -> None:
    parameters = save_adapter(base, tmp_path, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    found = inspect(tmp_path)
    assert (found.facts["type"], found.facts["trained parameters"]) == ("IA3", parameters)


@pytest.mark.parametrize("pattern", [{"q_proj.lora_E": 5}, {"q_proj.lora_E": [True, "x"]}, [1]])
def test_a_forged_pattern_of_adalora(base: Path, tmp_path: Path, pattern: Any) -> None:
    save_adapter(base, tmp_path, AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"]))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": pattern}))
    assert "must list true or false for every triplet" in inspect(tmp_path).problems[0]


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (VeraConfig(r=8, target_modules=["q_proj"]), {"type": "VERA", "rank": 8, "target modules": ["q_proj"]}),
        (PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), {"num virtual tokens": 5}),
        (LoraConfig(r=4, lora_alpha=6, use_dora=True, bias="all"), {"use dora": True, "bias": "all", "scaling": 1.5}),
        (LoraConfig(r=4, trainable_token_indices=[3, 9]), {"type": "LORA", "trainable token indices": [3, 9]}),
    ],
    ids=["vera", "prompt", "dora", "tokens"],
)
def test_a_checkpoint_of_a_tuner(base: Path, tmp_path: Path, config: Any, facts: dict[str, Any]) -> None:
    """There is no lora/ beside what is no LoRA; all that distinguishes an adapter is said."""
    checkpoint = tmp_path / "step=8"
    save_adapter(base, checkpoint / "adapter", config)
    if config.peft_type == "LORA":
        shutil.copytree(checkpoint / "adapter", checkpoint / "lora")
    manifest = {"method": config.peft_type.value, "starts_at_zero": True, "matrices": []}
    (checkpoint / "lowrank_dist.json").write_text(json.dumps(manifest))
    found = inspect(checkpoint)
    assert (found.kind, found.problems) == ("checkpoint of an adapter", [])
    assert facts.items() <= found.facts.items()
    assert ("rank" in found.facts) == hasattr(config, "r")


def test_a_checkpoint(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_as_checkpoint(base, tmp_path / "step=8", step=8, world_size=2)
    found = inspect(checkpoint)
    assert (found.kind, found.complete) == ("checkpoint of an adapter", True)
    facts = found.facts
    assert (facts["base"], facts["method"], facts["quantization"]) == (str(base), "PiSSA", "NF4(...)")
    assert (facts["step"], facts["world size"], facts["matrices"]) == (8, 2, 4)
    assert facts["bytes"] == {part: size(checkpoint / part) for part in ("adapter", "adapter_init", "lora")}
    assert "adapter: " in table(checkpoint, capsys)
    (checkpoint / "adapter_init" / "adapter_model.safetensors").unlink()
    weights = checkpoint / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    problems = inspect(checkpoint).problems
    assert len(problems) == 2
    assert problems[0].startswith("adapter: adapter_model.safetensors: ")
    assert problems[1] == "adapter_init/adapter_model.safetensors is missing"


def test_what_a_checkpoint_lacks_of_its_manifest(base: Path, tmp_path: Path) -> None:
    """Headers suffice: files of the optimizer and the state, and single tensors."""
    checkpoint = save_as_checkpoint(base, tmp_path / "step=8")
    save_file({"w.exp_avg": torch.ones(2)}, checkpoint / "optimizer.safetensors")
    save_file({"rng.0": torch.ones(2)}, checkpoint / "state.safetensors")
    hashes = {"optimizer": {"w.exp_avg": "0"}, "state": {"rng.0": "0"}}
    for part in ("adapter", "lora"):
        with safe_open(checkpoint / part / "adapter_model.safetensors", "pt") as file:
            hashes[part] = dict.fromkeys(file.keys(), "0")
    manifest = checkpoint / "lowrank_dist.json"
    values = json.loads(manifest.read_text())

    def problems() -> list[str]:
        manifest.write_text(json.dumps({**values, "hashes": hashes}))
        found = inspect(checkpoint)
        assert found.facts["training can resume"] == found.complete
        return found.problems

    assert problems() == []
    hashes["optimizer"]["v.exp_avg"] = hashes["optimizer"]["v.exp_avg_sq"] = "0"
    assert problems() == ["optimizer.safetensors lacks v.exp_avg and 1 more"]
    (checkpoint / "optimizer.safetensors").unlink()
    (checkpoint / "lora" / "adapter_model.safetensors").unlink()
    state = checkpoint / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    lora, optimizer, damaged = problems()
    assert lora == "lora/adapter_model.safetensors is missing"
    assert optimizer == "optimizer.safetensors is missing"
    assert damaged.startswith("state.safetensors: ")
    assert not inspect(tmp_path).complete  # nor is the directory that holds it


def test_what_a_residual_model_lacks_of_its_manifest(base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path)
    save_adapter(base, tmp_path / "pissa_init")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = dict.fromkeys(file.keys(), "0")
    manifest = {"tensors": {"model": names, "frozen_factors": {"a": "0"}}}
    (tmp_path / "lowrank_dist.json").write_text(json.dumps(manifest))
    assert inspect(tmp_path).problems == ["pissa_init/frozen_factors.safetensors is missing"]


def test_verify_ends_with_a_status(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_as_checkpoint(base, tmp_path / "runs" / "step=8")
    (tmp_path / "runs" / ".git").mkdir()
    for path in (checkpoint, checkpoint.parent):
        assert cli.main(["inspect", str(path), "--verify"]) == 0
    (checkpoint / "lora" / "adapter_model.safetensors").unlink()
    for path in (checkpoint, checkpoint.parent):
        assert cli.main(["inspect", str(path), "--verify"]) == 1
        assert "complete" in capsys.readouterr().out
        assert cli.main(["inspect", str(path)]) == 0  # which describes what is there


def test_a_file_is_no_directory(base: Path, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is a file; pass the directory that holds it, {tmp_path}"):
        inspect(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bits", [16, 4])
def test_a_decomposed_model(base: Path, tmp_path: Path, bits: int) -> None:
    """In the published layout, as PEFT and transformers write it: 4-bit weights count as what they stand for."""
    options: dict[str, Any] = {}
    if bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    model.save_pretrained(tmp_path)
    parameters = save_adapter(base, tmp_path / "pissa_init")
    found = inspect(tmp_path)
    assert (found.kind, found.complete) == ("residual model", True)
    facts = found.facts
    assert (facts["method"], facts["rank"], facts["trained parameters"]) == ("pissa", 4, parameters)
    assert facts["residual"] == ("NF4" if bits == 4 else "dense")
    assert facts["parameters"] == AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert set(facts["by dtype"]) == ({"NF4", "BF16"} if bits == 4 else {"BF16"})
    assert facts["bytes"]["pissa_init"] == size(tmp_path / "pissa_init")
    (tmp_path / "model.safetensors").unlink()
    assert not inspect(tmp_path).complete


def test_a_directory_of_checkpoints(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Newest first; what a writer left unfinished is marked, and what is no checkpoint is left out."""
    for number, step in enumerate((4, 12, 8)):
        checkpoint = save_as_checkpoint(base, tmp_path / f"step={step}", step=step)
        for file in checkpoint.rglob("*"):
            os.utime(file, (1e9 + number, 1e9 + number))
    partial, old = tmp_path / f".step=16.{RANDOM}.partial", tmp_path / f".step=4.{RANDOM}.old"
    shutil.copytree(tmp_path / "step=8", partial, copy_function=shutil.copyfile)
    old.mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "hparams.yaml").touch()
    found = inspect(tmp_path)
    assert found.kind == "directory"
    names = [Path(item.path).name for item in found.contents]
    assert set(names[:2]) == {partial.name, old.name}
    assert names[2:] == ["step=8", "step=12", "step=4"]
    assert [item.complete for item in found.contents] == [False, False, True, True, True]
    assert [item.facts.get("step") for item in found.contents[2:]] == [8, 12, 4]
    lines = table(tmp_path, capsys).splitlines()
    assert [line.split()[0] for line in lines[-5:]] == names
    assert any("step=16 is being written, or its writer died" in line for line in lines[-5:])
    assert inspect(partial).kind == "unfinished directory"


def test_a_hub_id_in_the_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = inspect("someone/model")
    assert (found.path, found.kind, found.facts["snapshot"]) == ("someone/model", "model", str(snapshot))
    with pytest.raises(CheckpointError, match="someone/else': neither a directory nor a model"):
        inspect("someone/else")


@pytest.mark.parametrize("files", [[], ["config.json"], ["notes.txt"]], ids=str)
def test_nothing_known(tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what was looked for."""
    for name in files:
        (tmp_path / name).write_text("{}")
    (tmp_path / "empty").mkdir()
    assert cli.main(["inspect", str(tmp_path)]) == 1
    output, error = capsys.readouterr()
    assert output == ""
    assert error.count("\n") == 1
    for text in ("lowrank-dist inspect: ", "lowrank_dist.json", "*_init/adapter_config.json", "config.json"):
        assert text in error
    for path in (tmp_path / "missing", tmp_path / (files or ["x"])[0]):
        with pytest.raises(CheckpointError, match="no such directory"):
            inspect(path)


@pytest.mark.parametrize("text", ["", "[]", '{"matrices": 3}', '{"method": "LoRAXS", "matrices": [{}]}'])
def test_a_damaged_manifest_is_a_problem_not_an_end(base: Path, tmp_path: Path, text: str) -> None:
    checkpoint = save_as_checkpoint(base, tmp_path / "checkpoint")
    (checkpoint / "lowrank_dist.json").write_text(text)
    found = inspect(checkpoint)
    assert found.kind == "checkpoint of an adapter"
    assert not found.complete


def test_json(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_as_checkpoint(base, tmp_path / "a")
    assert cli.main(["inspect", "--json", str(tmp_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == inspect(tmp_path).as_dict()
    assert Description(**{k: v for k, v in values.items() if k != "complete"}).kind == "directory"
    assert values["contents"][0]["facts"]["rank"] == 4


def test_no_model_library_is_loaded(base: Path) -> None:
    """Headers are enough: the answer comes without transformers and PEFT."""
    program = "import sys; from lowrank_dist.cli import main; main(sys.argv[1:]); "
    program += "print([m for m in ('transformers', 'peft', 'deepspeed', 'lightning') if m in sys.modules])"
    command = [sys.executable, "-c", program, "inspect", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
