"""The peers: PEFT's PiSSA, dask's compressed SVD, Heat's randomized SVD."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from meters import PeakMemory, repeat, residual_norm, seconds_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lowrank_dist.storage.reader import CheckpointReader

HERE = Path(__file__).parent
PEER_TIMEOUT = 600


class PeerError(Exception):
    """A peer that is not installed, or did not finish; the text says why."""


@dataclass(kw_only=True)
class PeftOutcome:
    """What PEFT took; MB for memory."""

    loading: list[float]
    seconds: list[float]
    private: float
    resident: float
    excess: dict[str, float]


def time_peft(checkpoint: Path, rank: int, init: str) -> float:
    """Seconds of one run, after one to warm up."""
    return measure_peft(checkpoint, rank, init, 1, math.inf, None).seconds[0]


def measure_peft(
    checkpoint: Path, rank: int, init: str, repeats: int, budget: float, best: Mapping[str, float] | None
) -> PeftOutcome:
    """``get_peft_model`` on a model that was loaded as fp32; loading is timed on its own; `best`: residuals."""
    loading: list[float] = []
    transformers_logging.disable_progress_bar()

    def load() -> nn.Module:
        gc.collect()
        models: list[nn.Module] = []
        loading.append(seconds_of(lambda: models.append(_load(checkpoint))))
        return models[0]

    def initialise(model: nn.Module) -> nn.Module:
        targets: Any = "all-linear" if _is_model(checkpoint) else [name for name, _ in model.named_children()]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=init)  # type: ignore[arg-type]
        return get_peft_model(model, config)  # type: ignore[arg-type]

    def warm_up() -> tuple[nn.Module, float]:
        model, adapted = load(), []
        seconds = seconds_of(lambda: adapted.append(initialise(model)))
        return adapted[0], seconds

    with PeakMemory() as memory:
        model, first = warm_up()
    excess = {} if best is None else _excess(model, checkpoint, best)
    del model
    seconds = repeat(initialise, repeats=repeats, budget=budget, first=first, prepare=load)
    return PeftOutcome(
        loading=loading[1:] or loading, seconds=seconds, private=memory.private, resident=memory.resident, excess=excess
    )


def _is_model(checkpoint: Path) -> bool:
    return (checkpoint / "config.json").is_file()


def _load(checkpoint: Path) -> nn.Module:
    """The model, or the matrices of a checkpoint without a configuration as linear layers."""
    if _is_model(checkpoint):
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    reader = CheckpointReader(checkpoint)
    model = nn.Module()
    for name in reader:
        rows, columns = reader.info(name).shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(reader.rows(name, 0, rows).float())
        model.add_module(name.removesuffix(".weight"), linear)
    return model


def _excess(model: nn.Module, checkpoint: Path, best: Mapping[str, float]) -> dict[str, float]:
    reader = CheckpointReader(checkpoint)
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        key = name.removeprefix("base_model.model.") + ".weight"
        left, right = (getattr(module, factor)["default"].weight.detach() for factor in ("lora_B", "lora_A"))
        norm = residual_norm(
            lambda start, stop, key=key: reader.rows(key, start, stop),  # type: ignore[misc]
            left,
            right,
            module.scaling["default"],  # type: ignore[index]
        )
        found[key] = norm / best[key] - 1
    return found


def run_dask(options: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """`dask_peer.py` with `options`; its result.

    Raises
    ------
    PeerError
        Where it is not installed or fails.
    """
    _require("dask", "distributed")
    return _outcome([sys.executable, str(HERE / "dask_peer.py"), json.dumps({**options, "ranks": ranks})])


def run_heat(options: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """`heat_peer.py` with `options` on as many MPI processes; its result, with the bytes that MPI sent for one SVD.

    Raises
    ------
    PeerError
        Where it is not installed or fails.
    """
    if shutil.which("mpirun") is None:
        raise PeerError("no mpirun (apt-get install openmpi-bin libopenmpi-dev)")
    _require("heat", "mpi4py")
    result = _heat(options, ranks)
    with_one, without = (_mpi_bytes({**options, "counted": counted}, ranks) for counted in (1, 0))
    return {**result, "sent": None if with_one is None or without is None else with_one - without}


def _heat(options: Mapping[str, Any], ranks: int, *mpi_options: str) -> dict[str, Any]:
    as_root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    command = ["mpirun", *as_root, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *mpi_options]
    return _outcome([*command, sys.executable, str(HERE / "heat_peer.py"), json.dumps(options)])


def _mpi_bytes(options: Mapping[str, Any], ranks: int) -> int | None:
    """Bytes that Open MPI's monitoring counted between the processes; None where it has no such component."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"enable": 1, "enable_output": 3, "filename": f"{folder}/mpi"}
        flags = [word for name, value in settings.items() for word in ("--mca", f"pml_monitoring_{name}", str(value))]
        _heat(options, ranks, *flags)
        files = list(Path(folder).glob("mpi*.prof"))
        lines = [line.split("\t") for file in files for line in file.read_text().splitlines()]
    return sum(int(line[3].split()[0]) for line in lines if line[0] == "E") if files else None


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise PeerError(f"not installed: {', '.join(missing)} (benchmarks/requirements.txt)")


def _outcome(command: list[str]) -> dict[str, Any]:
    """What a peer printed as JSON on its last line."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    try:
        done = subprocess.run(
            command, env={**os.environ, **one_thread}, capture_output=True, text=True, timeout=PEER_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"did not finish in {PEER_TIMEOUT} s") from None
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not results:
        error = [line for line in done.stderr.splitlines() if "Error" in line] or ["no result"]
        raise PeerError(f"failed: {error[0][:160]}")
    return dict(json.loads(results[-1]))
