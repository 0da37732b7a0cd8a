"""What happens to each of Lightning's callbacks and Trainer flags: ``python tests/helpers/lightning_table.py``.

It writes the tables of ``docs/lightning.md``. `tests/system/test_lightning.py` tries each entry, and fails for a new
one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import callbacks as of_lightning

DOCUMENT = Path(__file__).parents[2] / "docs" / "lightning.md"
HEADING = "## Callbacks\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """How a callback or flag is tried in a fit of two steps, and what the documents say."""

    says: str
    #: Makes the callback, or is the value of the flag; it gets a directory.
    make: Callable[[Path], Any] | None = None
    #: A part of the message with which it is refused.
    error: str | None = None
    steps: int = 2


def callback(name: str, **options: Any) -> Callable[[Path], Any]:
    return lambda _: getattr(of_lightning, name)(**options)


def value(given: Any) -> Callable[[Path], Any]:
    return lambda _: given


_AVERAGES = "Refused: it copies the module before there are values. Average the `lora/` of checkpoints with PEFT."
_AVERAGING = "it averages a copy of the whole module"
_BASE = "The base class of others; works."

CALLBACKS: dict[str, Case] = {
    "BackboneFinetuning": Case(
        says="Refused: an engine trains the parameters that it was made with. Use learning rates of parameter groups.",
        make=callback("BackboneFinetuning"),
        error="it adds parameters to the optimizer while the run trains",
    ),
    "BaseFinetuning": Case(says="Refused, as its subclasses.", error="it adds parameters to the optimizer"),
    "BasePredictionWriter": Case(says="Takes no part in a fit."),
    "BatchSizeFinder": Case(
        says="Refused by Lightning under every distributed strategy, `Tuner.scale_batch_size` too: one rank that runs "
        "out of memory leaves the others waiting. `lowrank-dist plan` tells what fits.",
        make=callback("BatchSizeFinder"),
        error="The Batch size finder is not supported with distributed strategies",
    ),
    "Callback": Case(says=_BASE, make=callback("Callback")),
    "Checkpoint": Case(says=_BASE, make=callback("Checkpoint")),
    "DeviceStatsMonitor": Case(says="Works.", make=callback("DeviceStatsMonitor")),
    "EMAWeightAveraging": Case(says=_AVERAGES, make=callback("EMAWeightAveraging"), error=_AVERAGING),
    "EarlyStopping": Case(says="Works.", make=callback("EarlyStopping", monitor="val_loss")),
    "GradientAccumulationScheduler": Case(
        says="Refused: checkpoints count steps by one number of batches. Pass `Trainer(accumulate_grad_batches=N)`.",
        make=callback("GradientAccumulationScheduler", scheduling={0: 1, 1: 2}),
        error="all epochs must accumulate the same number of batches",
    ),
    "LambdaCallback": Case(says="Works.", make=callback("LambdaCallback", on_train_start=lambda *_: None)),
    "LearningRateFinder": Case(
        says="Works, `Tuner.lr_find` too; the fit goes on as if nothing had been searched. After `Tuner.lr_find` make "
        "a new module, strategy and Trainer.",
        make=lambda _: of_lightning.LearningRateFinder(num_training_steps=4, min_lr=1e-6, max_lr=1e-2),
    ),
    "LearningRateMonitor": Case(
        says="Works, with momentum and weight decay.",
        make=callback("LearningRateMonitor", log_momentum=True, log_weight_decay=True),
    ),
    "ModelCheckpoint": Case(
        says="Works; its checkpoints are directories. `AdapterCheckpoint` is one that writes in the background.",
        make=lambda directory: of_lightning.ModelCheckpoint(directory / "checkpoints", save_last=True),
    ),
    "ModelPruning": Case(
        says="Refused: masked copies are not sharded. Prune the merged model.",
        make=callback("ModelPruning", pruning_fn="l1_unstructured"),
        error="it replaces parameters by masked copies",
    ),
    "ModelSummary": Case(says="Works.", make=callback("ModelSummary")),
    "OnExceptionCheckpoint": Case(
        says="Works for an exception that all ranks raise.",
        make=lambda directory: of_lightning.OnExceptionCheckpoint(directory / "exception"),
    ),
    "ProgressBar": Case(says="The abstract base class of others; works."),
    "RichModelSummary": Case(says="Works.", make=callback("RichModelSummary")),
    "RichProgressBar": Case(says="Works.", make=callback("RichProgressBar")),
    "SpikeDetection": Case(
        says="Works.", make=lambda directory: of_lightning.SpikeDetection(exclude_batches_path=str(directory / "skip"))
    ),
    "StochasticWeightAveraging": Case(
        says=_AVERAGES, make=callback("StochasticWeightAveraging", swa_lrs=1e-2), error=_AVERAGING
    ),
    "TQDMProgressBar": Case(says="Works.", make=callback("TQDMProgressBar")),
    "ThroughputMonitor": Case(
        says="Works. `StepMonitor` counts tokens and tells where the time goes.",
        make=callback("ThroughputMonitor", batch_size_fn=lambda batch: len(batch[0])),
    ),
    "Timer": Case(says="Works.", make=callback("Timer", duration={"hours": 1})),
    "WeightAveraging": Case(says=_AVERAGES, make=callback("WeightAveraging"), error=_AVERAGING),
}

FLAGS: dict[str, Case] = {
    "accelerator": Case(says='`"gpu"` and `"cpu"`.', make=value("cpu")),
    "accumulate_grad_batches": Case(
        says="Works; the last step of an epoch may have fewer batches.", make=value(2), steps=2
    ),
    "barebones": Case(says="Works.", make=value(True)),
    "benchmark": Case(says="Works.", make=value(True)),
    "callbacks": Case(says="See above.", make=value([])),
    "check_val_every_n_epoch": Case(says="Works.", make=value(1)),
    "default_root_dir": Case(says="Works.", make=lambda directory: directory),
    "detect_anomaly": Case(says="Works.", make=value(True)),
    "deterministic": Case(says="Works.", make=value(True)),
    "devices": Case(says="Works."),
    "enable_autolog_hparams": Case(says="Works.", make=value(False)),
    "enable_checkpointing": Case(
        says="Works. True adds a `ModelCheckpoint`; leave it out with `AdapterCheckpoint`.", make=value(True)
    ),
    "enable_model_summary": Case(says="Works.", make=value(True)),
    "enable_progress_bar": Case(says="Works.", make=value(True)),
    "fast_dev_run": Case(says="Works.", make=value(1), steps=1),
    "gradient_clip_algorithm": Case(
        says='`"norm"`. `"value"` is refused; call `self.clip_gradients` in `configure_gradient_clipping` for it.',
        make=value("value"),
        error="DeepSpeed clips by norm alone",
    ),
    "gradient_clip_val": Case(says="Works: the norm of all gradients on all ranks.", make=value(0.5)),
    "inference_mode": Case(says="Works.", make=value(False)),
    "limit_predict_batches": Case(says="Works.", make=value(1)),
    "limit_test_batches": Case(says="Works.", make=value(1)),
    "limit_train_batches": Case(says="Works.", make=value(1), steps=1),
    "limit_val_batches": Case(says="Works.", make=value(1)),
    "log_every_n_steps": Case(says="Works.", make=value(1)),
    "logger": Case(says="Works.", make=value(False)),
    "max_epochs": Case(says="Works.", make=value(1)),
    "max_steps": Case(says="Works.", make=value(1), steps=1),
    "max_time": Case(says="Works.", make=value("00:01:00:00")),
    "min_epochs": Case(says="Works.", make=value(1)),
    "min_steps": Case(says="Works.", make=value(1)),
    "model_registry": Case(says="Of Lightning's own hub; nothing here looks at it.", make=value(None)),
    "num_nodes": Case(says="Works.", make=value(1)),
    "num_sanity_val_steps": Case(says="Works.", make=value(1)),
    "overfit_batches": Case(says="Works.", make=value(1), steps=1),
    "plugins": Case(
        says="Cluster environments. A `CheckpointIO` is refused: checkpoints are directories that all ranks write.",
        make=lambda _: [L.pytorch.plugins.TorchCheckpointIO()],
        error="a CheckpointIO writes one file on one rank",
    ),
    "precision": Case(says="`32-true`, `bf16-true`, `bf16-mixed`; others are refused.", make=value("bf16-mixed")),
    "profiler": Case(says="Works.", make=value("simple")),
    "reload_dataloaders_every_n_epochs": Case(says="Works.", make=value(1)),
    "strategy": Case(says="`PiSSAStrategy`, for one Trainer; a Trainer may fit one module after another."),
    "sync_batchnorm": Case(says="No effect, as under every DeepSpeed strategy.", make=value(True)),
    "use_distributed_sampler": Case(says="Works.", make=value(True), steps=1),
    "val_check_interval": Case(says="Works.", make=value(1)),
}


def installed() -> tuple[set[str], set[str]]:
    """Names of Lightning's callbacks and of the flags of its Trainer."""
    return set(of_lightning.__all__), set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}


def tables() -> str:
    """The part of the document from `HEADING` on."""
    lines = [HEADING, "| callback | under `PiSSAStrategy` |", "|---|---|"]
    lines += [f"| `{name}` | {case.says} |" for name, case in sorted(CALLBACKS.items())]
    lines += ["\n## Flags of the Trainer\n", "| flag | under `PiSSAStrategy` |", "|---|---|"]
    lines += [f"| `{name}` | {case.says} |" for name, case in sorted(FLAGS.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(DOCUMENT.read_text().partition(HEADING)[0] + tables())
