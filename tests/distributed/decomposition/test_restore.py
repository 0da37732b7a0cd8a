"""Residuals formed again on another number of ranks: every byte that the first run held, and its digest."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.covering import covering
from helpers.models import save_checkpoint
from helpers.ranks import run_ranks, run_ranks_catching
from helpers.training import DEEPSPEED_CONFIG
from lowrank_dist import EVA, NF4, QERA, CorDA, LoftQ, LoRA, LoRAGA, LoRAOne, LoRAXS, MiLoRA, OLoRA, PiSSA
from lowrank_dist.adapters.files import write_adapter
from lowrank_dist.calibration.measure import Calibration
from lowrank_dist.calibration.walk import CalibrationPass
from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.decomposition.restore import Resume, check_digests
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError
from lowrank_dist.initialization.build import build_model
from lowrank_dist.initialization.materialize import Materialized
from lowrank_dist.initialization.open import ModelRecipe, OpenedModel
from lowrank_dist.initialization.source import PretrainedSource
from lowrank_dist.layers.frozen import ExtendedLinear, FrozenWeight
from lowrank_dist.methods import Factors, Matrix
from lowrank_dist.model.names import peft_name
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import Encoded
from lowrank_dist.residual_model.fingerprint import source_fingerprint
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.zero3.partition import Partitioner, gathered, use_cpu_accelerator, whole_shape

FP32, BF16 = torch.float32, torch.bfloat16
DOUBLE = NF4(double_quant=True)


@dataclass(frozen=True, kw_only=True)
class EitherSide(PiSSA):
    """QPiSSA that ends on the decomposition for about every second matrix, whatever leaves less."""

    @staticmethod
    def errors(matrix: Matrix, encoded: Encoded, *candidates: Factors) -> list[float]:
        PiSSA.errors(matrix, encoded, *candidates)
        return [0.0, 1.0] if zlib.crc32(matrix.name.encode()) % 2 else [1.0, 0.0]


@dataclass(frozen=True)
class Case:
    init: Any
    residual: Any = field(default_factory=NF4)
    factor_dtype: torch.dtype = FP32
    adapter: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})
    untie: bool = False
    ranks_per_matrix: int | None = None


def run(pretrained: Path, case: Case, resume: Resume | None = None, cache: Path | None = None) -> dict[str, Any]:
    """Fill a model; what it holds, whole, on every rank."""
    use_cpu_accelerator()
    partitioner, backbone = Partitioner(DEEPSPEED_CONFIG), build_skeleton(pretrained)
    group = partitioner.group
    built = build_model(
        ModelRecipe(
            pretrained=str(pretrained),
            adapter=LoraConfig(**{"r": 3, "lora_alpha": 2, **case.adapter}),
            init=case.init,
            quantization=None if case.residual.exact else case.residual,
            cache=cache,
            untie_embeddings=case.untie,
        ),
        backbone,
        partitioner,
        compute_dtype=case.residual.dtype if case.residual.exact else FP32,
        factor_dtype=case.factor_dtype,
        calibrate=calibrated_on_one_batch,
        sharding=Sharding(ranks_per_matrix=case.ranks_per_matrix),
        resume=resume,
    )
    result = built.materialized
    return {
        "stored": stored(backbone),
        "factors": whole_factors(backbone, result, result.initial, group),
        "encoded": whole_factors(backbone, result, result.encoded_from, group),
        "cores": {n: m.core.ds_tensor.clone() for n, m in backbone.named_modules() if isinstance(m, ExtendedLinear)},
        "reports": {report.name: report for report in built.report.matrices},
        "facts": built.facts,
        "kind": type(built.source).__name__,
    }


@contextmanager
def calibrated_on_one_batch(opened: OpenedModel, partitioner: Partitioner, **options: Any) -> Iterator[CalibrationPass]:
    batch = {"input_ids": torch.arange(2, 34).view(2, 16) + partitioner.group.rank}
    yield CalibrationPass(
        opened.backbone,
        opened.plan,
        opened.source.reader,
        partitioner,
        [batch | {"labels": batch["input_ids"]}],
        calibration=Calibration(batches=1),
        init=opened.source.init,
        residual=opened.source.residual,
        **options,
    )


def stored(backbone: Any) -> dict[str, Tensor]:
    """Every storage of every matrix, without padding."""
    found = {}
    for name, module in backbone.named_modules():
        if not isinstance(module, FrozenWeight):
            continue
        experts = getattr(module, "experts", None) or 1
        storages = module.residual.storages(module.partition)
        with gathered(module.stored()):
            for key, whole in module.by_name(module.stored()).items():
                shards = whole.detach().view(module.partition.world_size, experts, -1)
                for expert in range(experts):
                    flat = shards[:, expert].flatten()[: storages[key].numel].clone()
                    found[f"{name}.{key}.{expert}"] = flat.view(torch.uint8)
    return found


def whole_factors(backbone: Any, result: Materialized, shards: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    whole = {}
    for name, shard in shards.items():
        shape = whole_shape(backbone.get_parameter(name)) if name in dict(backbone.named_parameters()) else None
        assert shape is not None
        whole[peft_name(name)] = group.gather_equal(shard)[: shape.numel()].view(shape).clone()
    return whole


def run_all(pretrained: Path, cases: Sequence[Case], resumes: Sequence[Resume | None]) -> list[dict[str, Any]]:
    return [run(pretrained, case, resume) for case, resume in zip(cases, resumes, strict=True)]


def save(directory: Path, result: dict[str, Any]) -> Resume:
    """The part of a checkpoint that a base is restored from."""
    config = LoraConfig(r=3)
    write_adapter(directory / "adapter_init", result["factors"], config)
    if result["encoded"]:
        write_adapter(directory / "adapter_encoded", result["encoded"], config)
    return Resume.from_facts(directory, result["facts"], result["reports"].values())


def assert_the_same(again: dict[str, Any], first: dict[str, Any]) -> None:
    for part in ("stored", "factors", "encoded", "cores"):
        assert again[part].keys() == first[part].keys()
        for name, tensor in first[part].items():
            if part == "cores" and again[part][name].shape != tensor.shape:
                continue  # a shard of another number of ranks
            assert torch.equal(again[part][name], tensor), (part, name)
    check_digests(again["reports"].values(), first["reports"])
    for name, report in first["reports"].items():
        assert report.digest is not None
        assert len(report.digest) == 32
        differing = {"seconds": 0.0, "nbytes": 0, "group_size": 1}
        assert replace(again["reports"][name], **differing) == replace(report, **differing)


def round_trip(
    tmp_path: Path, pretrained: Path, ranks: tuple[int, int], cases: Sequence[Case], again: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Run the cases on ``ranks[0]`` ranks, restore them on ``ranks[1]``; returns the first runs."""
    first = run_ranks(ranks[0], run_all, pretrained, cases, [None] * len(cases))[0]
    resumes = [save(tmp_path / str(index), result) for index, result in enumerate(first)]
    changed = [replace(case, **(again or {})) for case in cases]
    for restored, result, case in zip(
        run_ranks(ranks[1], run_all, pretrained, changed, resumes)[0], first, cases, strict=True
    ):
        assert_the_same(restored, result)
        assert restored["facts"]["method"] == str(case.init)
    return first


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA with rows that no number of ranks divides; more than 256 of some, and rows that end inside a block."""
    return save_checkpoint(
        tmp_path_factory.mktemp("odd"),
        "llama",
        num_hidden_layers=1,
        hidden_size=68,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=331,
        vocab_size=517,
        tie_word_embeddings=True,
    )


EXACT = [PiSSA(power_iterations=2), LoRA(), OLoRA(), MiLoRA(), LoRAXS(power_iterations=2)]
QUANTIZED = [
    *EXACT,
    PiSSA(power_iterations=2, quantization_iterations=5),
    EitherSide(power_iterations=2, quantization_iterations=2),
    LoftQ(power_iterations=2),
    LoftQ(power_iterations=2, quantization_iterations=3),
]


@pytest.mark.parametrize(
    ("first", "again", "residual", "dtype"),
    [
        (2, 3, NF4(), FP32),
        (1, 4, DOUBLE, BF16),
        (4, 1, NF4(block_size=128, double_quant=True), FP32),
        (3, 2, Dense(dtype=BF16), BF16),
        (1, 3, Dense(dtype=FP32), FP32),
    ],
    ids=str,
)
def test_every_method_on_another_number_of_ranks(
    odd: Path, tmp_path: Path, first: int, again: int, residual: Any, dtype: torch.dtype
) -> None:
    methods = EXACT if residual.exact else QUANTIZED
    results = round_trip(tmp_path, odd, (first, again), [Case(init, residual, dtype) for init in methods])
    if not residual.exact:
        assert {report.ended_on for report in results[6]["reports"].values()} == {"quantize", "decompose"}
        assert 0 < len(results[6]["encoded"]) < len(results[6]["factors"])
        assert results[7]["encoded"].keys() == results[7]["factors"].keys()
    assert all(not result["encoded"] for result in results[:5])


@pytest.mark.parametrize(("first", "again"), [((4, 2), (4, 1)), ((2, 1), (3, 1)), ((3, None), (4, 2))])
def test_whoever_shares_a_matrix(odd: Path, tmp_path: Path, first: Any, again: Any) -> None:
    """A part of the ranks decomposes each matrix, another part restores it."""
    inits = [EitherSide(quantization_iterations=2), LoftQ(), OLoRA(), LoRA()]
    cases = [Case(init, DOUBLE, ranks_per_matrix=first[1]) for init in inits]
    round_trip(tmp_path, odd, (first[0], again[0]), cases, {"ranks_per_matrix": again[1]})


TARGETS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj", "wpe"]}, {"n_embd": 68, "n_head": 2}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"num_hidden_layers": 1},
    ),
    "experts [in, out]": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"num_hidden_layers": 1},
    ),
    "untied": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head", "down_proj"], "rank_pattern": {"lm_head": 5}},
        {"tie_word_embeddings": True, "num_hidden_layers": 1, "vocab_size": 517},
    ),
}


@covering(1, {("first", "again"): [(2, 3), (3, 1)], "name": TARGETS})
def test_every_kind_of_weight(tmp_path: Path, name: str, first: int, again: int) -> None:
    architecture, adapter, changes = TARGETS[name]
    pretrained = save_checkpoint(tmp_path / "model", architecture, **changes)
    inits = [PiSSA(), EitherSide(quantization_iterations=2), LoftQ(), LoRA()]
    cases = [Case(init, DOUBLE, adapter=adapter, untie=name == "untied") for init in inits]
    cases.append(Case(PiSSA(), Dense(dtype=FP32), adapter=adapter, untie=name == "untied"))
    results = round_trip(tmp_path, pretrained, (first, again), cases)
    assert set(results[2]["encoded"]) == set(results[2]["factors"])
    assert results[1]["encoded"]


@pytest.mark.parametrize(("first", "again"), [(2, 3), (1, 2)])
def test_without_a_second_calibration(odd: Path, tmp_path: Path, first: int, again: int) -> None:
    inits = [CorDA(), CorDA(corda_method="kpm"), EVA(), LoRAGA(), LoRAOne()]
    cases = [Case(init, residual) for init in inits for residual in (DOUBLE, Dense(dtype=FP32))]
    cases += [Case(QERA(), DOUBLE), Case(QERA(approximate=True), NF4())]
    results = round_trip(tmp_path, odd, (first, again), cases)
    assert all(result["encoded"].keys() == result["factors"].keys() for result in results[-2:])


# -- what is not the same is found ----------------------------------------------------------------------------------


def digests_of(result: dict[str, Any]) -> dict[str, str]:
    return {name: report.digest for name, report in result["reports"].items()}


@pytest.mark.parametrize("residual", [DOUBLE, Dense(dtype=FP32)], ids=str)
def test_a_byte_of_the_base_and_a_number_of_a_factor(odd: Path, tmp_path: Path, residual: Any) -> None:
    """One matrix has another digest each time, and is named."""
    case = Case(PiSSA(), residual)
    (first,) = run_ranks(2, run_all, odd, [case], [None])[0]
    resume = save(tmp_path / "checkpoint", first)
    changed = shutil.copytree(odd, tmp_path / "changed")
    name = "model.layers.0.mlp.down_proj"
    file = changed / json.loads((changed / "model.safetensors.index.json").read_text())["weight_map"][f"{name}.weight"]
    tensors = load_file(file)
    weight = tensors[f"{name}.weight"].clone().view(torch.uint8)
    weight[-1, -1] ^= 128  # a sign
    save_file(tensors | {f"{name}.weight": weight.view(FP32)}, file, metadata={"format": "pt"})
    factors = dict(first["factors"])
    key = next(key for key in factors if "gate_proj.lora_A" in key)
    factors[key] = factors[key].clone()
    factors[key][0, 0] *= 2
    other = save(tmp_path / "other", first | {"factors": factors})
    for _, error in run_ranks_catching(3, run, changed, case, resume):
        assert "the pretrained weights have changed since it was written" in str(error)
    # of a large checkpoint the fingerprint covers samples only
    overlooked = replace(
        resume, pretrained_fingerprint=source_fingerprint(CheckpointReader(changed), ShardGroup.single())
    )
    for pretrained, resumed, wrong in ((changed, overlooked, name), (odd, other, "model.layers.0.mlp.gate_proj")):
        for _, error in run_ranks_catching(3, run, pretrained, case, resumed):
            assert re.search(rf"{wrong}: the residual .* \(1 of 7 matrices differ\)", str(error))


@pytest.mark.parametrize("residual", [NF4(), DOUBLE, Dense(dtype=FP32)], ids=str)
def test_a_decomposed_model_has_the_digests_of_the_walk(odd: Path, tmp_path: Path, residual: Any) -> None:
    """Written by 2 ranks, each matrix by one, and read by 3; 331 x 68 numbers do not fill their last block."""
    case = Case(PiSSA(), residual, ranks_per_matrix=1)
    walked = run_ranks(2, run, odd, case)[0]
    written = run_ranks(2, run, odd, case, None, tmp_path)[0]
    read = run_ranks(3, run, odd, case, None, tmp_path)[0]
    assert [written["kind"], read["kind"]] == [ResidualModel.__name__] * 2
    assert digests_of(walked) == digests_of(written) == digests_of(read)


def test_a_run_goes_on_from_what_it_started_from(odd: Path, tmp_path: Path) -> None:
    """The residual model in the cache if that is what it was, else the pretrained weights; nothing is written."""
    case = Case(PiSSA(quantization_iterations=2))
    cached = run_ranks(2, run, odd, case, None, tmp_path / "cache")[0]
    walked = run_ranks(1, run, odd, case)[0]
    assert cached["facts"]["source"] != walked["facts"]["source"]
    assert cached["encoded"].keys() == walked["encoded"].keys() != set()
    for first, kind in ((cached, ResidualModel), (walked, PretrainedSource)):
        resume = save(tmp_path / kind.__name__, first)
        again = run_ranks(3, run, odd, case, resume, tmp_path / "cache")[0]
        assert again["kind"] == kind.__name__
        assert_the_same(again, first)
    again = run_ranks(2, run, odd, case, resume, tmp_path / "empty")[0]
    assert again["kind"] == PretrainedSource.__name__
    assert not (tmp_path / "empty").exists()
    # without the cache, the residual is formed again from the factors that the checkpoint has
    again = run_ranks(2, run, odd, case, save(tmp_path / "lost", cached))[0]
    assert again["kind"] == PretrainedSource.__name__
    assert_the_same(again, cached)


def test_factors_that_do_not_fit(odd: Path, tmp_path: Path) -> None:
    """Refused on every rank, before anything is decomposed."""
    case = Case(PiSSA())
    resume = save(tmp_path / "checkpoint", run_ranks(1, run, odd, case)[0])
    wider = {"target_modules": "all-linear", "r": 4}
    of_head = {"target_modules": ["q_proj", "lm_head"]}
    for changed, text in (
        (replace(case, adapter=wider), r"q_proj.lora_A.weight has shape \[3, 68\], the adapter needs \[4, 68\]"),
        (replace(case, adapter=of_head, untie=True), r"untie_embeddings is True, but the run .* had False"),
        (replace(case, factor_dtype=BF16), r"stored as F32, which factors in torch.bfloat16 cannot hold"),
        (replace(case, residual=DOUBLE), r"quantization is .*double_quant=True.*, but the run .* had .*=False"),
    ):
        for _, error in run_ranks_catching(2, run, odd, changed, resume):
            with pytest.raises(AssertionError, match=text):
                raise AssertionError(error)
    fewer = run_ranks(1, run, odd, replace(case, adapter={"target_modules": ["q_proj"]}))[0]
    for _, error in run_ranks_catching(2, run, odd, case, save(tmp_path / "fewer", fewer)):
        assert "holds no base_model.model.model.layers.0." in str(error)
    nothing = replace(resume, checkpoint=tmp_path / "nothing")
    for _, error in run_ranks_catching(2, run, odd, case, nothing):
        assert "adapter_init: holds neither adapter_model.safetensors.index.json nor" in str(error)


def test_bf16_factors_in_an_fp32_run(odd: Path, tmp_path: Path) -> None:
    """What was trained in bf16 can go on with factors in fp32: they hold the same numbers."""
    case = Case(LoftQ(), factor_dtype=BF16)
    first = run_ranks(2, run, odd, case)[0]
    again = run_ranks(1, run, odd, replace(case, factor_dtype=FP32), save(tmp_path, first))[0]
    assert digests_of(again) == digests_of(first)
    assert all(torch.equal(again["factors"][name], factor.float()) for name, factor in first["factors"].items())


def unreadable(pretrained: Path, case: Case, resume: Resume) -> None:
    """Rank 1 cannot read a factor."""
    from lowrank_dist.distributed.group import ShardGroup

    if ShardGroup().rank == 1:
        rows = CheckpointReader.rows

        def broken(self: CheckpointReader, name: str, start: int, stop: int) -> Tensor:
            if resume.checkpoint in self.directory.parents:
                raise OSError(f"{name}: the disk is gone")
            return rows(self, name, start, stop)

        CheckpointReader.rows = broken
    run(pretrained, case, resume)


def test_trouble_with_a_file_is_an_error_on_every_rank(odd: Path, tmp_path: Path) -> None:
    resume = save(tmp_path, run_ranks(1, run, odd, Case(PiSSA()))[0])
    for ranks_per_matrix in (2, 1):
        case = Case(PiSSA(), ranks_per_matrix=ranks_per_matrix)
        for _, error in run_ranks_catching(2, unreadable, odd, case, resume):
            assert "the disk is gone" in str(error)


def test_digests_that_nobody_took_are_passed_over() -> None:
    shape = {"rows": 1, "columns": 1, "rank": 1}
    now = [MatrixReport(name=name, digest="a", **shape) for name in "xyz"]
    check_digests(now, {})
    check_digests(now, {"x": MatrixReport(name="x", digest="a", **shape), "y": MatrixReport(name="y", **shape)})
    with pytest.raises(CheckpointError, match="z: the residual"):
        check_digests(now, {"z": MatrixReport(name="z", digest="b", **shape)})
