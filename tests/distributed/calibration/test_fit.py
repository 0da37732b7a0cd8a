"""Methods that look at data, through the strategy: what they start from, what they leave of the training data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import AutoModelForCausalLM

from helpers.covering import covering
from helpers.models import save_checkpoint
from helpers.ranks import run_ranks
from helpers.training import BATCHES, CausalLM, dense_state, loader, make_strategy, make_trainer, tokens
from lowrank_dist import EVA, QERA, Calibration, CorDA, LoRA, LoRAGA, LoRAOne, PiSSA
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.errors import InputError
from lowrank_dist.methods import Method
from lowrank_dist.training.module import CausalLMModule

METHODS: list[Method] = [CorDA(), CorDA(corda_method="kpm"), EVA(), LoRAGA()]


def loss_of(backbone: Any, batch: list[Tensor]) -> Tensor:
    (ids,) = batch
    return backbone(input_ids=ids, labels=ids).loss


def fitted(pretrained: Path, init: Method, precision: str, quantized: bool) -> tuple[list[float], Any]:
    options = {"init": init, "calibration": Calibration(batches=2, step=loss_of)}
    module = CausalLM(pretrained)
    trainer = make_trainer(
        make_strategy(pretrained, **options, **({} if quantized else {"quantization": None})),
        precision=precision,
        steps=3,
    )
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 3))
    return module.losses, trainer.strategy.init_report


@covering(1, {"init": METHODS, "world_size": [1, 2]}, ids=repr)
def test_step_0_is_the_original_model(llama: Path, init: Method, world_size: int) -> None:
    """fp32 without quantization: B A and the residual add up to W. The checkpoint is read once."""
    losses, report = run_ranks(world_size, fitted, llama, init, "32-true", False)[0]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    (ids,) = tokens(1)
    assert losses[0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert report.bytes_read == report.checkpoint_bytes
    assert len(set(losses)) == 3


def test_lora_one_begins_lower_than_the_original_model(llama: Path) -> None:
    """Step 0 is a step of descent, the same on 1, 2 and 3 ranks; gradients summed in another order turn its directions
    by rounding.
    """
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    (ids,) = tokens(1)
    before = model(input_ids=ids, labels=ids).loss.item()
    single, *others = (run_ranks(ranks, fitted, llama, LoRAOne(), "32-true", False)[0][0] for ranks in (1, 2, 3))
    assert single[0] < before - 1e-3
    assert len(set(single)) == 3
    for losses in others:
        assert losses == pytest.approx(single, rel=1e-4)


@covering(1, {"init": [CorDA(), LoRAGA(), QERA()], "precision": ["bf16-true", "bf16-mixed"]}, ids=repr)
def test_quantized_in_bf16(llama: Path, init: Method, precision: str) -> None:
    """NF4 moves the loss of this random model by less than a tenth."""
    losses, _ = run_ranks(2, fitted, llama, init, precision, True)[0]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    (ids,) = tokens(1)
    assert losses[0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=0.1)


def lora_ga_factors(pretrained: Path) -> dict[str, Tensor]:
    module = CausalLM(pretrained)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    calibration = Calibration(batches=3, step=loss_of)
    strategy = make_strategy(
        pretrained,
        init=LoRAGA(scale="unit", oversampling=64),
        adapter=adapter,
        quantization=None,
        calibration=calibration,
    )
    trainer = make_trainer(strategy, steps=1)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 3))
    return {name: tensor for name, tensor in dense_state(strategy).items() if "lora_" in name}


@pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_ga_starts_where_pefts_does(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches, on two ranks and in one process. PEFT is given an exact SVD in the place of its randomized one.
    Signs of singular vectors are free. ``scale="unit"``: "stable" in PEFT takes the inputs of a Conv1D for its outputs.
    fp32 rounding of a gradient turns them by it over the gap of singular values.
    """

    def svd(a: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)
        return u[:, :q].float(), s[:q].float(), vh[:q].mT.float()

    monkeypatch.setattr(torch, "svd_lowrank", svd)
    pretrained = save_checkpoint(tmp_path, architecture)
    ours = run_ranks(2, lora_ga_factors, pretrained)[0]
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules="all-linear",
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(scale="unit"),
    )
    config.target_modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in ours})

    def train_step() -> None:
        for ids in tokens(3):
            model(input_ids=ids, labels=ids).loss.backward()

    torch.manual_seed(0)
    preprocess_loraga(model, config, train_step)
    theirs = {n.removeprefix("base_model.model."): t for n, t in get_peft_model(model, config).state_dict().items()}
    assert len(ours) >= 16
    for name, factor in ours.items():
        torch.testing.assert_close(
            factor.abs(), theirs[name].abs(), rtol=0, atol=1e-3 * float(theirs[name].abs().max())
        )


class Recording(CausalLM):
    """Remembers what it was trained on."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen = [*getattr(self, "seen", []), batch[0].clone()]
        return super().training_step(batch, index)


class Data(L.LightningDataModule):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> DataLoader:
        return self.make()


class Rows(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor]]:
        order = torch.randperm(96)
        yield from ((tokens(BATCHES).flatten(0, 1)[index],) for index in order)


def make_loader(kind: str) -> DataLoader:
    dataset = TensorDataset(tokens(BATCHES).flatten(0, 1))
    if kind == "generator":
        return DataLoader(dataset, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(5))
    if kind == "workers":
        # as in a rank of its own; in those of the tests the default would start a server that imports everything first
        settings = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
        return DataLoader(dataset, batch_size=3, shuffle=True, **settings)
    if kind == "iterable":
        return DataLoader(Rows(), batch_size=3)
    return DataLoader(dataset, batch_size=3, shuffle=True)


def order_of_training(pretrained: Path, kind: str, init: Method) -> tuple[list[Tensor], Tensor]:
    L.seed_everything(3, verbose=False)
    module = Recording(pretrained)
    calibration = Calibration(batches=3, step=loss_of) if init.statistic else None
    trainer = make_trainer(make_strategy(pretrained, init=init, calibration=calibration), steps=5)
    if kind == "early":  # asks for the loaders before the strategy is set up
        module.setup = lambda stage: trainer.estimated_stepping_batches
    data = Data(lambda: make_loader(kind)) if kind in ("datamodule", "early") else make_loader(kind)
    trainer.fit(module, data)
    return module.seen, torch.rand(4)


@pytest.mark.parametrize("kind", ["plain", "generator", "workers", "iterable", "datamodule", "early"])
def test_training_sees_the_data_that_it_would_see_anyway(llama: Path, kind: str) -> None:
    """Order of the batches and random numbers afterwards."""
    seen, numbers = run_ranks(2, order_of_training, llama, kind, EVA())[0]
    expected, expected_numbers = run_ranks(2, order_of_training, llama, kind, LoRA())[0]
    assert len(seen) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert torch.equal(numbers, expected_numbers)


def fine_tuned(material: Path, init: dict[str, Any], packing: bool) -> tuple[str, str]:
    """Fit from a YAML file, as ``lowrank-dist fit`` does; the strategy's `init` and `calibration`."""
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"}}
    strategy = {
        "pretrained": str(material / "model"),
        "adapter": adapter,
        "init": init,
        "calibration": {"class_path": "lowrank_dist.Calibration", "init_args": {"batches": 2}},
        "show_progress": False,
    }
    trainer = {
        "strategy": {"class_path": "lowrank_dist.PiSSAStrategy", "init_args": strategy},
        "accelerator": "cpu",
        "devices": torch.distributed.get_world_size(),
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": str(material),
    }
    data = {"tokenizer": str(material / "model"), "train": str(material / "data.jsonl"), "batch_size": 2}
    options = {
        "model": {"pretrained": str(material / "model")},
        "data": data | {"packing": packing, "max_length": 64},
        "trainer": trainer,
    }
    cli = LightningCLI(
        CausalLMModule, SFTDataModule, args={"subcommand": "fit", "fit": options}, run=True, save_config_callback=None
    )
    return repr(cli.trainer.strategy.init), repr(cli.trainer.strategy.calibration)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "init",
    [
        {"class_path": "lowrank_dist.CorDA", "init_args": {"corda_method": "kpm"}},
        {"class_path": "lowrank_dist.LoRAGA", "init_args": {"scale": "unit"}},
    ],
    ids=lambda init: init["class_path"],
)
def test_from_the_modules_of_the_command_line(material: Path, init: dict[str, Any], packing: bool) -> None:
    """Batches are dicts, the loss is the module's own."""
    method, calibration = run_ranks(2, fine_tuned, material, init, packing)[0]
    assert method.startswith(init["class_path"].rsplit(".", 1)[-1])
    assert calibration.startswith("Calibration(batches=2")


def refused(pretrained: Path, calibration: Calibration | None) -> str:
    module = CausalLM(pretrained)
    trainer = make_trainer(make_strategy(pretrained, init=EVA(), calibration=calibration))
    try:
        trainer.validate(module, loader(trainer.global_rank, trainer.world_size, 1), verbose=False)
    except InputError as error:
        return str(error)
    return f"val_loss {float(trainer.callback_metrics['val_loss']):.4f}"


def test_without_training_data(llama: Path) -> None:
    for message in run_ranks(2, refused, llama, None):
        assert "Calibration(data=...)" in message
    data = [{"input_ids": ids} for ids in tokens(2)]
    for message in run_ranks(2, refused, llama, Calibration(batches=2, data=data)):
        assert message.startswith("val_loss")


def test_options_that_do_not_fit(llama: Path) -> None:
    with pytest.raises(InputError, match=r"PiSSA does not look at data"):
        make_strategy(llama, init=PiSSA(), calibration=Calibration())
    with pytest.raises(InputError, match=r"ranks_per_matrix=2 cannot be used with EVA"):
        make_strategy(llama, init=EVA(), ranks_per_matrix=2)
    with pytest.raises(InputError, match=r"batches=0 must be at least 1"):
        Calibration(batches=0)
    with pytest.raises(InputError, match=r"positions='some' is not one of attended, labelled, all"):
        Calibration(positions="some")  # type: ignore[arg-type]
