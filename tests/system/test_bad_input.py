"""Bad input on two ranks: one clear error on every rank, before training, no rank left hanging, nothing half-written.

Damage is done to real files; where only one rank sees it, only that rank's copy is damaged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.ranks import run_ranks_catching
from helpers.training import CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import NF4, AdapterCheckpoint, PiSSA
from lowrank_dist.errors import InputError
from lowrank_dist.storage.headers import INDEX_NAME


def attempt(pretrained: Path, output: Path, adapter: dict[str, Any], options: dict[str, Any]) -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if (pretrained / f"rank{rank}").is_dir():  # a host whose copy differs from the others'
        pretrained = pretrained / f"rank{rank}"
    precision = options.pop("precision", "32-true")
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": "all-linear", **adapter})
    module = options.pop("module", CausalLM)(pretrained)
    trainer = make_trainer(
        make_strategy(pretrained, adapter=config, **options),
        precision=precision,
        steps=1,
        callbacks=[AdapterCheckpoint(dirpath=output, every_n_train_steps=1)],
        enable_checkpointing=True,
    )
    trainer.fit(module, loader(rank, size, 1))


def refused(pretrained: Path, tmp_path: Path, *texts: str, adapter: Any = None, **options: Any) -> None:
    """Both ranks raise ValueError with all `texts`, and nothing is written."""
    output = tmp_path / "output"
    outcomes = run_ranks_catching(2, attempt, pretrained, output, adapter or {}, options)
    for _, error in outcomes:
        assert error is not None
        report = "\n".join(error.splitlines()[error.splitlines().index(_first_of_report(error)) :])
        for text in texts:
            assert text in report
    assert not output.exists() or not any(output.rglob("*"))


def _first_of_report(error: str) -> str:
    """First line of the exception's own text: after the last frame of the traceback."""
    lines = error.splitlines()
    last_frame = max(i for i, line in enumerate(lines) if line.startswith("  File "))
    names = ("ValueError", "InputError", "CheckpointError", "ModelError", "RemoteError", "TypeError")
    return next(line for line in lines[last_frame:] if line.split(":")[0].rsplit(".", 1)[-1] in names)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = directory / json.loads((directory / INDEX_NAME).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"


def test_missing_shard(copy: Path, tmp_path: Path) -> None:
    victim = min(copy.glob("model-*.safetensors"))
    victim.unlink()
    refused(copy, tmp_path, victim.name, "missing")


def test_shard_missing_on_one_host_only(llama: Path, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copytree(llama, tmp_path / "model" / f"rank{rank}")
    victim = min((tmp_path / "model" / "rank1").glob("model-*.safetensors"))
    victim.unlink()
    refused(tmp_path / "model", tmp_path, victim.name, "missing")


def test_truncated_shard(copy: Path, tmp_path: Path) -> None:
    victim = min(copy.glob("model-*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-64])
    refused(copy, tmp_path, victim.name, "truncated or corrupt")


def test_index_naming_an_absent_tensor(copy: Path, tmp_path: Path) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    (copy / INDEX_NAME).write_text(json.dumps(index))
    refused(copy, tmp_path, "ghost.weight", "does not hold")


def test_tensor_missing_from_the_checkpoint(copy: Path, tmp_path: Path) -> None:
    index = json.loads((copy / INDEX_NAME).read_text())
    del index["weight_map"][Q]
    (copy / INDEX_NAME).write_text(json.dumps(index))
    refused(copy, tmp_path, "model.layers.0.self_attn.q_proj", "the pretrained weights hold no such tensor")


def test_wrong_shape(copy: Path, tmp_path: Path) -> None:
    edit(copy, Q, lambda w: w[:-1].clone())
    refused(copy, tmp_path, "q_proj", "the model has shape [64, 64], the pretrained weights [63, 64]")


def test_wrong_dtype(copy: Path, tmp_path: Path) -> None:
    edit(copy, Q, lambda w: w.to(torch.int8))
    refused(copy, tmp_path, "q_proj", "store I8")


@pytest.mark.parametrize("row", [0, 63])
@pytest.mark.parametrize("name", [Q, "model.embed_tokens.weight"])
def test_nan_in_the_rows_of_one_rank(copy: Path, tmp_path: Path, name: str, row: int) -> None:
    def spoil(w: torch.Tensor) -> torch.Tensor:
        w[row, 5] = float("nan")
        return w

    edit(copy, name, spoil)
    refused(copy, tmp_path, name, "NaN or infinity at", str([row, 5] if name == Q else [row * 64 + 5]))


def test_rank_above_the_short_side(llama: Path, tmp_path: Path) -> None:
    text = "rank=33 exceeds min(out, in)=32 of model.layers.0.self_attn.k_proj"
    refused(llama, tmp_path, text, "target_modules", adapter={"r": 33, "target_modules": ["k_proj"]})


def test_target_that_matches_nothing(llama: Path, tmp_path: Path) -> None:
    refused(
        llama,
        tmp_path,
        "no_such_layer",
        "Linear layers of this model: ",
        "q_proj",
        adapter={"target_modules": ["no_such_layer"]},
    )


def test_tied_target(llama: Path, tmp_path: Path) -> None:
    refused(
        llama, tmp_path, "lm_head.weight is tied to model.embed_tokens.weight", adapter={"target_modules": ["lm_head"]}
    )


def test_embedding_target(llama: Path, tmp_path: Path) -> None:
    text = "model.embed_tokens.weight is tied to lm_head.weight; give each its own with PiSSAStrategy(untie_embeddings"
    refused(llama, tmp_path, text, adapter={"target_modules": ["embed_tokens"]})


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"lora_bias": True}, "LoraConfig.lora_bias=True is computed by PEFT's own layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "PiSSAStrategy(init=PiSSA(...))"),
    ],
)
def test_unsupported_adapter_options(llama: Path, tmp_path: Path, adapter: dict[str, Any], text: str) -> None:
    refused(llama, tmp_path, text, adapter=adapter)


class BuiltTooEarly(CausalLM):
    def __init__(self, pretrained: Path) -> None:
        super().__init__(pretrained)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pretrained))


class NoModel(CausalLM):
    def configure_model(self) -> None:
        self.model = torch.nn.Identity()


class ExtraLayer(CausalLM):
    def configure_model(self) -> None:
        super().configure_model()
        self.head = torch.nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (BuiltTooEarly, "is on cpu, not on the meta device: build the model in configure_model"),
        (NoModel, "NoModel holds no transformers model after configure_model"),
        (ExtraLayer, "ExtraLayer.head.weight is outside the transformers model 'model'"),
    ],
)
def test_model_not_built_as_it_must_be(llama: Path, tmp_path: Path, module: Any, text: str) -> None:
    refused(llama, tmp_path, text, module=module)


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_fp16(llama: Path, tmp_path: Path, precision: str) -> None:
    refused(
        llama,
        tmp_path,
        f"precision={precision!r} is not supported; use one of 32-true, bf16-true, bf16-mixed",
        precision=precision,
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"no_such_option": 1}, "unknown option no_such_option=1"),
        ({"stage": 2}, "unknown option stage=2"),
        ({"config": {"zero_optimization": {"stage": 2}}}, "zero_optimization.stage=2; it must be 3"),
        ({"quantization": None, "init": PiSSA(quantization_iterations=5)}, "pass quantization=NF4()"),
        ({"offload_parameters": True, "offload_params_device": "nvme"}, "cannot be offloaded to 'nvme'"),
    ],
)
def test_unknown_or_contradictory_options(llama: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    refused(llama, tmp_path, text, **options)


def test_a_checkpoint_that_is_not_there(tmp_path: Path, llama: Path) -> None:
    refused(llama, tmp_path, "'/no/such/model': no such directory", module=FromElsewhere)


class FromElsewhere(CausalLM):
    def setup(self, stage: str) -> None:
        self.trainer.strategy.pretrained = "/no/such/model"


def test_a_quantized_checkpoint(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, tmp_path, "no tensor is stored so", quantization=NF4())


def twice(pretrained: Path, first: str) -> None:
    module, trainer = CausalLM(pretrained), make_trainer(make_strategy(pretrained), steps=1)
    batches = loader(trainer.global_rank, trainer.world_size, 1)
    getattr(trainer, first)(module, batches)
    trainer.fit(module, batches)


@pytest.mark.parametrize("first", ["fit", "validate"])
def test_fit_of_a_module_that_ran_before(llama: Path, first: str) -> None:
    """DeepSpeed would fail in the first backward, and not say why."""
    for _, error in run_ranks_catching(2, twice, llama, first):
        assert "make a new module, strategy and Trainer" in str(error)


def test_fewer_ranks_than_devices(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that a shell inside of an allocation has kept makes Lightning start no processes."""
    for name, value in {"SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    with pytest.raises(InputError, match="devices=2 on num_nodes=1 make 2 ranks.*reports 1:.*unset SLURM_NTASKS"):
        make_trainer(make_strategy(llama), devices=2, steps=1)
