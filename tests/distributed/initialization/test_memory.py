"""The walk, and merging, under a memory cap that the operating system enforces."""

from __future__ import annotations

import ctypes
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lowrank_dist.export.merge as merge
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks, run_ranks_catching
from lowrank_dist import NF4, PiSSA
from lowrank_dist.decomposition.walk import Batch, Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.storage.reader import CheckpointReader

M_MMAP_THRESHOLD = -3  # of malloc.h
ROWS, COLUMNS, MATRICES = 2048, 4096, 12
BLOCK = ROWS // 2 * COLUMNS * 4  # fp32 rows of one rank of two


def data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA caps; mapped files are not in it."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()


@alone
def walk_under_a_cap(checkpoint: Path, residual: Any, blocks: int, keep: bool) -> int:
    reader, group = CheckpointReader(checkpoint), ShardGroup()
    planned = [
        PlannedMatrix(
            layer=name[:-7], key=name, rows=ROWS, columns=COLUMNS, input_first=False, rank=8, scaling=1.0
        )
        for name in sorted(reader)
    ]  # fmt: skip
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)  # else what is freed stays in the heap, in pieces
    walk = Walk(reader, group, init=PiSSA(), residual=residual, factor_dtype=torch.float32)
    batches = [Batch(group_size=group.size, matrices=(matrix,)) for matrix in planned]
    for _ in walk.run(batches[:1]):  # libraries load, thread stacks and communication buffers are made
        pass
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + blocks * BLOCK, hard))
    kept = []
    count = 0
    for matrix in walk.run(batches):
        count += 1
        if keep:
            kept.append(matrix)
    return count


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    for i in range(MATRICES):
        tensor = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16()
        save_file({f"l{i:02d}.weight": tensor}, directory / f"part{i:02d}.safetensors")
    index = {f"l{i:02d}.weight": f"part{i:02d}.safetensors" for i in range(MATRICES)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


@pytest.mark.parametrize("residual", [NF4(), Dense(dtype=torch.bfloat16)], ids=str)
def test_a_rank_needs_a_few_row_blocks_whatever_the_model(checkpoint: Path, residual: Any) -> None:
    """Five do, of a model of twelve: the one in use, the next, and what decomposing and encoding take; one to spare."""
    assert run_ranks(2, walk_under_a_cap, checkpoint, residual, 6, False) == [MATRICES, MATRICES]


def test_the_cap_would_be_felt(checkpoint: Path) -> None:
    """The same walk that keeps its results in fp32 dies of the cap."""
    outcomes = run_ranks_catching(2, walk_under_a_cap, checkpoint, Dense(dtype=torch.float32), 6, True)
    assert any(error is not None for _, error in outcomes)


BLOCK_OF_MERGE = 4 * 2**20


@alone
def merge_under_a_cap(tiny: Path, large: Path, output: Path, block: int, blocks: int) -> None:
    """Merge `large` by blocks of so many bytes, within so many times 4 MiB from when its files are open."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
    merge.merge_checkpoint(tiny / "adapter", output / "tiny")  # libraries load, buffers are made
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    planned = merge.plan_merge

    def capped(*args: Any) -> Any:
        # not before: accelerate reserves, and never touches, memory for every parameter of the skeleton in turn
        plan = planned(*args)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + blocks * BLOCK_OF_MERGE, hard))
        return plan

    merge.plan_merge, merge.BLOCK_BYTES = capped, block
    merge.merge_checkpoint(large / "adapter", output / "large", dtype=torch.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and one whose embedding and head are 64 MiB each in fp32; both with an adapter of all they have."""
    sizes = {"hidden_size": 512, "intermediate_size": 8192, "vocab_size": 32768, "num_attention_heads": 8}
    small, large = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("large")
    save_checkpoint(small, "llama")
    config = AutoConfig.for_model("llama", num_hidden_layers=1, num_key_value_heads=8, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(large)
    for directory in (small, large):
        model = AutoModelForCausalLM.from_pretrained(directory)
        targets = ["q_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
        model.save_pretrained(directory / "adapter", save_embedding_layers=False)
    return small, large


def test_merging_needs_a_few_blocks_whatever_the_tensors(bases: tuple[Path, Path], tmp_path: Path) -> None:
    """Six blocks, less than half of the largest tensor: five, and the factors of one parameter."""
    run_ranks(1, merge_under_a_cap, *bases, tmp_path, BLOCK_OF_MERGE, 6)
    reader = CheckpointReader(tmp_path / "large")
    assert max(reader.info(name).nbytes for name in reader) == 16 * BLOCK_OF_MERGE


def test_the_cap_of_merging_would_be_felt(bases: tuple[Path, Path], tmp_path: Path) -> None:
    """With blocks as large as a tensor the same merge dies, and leaves nothing."""
    ((_, error),) = run_ranks_catching(1, merge_under_a_cap, *bases, tmp_path, 2**30, 6)
    assert "memory" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
