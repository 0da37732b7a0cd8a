"""The calibration pass over the Trainer's training data, read without changing what training sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.data_connector import _process_dataloader
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lowrank_dist.calibration.measure import Calibration, Step, model_loss, step_name
from lowrank_dist.calibration.walk import CalibrationPass
from lowrank_dist.data.streaming import StreamLoader
from lowrank_dist.errors import InputError
from lowrank_dist.initialization.open import OpenedModel
from lowrank_dist.zero3.partition import Partitioner


@contextmanager
def calibration_batches(trainer: Trainer, calibration: Calibration) -> Iterator[Iterator[Any]]:
    """Yield this rank's batches, on its device: ``calibration.data``, or else the first batches of training.

    Training data come from the same place as in training (the ``train_dataloader`` hook, or the loaders passed to
    ``fit``), and are distributed over the ranks as in training. A loader is read through a separate iterator. At the
    end, all states that reading changes are restored: the random states of Python, NumPy and torch, the generators of
    loaders and samplers, and the state of loaders that have a ``state_dict``. Training therefore sees the same data in
    the same order as without calibration. The exception is an iterable data set that can be read only once: pass
    ``Calibration(data=...)`` with it.

    Parameters
    ----------
    trainer
        Trainer in ``strategy.setup``: module and datamodule are set up, the loops are not.
    calibration
        Calibration whose `data` is used, if it is set.

    Raises
    ------
    InputError
        If there are no training data, as in ``validate`` and ``test``.
    """
    strategy = trainer.strategy
    with isolate_rng(), ExitStack() as stack:
        if calibration.data is not None:
            batches: Iterator[Any] = iter(calibration.data)
        else:
            loaders = _training_loaders(trainer)
            for loader in loaders.flattened:
                stack.enter_context(_restored(loader))
            apart = CombinedLoader(loaders.iterables, loaders._mode)
            apart.flattened = [_reader(loader) for loader in loaders.flattened]
            stack.callback(apart.reset)  # ends its workers
            batches = (batch for batch, _, _ in iter(apart))

        def on_device() -> Iterator[Any]:
            for batch in batches:
                batch = strategy.precision_plugin.convert_input(batch)
                yield strategy.batch_to_device(batch, strategy.root_device)

        yield on_device()


@contextmanager
def calibration_pass(
    opened: OpenedModel,
    partitioner: Partitioner,
    *,
    module: LightningModule,
    calibration: Calibration,
    autocast: torch.dtype | None,
    compute_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    fp32_norms: bool,
    advance: Callable[[int], object],
) -> Iterator[CalibrationPass]:
    """The pass over what training would see; a `lowrank_dist.initialization.build.Calibrate` but for three arguments.

    Parameters
    ----------
    opened, partitioner, compute_dtype, factor_dtype, fp32_norms, advance
        From `lowrank_dist.initialization.build.build_model`.
    module
        Of the Trainer; see `calibration_batches` and `calibration_step`.
    calibration, autocast
        See `calibration_step`.
    """
    source = opened.source
    assert source.init is not None
    with calibration_batches(module.trainer, calibration) as batches:
        yield CalibrationPass(
            opened.backbone,
            opened.plan,
            source.reader,
            partitioner,
            batches,
            calibration=calibration,
            init=source.init,
            step=calibration_step(module, calibration, autocast),
            residual=source.residual,
            compute_dtype=compute_dtype,
            factor_dtype=factor_dtype,
            fp32_norms=fp32_norms,
            advance=advance,
        )


def _training_loaders(trainer: Trainer) -> CombinedLoader:
    source = trainer.fit_loop._data_source
    if trainer.state.fn != TrainerFn.FITTING or not source.is_defined():
        raise InputError(
            f"Trainer.{trainer.state.fn}: the initialisation needs data, and there are no training data here; pass "
            "PiSSAStrategy(calibration=Calibration(data=...)), or call fit first"
        )
    if trainer.fit_loop._combined_loader is not None:  # Trainer.estimated_stepping_batches has created it
        return trainer.fit_loop._combined_loader
    asked = source.dataloader()
    loaders = asked if isinstance(asked, CombinedLoader) else CombinedLoader(asked, "max_size_cycle")
    # The CombinedLoader may be the user's own object, which must not receive the loaders that Lightning processes.
    loaders = CombinedLoader(loaders.iterables, loaders._mode)
    loaders.flattened = [
        _process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, loader) for loader in loaders.flattened
    ]
    return loaders


def _reader(loader: Any) -> Any:
    """A separate loader of the same data, so that its persistent workers end with it."""
    return copy.copy(loader) if isinstance(loader, DataLoader | StreamLoader) else loader


@contextmanager
def _restored(loader: Any) -> Iterator[None]:
    """Restore the states that reading `loader` changes."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    held = [getattr(holder, "generator", None) for holder in holders]
    generators = [(one, one.get_state()) for one in held if isinstance(one, torch.Generator)]
    stateful = callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
    state = copy.deepcopy(loader.state_dict()) if stateful else None
    try:
        yield
    finally:
        for generator, before in generators:
            generator.set_state(before)
        if stateful:
            loader.load_state_dict(state)


def calibration_step(module: LightningModule, calibration: Calibration, autocast: torch.dtype | None) -> Step:
    """The step to run for every batch: ``calibration.step``, else the module's own, else the backbone's loss.

    Parameters
    ----------
    module
        Module that may have a method ``calibration_step(batch) -> loss``.
    calibration
        Calibration whose `step`, if set, takes precedence.
    autocast
        Dtype of the autocast around the step. None: no autocast.
    """
    own: Callable[[Any], Any] | None = getattr(module, "calibration_step", None)
    if own is None or calibration.step is not None:
        chosen = calibration.step or model_loss
        return _Step(run=chosen, name=step_name(chosen), autocast=autocast)
    return _Step(run=lambda _, batch: own(batch), name=step_name(own), autocast=autocast)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step under autocast; its string names the step and the dtype."""

    run: Step
    name: str
    autocast: torch.dtype | None

    def __call__(self, backbone: Any, batch: Any) -> Any:
        device = next(backbone.parameters()).device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return self.run(backbone, batch)

    def __str__(self) -> str:
        return f"{self.name}, autocast: {self.autocast}"
