"""What of Lightning cannot work on sharded parameters, refused before weights are read; ``docs/lightning.md`` has all.

Also ``"auto"`` in DeepSpeed configurations, which the Trainer of transformers fills in.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lowrank_dist.errors import InputError

_AVERAGES = (
    "it averages a copy of the whole module, made before the parameters have values and are sharded; save checkpoints "
    "with AdapterCheckpoint(save_top_k=-1) and average their lora/ with PEFT's "
    "add_weighted_adapter(combination_type='cat'), or use torch.optim.ASGD, whose state `ax` is the average"
)
_REFUSED: tuple[tuple[type[Callback], str], ...] = (
    (WeightAveraging, _AVERAGES),
    (StochasticWeightAveraging, _AVERAGES),
    (
        ModelPruning,
        "it replaces parameters by masked copies, which are not sharded; prune the merged model (lowrank-dist merge)",
    ),
    (
        BaseFinetuning,
        "it adds parameters to the optimizer while the run trains, but a ZeRO-3 engine trains those that it was made "
        "with; give a parameter group of its own a learning rate of 0 for the first steps (LambdaLR takes one function "
        "for each group), or fit twice",
    ),
)


def check_features(trainer: Trainer) -> None:
    """Raise InputError for callbacks and flags of `trainer` that would fail, or do nothing, once it fits.

    It must be called before weights are read. Issues no collective.

    Raises
    ------
    InputError
        With the reason and what to do instead.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            raise InputError(
                f"GradientAccumulationScheduler(scheduling={callback.scheduling}): all epochs must "
                "accumulate the same number of batches, because checkpoints count steps by it; leave the callback "
                "out and pass Trainer(accumulate_grad_batches=N)"
            )
        for kind, reason in _REFUSED:
            if isinstance(callback, kind):
                raise InputError(f"{type(callback).__name__} cannot be used with PiSSAStrategy: {reason}")
    module = trainer.lightning_module
    if trainer.gradient_clip_algorithm == "value":
        raise InputError(
            "Trainer(gradient_clip_algorithm='value'): DeepSpeed clips by norm alone; use 'norm', or call "
            "self.clip_gradients(optimizer, gradient_clip_val=..., gradient_clip_algorithm='value') in the module's "
            "configure_gradient_clipping"
        )
    if is_overridden("backward", module, LightningModule):
        raise InputError(
            f"{type(module).__name__} overrides backward, which DeepSpeed's engine does not call; scale or change the "
            "loss that training_step returns"
        )


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out entries of a DeepSpeed configuration that are ``"auto"``: Lightning and this strategy decide on them.

    Sections in which nothing else is, go as well.

    Raises
    ------
    InputError
        If they are in ``optimizer`` or ``scheduler``, which transformers' arguments would fill in.
    """
    found = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            kept = without_auto(value)
            if key in ("optimizer", "scheduler") and _has_auto(value):
                raise InputError(
                    f'the DeepSpeed config has "auto" in its section {key}, which only the Trainer of transformers '
                    "fills in; leave the section out and return the optimizer and its schedule in configure_optimizers"
                )
            if kept:
                found[key] = kept
        elif value != "auto":
            found[key] = value
    return found


def _has_auto(section: dict[str, Any]) -> bool:
    return any(_has_auto(value) if isinstance(value, dict) else value == "auto" for value in section.values())
