"""The checkpoint hooks of a Lightning strategy, for sharded adapters.

With Lightning's own DeepSpeed strategy, DeepSpeed writes one pickle per rank, which only the same number of ranks can
load. Here a checkpoint is a directory of safetensors and JSON (`lowrank_dist.checkpoints.layout`), from which any
number of ranks resumes.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lowrank_dist.checkpoints.codec import StateError
from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.checkpoints.resuming import load_allocation, load_optimizer, load_parameters
from lowrank_dist.checkpoints.saving import Saver
from lowrank_dist.checkpoints.state import (
    OWN_STATE,
    changed_settings,
    check_loops,
    check_schedules,
    decode_training_state,
    encode_training_state,
    restore_engine,
    restore_rng,
)
from lowrank_dist.checkpoints.writer import CheckpointWriter
from lowrank_dist.distributed.gather_to_owner import gather_to_owners
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError
from lowrank_dist.training.stage3 import Stage3Strategy
from lowrank_dist.zero3.optimizer import ShardedOptimizer
from lowrank_dist.zero3.partition import is_partitioned, local_shard, whole_shape

#: Attributes of the Trainer, and names of their states in a checkpoint.
LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


class CheckpointedStrategy(Stage3Strategy):
    """DeepSpeed at ZeRO stage 3 with checkpoints of trained parameters only.

    A subclass calls `_checkpoints_with` once its model is sharded. `_resumed` is the checkpoint that was passed to the
    Trainer, or None; it is reset once its state is restored. `resumed_from` keeps its directory. `run` is what all
    checkpoints of a run have in common, over all of its attempts, and no other's.

    Parameters
    ----------
    **options
        Options of `Stage3Strategy`.
    """

    #: Tells data modules that a resumed run repeats the batches of an unfinished step.
    resumes_whole_steps = True

    def __init__(self, **options: Any) -> None:
        options["exclude_frozen_parameters"] = True
        super().__init__(**options)
        self._writer: CheckpointWriter | None = None
        self._saver: Saver | None = None
        self._background: list[Future[None]] | None = None
        self._saved_by: dict[str, Any] | None = None
        self._resumed: TrainingCheckpoint | None = None
        self.resumed_from: Path | None = None
        self.run: str | None = None
        self._resumed_state: dict[str, Any] = {}
        self._candidates: list[Path] = []

    def setup_environment(self) -> None:
        """Meet the other ranks, and see that those that look for the last checkpoint have all found one, or none."""
        super().setup_environment()
        found = self._group.gather_objects([os.fspath(path) for path in self._candidates])
        if len({bool(paths) for paths in found}) > 1:
            seen = next(paths[0] for paths in found if paths)
            blind = ", ".join(str(rank) for rank, paths in enumerate(found) if not paths)
            raise OSError(
                errno.ESTALE,
                f'ckpt_path="last": not all ranks see {seen} (rank {blind} does not); dirpath must be one directory '
                "that all nodes share. If it is, its file system shows new files late: start again",
            )

    def _checkpoints_with(self, writer: CheckpointWriter) -> None:
        """Use `writer` for saves, and load the trained parameters of a resumed run. Collective.

        Must be called before DeepSpeed's engine exists.
        """
        self._writer, self._saver = writer, Saver(writer, self._timeout or timedelta(minutes=30))
        self._allocation = writer.allocation
        self.run = self.broadcast(uuid.uuid4().hex) if self._resumed is None else self._resumed.run
        self._load_parameters()

    def _load_parameters(self) -> None:
        if self._resumed is not None and self._writer is not None:
            load_parameters(self._resumed, self._writer.trained, self._writer.files, self._group)

    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._load_training_state()
        else:
            self._forget_resumed()

    def teardown(self) -> None:
        self._forget_resumed()
        if self._saver is not None:
            self._saver.close()
        super().teardown()

    # -- saving -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write adapters and training state to the directory `filepath`; complete or absent. Collective.

        Of the module's own buffers those of rank 0 are written, as Lightning does.

        Called by ``trainer.save_checkpoint``. `lowrank_dist.checkpoints.layout` describes the files.

        Raises
        ------
        OSError, InputError
            On every rank if the checkpoint cannot be written; an older checkpoint at `filepath` stays intact.
        StateError
            If the state of a callback, a schedule or the data module cannot be stored without pickle.
        TypeError
            If `storage_options` are given.
        """
        if storage_options is not None:
            raise TypeError("PiSSAStrategy: storage_options are not supported without a CheckpointIO; omit them")
        trainer, saver = self._trainer, self.saver
        fitting = trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in checkpoint
        optimizer = ShardedOptimizer(self.deepspeed_engine.optimizer) if fitting else None
        state = None
        if optimizer is not None:
            state = encode_training_state(
                {**checkpoint, "state_dict": self._own_state()},
                optimizer,
                self.deepspeed_engine,
                self._group,
                allocation=None if self._allocation is None else self._allocation.state(),
            )
        facts: dict[str, Any] = {} if self._allocation is None else {"rank_by_layer": self._allocation.rank_by_layer}
        if self._saved_by is not None:
            facts["saved_by"] = self._saved_by
        if self.run is not None:
            facts["run"] = self.run
        facts |= {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }
        save = saver.save(Path(self.broadcast(os.fspath(filepath))), optimizer, state=state, facts=facts)
        if self._background is None:
            save.result()
        else:
            self._background.append(save)

    def _own_state(self) -> dict[str, Any]:
        """The persistent buffers and the extra state of the module beside its model, those of this rank."""
        module = self.lightning_module
        assert module is not None
        inside = set(map(id, self.saver.writer.model.buffers()))
        state = module.state_dict(keep_vars=True)
        return {
            name: value
            for name, value in state.items()
            if not isinstance(value, nn.Parameter) and id(value) not in inside
        }

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what `_own_state` returned, on every rank; the model is loaded when it is set up.

        Raises
        ------
        CheckpointError
            If a buffer has another shape.
        """
        super().load_model_state_dict(checkpoint, strict=strict)
        module, state = self.lightning_module, checkpoint.get("state_dict") or {}
        if not state:
            return
        assert module is not None
        try:
            _, unknown = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.resumed_from}: {type(module).__name__} cannot take the buffers of its run: "
                + " ".join(str(error).split())
            ) from error
        if unknown:
            rank_zero_warn(f"{self.resumed_from}: {type(module).__name__} has no {', '.join(unknown)}; left out")

    def save_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter, its initial value and the converted LoRA; complete or absent. Collective.

        Parameters
        ----------
        directory
            Directory to write, replaced if it exists. It becomes a checkpoint without training state.
        """
        self.save_checkpoint({}, directory)

    def optimizer_state(self, optimizer: object) -> dict[str, Tensor]:
        """Return nothing: `save_checkpoint` reads the state from the shards."""
        return {}

    @contextmanager
    def background_saves(self, *, saved_by: Mapping[str, Any] | None = None) -> Iterator[list[Future[None]]]:
        """Inside, ``trainer.save_checkpoint`` returns once the state is copied; files are written in the background.

        Parameters
        ----------
        saved_by
            Who saves, for the manifest.

        Yields
        ------
        list of Future
            A future for each save that starts inside. ``result()`` waits for the save and raises its error.
        """
        self._background, self._saved_by = [], None if saved_by is None else dict(saved_by)
        try:
            yield self._background
        finally:
            self._background = self._saved_by = None

    @property
    def saver(self) -> Saver:
        """The object that writes the checkpoints.

        Raises
        ------
        RuntimeError
            Before the model is set up.
        """
        if self._saver is None:
            raise RuntimeError("PiSSAStrategy: no adapter exists before the model is set up (fit, validate or test)")
        return self._saver

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove a checkpoint after all saves in progress have ended."""
        if self.is_global_zero:
            self.saver.remove(Path(filepath))
            self.saver.wait()

    # -- resuming -----------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False, unlike in the parent class: the residual is formed from the factors in the checkpoint."""
        return False

    def resume_from(self, candidates: Sequence[Path]) -> None:
        """Let ``ckpt_path="last"`` mean the first of `candidates` that is not damaged; the caller passes the first."""
        self._candidates = list(candidates)

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read and verify a checkpoint, from which the model is then built. Runs no code from it. Collective.

        Raises
        ------
        CheckpointError
            On every rank, if the directory is not a checkpoint, is damaged, or has no training state although the
            Trainer fits. With ``ckpt_path="last"`` the next older checkpoint is tried first, and a line names the
            damaged one.
        """
        candidates = [os.fspath(checkpoint_path)]
        if self._candidates and Path(checkpoint_path) == self._candidates[0]:
            candidates = [os.fspath(path) for path in self._candidates]
        candidates = self.broadcast(candidates)
        for path, older in zip(candidates, [*candidates[1:], None], strict=True):
            try:
                return self._load_checkpoint(path)
            except (CheckpointError, StateError) as error:  # on every rank
                self._forget_resumed()
                if older is None:
                    raise
                rank_zero_info(f"{error}; resuming from {older} instead")
        raise AssertionError("there is always one candidate")

    def _load_checkpoint(self, path: str) -> dict[str, Any]:
        trainer, group = self._trainer, self._group
        with group.shared_errors():
            resumed = TrainingCheckpoint(path)
            if trainer.state.fn == TrainerFn.FITTING and not resumed.has_training_state:
                raise CheckpointError(
                    f"ckpt_path={path!r} was saved with weights_only: there is nothing to resume from"
                )
        self._resumed, self.resumed_from = resumed, resumed.directory
        resumed.verify(group)
        if not resumed.has_training_state:
            return {"pytorch-lightning_version": lightning.__version__, "state_dict": {}}
        with group.shared_errors():
            loops = {name: getattr(trainer, name).state_dict() for name in LOOPS}
            state = decode_training_state(resumed, accumulate_grad_batches=trainer.accumulate_grad_batches)
            check_loops(state.get("loops", {}), loops)
        self._tell_of_changes(state)
        self._resumed_state = {**state.pop(OWN_STATE), "schedules": state.get("lr_schedulers", [])}
        if self.gathering is not None:
            self._restore_in_place()
        return state

    def _tell_of_changes(self, state: Mapping[str, Any]) -> None:
        """Warn of hyper-parameters that are not those of the resumed run: most of them do not act any more."""
        module, data = self.lightning_module, getattr(self._trainer, "datamodule", None)
        assert module is not None
        own = {"hyper_parameters": module.hparams, "datamodule_hyper_parameters": getattr(data, "hparams", {})}
        if changed := changed_settings(state, own):
            rank_zero_warn(
                f"{self.resumed_from} is resumed with {', '.join(changed)}: optimizer and learning rates go on as in "
                "the checkpoint, whatever these say; to change them, start a new run with its adapter"
            )

    def _restore_in_place(self) -> None:
        """Go back to a checkpoint of this run while it trains, as Lightning's search for a learning rate does."""
        self._load_parameters()
        ShardedOptimizer(self.deepspeed_engine.optimizer).begin_again()
        self._load_training_state()
        assert self.gathering is not None
        self.gathering.expire()
        restore_rng(self._resumed_state["rng"], self._group)
        self._forget_resumed()

    def _load_training_state(self) -> None:
        if self._resumed is None:
            return
        assert self._writer is not None
        state, engine = self._resumed_state, self.deepspeed_engine
        load_optimizer(
            self._resumed,
            self._writer.trained,
            ShardedOptimizer(engine.optimizer),
            self._group,
            steps=state["steps"],
            settings=state["settings"],
            scalars=state.get("scalars"),  # absent from checkpoints of earlier versions
        )
        if self._allocation is not None:
            load_allocation(
                self._resumed,
                self._writer.trained,
                self._allocation,
                engine,
                self._group,
                state=state["allocation"],
            )
        with self._group.shared_errors():
            restore_engine(state["engine"], engine)
            own = [config.scheduler.state_dict() for config in self.lr_scheduler_configs]
            check_schedules(state["schedules"], own)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self._resumed is not None:
            restore_rng(self._resumed_state["rng"], self._group)
        self._forget_resumed()

    def _forget_resumed(self) -> None:
        if self._resumed is not None:
            self._resumed.close()
        self._resumed, self._resumed_state = None, {}

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Return the whole trained parameters on rank 0, without the frozen base. Collective.

        Inside `background_saves` the result is empty, because the owners write the parameters.

        Raises
        ------
        InputError
            After an exception that only some ranks raised (`Saver.meet`). Every save of Lightning calls this method
            first.
        """
        assert self.lightning_module is not None
        if self._trainer.interrupted:
            self.saver.meet(self._trainer.global_step)
        if self._background is not None:
            return {}
        trained = [(n, p) for n, p in self.lightning_module.named_parameters() if p.requires_grad and is_partitioned(p)]
        shapes = {name: whole_shape(parameter) for name, parameter in trained}
        shards = ((name, local_shard(parameter), shapes[name].numel()) for name, parameter in trained)
        return {name: whole.view(shapes[name]) for name, whole in gather_to_owners(shards, lambda _: 0, self._group)}

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _group(self) -> ShardGroup:
        return ShardGroup(device=self.root_device)
