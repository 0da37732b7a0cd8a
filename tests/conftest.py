"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings

# an example that takes long on a busy machine is no failure; CI draws the same ones every time
busy = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("here", **busy)
settings.register_profile("ci", **busy, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all tests are collected: what is imported is no garbage

#: Files that take longest, begun first: no worker ends alone with one of them.
LONG = (
    "system/test_benchmarks.py",
    "system/test_launch.py",
    "slurm/",
    "zero3/test_gathering.py",
    "decomposition/test_restore.py",
    "system/test_configs.py",
    "initialization/test_materialize.py",
    "checkpoints/test_save_faults.py",
    "cli/test_decompose.py",
    "training/test_accumulation.py",
    "decoding/test_fit.py",
    "checkpoints/test_resume.py",
    "residual_model/test_",
    "decomposition/test_walk.py",
    "checkpoints/test_model_checkpoint.py",
    "zero3/test_shard_within.py",
    "calibration/test_fit.py",
    "system/test_parity.py",
    "forecast/test_forecast.py",
    "initialization/test_starting_adapter.py",
    "initialization/test_memory.py",
    "system/test_interop.py",
    "system/test_docs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((at for at, part in enumerate(LONG) if part in item.path.as_posix()), len(LONG))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays with one worker, which makes its fixtures and has its ranks; so does all of tests/gpu.

    ``--dist loadgroup`` does nothing of the kind: pytest 9.2 does not let xdist 3.8 write a group into the name of a
    test.
    """
    from xdist.scheduler import LoadFileScheduling

    class FileScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "tests/gpu" if file.startswith("tests/gpu/") else file

    config.option.loadscopereorder = False  # the order is that of LONG, not of numbers of tests
    return FileScheduling(config, log)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with tied embeddings, fp32, in several files."""
    from helpers.models import save_checkpoint  # imports torch, which xdist's own process does not need

    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and a few prompts with completions."""
    from helpers.sft import save_material

    records = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(24)]
    return save_material(tmp_path_factory.mktemp("material"), records)


@pytest.fixture(scope="session", autouse=True)
def exact_bitsandbytes() -> Iterator[None]:
    """Stock models compute in fp32 from their weights in 4 bits, whatever the CPU.

    Where it has AVX512-BF16, ``Linear4bit`` otherwise rounds to bf16 in eval mode, and takes only rows by 32 and
    columns by `block_size` (bitsandbytes 0.50, `_convert_weight_packed_for_cpu`). Releases before it do not ask.
    """
    with patch("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, create=True):
        yield
