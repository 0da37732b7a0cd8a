"""The walk on 1 to 4 ranks: bytes that do not depend on the world size, one read of every byte, bounded memory."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional as bnb
import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import lowrank_dist.decomposition.walk
from helpers.covering import covering
from helpers.live import LiveMemory
from helpers.models import CAUSAL_LMS, save_checkpoint
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.training import STEPS, CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import NF4, LoftQ, LoRA, LoRAGA, PiSSA
from lowrank_dist.decomposition.measure import Measure
from lowrank_dist.decomposition.walk import Batch, DecomposedMatrix, Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import ModelError
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.methods.base import Matrix, residual_block
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.storage.buffers import Buffers
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.zero3.partition import stored_bytes

SHAPES = [(96, 64), (64, 136), (37, 36), (3, 50), (200, 20)]


def weight(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    scale = torch.arange(1, columns + 1) ** -0.5
    return torch.randn(rows, columns, generator=generator) * scale


def decompose_rows(method: Any, fmt: Any, rows: int, columns: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    group = ShardGroup()
    partition = RowPartition(rows=rows, columns=columns, world_size=group.size, block=fmt.block)
    start, stop = partition.bounds(group.rank)
    matrix = Matrix(
        name=f"w{rows}x{columns}",
        block=weight(rows, columns)[start:stop],
        partition=partition,
        group=group,
        rank=3,
        scaling=0.5,
        input_first=False,
        factor_dtype=torch.bfloat16,
    )
    result = method.decompose(matrix, fmt)
    return result.factors.left, result.factors.right, result.residual.shards, residual_block(matrix, result.factors)


@covering(2, {("rows", "columns"): SHAPES, "double_quant": [False, True], "method": [PiSSA(), LoRA()]}, ids=str)
def test_shards_equal_bitsandbytes_on_the_whole_residual(
    method: Any, double_quant: bool, rows: int, columns: int
) -> None:
    """Bit for bit: the residual that the ranks formed, put together and quantized whole, has the shards' bytes."""
    fmt = NF4(double_quant=double_quant)
    for world_size in (1, 2, 3, 4):
        parts = run_ranks(world_size, decompose_rows, method, fmt, rows, columns)
        residual = torch.cat([part[3] for part in parts]).flatten()
        residual = torch.nn.functional.pad(residual, (0, -residual.numel() % 64))
        packed, state = bnb.quantize_4bit(residual, quant_type="nf4")
        stored = {name: torch.cat([part[2][name] for part in parts]) for name in parts[0][2]}
        assert torch.equal(stored["weight_packed"][: packed.numel()], packed.flatten())
        if double_quant:  # the offset is a mean that bitsandbytes sums in fp32: tests/unit/quantization/test_nf4.py
            nested = stored["weight_nested"].view(torch.float32)
            codes, second = bnb.quantize_blockwise(state.absmax - nested[0], blocksize=256)
            assert torch.equal(stored["weight_absmax"][: codes.numel()], codes)
            assert torch.equal(nested[1 : 1 + second.absmax.numel()], second.absmax)
        else:
            assert torch.equal(stored["weight_absmax"].view(torch.float32)[: state.absmax.numel()], state.absmax)


class Troubled(Measure):
    """Fails on rank 1, when the matrix is decomposed and nobody waits for the rank any more."""

    def after(self, matrix: Matrix, *args: Any, **kwargs: Any) -> None:
        super().after(matrix, *args, **kwargs)
        if ShardGroup().rank == 1:
            raise OSError("the disk is gone")


def walk_with_trouble(checkpoint: Path, group_size: int) -> None:
    """Rank 1 fails in its first turn."""
    with patch.object(lowrank_dist.decomposition.walk, "Measure", Troubled):
        walk_in_turns(checkpoint, group_size)


@pytest.mark.parametrize("group_size", [1, 2])
def test_trouble_in_one_turn_leaves_nobody_waiting_in_the_next(tmp_path: Path, group_size: int) -> None:
    save_file({f"{i}.weight": weight(*shape) for i, shape in enumerate(SHAPES)}, tmp_path / "model.safetensors")
    for _, error in run_ranks_catching(4, walk_with_trouble, tmp_path, group_size):
        assert "the disk is gone" in str(error)


def test_a_matrix_that_cannot_be_decomposed_is_named(tmp_path: Path) -> None:
    save_file({"w.weight": weight(96, 64)}, tmp_path / "model.safetensors")
    walk = Walk(
        CheckpointReader(tmp_path),
        ShardGroup.single(),
        init=LoRAGA(),
        residual=Dense(dtype=torch.float32),
        factor_dtype=torch.float32,
        statistics=lambda planned: torch.full((planned.rows, planned.columns), torch.nan),
    )
    planned = PlannedMatrix(layer="w", key="w.weight", rows=96, columns=64, input_first=False, rank=3, scaling=1.0)
    with pytest.raises(ModelError, match=r"w: LoRAGA cannot decompose the 96 x 64 matrix .*calibrate on other data"):
        list(walk.run([Batch(group_size=1, matrices=(planned,))]))


@pytest.mark.parametrize("method", [PiSSA(power_iterations=8), LoRA()], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bytes_do_not_depend_on_the_world_size(method: Any, rows: int, columns: int) -> None:
    """LoRA's residual is W itself: equal bytes, always. PiSSA's factors agree to fp32 rounding and are rounded to bf16
    before the residual is formed: where no entry falls on the other side of a bf16 boundary, bytes are equal too; one
    entry that does changes one row or column of the residual by 2^-9 of a product, and few of its codes.
    """
    reference = run_ranks(1, decompose_rows, method, NF4(), rows, columns)[0]
    for world_size in (2, 3, 4):
        parts = run_ranks(world_size, decompose_rows, method, NF4(), rows, columns)
        left, packed = (torch.cat([part[0] for part in parts]), torch.cat([p[2]["weight_packed"] for p in parts]))
        packed = packed[: reference[2]["weight_packed"].numel()]
        if torch.equal(left, reference[0]) and torch.equal(parts[0][1], reference[1]):
            assert torch.equal(packed, reference[2]["weight_packed"][: packed.numel()])
        else:
            assert not isinstance(method, LoRA)
            torch.testing.assert_close(left, reference[0], rtol=2**-7, atol=1e-3)
            assert (packed != reference[2]["weight_packed"][: packed.numel()]).float().mean() < 0.02


def planned_matrices(checkpoint: Path) -> list[PlannedMatrix]:
    reader = CheckpointReader(checkpoint)
    return [
        PlannedMatrix(
            layer=name[:-7],
            key=name,
            rows=reader.info(name).shape[0],
            columns=reader.info(name).shape[1],
            input_first=False,
            rank=3,
            scaling=1.0,
        )
        for name in sorted(reader)
    ]


def walk_in_turns(checkpoint: Path, group_size: int) -> dict[str, DecomposedMatrix]:
    """All matrices in one batch: most groups have more than one, some fewer than others."""
    walk = Walk(CheckpointReader(checkpoint), ShardGroup(), init=LoRA(), residual=NF4(), factor_dtype=torch.float32)
    batch = Batch(group_size=group_size, matrices=tuple(planned_matrices(checkpoint)))
    return {matrix.planned.key: matrix for matrix in walk.run([batch])}


@pytest.mark.parametrize("group_size", [1, 2])
def test_groups_of_ranks_take_turns(tmp_path: Path, group_size: int) -> None:
    """Five matrices, 4 ranks: every rank ends with its shards of all, those that all ranks together would have."""
    weights = {f"{i}.weight": weight(*shape) for i, shape in enumerate(SHAPES)}
    save_file(weights, tmp_path / "model.safetensors")
    parts = run_ranks(4, walk_in_turns, tmp_path, group_size)
    for planned in planned_matrices(tmp_path):
        together = run_ranks(4, decompose_rows, LoRA(), NF4(), planned.rows, planned.columns)
        for name, storage in NF4().storages(planned.row_partition(4, block=NF4().block)).items():
            cut = [part[planned.key].residual[name] for part in parts]
            whole = [shards[name] for _, _, shards, _ in together]
            assert [len(shard) for shard in cut] == [len(shard) for shard in whole]
            assert torch.equal(torch.cat(cut)[: storage.numel], torch.cat(whole)[: storage.numel])
        assert len({part[planned.key].report.norm for part in parts}) == 1
        assert parts[0][planned.key].report.norm == pytest.approx(float(weights[planned.key].double().norm()), rel=1e-6)


@alone
def walk_with_buffers(checkpoint: Path, method: Any, fmt: Any, lent: bool) -> dict[str, tuple[Any, ...]]:
    """What is kept of every matrix to the end, its row blocks and residuals in memory that is lent, or not."""
    lowrank_dist.decomposition.walk.Buffers = partial(Buffers, least=1 if lent else 2**40)
    walk = Walk(CheckpointReader(checkpoint), ShardGroup(), init=method, residual=fmt, factor_dtype=torch.float32)
    batches = [Batch(group_size=walk.group.size, matrices=(planned,)) for planned in planned_matrices(checkpoint)]
    return {m.planned.key: (m.residual, m.factors, replace(m.report, seconds=0.0)) for m in walk.run(batches)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("method", "fmt"),
    [
        (LoRA(), Dense(dtype=torch.float32)),  # the shards are the block that was read
        (PiSSA(), Dense(dtype=torch.float32)),  # the residual that was formed
        (PiSSA(), Dense(dtype=torch.bfloat16)),
        (PiSSA(quantization_iterations=3), NF4(double_quant=True)),
        (LoftQ(quantization_iterations=2), NF4()),
    ],
    ids=str,
)
def test_memory_that_is_used_again_changes_nothing(tmp_path: Path, method: Any, fmt: Any, world_size: int) -> None:
    weights = {f"{i}.weight": weight(*shape).bfloat16() for i, shape in enumerate(SHAPES)}
    save_file(weights, tmp_path / "model.safetensors")
    lent, fresh = (run_ranks(world_size, walk_with_buffers, tmp_path, method, fmt, b) for b in (True, False))
    for mine, expected in zip(lent, fresh, strict=True):
        assert mine.keys() == expected.keys() == weights.keys()
        for name, (residual, factors, report) in mine.items():
            assert all(torch.equal(residual[key], value) for key, value in expected[name][0].items())
            assert all(torch.equal(factors[key], value) for key, value in expected[name][1].items())
            assert report == expected[name][2]


def walk_together(checkpoint: Path, method: Any, fmt: Any) -> list[DecomposedMatrix]:
    walk = Walk(CheckpointReader(checkpoint), ShardGroup(), init=method, residual=fmt, factor_dtype=torch.bfloat16)
    batches = [Batch(group_size=walk.group.size, matrices=(planned,)) for planned in planned_matrices(checkpoint)]
    return list(walk.run(batches))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "fmt"),
    [
        (PiSSA(), NF4()),
        (PiSSA(), Dense(dtype=torch.bfloat16)),
        (PiSSA(), Dense(dtype=torch.float32)),
        (PiSSA(quantization_iterations=3), NF4()),
        (LoftQ(quantization_iterations=2), NF4()),
        (LoRA(), NF4()),
    ],
    ids=str,
)
def test_reported_norms_are_those_of_what_is_kept(
    tmp_path: Path, method: Any, fmt: Any, dtype: torch.dtype, world_size: int
) -> None:
    """``||W||``, ``||W - (Q + B A)||`` and ``||W - Q(W)||`` from the checkpoint and all shards, in fp64. Rows in fp32
    are the mapped file, rows in bf16 are overwritten. 1e-5, and 3e-7 of W: the fp32 rounding of residuals.
    """
    weights = {f"{i}.weight": weight(*shape).to(dtype) for i, shape in enumerate(SHAPES)}
    save_file(weights, tmp_path / "model.safetensors")
    for parts in zip(*run_ranks(world_size, walk_together, tmp_path, method, fmt), strict=True):
        planned, report = parts[0].planned, parts[0].report
        stored = {name: torch.cat([part.residual[name] for part in parts]) for name in parts[0].residual}
        residual = fmt.decode(stored, parts[0].partition, torch.float32).double()
        a, b = (
            torch.cat([part.factors[name] for part in parts])[: math.prod(shape)].view(shape).double()
            for name, shape in planned.factor_shapes.items()
        )
        w = weights[planned.key].double()
        assert report.norm == pytest.approx(float(w.norm()), rel=1e-6)
        assert report.error == pytest.approx(float((w - residual - b @ a).norm()), rel=1e-5, abs=3e-7 * report.norm)
        plain = 0.0
        if isinstance(fmt, NF4):
            partition = RowPartition(rows=planned.rows, columns=planned.columns, world_size=1, block=fmt.block)
            plain = float((w - fmt.encode(w.float(), partition, ShardGroup.single()).decoded).norm())
        assert report.quantization_error == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("group_size", [1, 2])
def test_a_damaged_matrix_of_a_later_turn_is_an_error_on_every_rank(tmp_path: Path, group_size: int) -> None:
    weights = {f"{i}.weight": weight(*shape) for i, shape in enumerate(SHAPES)}
    weights["4.weight"][-1, 7] = math.nan  # the fifth; the last rows, which the last rank of its group has
    save_file(weights, tmp_path / "model.safetensors")
    for _, error in run_ranks_catching(4, walk_in_turns, tmp_path, group_size):
        assert "4.weight: NaN or infinity at [199, 7]" in str(error)


def walk(pretrained: Path, options: dict[str, Any], auto_class: Any = None) -> dict[str, Any]:
    """Set the model up as `validate` does; what the ranks hold afterwards."""
    module = CausalLM(pretrained) if auto_class is None else CausalLM(pretrained, auto_class)
    trainer = make_trainer(make_strategy(pretrained, **options))
    trainer.validate(module, loader(trainer.global_rank, trainer.world_size, 1), verbose=False)
    strategy = trainer.strategy
    frozen = [m for m in module.modules() if isinstance(m, FrozenLinear)]
    return {
        "report": strategy.init_report,
        "stored": stored_bytes(p for m in frozen for p in m.stored()),
        "live": LiveMemory(module).current_bytes(),
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "matrices": [(m.partition.rows, m.partition.columns, m.partition.rows_per_rank) for m in frozen],
    }


@covering(1, {"double_quant": [False, True], "world_size": [1, 2, 3, 4]})
def test_an_idle_rank_holds_its_part_and_padding(llama: Path, world_size: int, double_quant: bool) -> None:
    results = run_ranks(world_size, walk, llama, {"quantization": NF4(double_quant=double_quant)})
    for result in results:
        expected = 0
        for rows, columns, rows_per_rank in result["matrices"]:
            assert rows_per_rank * world_size - rows < world_size * 64
            blocks = rows_per_rank * columns // 64
            maxima = 1 + math.ceil(math.ceil(rows * columns / 64) / 256)  # the offset and the second level
            nested = math.ceil(maxima / world_size) * 4
            expected += blocks * 32 + (blocks + nested if double_quant else blocks * 4)
        assert result["stored"] == expected == result["report"].residual_bytes_per_rank
        assert result["live"] == 0
        assert result["report"].residual_bytes == world_size * expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_byte_is_read_once(llama: Path, world_size: int) -> None:
    result = run_ranks(world_size, walk, llama, {})[0]
    assert result["report"].bytes_read == result["report"].checkpoint_bytes == CheckpointReader(llama).nbytes


@pytest.mark.parametrize(
    ("init", "quantization"),
    [(PiSSA(), NF4()), (PiSSA(quantization_iterations=3), NF4()), (LoRA(), NF4()), (LoftQ(), NF4()), (PiSSA(), None)],
    ids=str,
)
def test_every_method_reports_what_it_left_over(llama: Path, init: Any, quantization: Any) -> None:
    report = run_ranks(2, walk, llama, {"init": init, "quantization": quantization})[0]["report"]
    assert len(report.matrices) == 14
    for matrix in report.matrices:
        if quantization is None:
            assert matrix.error == 0  # fp32: see test_reported_norms_are_those_of_what_is_kept
        elif isinstance(init, LoRA):
            assert matrix.error == pytest.approx(matrix.quantization_error, rel=1e-6)
        else:
            assert 0 < matrix.error < matrix.quantization_error


def live_peak(pretrained: Path, options: dict[str, Any]) -> tuple[int, int, int]:
    module = CausalLM(pretrained)
    trainer = make_trainer(make_strategy(pretrained, **options), steps=4)
    watched: dict[str, Any] = {}

    def start(batch: Any, index: int) -> None:
        if index == 2:  # the order of gathers is known from the second step on
            watched["memory"] = LiveMemory(module).__enter__()

    module.on_train_batch_start = start
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 4))
    watched["memory"].__exit__()
    layers = [sum(p.ds_numel * p.element_size() for p in layer.parameters()) for layer in module.model.model.layers]
    head = module.model.model.embed_tokens.weight
    return watched["memory"].peak_bytes, max(layers), head.ds_numel * head.element_size()


@pytest.mark.parametrize("options", [{"gradient_checkpointing": False}, {}, {"use_reentrant": True}], ids=str)
def test_live_gathered_bytes_stay_within_a_few_layers(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]
) -> None:
    """Budget: the layer at work while it is put together (twice), `live_layers` = 2 ahead of it, and the embedding."""
    deep = save_checkpoint(tmp_path_factory.mktemp("deep"), "llama", num_hidden_layers=8, tie_word_embeddings=True)
    peak, layer, head = run_ranks(2, live_peak, deep, options)[0]
    assert 0 < peak <= 4 * layer + head
    assert 8 * layer > 4 * layer + head


@pytest.mark.parametrize("architecture", CAUSAL_LMS)
def test_architectures(tmp_path: Path, architecture: str) -> None:
    """Step 0 without quantization has the loss of the original model, whatever its layers are called."""
    pretrained = save_checkpoint(tmp_path, architecture)
    result = run_ranks(2, walk, pretrained, {"quantization": None})[0]
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    (ids,) = next(iter(loader(0, 1, 1)))
    assert result["val_loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    quantized = run_ranks(3, fit_losses, pretrained)
    assert quantized[0][-1] < quantized[0][0]


def test_a_checkpoint_without_the_head(tmp_path: Path) -> None:
    """Saved from the bare model, with names that lack ``model.``: found as transformers finds them."""
    pretrained = save_checkpoint(tmp_path, "llama", auto_class=AutoModel, tie_word_embeddings=True)
    result = run_ranks(2, walk, pretrained, {"quantization": None})[0]
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    (ids,) = next(iter(loader(0, 1, 1)))
    assert result["val_loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert result["report"].bytes_read == result["report"].checkpoint_bytes


@alone
def walk_from_the_hub(pretrained: Path, cache: Path) -> dict[str, Any]:
    huggingface_hub.constants.HF_HUB_CACHE = str(cache)
    module = CausalLM(pretrained)
    trainer = make_trainer(make_strategy(pretrained, quantization=None))
    trainer.strategy.pretrained = "someone/model"
    trainer.validate(module, loader(trainer.global_rank, trainer.world_size, 1), verbose=False)
    return {"val_loss": float(trainer.callback_metrics["val_loss"])}


def test_a_hub_id_is_taken_from_the_cache(llama: Path, tmp_path: Path) -> None:
    commit = "0" * 40
    shutil.copytree(llama, tmp_path / "models--someone--model" / "snapshots" / commit)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text(commit)
    local = run_ranks(2, walk, llama, {"quantization": None})[0]
    assert run_ranks(2, walk_from_the_hub, llama, tmp_path)[0]["val_loss"] == local["val_loss"]


def fit_losses(pretrained: Path) -> list[float]:
    module = CausalLM(pretrained)
    trainer = make_trainer(make_strategy(pretrained))
    trainer.fit(module, same_batch(trainer.global_rank, trainer.world_size))
    return module.losses


def same_batch(rank: int, world_size: int) -> DataLoader:
    """The first batch again and again: its loss must fall."""
    (ids,) = next(iter(loader(rank, world_size, 1)))
    return DataLoader(TensorDataset(ids.repeat(STEPS, 1)), batch_size=len(ids))


def test_an_encoder(tmp_path: Path) -> None:
    pretrained = save_checkpoint(tmp_path, "bert", auto_class=AutoModelForMaskedLM)
    losses = run_ranks(2, encoder_losses, pretrained, AutoModelForMaskedLM, None)[0]
    assert losses[-1] < losses[0]


def test_an_encoder_with_a_new_head(tmp_path: Path) -> None:
    """The head is not in the checkpoint: it starts from the model's own initialisation and is trained whole."""
    pretrained = save_checkpoint(tmp_path, "bert", auto_class=AutoModelForMaskedLM)
    losses = run_ranks(2, encoder_losses, pretrained, AutoModelForSequenceClassification, ["pooler", "classifier"])[0]
    assert losses[-1] < losses[0]


class Encoder(CausalLM):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (ids,) = batch
        labels = ids[:, 0] % 2 if "Classification" in self.auto_class.__name__ else ids
        loss = self.model(input_ids=ids, labels=labels).loss
        self.losses.append(float(loss.detach()))
        return loss


def encoder_losses(pretrained: Path, auto_class: Any, saved: list[str] | None) -> list[float]:
    from peft import LoraConfig

    targets = ["query", "value"] if saved else ["query", "value", "dense"]
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=targets, modules_to_save=saved)
    module = Encoder(pretrained, auto_class)
    trainer = make_trainer(make_strategy(pretrained, adapter=adapter))
    trainer.fit(module, same_batch(trainer.global_rank, trainer.world_size))
    return module.losses
