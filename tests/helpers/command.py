"""Runs ``lowrank-dist`` in processes of its own that fork from a server which has imported everything already.

Fresh interpreters take seconds to import what the commands need; what a command does, prints and returns is the same.
Some tests start interpreters all the same (`test_launch.py`), since that is what users do.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

from helpers.ranks import CONTEXT, environment_of, meeting_place

LAUNCHERS = ("SLURM", "TORCHELASTIC", "LOCAL_", "RANK", "WORLD_SIZE", "MASTER", "NODE_RANK", "GROUP_RANK")


def lowrank_dist(*arguments: str | Path, ranks: int | None = None, timeout: float = 240) -> CompletedProcess[str]:
    """``lowrank-dist arguments`` in one process, or in `ranks` processes that torchrun seems to have started.

    Status and output are those of the first rank; of another one where only that failed.
    """
    argv = list(map(str, arguments))
    store = meeting_place()
    with tempfile.TemporaryDirectory() as directory:
        started = []
        for rank in range(ranks or 1):
            environment = {} if ranks is None else environment_of(rank, ranks, store.port)
            output = Path(directory) / str(rank)
            process = CONTEXT.Process(target=_main, args=(argv, output, environment), daemon=False)
            process.start()
            started.append((process, output))
        for process, _ in started:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
        found = [
            CompletedProcess(argv, process.exitcode, *(output.with_suffix(s).read_text() for s in (".out", ".err")))
            for process, output in started
        ]
    return next((one for one in found if one.returncode != 0), found[0])


def _main(argv: list[str], output: Path, environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    os.environ.update(environment)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    from lowrank_dist.cli import main

    try:
        sys.exit(main(argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
