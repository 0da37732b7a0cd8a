"""A `ModelCheckpoint` that writes adapters and training state, in the background."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lowrank_dist.callbacks.run_lock import hold, let_go
from lowrank_dist.checkpoints.layout import checkpoints
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.storage.beside import restore_replaced, sweep
from lowrank_dist.storage.layout import MANIFEST, read_manifest
from lowrank_dist.storage.replacing import is_ours
from lowrank_dist.training.strategy import PiSSAStrategy

#: State of `ModelCheckpoint` about saved checkpoints. Lightning sets it before the files are complete.
_BOOKKEEPING = (
    "best_k_models",
    "best_model_path",
    "best_model_score",
    "current_score",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
    "_last_checkpoint_saved",
    "_last_global_step_saved",
)

#: Those of them that are paths. They come from a file when a run is resumed.
_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")

#: A name in Lightning's format of file names.
_METRIC = re.compile(r"\{(\w+)")

log = logging.getLogger(__name__)


class AdapterCheckpoint(ModelCheckpoint):
    """Save the adapter, the converted LoRA and the training state, without the frozen base.

    A checkpoint is a directory of safetensors and JSON files. It is either complete or absent. It contains:

    - ``adapter/``: the trained factors, a PEFT adapter for the *residual*;
    - ``adapter_init/``: the factors before training;
    - ``lora/``: the converted LoRA, of rank 2r, a PEFT adapter for the *original* model;
    - ``optimizer.safetensors``, ``state.json``, ``state.safetensors``: the training state (not with
      ``save_weights_only``);
    - ``lowrank_dist.json``: settings, step, quantization error per matrix, hashes.

    ``trainer.fit(..., ckpt_path=DIR)`` resumes on any number of ranks. ``ckpt_path="last"`` resumes from the newest
    complete checkpoint in `dirpath`: of the run that wrote last, the one of the highest step. The last step of a fit is
    also saved, whatever the interval, unless ``save_top_k=0`` or a ``monitor`` decides. Under gradient accumulation a
    save waits for the end of the step. With ``save_on_exception``, an exception raised on only some ranks triggers no
    save, because a save needs all ranks.

    A run that is resumed with ``ckpt_path="last"`` removes the checkpoints that `save_top_k` has superseded and that an
    earlier attempt, killed meanwhile, has left: those of this run and this callback in `dirpath`, by their manifests,
    before the step from which it resumes. Nothing is ever removed outside `dirpath`, or without a manifest of this
    package. While a run trains, another one with the same `dirpath` is refused.

    The class takes the arguments of `lightning.pytorch.callbacks.ModelCheckpoint` (``dirpath``,
    ``every_n_train_steps``, ``monitor``, ``save_top_k``, ``save_last``, ...) with the same meaning, and two more.

    Parameters
    ----------
    background
        Write files while training goes on; a step waits only while the state is copied. Old checkpoints are removed,
        links are made and loggers are notified once the new checkpoint is complete.
    on_save_error
        What to do when a save fails (for instance on a full disk). ``"stop"``: training ends with the error, at the
        next save or at the end. ``"continue"``: training goes on with a warning. In both cases earlier checkpoints
        stay intact, the attributes of the callback (``best_model_path``, ...) name only complete checkpoints, and no
        checkpoint is removed in favour of the failed one.

    Attributes
    ----------
    save_seconds : float or None
        Seconds that the last save took, from the snapshot to the complete checkpoint. None before the first save.

    Raises
    ------
    MisconfigurationException
        If `on_save_error` is neither ``"stop"`` nor ``"continue"``. At set-up, if the trainer's strategy is not
        `PiSSAStrategy`.

    See Also
    --------
    Preemption : Saves through this callback when SLURM ends or preempts the job.
    lowrank_dist.convert_checkpoint : Writes another LoRA from a checkpoint.
    lowrank_dist.merge_checkpoint : Merges the adapter of a checkpoint into the pretrained weights.

    Examples
    --------
    Save every 200 optimizer steps and keep all checkpoints:

    >>> from lowrank_dist import AdapterCheckpoint
    >>> callback = AdapterCheckpoint(filename="{step}", every_n_train_steps=200, save_top_k=-1)
    >>> callback.background, callback.on_save_error
    (True, 'stop')

    Pass it to ``Trainer(strategy=PiSSAStrategy(...), callbacks=[callback])``.
    """

    FILE_EXTENSION = ""

    def __init__(
        self, *args: Any, background: bool = True, on_save_error: Literal["stop", "continue"] = "stop", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if on_save_error not in ("stop", "continue"):
            raise MisconfigurationException(f"on_save_error={on_save_error!r} must be 'stop' or 'continue'")
        self.background, self.on_save_error = background, on_save_error
        self.save_seconds: float | None = None
        self._save: Future[None] | None = None
        self._loggers_pending = False
        self._before: dict[str, Any] = {}
        self._removals: list[Path] = []
        self._in_top_k = False
        self._resumes_last = False
        self._lock: Path | None = None
        self._group = ShardGroup.single()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, PiSSAStrategy):
            raise MisconfigurationException(
                f"AdapterCheckpoint writes the adapters of a PiSSAStrategy, but the strategy is "
                f"{type(trainer.strategy).__name__}; use lightning's ModelCheckpoint with it"
            )
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.dirpath is None:
            return
        strategy: Any = trainer.strategy
        self._group = strategy._group
        with self._group.shared_errors():
            if trainer.is_global_zero:
                self._let_go()
                self._lock = hold(Path(self.dirpath))
                sweep(Path(self.dirpath))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._let_go()

    def _let_go(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            let_go(lock)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the bookkeeping; paths that do not lead to checkpoints in `dirpath` are left out with a warning.

        Collective. What rank 0 sees in `dirpath` counts: ranks decide by their bookkeeping whether they all save.
        """
        state = None
        with self._group.shared_errors():
            if self._group.rank == 0:
                state = self._checked(state_dict)
        found: Any = self._group.broadcast_object(state)
        super().load_state_dict(found)

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(state_dict)
        for name in _PATHS:
            if state.get(name) and not self._is_own(state[name], may_be_gone=True):
                if state.get("dirpath") == self.dirpath:
                    log.warning("%s=%r is no checkpoint in %s; it is forgotten", name, state[name], self.dirpath)
                state[name] = ""
        best = state.get("best_k_models")
        best = best if isinstance(best, dict) else {}
        state["best_k_models"] = {path: score for path, score in best.items() if self._is_own(path)}
        if state.get("kth_best_model_path") not in state["best_k_models"]:
            worst = max if self.mode == "min" else min
            scores = state["best_k_models"]
            state["kth_best_model_path"] = worst(scores, key=scores.__getitem__) if len(scores) else ""
        if self.save_last and not state.get("last_model_path"):
            # killed between the first save and the first "last" one, which the state does not know
            last = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            state["last_model_path"] = last if self._is_own(last) else ""
        return state

    def _is_own(self, path: object, *, may_be_gone: bool = False) -> bool:
        """Whether `path` is a checkpoint in `dirpath`, or was one, and nothing else."""
        if not isinstance(path, str) or self.dirpath is None or Path(path).name in ("", ".."):
            return False
        found = Path(path)
        inside = found.parent.resolve() == Path(self.dirpath).resolve()
        return inside and (is_ours(found) or found.is_symlink() or (may_be_gone and not found.exists()))

    # -- when ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        strategy: Any = trainer.strategy
        resumed: Path | None = strategy.resumed_from
        sweeps = trainer.is_global_zero and self._resumes_last and self.save_top_k > 0
        if sweeps and resumed is not None and self._is_own(str(resumed)):
            self._sweep_superseded(trainer, resumed)
        if resumed is None and trainer.is_global_zero and self.dirpath is not None:
            self._tell_of_others(Path(self.dirpath))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if not trainer.fit_loop._should_accumulate():  # gradients of an unfinished step would be lost
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self._save is not None and self._save.done() and self._save.exception() is None:
            self._notify_loggers(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.monitor is None and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            if self._save is not None:
                self._settle(trainer)
            if self._should_save_on_exception(trainer):
                _saver(trainer).meet(trainer.global_step)  # also before the collectives that reduce metrics
                super().on_exception(trainer, pl_module, exception)
                self._settle(trainer)
        except (OSError, InputError) as error:  # not raised: it would hide `exception` from the user
            log.warning("No checkpoint was saved after the %s: %s", type(exception).__name__, error)
        finally:
            self._let_go()

    def save_now(self, trainer: Trainer) -> None:
        """Save this step, whatever the interval, and wait until the checkpoint is complete. Collective.

        Call it at the end of an optimizer step or of a batch of a validation. If a ``monitor`` or ``save_top_k=0``
        decides which checkpoints are kept, or the name has a metric of a validation that is not complete, this one is
        written beside them as ``preempted``.
        """
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            metrics = set(_METRIC.findall(self.filename or "")) - {"epoch", "step"}
            if self.monitor is None and self.save_top_k != 0 and not (trainer.validating and metrics):
                self._save_topk_checkpoint(trainer, candidates)
            else:
                with self._rolled_back_on_failure(trainer):
                    self._save_checkpoint(trainer, os.path.join(self.dirpath or "", "preempted"))
            self._save_last_checkpoint(trainer, candidates)
        self._settle(trainer)

    # -- how ----------------------------------------------------------------------------------------------------

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        with self._rolled_back_on_failure(trainer):
            self._in_top_k = True
            try:
                super()._save_topk_checkpoint(trainer, monitor_candidates)
            finally:
                self._in_top_k = False

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if not self.save_last:
            return
        try:
            self._save_last(trainer, monitor_candidates)
        finally:
            self._remove_superseded(trainer)

    def _save_last(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last == "link" and self._last_checkpoint_saved and self.save_top_k != 0:
            super()._save_last_checkpoint(trainer, monitor_candidates)  # `_link_checkpoint` waits for the save
            return
        with self._rolled_back_on_failure(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _rolled_back_on_failure(self, trainer: Trainer) -> Iterator[None]:
        """Restore Lightning's bookkeeping if the save inside fails.

        The previous save ends first: Lightning chooses names, and which checkpoints to remove, from what is on disk.
        """
        self._settle(trainer)
        self._before = {name: getattr(self, name) for name in _BOOKKEEPING}
        self._before["best_k_models"] = dict(self.best_k_models)
        try:
            yield
            if not self.background:
                self._settle(trainer)
        except (OSError, InputError) as error:
            self._failed(error)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        strategy: Any = trainer.strategy
        began = time.monotonic()
        saved_by = {"filename": self.filename, "monitor": self.monitor} if self._in_top_k else None
        with strategy.background_saves(saved_by=saved_by) as saves:
            trainer.save_checkpoint(filepath, self.save_weights_only)
        (self._save,) = saves
        self._save.add_done_callback(lambda _: setattr(self, "save_seconds", time.monotonic() - began))
        self._loggers_pending = True
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    def _settle(self, trainer: Trainer) -> None:
        """Wait for the save in progress, then notify loggers or handle the error, which is the same on all ranks."""
        if self._save is None:
            return
        save, self._save = self._save, None
        _saver(trainer).wait()
        try:
            save.result()
        except (OSError, InputError) as error:
            self._failed(error)
        else:
            self._notify_loggers(trainer)

    def _failed(self, error: Exception) -> None:
        vars(self).update(self._before)
        self._loggers_pending = False
        if self.on_save_error == "stop":
            raise error
        log.warning("A checkpoint could not be saved; training goes on: %s", error)

    def _notify_loggers(self, trainer: Trainer) -> None:
        if self._loggers_pending and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._loggers_pending = False

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            _saver(trainer).link(Path(filepath), Path(linkpath))

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """As Lightning's, but with ``ckpt_path="last"`` the checkpoint that the run resumed from is not spared."""
        if previous == current or not self._is_own(previous):
            return False
        return self._resumes_last or super()._should_remove_checkpoint(trainer, previous, current)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            self._removals.append(Path(filepath))
            if self.save_last != "link":  # else once the link leads to the new one
                self._remove_superseded(trainer)

    def _remove_superseded(self, trainer: Trainer) -> None:
        removals, self._removals = self._removals, []
        for path in removals:
            _saver(trainer).remove(path)

    def _sweep_superseded(self, trainer: Trainer, resumed: Path) -> None:
        """Remove what earlier attempts of this run have left; the checkpoint at `resumed` is complete and verified."""
        own, kept = {"filename": self.filename, "monitor": self.monitor}, {resumed.resolve()}
        kept |= {Path(path).resolve() for path in (*self.best_k_models, self.best_model_path) if path}
        manifest = read_manifest(resumed)
        step, run = manifest["step"], manifest.get("run")
        superseded = []
        for path in sorted(resumed.parent.glob(f"*/{MANIFEST}")):
            if is_ours(path.parent) and not path.parent.name.startswith(".") and path.parent.resolve() not in kept:
                with suppress(CheckpointError, OSError):
                    manifest = read_manifest(path.parent)
                    same = manifest.get("saved_by") == own and manifest.get("run") == run
                    if same and manifest["step"] < step:
                        superseded.append(path.parent)
        for link in resumed.parent.iterdir():
            if superseded and link.is_symlink() and link.resolve() in {path.resolve() for path in superseded}:
                _saver(trainer).link(resumed, link)
        for path in superseded:
            log.info("%s: superseded, and left by an earlier attempt; removed", path)
            _saver(trainer).remove(path)

    def _tell_of_others(self, directory: Path) -> None:
        """Warn of checkpoints of another run, among which those of this one will lie."""
        others: list[str] = []
        with suppress(OSError):  # only this rank looks, so that it must not end alone
            others = [path.name for path in checkpoints(directory)]
        if others:
            log.warning(
                "%s has checkpoints of an earlier run (%s%s), which stay: of this run, names that are taken get a "
                'version, such as %s-v1, and ckpt_path="last" means the run that wrote last; pass another dirpath to '
                "keep runs apart",
                directory,
                ", ".join(others[:3]),
                ", ..." if len(others) > 3 else "",
                others[0],
            )

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        directory = Path(self._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        restore_replaced(directory)
        found = checkpoints(directory)
        strategy: Any = trainer.strategy
        strategy.resume_from(found)
        self._resumes_last = bool(found)
        return set() if not found else {str(found[0])}


def _saver(trainer: Trainer) -> Any:
    strategy: Any = trainer.strategy
    return strategy.saver
