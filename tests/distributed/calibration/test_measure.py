"""Calibration over sharded models of 1 to 4 ranks against hooks and autograd on the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers.covering import covering
from helpers.live import LiveStorages
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks
from helpers.training import DEEPSPEED_CONFIG
from lowrank_dist import NF4
from lowrank_dist.calibration.measure import Calibration
from lowrank_dist.calibration.statistics import add_product
from lowrank_dist.calibration.walk import CalibrationPass
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError
from lowrank_dist.methods import Decomposition, LoRA, Matrix, Method
from lowrank_dist.model.plan import open_plan
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.zero3 import layerwise
from lowrank_dist.zero3.partition import Partitioner, gathered, use_cpu_accelerator, whole_shape

BATCHES, GLOBAL_BATCH, LENGTH = 3, 12, 16


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """LoRA that keeps what it was given."""

    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "covariance"
    seen: ClassVar[dict[str, tuple[Tensor, Tensor]]] = {}

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        assert matrix.statistic is not None
        self.seen[matrix.name] = (matrix.block.clone(), matrix.statistic.clone())
        return LoRA().decompose(matrix, residual)


@dataclass(frozen=True, kw_only=True)
class GradientRecorder(Recorder):
    statistic: ClassVar[Literal["covariance", "gradient"] | None] = "gradient"


RECORDERS: dict[str, Recorder] = {"covariance": Recorder(), "gradient": GradientRecorder()}


def global_batches(*, padded: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    batches = []
    for _ in range(BATCHES):
        ids = torch.randint(3, 256, (GLOBAL_BATCH, LENGTH), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if padded:
            lengths = torch.randint(5, LENGTH + 1, (GLOBAL_BATCH, 1), generator=generator)
            batch["attention_mask"] = (torch.arange(LENGTH) < lengths).long()
            batch["labels"][:, :4] = -100
            batch["labels"][batch["attention_mask"] == 0] = -100
        batches.append(batch)
    return batches


def part(batch: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    return {name: values.unflatten(0, (world_size, -1))[rank] for name, values in batch.items()}


def skeleton(pretrained: Path, targets: Any = "all-linear") -> tuple[Any, ...]:
    use_cpu_accelerator()
    partitioner = Partitioner(DEEPSPEED_CONFIG)
    reader = CheckpointReader(pretrained)
    opened = open_plan(reader, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    return opened.backbone, opened.plan, reader, partitioner


def sharded(pretrained: Path, statistic: str, padded: bool, options: dict[str, Any], residual: Any) -> dict[str, Any]:
    backbone, plan, reader, partitioner = skeleton(pretrained)
    group = partitioner.group
    batches = [part(batch, group.rank, group.size) for batch in global_batches(padded=padded)]
    init = RECORDERS[statistic]
    init.seen.clear()
    before = {n: (p.requires_grad, m.training) for m in backbone.modules() for n, p in m.named_parameters()}
    result = CalibrationPass(
        backbone,
        plan,
        reader,
        partitioner,
        batches,
        calibration=Calibration(**options),
        init=init,
        residual=residual,
        compute_dtype=torch.float32,
        factor_dtype=torch.float32,
    ).materialize()
    after = {n: (p.requires_grad, m.training) for m in backbone.modules() for n, p in m.named_parameters()}
    assert {name: after[name] for name in before if name in after} == {n: v for n, v in before.items() if n in after}
    assert all(module.__dict__.get("forward") is None for module in backbone.modules())
    backbone.eval()
    with torch.no_grad(), gathered(list(backbone.parameters())):
        logits = backbone(input_ids=batches[0]["input_ids"]).logits
    return {"seen": init.seen, "report": result.report, "logits": logits}


def whole_model(pretrained: Path, statistic: str, padded: bool, positions: str = "attended") -> dict[str, Tensor]:
    """The statistic of every linear layer but the head, from the dense model in one process."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lm_head" not in n}
    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)
    counted: Tensor

    def hook(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0][counted].detach()
            sums[name] = sums[name] + x.mT @ x

        return add

    tokens = 0
    if statistic == "covariance":
        for name, layer in layers.items():
            layer.register_forward_hook(hook(name))
    for batch in global_batches(padded=padded):
        counted = torch.ones(GLOBAL_BATCH, LENGTH, dtype=torch.bool)
        if positions != "all" and padded:
            counted = batch["attention_mask"].bool()
        if positions == "labelled":
            counted = counted & (batch["labels"] != -100)
        tokens += int(counted.sum())
        loss = model(**batch).loss / BATCHES
        if statistic == "gradient":
            loss.backward()
    if statistic == "covariance":
        return {f"{name}.weight": total / tokens for name, total in sums.items()}
    return {f"{name}.weight": layer.weight.grad for name, layer in layers.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "llama": save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=True),
        "gpt2": save_checkpoint(tmp_path_factory.mktemp("gpt2"), "gpt2"),
    }


def check(parts: list[dict[str, Any]], expected: dict[str, Tensor], weights: Any) -> None:
    assert set(parts[0]["seen"]) == set(expected)
    for name, whole in expected.items():
        measured = torch.cat([one["seen"][name][1] for one in parts])
        torch.testing.assert_close(measured, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
        assert torch.equal(torch.cat([one["seen"][name][0] for one in parts]), weights[name])


@covering(2, {"statistic": ["covariance", "gradient"], "architecture": ["llama", "gpt2"], "world_size": [1, 2, 3, 4]})
def test_statistics_equal_those_of_the_whole_model(
    checkpoints: dict[str, Path], architecture: str, world_size: int, statistic: str
) -> None:
    """fp32: sums over tokens in another order, 1e-4 of an entry or 1e-5 of the largest. Weights are bit for bit those
    of the checkpoint, and read from it once. The logits at step 0 are those of the checkpoint.
    """
    pretrained, padded = checkpoints[architecture], statistic == "covariance"
    parts = run_ranks(world_size, sharded, pretrained, statistic, padded, {}, Dense(dtype=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).eval()
    check(parts, whole_model(pretrained, statistic, padded), model.state_dict())
    report = parts[0]["report"]
    assert report.bytes_read == report.checkpoint_bytes
    assert [matrix.error for matrix in report.matrices] == [0.0] * len(report.matrices)
    for rank, one in enumerate(parts):
        ids = part(global_batches(padded=padded)[0], rank, world_size)["input_ids"]
        torch.testing.assert_close(one["logits"], model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["labelled", "all"])
def test_positions_that_count(checkpoints: dict[str, Path], positions: str) -> None:
    options = {"positions": positions}
    parts = run_ranks(2, sharded, checkpoints["llama"], "covariance", True, options, Dense(dtype=torch.float32))
    expected = whole_model(checkpoints["llama"], "covariance", True, positions)
    for name, whole in expected.items():
        measured = torch.cat([one["seen"][name][1] for one in parts])
        torch.testing.assert_close(measured, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("statistic", ["covariance", "gradient"])
def test_shards_are_cut_as_the_residual_wants_them(tmp_path: Path, statistic: str) -> None:
    """NF4 blocks of 64 do not end with a row of 136: a rank's rows are a multiple of 8. Weights stored in bf16 reach
    the method as they are.
    """
    pretrained = save_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    padded = statistic == "covariance"
    parts = run_ranks(3, sharded, pretrained, statistic, padded, {"offload": True}, NF4())
    weights = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32).state_dict()
    check(parts, whole_model(pretrained, statistic, padded), weights)


def shared_covariances(pretrained: Path) -> tuple[list[str], int, list[int]]:
    backbone, plan, reader, partitioner = skeleton(pretrained)
    batches = [part(batch, partitioner.group.rank, partitioner.group.size) for batch in global_batches(padded=False)]
    statistics = CalibrationPass(
        backbone,
        plan,
        reader,
        partitioner,
        batches,
        calibration=Calibration(),
        init=Recorder(),
        residual=Dense(dtype=torch.float32),
        compute_dtype=torch.float32,
        factor_dtype=torch.float32,
    ).statistics()
    names = list(statistics.values)
    left = [(statistics(planned), len(statistics.values))[1] for planned in plan.matrices]
    return names, len(plan.matrices), left


def test_layers_with_the_same_input_share_one_covariance(checkpoints: dict[str, Path]) -> None:
    """q, k, v and gate, up of two layers: four covariances each, which go with the last layer that asks for them."""
    names, matrices, left = run_ranks(2, shared_covariances, checkpoints["llama"])[0]
    assert [name.rsplit(".", 1)[-1] for name in names] == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2
    assert matrices == 14
    assert left == [8, 8, 7, 6, 6, 5, 4, 4, 4, 3, 2, 2, 1, 0]


@alone
def live_bytes(pretrained: Path, statistic: str) -> tuple[int, int, int]:
    """Most bytes of gathered tensors alive at one time; those of the largest layer, and of the embedding."""
    backbone, plan, reader, partitioner = skeleton(pretrained)
    live, gather = LiveStorages(), layerwise.gathered

    @contextmanager
    def watched(parameters: list[Any]) -> Iterator[None]:
        with gather(parameters):
            for parameter in parameters:
                live.watch(parameter)
            live.look()
            yield

    layerwise.gathered = watched
    rank, size = partitioner.group.rank, partitioner.group.size
    CalibrationPass(
        backbone,
        plan,
        reader,
        partitioner,
        [part(batch, rank, size) for batch in global_batches(padded=False)],
        calibration=Calibration(),
        init=RECORDERS[statistic],
        residual=Dense(dtype=torch.float32),
        compute_dtype=torch.float32,
        factor_dtype=torch.float32,
    ).statistics()
    layers = [sum(whole_shape(p).numel() for p in layer.parameters()) * 4 for layer in backbone.model.layers]
    return live.peak_bytes, max(layers), whole_shape(backbone.model.embed_tokens.weight).numel() * 4


@pytest.mark.parametrize("statistic", ["covariance", "gradient"])
def test_one_layer_is_gathered_at_a_time(tmp_path: Path, statistic: str) -> None:
    deep = save_checkpoint(tmp_path, "llama", num_hidden_layers=6, tie_word_embeddings=True)
    peak, layer, embedding = run_ranks(2, live_bytes, deep, statistic)[0]
    assert max(layer, embedding) <= peak <= 1.1 * max(layer, embedding)


def product_in_parts(transient_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    group = ShardGroup()
    partition = RowPartition(rows=10, columns=7, world_size=group.size)
    generator = torch.Generator().manual_seed(group.rank)
    left, right = torch.randn(5 - group.rank, 10, generator=generator), torch.randn(5 - group.rank, 7)
    start, stop = partition.bounds(group.rank)
    into = torch.ones(stop - start, 7)
    add_product(left.bfloat16(), right, partition, group, into=into, transient_bytes=transient_bytes)
    return into, left.bfloat16().float(), right


@pytest.mark.parametrize("transient_bytes", [1, 150, 2**20])
def test_products_are_formed_some_columns_at_a_time(transient_bytes: int) -> None:
    parts = run_ranks(3, product_in_parts, transient_bytes)
    expected = 1 + sum(left.mT @ right for _, left, right in parts)
    torch.testing.assert_close(torch.cat([rows for rows, _, _ in parts]), expected)


def refused(pretrained: Path, case: str) -> str:
    backbone, plan, reader, partitioner = skeleton(pretrained)
    batches: list[Any] = [part(batch, 0, 12) for batch in global_batches(padded=False)]
    statistic = "gradient"
    if case == "no batch on rank 1" and partitioner.group.rank == 1:
        batches = []
    elif case == "no labels":
        batches = [{"input_ids": batch["input_ids"]} for batch in batches]
    elif case == "lists":
        batches = [[batch["input_ids"]] for batch in batches]
    elif case == "nothing counts":
        statistic = "covariance"
        batches = [batch | {"attention_mask": torch.zeros_like(batch["input_ids"])} for batch in batches]
    elif case == "infinity":
        statistic = "covariance"
        backbone.model.embed_tokens.register_forward_hook(lambda _, args, y: y * torch.inf)
    elif case == "nothing to learn":
        batches = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    elif case == "reading fails on rank 1":
        batches = broken(batches, partitioner.group.rank)
    elif case == "a layer is passed by":
        backbone.model.layers[1].mlp.forward = lambda x: x
    try:
        CalibrationPass(
            backbone,
            plan,
            reader,
            partitioner,
            batches,
            calibration=Calibration(),
            init=RECORDERS[statistic],
            residual=Dense(dtype=torch.float32),
            compute_dtype=torch.float32,
            factor_dtype=torch.float32,
        ).statistics()
    except InputError as error:
        return str(error)
    return "nothing was raised"


def broken(batches: list[Any], rank: int) -> Iterator[Any]:
    yield batches[0]
    if rank == 1:
        raise InputError("the disk is gone")
    yield batches[1]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("no batch on rank 1", "there is no batch on at least one rank"),
        ("no labels", "add labels to the batches"),
        ("lists", "a batch is a list"),
        ("nothing counts", "no position of the inputs of model.layers.0.self_attn.q_proj counts"),
        ("nothing to learn", "the loss of a batch is nan"),
        ("infinity", "contains a NaN or infinity"),
        ("reading fails on rank 1", "the disk is gone"),
        ("a layer is passed by", "model.layers.1.mlp.gate_proj got no input"),
    ],
)
def test_what_cannot_be_measured_is_refused_on_all_ranks(checkpoints: dict[str, Path], case: str, text: str) -> None:
    for message in run_ranks(2, refused, checkpoints["llama"], case):
        assert text in message


def with_an_embedding(pretrained: Path) -> str:
    backbone, plan, reader, partitioner = skeleton(pretrained, ["q_proj", "embed_tokens"])
    options: dict[str, Any] = {"compute_dtype": torch.float32, "factor_dtype": torch.float32}
    residual, calibration = Dense(dtype=torch.float32), Calibration()
    arguments = (backbone, plan, reader, partitioner, [])
    try:
        CalibrationPass(*arguments, calibration=calibration, init=Recorder(), residual=residual, **options).statistics()
    except InputError as error:
        return f"{reader.bytes_read} bytes read: {error}"
    return "nothing was raised"


def test_embeddings_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    message = run_ranks(1, with_an_embedding, save_checkpoint(tmp_path, "llama"))[0]
    assert message.startswith("0 bytes read: model.embed_tokens: Recorder needs the covariance of every adapted weight")
