"""PiSSA to LoRA, exact and truncated: checked in fp64 and against merged models under stock PEFT."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.checkpoints import adapted, deltas, load_base, load_lora, make_checkpoint
from helpers.models import save_checkpoint
from lowrank_dist.adapters.files import read_adapter, write_adapter
from lowrank_dist.adapters.lora import lora_config, to_lora
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.export.convert import convert_checkpoint

A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"


@settings(max_examples=30)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_delta_is_exact(rows: int, columns: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    trained = {A: torch.randn(rank, columns, generator=g).double(), B: torch.randn(rows, rank, generator=g).double()}
    start = {name: torch.randn(t.shape, generator=g).double() for name, t in trained.items()}
    converted = to_lora(trained, start)
    assert converted[A].shape == (2 * rank, columns)
    assert converted[B].shape == (rows, 2 * rank)
    torch.testing.assert_close(
        converted[B] @ converted[A], trained[B] @ trained[A] - start[B] @ start[A], rtol=1e-12, atol=1e-12
    )


def test_whole_modules_pass_through() -> None:
    head = torch.randn(3, 4)
    assert to_lora({"base_model.model.classifier.weight": head}, {})["base_model.model.classifier.weight"] is head


@pytest.mark.parametrize("start", [{}, {A: torch.zeros(2, 3)}])
def test_a_missing_or_misshapen_initial_factor_is_refused(start: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"lora_A.weight \[4, 3\]: its initial value"):
        to_lora({A: torch.zeros(4, 3)}, start)


def lora_layers(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def scalings(model: Any) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 3}},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 10, "v_proj": 5}},
    ],
)
def test_every_module_keeps_its_scaling(llama: Path, rslora: bool, patterns: dict[str, Any]) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora, **patterns)
    before = scalings(get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config))
    after_model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), lora_config(config))
    assert scalings(after_model) == pytest.approx(before, rel=1e-15)
    ranks = {layer.r["default"] for layer in lora_layers(after_model).values()}
    assert ranks == ({6, 8} if patterns else {8})


@pytest.mark.parametrize("rslora", [False, True])
def test_converted_adapter_on_the_base_equals_the_adapter_on_the_residual(
    llama: Path, tmp_path: Path, rslora: bool
) -> None:
    """Stock PEFT on both sides, fp32: rounding of sums of a few products, nothing else."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_rslora=rslora)
    config.init_lora_weights = False  # random, not zero
    scaling = 8 / (math.sqrt(4) if rslora else 4)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    tensors, start = {}, {}
    for name, module in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(module, part)["default"].weight
            start[f"{name}.{part}.weight"] = weight.detach().clone()
            weight.data += 0.1 * torch.randn_like(weight)
            tensors[f"{name}.{part}.weight"] = weight.detach().clone()
        residual = module.base_layer.weight
        residual.data -= scaling * start[f"{name}.lora_B.weight"] @ start[f"{name}.lora_A.weight"]
    write_adapter(tmp_path / "lora", to_lora(tensors, start), lora_config(config))
    converted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "lora")
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_survives_being_written_and_read(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["x"])
    write_adapter(tmp_path / "a", {A: torch.ones(2, 3), B: torch.zeros(5, 2)}, config)
    tensors, read = read_adapter(tmp_path / "a")
    assert torch.equal(tensors[A], torch.ones(2, 3))
    assert (read.r, read.lora_alpha, set(read.target_modules)) == (2, 4, {"x"})


def test_an_empty_adapter_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refusing to write an adapter without tensors"):
        write_adapter(tmp_path / "a", {}, LoraConfig(r=2))
    assert not (tmp_path / "a").exists()


def test_a_truncated_adapter_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {A: torch.ones(2, 3)}, LoraConfig(r=2))
    path = tmp_path / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(tmp_path / "a")


@dataclass(frozen=True)
class Case:
    """An adapter, the model it is for, the exact ranks of its modules and the largest of them."""

    adapter: dict[str, Any]
    rank: int
    architecture: str = "llama"
    uniform: bool = True
    options: dict[str, Any] = field(default_factory=dict)


EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "rank_pattern": {r".*\.down_proj": 3},
    "alpha_pattern": {r".*\.gate_up_proj": 6, r".*\.down_proj": 5},
}
PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 5},
    "alpha_pattern": {"q_proj": 10, "up_proj": 1},
}
CASES = {
    "plain": Case({"target_modules": ["q_proj", "down_proj"]}, 8),
    "rslora": Case({"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, 8),
    "patterns": Case({"target_modules": ["q_proj", "v_proj", "up_proj"], **PATTERNS}, 10, uniform=False),
    "rslora, patterns": Case(
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True, **PATTERNS}, 10, uniform=False
    ),
    "starts at zero": Case({"target_modules": "all-linear"}, 4, options={"starts_at_zero": True}),
    "conv1d": Case(
        {"target_modules": ["c_attn", "c_fc", "c_proj"], "rank_pattern": {"c_attn": 5}, "fan_in_fan_out": True},
        10,
        "gpt2",
        uniform=False,
    ),
    "embedding": Case(
        {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True, "rank_pattern": {"embed_tokens": 3}},
        8,
        "qwen2",
        False,
    ),
    "positions": Case({"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}, 8, "gpt2"),
    "mixtral": Case(EXPERTS, 8, "mixtral", uniform=False),
    "gpt_oss": Case(EXPERTS, 8, "gpt_oss", uniform=False),  # [in, out]
    "head": Case({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 8, "mistral"),
    "wide": Case({"target_modules": ["v_proj"], "r": 24}, 48),  # of which v_proj has 32 rows only
}
IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def config_of(case: Case) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **case.adapter})


def matrices(tensor: Tensor) -> list[Tensor]:
    return list(tensor) if tensor.ndim == 3 else [tensor]


@pytest.mark.parametrize("name", CASES)
def test_conversion_under_stock_peft(tmp_path: Path, name: str) -> None:
    """Exact, and at its full rank: the original model with the dense update merged, to fp32 rounding. Truncated: the
    error of every matrix is the tail of its dense update's spectrum, and the figures say so.
    """
    case = CASES[name]
    base = save_checkpoint(tmp_path / "base", case.architecture)
    made = make_checkpoint(tmp_path / "step", base, config_of(case), **case.options)
    exact = convert_checkpoint(made.directory, tmp_path / "exact")
    full = convert_checkpoint(made.directory, tmp_path / "full", rank=case.rank)
    assert (exact.rank, full.rank, full.exact_rank) == (case.rank,) * 3
    assert (exact.uniform, full.uniform, exact.energy) == (case.uniform, True, None)
    assert full.energy.least == pytest.approx(1, abs=1e-12)
    expected = logits(made.merged)
    assert (expected - logits(load_base(base))).abs().max() > 0.01
    models = [load_lora(base, done.path) for done in (exact, full)]
    for model in models:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-4, atol=1e-5)
    ranks = {layer.r["default"] for layer in adapted(models[1]).values()}
    assert (ranks, {layer.scaling["default"] for layer in adapted(models[1]).values()}) == ({case.rank}, {1.0})

    rank = 2
    done = convert_checkpoint(made.directory, tmp_path / "truncated", rank=rank)
    manifest = json.loads((done.path / "lowrank_dist.json").read_text())
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (manifest["rank"], manifest["adapter_is_for"]) == (rank, "the base")
    truncated, lost, total, kept = deltas(load_lora(base, done.path)), 0.0, 0.0, {}
    for weight, update in made.updates.items():
        stack = zip(matrices(update), matrices(truncated[weight]), strict=True)
        for expert, (dense, low) in enumerate(stack):
            square = torch.linalg.svdvals(dense).square()
            size, tail = float(square.sum()), float(square[rank:].sum())
            assert float((dense - low).norm()) == pytest.approx(math.sqrt(tail), rel=1e-5, abs=1e-6 * math.sqrt(size))
            lost, total = lost + tail, total + size
            parameter = weight if "experts" in weight else weight.removesuffix(".weight")
            kept[parameter + (f"[{expert}]" if dense is not update else "")] = 1 - tail / size
    assert done.energy.matrices == pytest.approx(kept, abs=1e-6)
    assert done.energy.overall == pytest.approx(1 - lost / total, abs=1e-6)
    assert manifest["energy_kept"] == {
        "overall": done.energy.overall,
        "least": min(done.energy.matrices.values()),
        "least_of": done.energy.least_of,
        "matrices": done.energy.matrices,
    }


@pytest.mark.parametrize("case", ["plain", "mixtral", "starts at zero"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_rounded_to_once(tmp_path: Path, case: str, rank: int | None, dtype: torch.dtype) -> None:
    """Factors with orthogonal rows and evenly split singular values, rounded to a relative eps / 2 each, change their
    product by no more than eps of its norm (and eps^2 / 4): the columns of ``dB diag(sqrt sigma)`` are at most
    ``eps / 2 sigma_i`` long. ``[A; A_0]`` and ``[B | -B_0]``, rounded, are far off. Factors of fp16 may be subnormal.
    """
    base = save_checkpoint(tmp_path / "base", CASES[case].architecture)
    made = make_checkpoint(tmp_path / "step", base, config_of(CASES[case]), change=1e-3, **CASES[case].options)
    for rounded_to in {dtype, torch.float32}:
        convert_checkpoint(made.directory, tmp_path / str(rounded_to), rank=rank, dtype=rounded_to)
    tensors, _ = read_adapter(tmp_path / str(dtype))
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    actual, reference = (deltas(load_lora(base, tmp_path / str(d))) for d in (dtype, torch.float32))
    for name in made.updates:
        for low, high in zip(matrices(actual[name]), matrices(reference[name]), strict=True):
            assert float((low - high).norm()) <= 1.1 * (torch.finfo(dtype).eps + 1e-4) * float(high.norm())


def test_rounding_the_exact_factors_would_lose_the_update(tmp_path: Path, llama: Path) -> None:
    """Why conversion to bf16 writes other factors than the exact ones: the change is 1e-3 of what it is a change of."""
    made = make_checkpoint(tmp_path / "step", llama, config_of(CASES["plain"]), change=1e-3)
    exact = convert_checkpoint(made.directory, tmp_path / "exact")
    tensors, config = read_adapter(exact.path)
    write_adapter(tmp_path / "naive", {name: t.bfloat16() for name, t in tensors.items()}, config)
    rounded = convert_checkpoint(made.directory, tmp_path / "rounded", dtype=torch.bfloat16)
    assert (rounded.rank, rounded.energy) == (8, None)
    for name, update in made.updates.items():
        naive, good = (deltas(load_lora(llama, tmp_path / d))[name] - update for d in ("naive", "rounded"))
        assert float(naive.norm()) > 0.5 * float(update.norm())
        assert float(good.norm()) < 0.01 * float(update.norm())


@pytest.mark.parametrize("rank", [None, 2])
def test_the_checkpoints_dtype_is_the_default(tmp_path: Path, llama: Path, rank: int | None) -> None:
    made = make_checkpoint(tmp_path / "step", llama, config_of(CASES["plain"]), dtype=torch.bfloat16)
    done = convert_checkpoint(made.directory, tmp_path / "lora", rank=rank)
    tensors, _ = read_adapter(done.path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_whole_modules_are_kept_as_they_are(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "mistral")
    made = make_checkpoint(tmp_path / "step", base, config_of(CASES["head"]))
    convert_checkpoint(made.directory, tmp_path / "lora", rank=1, dtype=torch.float16)
    trained, _ = read_adapter(made.directory / "adapter")
    tensors, _ = read_adapter(tmp_path / "lora")
    (head,) = (name for name in trained if "lm_head" in name)
    assert torch.equal(tensors[head], trained[head])
    assert {tensor.dtype for name, tensor in tensors.items() if name != head} == {torch.float16}


@pytest.mark.parametrize(
    ("adapter", "rank", "alternatives"),
    [
        ({"r": 4}, None, []),
        ({"r": 4}, 8, []),
        ({"r": 4}, 1, []),
        ({"r": 4}, 5, [1, 8]),
        ({"r": 12}, None, [16]),
        ({"r": 12}, 7, [1, 8]),
        ({"r": 24}, 20, [16, 32]),
        ({"r": 4, "rank_pattern": {"q_proj": 2}}, None, [8]),
        ({"r": 6, "rank_pattern": {"q_proj": 2}}, None, [8, 12]),
        ({"r": 4, "alpha_pattern": {"q_proj": 2}}, None, [8]),
        ({"r": 4, "rank_pattern": {"q_proj": 2}}, 3, [1, 8]),
    ],
)
def test_ranks_that_servers_take(
    tmp_path: Path, llama: Path, adapter: dict[str, Any], rank: int | None, alternatives: list[int]
) -> None:
    config = LoraConfig(lora_alpha=8, target_modules=["q_proj", "down_proj"], **adapter)
    made = make_checkpoint(tmp_path / "step", llama, config)
    done = convert_checkpoint(made.directory, tmp_path / "lora", rank=rank)
    assert list(done.alternatives) == alternatives
    for other, energy in done.alternatives.items():
        again = convert_checkpoint(made.directory, tmp_path / "again", rank=other, overwrite=True)
        assert energy.matrices == pytest.approx(again.energy.matrices, rel=1e-12)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_that_cannot_be_had_is_refused(tmp_path: Path, llama: Path, rank: int) -> None:
    made = make_checkpoint(tmp_path / "step", llama, config_of(CASES["plain"]))
    with pytest.raises(InputError, match=f"rank={rank}: the exact LoRA has rank 8; choose one from 1 to 8"):
        convert_checkpoint(made.directory, tmp_path / "lora", rank=rank)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step"]


def test_the_checkpoint_is_not_replaced(tmp_path: Path, llama: Path) -> None:
    made = make_checkpoint(tmp_path / "run" / "step", llama, config_of(CASES["plain"]))
    outputs = [made.directory / part for part in (".", "..", "../other/../step", "adapter", "adapter_init")]
    for output in outputs:
        with pytest.raises(InputError, match="is or contains what it would be made from"):
            convert_checkpoint(made.directory, output)
    convert_checkpoint(made.directory, made.directory / "lora", rank=1)
    assert (made.directory / "adapter").is_dir()


def test_only_a_conversion_is_replaced(tmp_path: Path, llama: Path) -> None:
    """Refused before anything is read, the second time even on request."""
    made, thesis = make_checkpoint(tmp_path / "step", llama, config_of(CASES["plain"])), tmp_path / "thesis"
    lora = convert_checkpoint(made.directory, tmp_path / "lora").path
    before = (lora / "adapter_config.json").stat().st_ino
    with pytest.raises(InputError, match="exists and is not empty; choose another directory or pass overwrite"):
        convert_checkpoint(made.directory, lora, rank=1)
    assert (lora / "adapter_config.json").stat().st_ino == before
    assert convert_checkpoint(made.directory, lora, rank=1, overwrite=True).rank == 1
    thesis.mkdir()
    (thesis / "chapter-1").touch()
    for checkpoint in (made.directory, tmp_path / "no such checkpoint"):
        with pytest.raises(InputError, match="was not written by lowrank_dist"):
            convert_checkpoint(checkpoint, thesis, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "step", "thesis"]
    assert [path.name for path in thesis.iterdir()] == ["chapter-1"]


def change_tensor(directory: Path, part: str, value: float) -> str:
    """Put `value` into the first factor whose name has `part`; returns the name."""
    tensors, config = read_adapter(directory)
    name = next(name for name in tensors if part in name)
    tensors[name][0, 0] = value
    write_adapter(directory, tensors, config)
    return name


@pytest.mark.parametrize("rank", [None, 2])
def test_diverged_and_unrepresentable_factors_are_refused(tmp_path: Path, llama: Path, rank: int | None) -> None:
    made = make_checkpoint(tmp_path / "step", llama, config_of(CASES["plain"]))
    change_tensor(made.directory / "adapter", "q_proj.lora_B", 1e12)
    with pytest.raises(InputError, match=r"lora_[AB].weight: holds .*, but the largest torch.float16 is 6.55e\+04"):
        convert_checkpoint(made.directory, tmp_path / "lora", rank=rank, dtype=torch.float16)
    name = change_tensor(made.directory / "adapter", "q_proj.lora_B", float("nan"))
    with pytest.raises(CheckpointError, match=f"{name}: holds NaN or infinity"):
        convert_checkpoint(made.directory, tmp_path / "lora", rank=rank)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step"]


def test_factors_that_do_not_go_together_are_refused(tmp_path: Path, llama: Path) -> None:
    made = make_checkpoint(tmp_path / "step", llama, config_of(CASES["plain"]))
    tensors, config = read_adapter(made.directory / "adapter")
    for name in [name for name in tensors if "lora_B" in name]:
        write_adapter(made.directory / "adapter", {n: t for n, t in tensors.items() if n != name}, config)
        with pytest.raises(CheckpointError, match=r"lora_A.weight: its 4 rows, for 1 matrices, do not match the 0"):
            convert_checkpoint(made.directory, tmp_path / "lora")
    write_adapter(made.directory / "adapter", {"base_model.model.lm_head.weight": torch.ones(2, 2)}, config)
    with pytest.raises(CheckpointError, match="holds no factors of a LoRA"):
        convert_checkpoint(made.directory, tmp_path / "lora")


def test_scalings_that_cannot_be_known(tmp_path: Path) -> None:
    """A file names neither of two parameters of one module; where the manifest does not either, patterns are moot."""
    base = save_checkpoint(tmp_path / "base", "mixtral")
    made = make_checkpoint(tmp_path / "step", base, config_of(CASES["mixtral"]), names_parameters=False)
    with pytest.raises(CheckpointError, match="does not say which factors belong to which of the parameters"):
        convert_checkpoint(made.directory, tmp_path / "lora", rank=2)
    for dtype, tolerance in ((None, 1e-4), (torch.bfloat16, 1e-2)):
        done = convert_checkpoint(made.directory, tmp_path / "lora", dtype=dtype, overwrite=True)
        assert (done.uniform, done.alternatives) == (False, {})
        model = load_lora(base, done.path)
        torch.testing.assert_close(logits(model), logits(made.merged), rtol=tolerance, atol=tolerance)
