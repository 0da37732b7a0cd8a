"""The program that every task of a job runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_dist.cluster.allocation import Allocation
from lowrank_dist.cluster.attempts import AttemptLog
from lowrank_dist.cluster.signals import SIGNALS
from lowrank_dist.errors import InputError
from lowrank_dist.slurm.environment import prefix_output, set_up

#: Exit status of a job that must not be requeued (EX_CONFIG of sysexits.h).
STOPPED = 78


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """``lowrank-dist fit`` as a task of a job, with its environment, callbacks and record of attempts.

    Every task calls the object.

    Attributes
    ----------
    config, overrides
        Configuration files and further arguments of ``lowrank-dist fit``.
    folder
        Folder of the job's logs and records, visible on all nodes.
    batches
        Batches per step, over all ranks. The number of accumulated batches follows from the allocated nodes.
    grace
        Seconds between the signal and the end of the job.
    timeout
        Minutes after which a collective times out. None: the strategy's value.
    health_check
        Check nodes and network before the model is set up.
    """

    config: tuple[str, ...]
    overrides: tuple[str, ...]
    folder: str
    batches: int
    grace: float
    timeout: float | None
    health_check: bool = True

    def __call__(self) -> None:
        """Run the task.

        Raises
        ------
        SystemExit
            With `STOPPED` if starting again would not help; with 0 (on one machine `LOCAL_REQUEUE_STATUS`) if the job
            is requeued.
        """
        SIGNALS.arm(training=False, keep=True)  # replaces submitit's handlers, which requeue without a checkpoint
        allocation = Allocation.current()
        if allocation is None:
            raise InputError("not a task of a job; submit it with `lowrank-dist submit`, or start it with srun")
        set_up(allocation)
        prefix_output(allocation)
        attempts = AttemptLog(self.folder, allocation.job_id)
        try:
            if allocation.rank == 0:
                attempts.begin(nodes=allocation.hosts, ranks=allocation.ranks, restarts=allocation.restarts)
            self._train(allocation)
        except InputError as error:
            attempts.error(node=allocation.host, rank=allocation.rank, error=error)
            self._stop(attempts, allocation, error)
        except Exception as error:
            attempts.error(node=allocation.host, rank=allocation.rank, error=error)
            raise
        SIGNALS.ignore()  # the signal of the time limit may arrive while the process exits
        if allocation.rank == 0:
            attempts.end("finished")

    def _train(self, allocation: Allocation) -> None:
        from lowrank_dist.training.fit_cli import command_line, run_trainer

        argv = self.arguments(allocation)
        with command_line(argv):
            run_trainer(argv)

    @staticmethod
    def _stop(attempts: AttemptLog, allocation: Allocation, error: Exception) -> None:
        attempts.stop()
        if allocation.rank == 0:
            attempts.end("stopped")
        print(f"lowrank-dist: the job stops: {error}", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED)

    def arguments(self, allocation: Allocation) -> list[str]:
        """Arguments of ``lowrank-dist`` for the allocated nodes."""
        from lowrank_dist.slurm.checks import accumulated

        devices = allocation.ranks // allocation.nodes
        arguments = [
            "fit",
            *(f"--config={path}" for path in self.config),
            *self.overrides,
            f"--trainer.num_nodes={allocation.nodes}",
            f"--trainer.devices={devices}",
            "--trainer.accumulate_grad_batches="
            + str(accumulated(batches=self.batches, nodes=allocation.nodes, devices=devices)),
            _added("callbacks", "lowrank_dist.Preemption", grace_seconds=self.grace, attempts=self.folder),
            "--ckpt_path=last",
        ]
        if self.health_check:
            arguments.append(_added("callbacks", "lowrank_dist.HealthCheck"))
        if self.timeout is not None:
            arguments.append(f"--trainer.strategy.init_args.timeout={_clock(self.timeout)}")
        if allocation.on_slurm:
            environment = "lightning.pytorch.plugins.environments.SLURMEnvironment"
            arguments.append(_added("plugins", environment, auto_requeue=False))
        return arguments

    def checkpoint(self) -> Any:
        """Return the unchanged job to submitit, whose handler may run before `__call__`."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _added(what: str, class_path: str, **init_args: object) -> str:
    return f"--trainer.{what}+=" + json.dumps({"class_path": class_path, "init_args": init_args})


def _clock(minutes: float) -> str:
    seconds = round(60 * minutes)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def requeue_script(folder: str) -> list[str]:
    """Shell commands that follow ``srun`` and requeue a failed job that was neither cancelled nor stopped.

    SLURM itself requeues after the loss of a node and after preemption, but not after the loss of a process. Where it
    ends the job or has requeued it, it kills the script; where slurmctld is too busy to answer, the script asks again.
    """
    return [
        "status=$?",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "for seconds in 10 20 40 80; do",
        f'    if [ $status -eq 0 ] || [ -e {_quoted(folder)}/"$job".stopped ]; then break; fi',
        '    state=$(squeue --noheader --jobs="$job" --format=%T)',
        '    echo "srun ended with status $status; job $job is ${state:-in a state that squeue did not say}"',
        '    if [ "$state" = RUNNING ] && scontrol requeue "$job"; then echo "job $job is requeued"; fi',
        "    sleep $seconds  # SLURM kills this script meanwhile",
        "done",
        "exit $status",
    ]


def _quoted(path: str) -> str:
    import shlex

    return shlex.quote(path)


def main(argv: Sequence[str] | None = None) -> None:
    """``srun python -m lowrank_dist.slurm --config FILE --folder DIR [overrides]``: the job without submitit."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m lowrank_dist.slurm", allow_abbrev=False, description=main.__doc__)
    parser.add_argument("--config", required=True, action="append")
    parser.add_argument("--folder", required=True, help="folder for the record of attempts, visible on all nodes")
    parser.add_argument("--batches", type=int, required=True, help="batches per step, over all ranks")
    parser.add_argument("--grace", type=float, default=300, help="the SECONDS of #SBATCH --signal=USR2@SECONDS")
    parser.add_argument("--timeout", type=float, default=15, help="minutes after which a collective times out")
    options, overrides = parser.parse_known_args(argv)
    os.makedirs(options.folder, mode=0o700, exist_ok=True)
    options.config = tuple(options.config)
    TrainingJob(**vars(options), overrides=tuple(overrides))()
