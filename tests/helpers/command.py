"""Runs ``lowrank-dist``, or a program, in processes that fork from a server which has imported everything already.

Fresh interpreters take seconds to import what the commands need; what a command does, prints and returns is the same.
Some tests start interpreters all the same (`test_launch.py`), since that is what users do.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

import torch

from helpers.ranks import CONTEXT, environment_of, meeting_place

LAUNCHERS = ("SLURM", "TORCHELASTIC", "LOCAL_", "RANK", "WORLD_SIZE", "MASTER", "NODE_RANK", "GROUP_RANK")


ROOT = Path(__file__).parents[2]


def lowrank_dist(
    *arguments: str | Path,
    ranks: int | None = None,
    environments: Sequence[Mapping[str, str]] | None = None,
    timeout: float = 240,
    cwd: Path = ROOT,
) -> CompletedProcess[str]:
    """``lowrank-dist arguments`` in one process, or in `ranks` processes that torchrun seems to have started.

    With `environments`, a process in each of them, which some other launcher seems to have started. Status and output
    are those of the first rank; of another one where only that failed.
    """
    store = meeting_place()
    if environments is None:
        environments = [{}] if ranks is None else [environment_of(rank, ranks, store.port) for rank in range(ranks)]
    found = run_main(_command, list(map(str, arguments)), environments, timeout, cwd)
    return next((one for one in found if one.returncode != 0), found[0])


def small_run(material: Path, output: Path) -> dict[str, object]:
    """Options of ``fit`` that let the demo's configuration train the model of `material` and write to `output`."""
    strategy = "--trainer.strategy.init_args"
    return {
        "--config": ROOT / "configs" / "smollm2-135m_qpissa_2cpu.yaml",
        "--model.pretrained": material / "model",
        f"{strategy}.pretrained": material / "model",
        f"{strategy}.adapter.init_args.r": 4,
        "--data.tokenizer": material / "model",
        "--data.train": material / "data.jsonl",
        "--data.validation": material / "data.jsonl",
        "--trainer.default_root_dir": output,
        "--trainer.logger.init_args.save_dir": output,
        "--trainer.precision": "32-true",
    }


def python(*arguments: str, timeout: float = 540) -> CompletedProcess[str]:
    """``python arguments``, a program or ``-m`` and a module, in the directory of the project.

    It forks only where no CUDA device is visible, as ranks do.
    """
    if torch.cuda.device_count() > 0:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    return run_main(_program, list(arguments), [{}], timeout)[0]


def run_main(
    main: Callable[[list[str]], int],
    argv: list[str],
    environments: Sequence[Mapping[str, str]],
    timeout: float = 240,
    cwd: Path = ROOT,
) -> list[CompletedProcess[str]]:
    """``main(argv)`` in one process for each of `environments`."""
    with tempfile.TemporaryDirectory() as directory:
        started: list[tuple[BaseProcess, Path]] = []
        for rank, environment in enumerate(environments):
            output = Path(directory) / str(rank)
            process = CONTEXT.Process(target=_main, args=(main, argv, output, dict(environment), cwd), daemon=False)
            process.start()
            started.append((process, output))
        for process, _ in started:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
        return [
            CompletedProcess(argv, process.exitcode, *(output.with_suffix(s).read_text() for s in (".out", ".err")))
            for process, output in started
        ]


def _main(
    main: Callable[[list[str]], int], argv: list[str], output: Path, environment: dict[str, str], cwd: Path
) -> None:
    os.chdir(cwd)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    os.environ.update(environment)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    try:
        sys.exit(main(argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _command(argv: list[str]) -> int:
    from lowrank_dist.cli import main

    return main(argv)


def _program(argv: list[str]) -> int:
    os.chdir(ROOT)
    if argv[0] == "-m":
        sys.argv, sys.path[:0] = argv[1:], [str(ROOT)]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = argv, [str((ROOT / argv[0]).parent)]
        runpy.run_path(argv[0], run_name="__main__")
    return 0
