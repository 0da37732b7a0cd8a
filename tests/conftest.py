"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
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

from helpers.models import save_checkpoint  # noqa: E402 (after the environment is set)
from helpers.sft import save_material  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup`` a file stays with one worker, which makes its fixtures; so does all of tests/gpu."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group("gpu" if item.get_closest_marker("gpu") else str(item.path)))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with tied embeddings, fp32, in several files."""
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and a few prompts with completions."""
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
