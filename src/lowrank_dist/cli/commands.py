"""The commands of ``lowrank-dist``, and its entry point.

The module of a command is imported only when that command runs, so that ``--help`` and ``--version`` are fast.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name

from lowrank_dist._version import __version__
from lowrank_dist.errors import InputError, RemoteError
from lowrank_dist.training.fit_cli import TRAINER_COMMANDS, no_garbage


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes
    ----------
    help
        Its line in ``lowrank-dist --help``.
    run
        ``module:function``. The function takes the arguments, parses them and returns the exit status.
    takes_name
        Whether the arguments passed to `run` begin with the command's name.
    ends_in_order
        Whether something may be left to do at the end of the process, such as what loggers have registered for it.
    """

    help: str
    run: str
    takes_name: bool = False
    ends_in_order: bool = False


COMMANDS = {
    name: Command(help=text, run="lowrank_dist.training.fit_cli:run_trainer", takes_name=True, ends_in_order=True)
    for name, text in TRAINER_COMMANDS.items()
} | {
    "plan": Command(
        help="forecast the memory, traffic and time of a run, and whether it fits",
        run="lowrank_dist.cli.plan.command:run",
    ),
    "data": Command(
        help="show what a run would train on: examples, lengths, and what is dropped", run="lowrank_dist.cli.data:run"
    ),
    "submit": Command(
        help="run fit as a job on a SLURM cluster", run="lowrank_dist.cli.submit:run", ends_in_order=True
    ),
    "decompose": Command(
        help="write a residual model: the residual and the initial adapter", run="lowrank_dist.cli.decompose:run"
    ),
    "convert": Command(
        help="convert a checkpoint's adapter to a LoRA for the original model",
        run="lowrank_dist.cli.convert:run",
    ),
    "merge": Command(
        help="write the original model with a checkpoint's adapter merged into it", run="lowrank_dist.cli.merge:run"
    ),
    "push": Command(
        help="write a model card beside a LoRA or a merged model, and upload both to the Hugging Face hub",
        run="lowrank_dist.cli.push:run",
    ),
    "generate": Command(
        help="ask a model: a prompt, a file of prompts, or a chat; on the base that it was trained on",
        run="lowrank_dist.cli.generate:run",
    ),
    "evaluate": Command(
        help="score a model with tasks of lm-evaluation-harness, on the base that it was trained on",
        run="lowrank_dist.cli.evaluate:run",
    ),
    "import": Command(
        help="write weights in pytorch_model.bin and the like as safetensors",
        run="lowrank_dist.cli.import_weights:run",
    ),
    "inspect": Command(
        help="describe the contents of a directory or a cached hub id", run="lowrank_dist.cli.inspect:run"
    ),
    "report": Command(help="print what an initialisation measured of the matrices", run="lowrank_dist.cli.report:run"),
    "compare": Command(
        help="compare runs: methods at their best learning rate, at equal steps and time",
        run="lowrank_dist.cli.compare.command:run",
    ),
    "demo": Command(
        help="QPiSSA on a small real model with 2 CPU ranks, converted and checked with stock PEFT",
        run="lowrank_dist.cli.demo:run",
        ends_in_order=True,
    ),
}


#: Lines that libraries log when they are imported, whatever the command does, by the name of the logger.
_BANNERS = {
    "DeepSpeed": "Setting accelerator to CPU",  # on standard output, where it would stand before JSON
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional package for inference
}


#: Exit status of a command whose reader ended first, as of a process that SIGPIPE ended.
READER_GONE = 128 + 13


def program() -> int:
    """The program ``lowrank-dist``: `main`, and the end of the process where nothing is left to do.

    Python would look through all imported modules for garbage before it ends, for seconds. A rank among others ends in
    order, because they may still need it.
    """
    status = main()
    one_of_several = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"))
    if not COMMANDS[sys.argv[1]].ends_in_order and not one_of_several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lowrank-dist``; `argv` excludes the program's name. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        parser().parse_args(argv[:1])  # exits: prints help, the version or the error
    name, command = argv[0], COMMANDS[argv[0]]
    for logger, banner in _BANNERS.items():
        logging.getLogger(logger).addFilter(partial(_is_news, banner))
    try:
        status = int(_imported(command.run)(argv if command.takes_name else argv[1:]))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return READER_GONE
    except InputError as error:
        return _refused(name, str(error))
    except OSError as error:
        if command.takes_name:  # a run of Lightning, whose traceback says what was under way
            raise
        return _refused(name, _of_the_system(error))
    finally:
        gc.unfreeze()  # some libraries count what is left at the end


def _refused(name: str, text: str) -> int:
    """Print what ended a command, and return its exit status."""
    from lowrank_dist.storage.parse import printable

    lines = "\n".join(printable(line, 10_000) for line in text.split("\n"))
    print(f"lowrank-dist {name}: {lines}", file=sys.stderr)
    return 1


def _of_the_system(error: OSError) -> str:
    """An error of the system, beginning with the file."""
    if error.filename is None or isinstance(error, RemoteError):
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _imported(run: str) -> Callable[[list[str]], int]:
    """The function of a command. What is imported for it is no garbage before it ends, and is not looked at."""
    with no_garbage():
        found: Callable[[list[str]], int] = resolve_name(run)
    gc.freeze()
    return found


def _nobody_reads() -> bool:
    """Whether who read the standard output has ended, as ``head`` does; then what is left for it goes nowhere."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # not of the system
        return False
    poll = select.poll()
    poll.register(output, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _is_news(banner: str, record: logging.LogRecord) -> bool:
    return banner not in str(record.msg)


def parser() -> argparse.ArgumentParser:
    """The parser of the commands' names; each command parses its own options."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist", description="Distributed low-rank adaptation under Lightning and DeepSpeed ZeRO-3."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser
