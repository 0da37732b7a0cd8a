"""``lowrank-dist submit``: submit a configuration as a job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lowrank_dist.errors import InputError
from lowrank_dist.slurm import SubmitOptions, prepare
from lowrank_dist.slurm.local import run_here
from lowrank_dist.slurm.submit import announce, follow

_DEFAULTS = SubmitOptions.__dataclass_fields__


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist submit``; `argv` excludes the command's name. Returns the exit status."""
    given, overrides = parser().parse_known_args(list(argv))
    actions = {name: vars(given).pop(name) for name in ("dry_run", "follow")}
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()
    }
    for override in overrides:
        key = override.split("=")[0]
        if key.startswith("--") and "." not in key and key != "--seed_everything":
            raise InputError(
                f"{key} is neither an option of submit (see --help) nor a key of the configuration "
                "(--trainer.*, --model.*, --data.*, --seed_everything)"
            )
    if actions["dry_run"] and actions["follow"]:
        raise InputError("--follow has no effect with --dry-run, which submits nothing; leave one of them out")
    submission = prepare(SubmitOptions(**{**options, "overrides": tuple(overrides)}))
    for warning in submission.shape.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if actions["dry_run"]:
        print(submission.script(), end="")
        return 0
    if submission.options.cluster == "local":  # the job's processes are children of this one
        return run_here(submission)
    jobs = submission.submit()
    announce(submission, jobs)
    return max(follow(submission, job) for job in jobs) if actions["follow"] else 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist submit``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist submit",
        allow_abbrev=False,
        description="Submit `lowrank-dist fit --config FILE` as a job that survives preemption, time limits and the "
        "loss of nodes: it saves, is requeued and resumes from the newest complete checkpoint. Any other argument "
        "overrides a key of the configuration (--model.lr 1e-4). A new submission resumes where the last job ended.",
    )
    add = parser.add_argument
    add("--config", required=True, action="append", help="configuration of `lowrank-dist fit`; repeatable")
    add("--cluster", default="slurm", help="slurm, or local: the same job as processes on this machine")
    add("--nodes", type=int, help="must be the configuration's num_nodes (default: that)")
    add("--min-nodes", type=int, help="after a requeue, start on as few nodes as this; the global batch stays the same")
    add("--gpus-per-node", type=int, help="must be the configuration's devices (default: that)")
    add("--cpus-per-task", type=int, help="CPU cores per rank")
    add("--mem-gb", type=float, help="memory per node, in GB")
    add("--partition", help="partition of the cluster")
    add("--account", help="account to charge")
    add("--qos", help="quality of service")
    add("--constraint", help="features that nodes must have")
    add("--exclude", help="nodes to avoid")
    add("--name", help="name of the job (default: that of the configuration)")
    add("--time", default=_DEFAULTS["time"].default, help="time limit, as in sbatch (default: %(default)s)")
    add(
        "--grace",
        type=int,
        default=_DEFAULTS["grace"].default,
        help="seconds before the limit at which to save and requeue (default: %(default)s)",
    )
    add(
        "--collective-timeout",
        type=float,
        default=_DEFAULTS["collective_timeout"].default,
        metavar="MINUTES",
        help="time after which a hanging collective ends the job, which is then requeued (default: %(default)s)",
    )
    add("--seconds-per-step", type=float, help="used, if given, to compare the checkpoint interval with --time")
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a job array over all combinations; rank, lr, seed, config (files over --config), or any key; repeatable",
    )
    add(
        "--array-parallelism",
        type=int,
        help="jobs of the array at a time (default: 8; 1 with --cluster local)",
    )
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch; repeatable")
    add("--setup", action="append", default=[], metavar="COMMAND", help="shell command before the job; repeatable")
    add("--dry-run", action="store_true", help="print the sbatch file and submit nothing")
    add("--follow", action="store_true", help="print the log of rank 0 until the job has ended")
    return parser
