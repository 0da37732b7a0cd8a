"""The allocation that this process runs in, read from the environment of SLURM, or of submitit on one machine."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property

log = logging.getLogger(__name__)

#: Exit status by which a task asks submitit's controller on one machine to start the job again.
LOCAL_REQUEUE_STATUS = 144

_TIMEOUT = 60  # seconds for a SLURM command
PAUSES = (2, 5, 10)  # seconds before a SLURM command that has failed is tried again: slurmctld may be busy


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The nodes and tasks of a job, and the position of this task.

    Attributes
    ----------
    job_id
        The id for SLURM commands: ``A_T`` for task T of array A, because the raw number of one of the tasks is also
        that of the whole array.
    rank, ranks
        Number of this task, and of all tasks.
    local_rank
        Number of this task on its node.
    node, nodes
        Number of this node, and of all nodes.
    restarts
        How often the job was requeued.
    on_slurm
        False for processes that submitit started on this machine.
    """

    job_id: str
    rank: int
    ranks: int
    local_rank: int
    node: int
    nodes: int
    restarts: int
    on_slurm: bool

    @classmethod
    def current(cls) -> Allocation | None:
        """The allocation of this process; None if it is not a task of a job."""
        env = os.environ
        if "SUBMITIT_LOCAL_JOB_ID" in env:
            ranks = int(env["SUBMITIT_LOCAL_NTASKS"])
            rank = int(env["SUBMITIT_LOCAL_GLOBALID"])
            return cls(
                job_id=env["SUBMITIT_LOCAL_JOB_ID"],
                rank=rank,
                ranks=ranks,
                local_rank=rank,
                node=0,
                nodes=1,
                restarts=0,
                on_slurm=False,
            )
        if "SLURM_JOB_ID" not in env or "SLURM_PROCID" not in env:
            return None
        array = env.get("SLURM_ARRAY_JOB_ID")
        return cls(
            job_id=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
            rank=int(env["SLURM_PROCID"]),
            ranks=int(env["SLURM_NTASKS"]),
            local_rank=int(env["SLURM_LOCALID"]),
            node=int(env["SLURM_NODEID"]),
            nodes=int(env["SLURM_NNODES"]),
            restarts=int(env.get("SLURM_RESTART_COUNT") or 0),
            on_slurm=True,
        )

    @cached_property
    def hosts(self) -> list[str]:
        """Names of the nodes, in order."""
        if not self.on_slurm:
            return [os.uname().nodename]
        return _run("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()

    @property
    def host(self) -> str:
        """Name of this node."""
        return self.hosts[self.node]

    def requeue(self) -> int:
        """Request that the job be started again, from one task. Returns the exit status for all tasks.

        Raises
        ------
        subprocess.SubprocessError
            If SLURM refuses it, or does not answer again and again.
        """
        if not self.on_slurm:
            return LOCAL_REQUEUE_STATUS
        _run("scontrol", "requeue", self.job_id, done="pending execution")  # SLURM has requeued it itself
        return 0

    def is_preempted(self) -> bool:
        """Whether SLURM is about to preempt the job, for sites that announce preemption only by SIGTERM."""
        if not self.on_slurm:
            return False
        shown = _run("scontrol", "show", "job", self.job_id)
        state, preempted = re.search(r"JobState=(\S+)", shown), re.search(r"PreemptTime=(\S+)", shown)
        return bool(state and state[1] == "RUNNING" and preempted and preempted[1] not in ("None", "Unknown"))


def _run(*command: str, done: str | None = None) -> str:
    """What the command prints. It is tried again where it fails, unless it says that all is `done`."""
    for pause in PAUSES:
        try:
            return _once(*command)
        except subprocess.SubprocessError as error:
            said = str(getattr(error, "stderr", None) or error).strip()
            if done is not None and done in said:
                return said
            log.warning("%s: %s; again in %d s", " ".join(command), said, pause)
            time.sleep(pause)
    return _once(*command)


def _once(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT).stdout
