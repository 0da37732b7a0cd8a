"""State of Lightning, the optimizer and the engine beside the model's tensors, into a checkpoint and back."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_dist.checkpoints.codec import encode_state
from lowrank_dist.checkpoints.layout import TrainingCheckpoint
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.layout import STATE
from lowrank_dist.storage.parse import Record, is_flag, is_integer, is_list_of
from lowrank_dist.zero3.optimizer import ShardedOptimizer

#: Key of this package's entry in Lightning's dictionary.
OWN_STATE = "lowrank_dist"

#: Attributes of DeepSpeed's engine that count.
ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")

_VALIDATION = "epoch_loop.val_loop.batch_progress"
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")

log = logging.getLogger(__name__)


def encode_training_state(
    checkpoint: dict[str, Any],
    optimizer: ShardedOptimizer,
    engine: Any,
    group: ShardGroup,
    *,
    allocation: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """JSON value and tensors of a training run's state.

    One object all-gather over `group` collects the states of all ranks' random number generators.

    Parameters
    ----------
    checkpoint
        Lightning's dictionary; its ``state_dict`` is that of the module without its model. Optimizer states are left
        out.
    optimizer, engine
        DeepSpeed's optimizer and engine.
    group
        All ranks.
    allocation
        State of an allocation of ranks (`lowrank_dist.tuners.adalora.allocation.RankAllocation`).

    Raises
    ------
    StateError
        On every rank, if an object can only be stored by pickle. Such objects among the hyper-parameters raise
        nothing; their ``repr`` is stored.
    InputError
        On every rank, if the optimizer's state cannot be saved for another number of ranks.
    """
    with group.shared_errors():
        scalars = optimizer.scalars
    own = {
        "steps": optimizer.steps,
        "scalars": scalars,
        "settings": optimizer.settings,
        "engine": {name: getattr(engine, name) for name in ENGINE_COUNTERS},
        "rng": group.gather_objects(rng_state()),
    }
    if allocation is not None:
        own["allocation"] = dict(allocation)
    with group.shared_errors():
        described = {key: checkpoint[key] for key in _HYPER_PARAMETERS if key in checkpoint}
        shown, shown_tensors = encode_state(described, lossy=True)
        rest = {key: value for key, value in checkpoint.items() if key != "optimizer_states" and key not in described}
        value, tensors = encode_state({**rest, OWN_STATE: own}, where="checkpoint", first=len(shown_tensors))
    return {**shown, **value}, shown_tensors | tensors


def changed_settings(state: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Hyper-parameters that the run of a checkpoint had and this one has otherwise, as ``name=value (was value)``.

    Parameters
    ----------
    state
        What `decode_training_state` returned.
    own
        Hyper-parameters of this run, by the same names of groups. Objects that need pickle are not compared.
    """
    changed = []
    for group in _HYPER_PARAMETERS:
        before, now = (encode_state(dict(values.get(group) or {}), lossy=True)[0] for values in (state, own))
        changed += [
            f"{name}={now[name]!r} (was {before[name]!r})"
            for name in before
            if name in now and now[name] != before[name] and "$repr" not in f"{before[name]}{now[name]}"
        ]
    return changed


def decode_training_state(checkpoint: TrainingCheckpoint, *, accumulate_grad_batches: int) -> dict[str, Any]:
    """Lightning's dictionary, with its progress counted in batches of this run.

    Progress is a number of optimizer steps. The number of batches per step depends on `accumulate_grad_batches`. On
    another number of ranks, or with another batch size, the steps stay the same if `accumulate_grad_batches` keeps the
    global batch. The last step of an epoch may have fewer batches. Batches of a step that an exception interrupted are
    not counted. A checkpoint saved in a hook at the end of an epoch resumes with the next epoch: Lightning would
    otherwise train one more batch of the finished epoch if ``max_steps`` is set. One saved after the fit has ended in
    the middle of an epoch resumes in that epoch. A checkpoint saved within a validation
    resumes with that validation, from its first batch: its metrics are those of all batches.

    Raises
    ------
    CheckpointError, StateError
        If the state is damaged.
    """
    state = _checked(checkpoint)
    before, now = checkpoint.manifest["accumulate_grad_batches"], accumulate_grad_batches
    loops = state["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    current = batches["current"]
    epoch_ended = batches["is_last_batch"] and current["processed"] == current["ready"]
    _count_whole_steps(batches, before, now, epoch_ended=epoch_ended)
    validation = loops[_VALIDATION]
    if validation["current"]["completed"] != validation["current"]["ready"]:
        # of the progress in an evaluation Lightning repeats this one only
        validation["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        validation["total"] |= validation["current"]
    elif epoch_ended:
        _move_to(epochs, epochs["current"]["ready"])
        _move_to(batches, 0, total=batches["total"]["processed"])
        batches["is_last_batch"] = False
    elif current["processed"] > 0 and epochs["current"]["completed"] == epochs["current"]["ready"]:
        # saved when the fit had ended, by `max_steps` say, in the middle of an epoch: it goes on
        for name in ("processed", "completed"):
            _move_to(epochs, epochs["current"]["ready"] - 1, names=[name])
    state.setdefault("state_dict", {})
    return state


def restore_engine(counters: Mapping[str, Any], engine: Any) -> None:
    """Set the counters of DeepSpeed's engine, and nothing else.

    Raises
    ------
    CheckpointError
        If a counter is missing or no number of steps.
    """
    for name in ENGINE_COUNTERS:
        if not isinstance(counters.get(name), int) or counters[name] < 0:
            raise CheckpointError(f"state.json: {name}={counters.get(name)!r} of the engine is no number of steps")
    engine.global_steps = counters["global_steps"]
    engine.global_samples = counters["global_samples"]
    engine.skipped_steps = counters["skipped_steps"]


def check_loops(found: Any, own: Any) -> None:
    """Raise CheckpointError unless Lightning's loops, whose states `own` are, have every name in `found`.

    Lightning sets the names of progress, at every depth, as attributes. The entries ``state_dict`` are data.
    """
    _check_names(found, own, "loops", lambda name: name.rpartition(".")[2] != "state_dict")


def check_schedules(found: Any, own: Any) -> None:
    """Raise CheckpointError unless schedules, whose states `own` are, have every name in `found`.

    torch sets the names of a schedule as attributes, and those of its parts, which are schedules or objects that
    compute factors. Deeper values are data.
    """
    _check_names(found, own, "lr_schedulers", lambda name: name in ("_schedulers", "lr_lambdas"))


def _check_names(found: Any, own: Any, where: str, into: Callable[[str], bool]) -> None:
    if isinstance(found, list | tuple) and isinstance(own, list | tuple):
        for index, (value, of_own) in enumerate(zip(found, own, strict=False)):
            _check_names(value, of_own, f"{where}[{index}]", into)
    elif isinstance(found, dict):
        for name, value in found.items():
            if not isinstance(own, dict) or name not in own:
                raise CheckpointError(
                    f"state.json: {where} has no {name!r} here; the checkpoint is damaged, or of a run with other "
                    "schedules or another release of Lightning or torch"
                )
            if into(name):
                _check_names(value, own[name], f"{where}.{name}", into)


def _checked(checkpoint: TrainingCheckpoint) -> dict[str, Any]:
    """The state of a checkpoint, if what is read of it here has the types that were written.

    Raises
    ------
    CheckpointError
        If it is damaged.
    """
    state = Record(checkpoint.state(), str(checkpoint.directory / f"{STATE}.json"))
    loop = state.record("loops").record("fit_loop")
    for name in ("epoch_progress", "epoch_loop.batch_progress", _VALIDATION):
        progress = loop.record(name)
        counts = [progress.record(part) for part in ("current", "total")]
        for count in counts:
            for entry in ("ready", "started", "processed", "completed"):
                count.integer(entry)
        if counts[0].keys() != counts[1].keys() or not all(map(is_integer, [*counts[0].values(), *counts[1].values()])):
            raise progress.wrong("total", "counts, as current")
    loop.record("epoch_loop.batch_progress").expect("is_last_batch", is_flag, "true or false")
    own = state.record(OWN_STATE)
    own.integer("steps")
    own.expect("settings", is_list_of(lambda group: isinstance(group, dict)), "a list of settings")
    own.expect("scalars", is_list_of(lambda group: isinstance(group, dict)), "a list of scalars", None)
    own.expect("rng", lambda v: is_list_of(lambda one: isinstance(one, dict))(v) and len(v) > 0, "states of generators")
    engine = own.record("engine")
    for name in ENGINE_COUNTERS:
        engine.integer(name)
    return state


def _count_whole_steps(progress: dict[str, Any], before: int, now: int, *, epoch_ended: bool) -> None:
    """Convert Lightning's batch progress, in place, from `before` batches per step to `now`; drop unfinished steps.

    In a checkpoint saved by a hook at the end of a batch, that batch is processed but not completed. Lightning resumes
    by this difference, so it is kept.
    """

    def converted(batches: int) -> int:
        return batches if before == now else -(-batches // before) * now

    current, total = progress["current"], progress["total"]
    unfinished = 0 if epoch_ended else current["processed"] % before
    whole = current["processed"] - unfinished
    ending = current["processed"] - current["completed"] if not unfinished else 0
    for name in current:
        earlier = converted(total[name] - current[name])
        current[name] = converted(whole) - (ending if name == "completed" else 0)
        total[name] = earlier + current[name]


def _move_to(
    progress: dict[str, Any], current: int, *, total: int | None = None, names: Sequence[str] | None = None
) -> None:
    """Set counts of Lightning's progress, in place, all by default; without `total` it moves as far as `current`."""
    for name in progress["current"] if names is None else names:
        moved = progress["total"][name] + current - progress["current"][name]
        progress["total"][name] = moved if total is None else total
        progress["current"][name] = current


def restore_rng(states: list[dict[str, Any]], group: ShardGroup) -> None:
    """Restore this rank's random number generators.

    On another number of ranks, torch's generator is seeded from rank 0's state and the rank. A run with dropout then
    continues with valid, but different, random numbers.
    """
    if len(states) == group.size:
        set_rng_state(states[group.rank])
        return
    set_rng_state(states[0])
    seed = int(torch.randint(2**62, ()).item()) + group.rank
    torch.manual_seed(seed)
    if group.rank == 0:
        log.info(
            "resumed on %d ranks instead of %d: random numbers (dropout) go on differently", group.size, len(states)
        )


def rng_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and, if CUDA is initialized, the current CUDA device."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the result of `rng_state`; CUDA's state only if it was recorded and CUDA is available."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
