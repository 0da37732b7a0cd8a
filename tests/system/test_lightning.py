"""Every callback and Trainer flag of the installed Lightning in a fit on two ranks, as ``docs/lightning.md`` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning

from helpers.lightning_table import CALLBACKS, DOCUMENT, FLAGS, HEADING, Case, installed, tables
from helpers.loggers import RecordingLogger
from helpers.ranks import run_ranks
from helpers.training import CausalLM, loader, make_strategy

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 2,
    "max_steps": 2,
    "max_epochs": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
}


class Finetuning(BaseFinetuning):
    """A user's own."""

    def freeze_before_training(self, pl_module: Any) -> None: ...

    def finetune_function(self, *_: Any) -> None: ...


class Searched(CausalLM):
    lr, batch_size = 1e-3, 2


def fit(pretrained: Path, options: dict[str, Any]) -> int:
    batches = 4 if "accumulate_grad_batches" in options else 2
    trainer = L.Trainer(strategy=make_strategy(pretrained, quantization=None), **options)
    trainer.fit(
        Searched(pretrained),
        loader(trainer.global_rank, trainer.world_size, batches),
        loader(trainer.global_rank, trainer.world_size, 1),
    )
    return trainer.global_step


def tried(pretrained: Path, directory: Path) -> dict[str, str]:
    """What went otherwise than the table says."""
    wrong = {}
    cases: list[tuple[str, Case, dict[str, Any]]] = []
    for name, case in CALLBACKS.items():
        made = Finetuning() if name == "BaseFinetuning" else case.make and case.make(directory / name)
        if made is not None:
            further = {"enable_progress_bar": True} if "Progress" in name else {}
            further |= {"enable_checkpointing": True} if "Checkpoint" in name else {}
            further |= {"enable_model_summary": True} if "Summary" in name else {}
            cases.append((name, case, {"callbacks": [made], "logger": RecordingLogger(), **further}))
    for name, case in FLAGS.items():
        if case.make is not None:
            defaults: dict[str, Any] = {"logger": False}
            if name == "barebones":
                defaults |= {"log_every_n_steps": None}
            cases.append((name, case, {**defaults, name: case.make(directory / name)}))
    for name, case, options in cases:
        try:
            steps = fit(pretrained, {**QUIET, "default_root_dir": directory / name, **options})
        except Exception as error:
            if case.error is None or case.error not in str(error):
                wrong[name] = f"{type(error).__name__}: {error}"
        else:
            if case.error is not None or steps != case.steps:
                wrong[name] = f"{steps} steps"
    return wrong


def test_each_does_what_the_documents_say(llama: Path, tmp_path: Path) -> None:
    assert run_ranks(2, tried, llama, tmp_path, timeout=500) == [{}, {}]


def test_the_documents_have_all_that_is_installed() -> None:
    assert installed() == (set(CALLBACKS), set(FLAGS))
    assert DOCUMENT.read_text().partition(HEADING)[2] == tables().removeprefix(HEADING)
