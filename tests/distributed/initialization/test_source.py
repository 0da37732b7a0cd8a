"""Weights that are no files train as the same weights on disk do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.models import save_checkpoint, stored
from helpers.ranks import RankFailedError, run_ranks
from helpers.training import ByStep, dense_state, loader, make_strategy, make_trainer
from lowrank_dist import AdapterCheckpoint, PiSSA
from lowrank_dist.storage.reader import CheckpointReader, TensorInfo

STEPS = 3


@dataclass(frozen=True)
class InMemory:
    """The tensors of a checkpoint, scaled."""

    directory: Path
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"in-memory-{self.directory.name}"

    @property
    def fingerprint(self) -> str:
        return f"{self.directory} {self.scale}"

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        reader = CheckpointReader(self.directory)
        return {name: reader.info(name) for name in reader}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        for path in self.directory.glob("*.safetensors"):
            held = load_file(path)
            if name in held:
                return held[name][start:stop] * self.scale
        raise KeyError(name)


def train(
    pretrained: Any, config: Path, options: dict[str, Any], output: Path | None = None, resume: Path | None = None
) -> tuple[list[float], dict[str, Tensor], str]:
    module = ByStep(config)
    strategy = make_strategy(pretrained, ranks_per_matrix=1, **options)  # what is measured else decides, and rounds
    callbacks = (
        [] if output is None else [AdapterCheckpoint(output, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    )
    trainer = make_trainer(strategy, steps=STEPS, callbacks=callbacks, enable_checkpointing=bool(callbacks))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    trainer.fit(module, loader(rank, size, STEPS), ckpt_path=resume)
    assert strategy.init_report is not None
    return module.losses, dense_state(strategy), str(strategy.init_report.bytes_read)


EXPERTS = LoraConfig(
    r=4, lora_alpha=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], lora_dropout=0.0
)


@pytest.mark.parametrize(
    ("architecture", "options", "saved"),
    [
        pytest.param("llama", {"init": PiSSA(quantization_iterations=2)}, {}, id="llama"),
        pytest.param("mixtral", {"adapter": EXPERTS}, {}, id="experts one by one"),
        pytest.param("mixtral", {"adapter": EXPERTS}, {"save_original_format": False}, id="stacked experts"),
    ],
)
def test_the_same_weights_give_the_same_run(
    tmp_path: Path, architecture: str, options: dict[str, Any], saved: dict[str, Any]
) -> None:
    """To rounding of fp32: a BLAS rounds by where in memory a weight lies, and tensors of files lie anywhere."""
    directory = save_checkpoint(tmp_path / "model", architecture, **saved)
    from_files = run_ranks(2, train, directory, directory, options)[0]
    from_source = run_ranks(2, train, InMemory(directory), directory, options)[0]
    assert from_source[0] == pytest.approx(from_files[0], rel=1e-6)
    assert from_source[1].keys() == from_files[1].keys()
    torch.testing.assert_close(from_source[1], from_files[1], rtol=1e-5, atol=1e-6)
    assert from_source[2] == from_files[2]  # bytes read


def test_a_file_given_itself_with_names_of_a_wrapper(llama: Path, tmp_path: Path) -> None:
    """The run from ``model.fp32.safetensors`` that a compiled model was saved to is that of the usual directory."""
    file = tmp_path / "model.fp32.safetensors"
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in stored(llama).items()}
    save_file(wrapped, file, metadata={"format": "pt"})
    shutil.copy(llama / "config.json", tmp_path)
    usual, unusual = (run_ranks(2, train, path, llama, {})[0] for path in (llama, file))
    assert unusual[0] == pytest.approx(usual[0], rel=1e-6)
    torch.testing.assert_close(unusual[1], usual[1], rtol=1e-5, atol=1e-6)
    assert unusual[2] == usual[2]  # bytes read


def test_a_run_resumes_with_the_source_of_its_start_only(tmp_path: Path, llama: Path) -> None:
    """On another number of ranks, as the undisturbed run to rounding: fp32, 1e-5 relative."""
    losses, _, _ = run_ranks(1, train, InMemory(llama), llama, {}, tmp_path)[0]
    checkpoint = tmp_path / "step=1"
    assert f"in-memory-{llama.name}" in (checkpoint / "lora" / "adapter_config.json").read_text()
    resumed, _, _ = run_ranks(2, train, InMemory(llama), llama, {}, None, checkpoint)[0]
    assert resumed == pytest.approx(losses[1:], rel=1e-5)
    with pytest.raises(RankFailedError, match="the pretrained weights have changed"):
        run_ranks(1, train, InMemory(llama, scale=2.0), llama, {}, None, checkpoint)


def test_what_needs_files_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init_cache=.*source of weights alone"):
        make_strategy(InMemory(llama), init_cache=tmp_path)
