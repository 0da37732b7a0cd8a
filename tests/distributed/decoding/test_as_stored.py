"""``quantization="as stored"``: a fit over the bytes of a quantized checkpoint is one over what they decode to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.models import save_checkpoint
from helpers.quantized import KINDS, quantize, quantize_experts, write_dense
from helpers.ranks import run_ranks
from helpers.training import ByStep, CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import FP8, INT8, MXFP4, AdapterCheckpoint, CorDA, LoRA, LoRAXS, PiSSA
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError, ModelError
from lowrank_dist.export.refit import refit_checkpoint
from lowrank_dist.forecast.job import RunSpec, parameters, planned_run
from lowrank_dist.inference.on_disk import ModelOnDisk
from lowrank_dist.initialization.open import ModelRecipe
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.storage.layout import MANIFEST

STEPS = 2
ONE_FILE: Any = {"max_shard_size": "1GB"}
#: Further formats that are kept; those of other scales and codes.
OTHERS = ("fp8-cut", "fp8-tensor", "ct-fp8-channel", "ct-fp8-block", "ct-int8-asymmetric", "ct-mxfp4", "modelopt-nvfp4")
EXPERTS = LoraConfig(
    r=4,
    lora_alpha=4,
    target_modules=["q_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    lora_dropout=0.0,
)
SOME = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Makes a quantized checkpoint of a kind, and the dense one; returns their directories."""
    root = tmp_path_factory.mktemp("stored")

    def make(kind: str) -> tuple[Path, Path]:
        quantized, dense = root / kind, root / f"{kind}-dense"
        if quantized.exists():
            return quantized, dense
        architecture = {"mxfp4": "gpt_oss", "fp8-experts": "mixtral"}.get(kind, "llama")
        # blocks of 32 that the edge cuts are decoded by us, but not by transformers
        base = root / f"base-{architecture}{'-cut' if kind == 'fp8-cut' else ''}"
        if not base.exists():
            size = {"llama": 160, "llama-cut": 144}.get(base.name.removeprefix("base-"), 64)
            dtype = torch.bfloat16 if architecture == "gpt_oss" else torch.float32
            save_checkpoint(base, architecture, num_hidden_layers=1, intermediate_size=size, dtype=dtype, **ONE_FILE)
        if kind == "mxfp4":
            decoded = quantize_experts(base, quantized)
        else:
            encoding = KINDS["fp8-blocks" if kind in ("fp8-experts", "fp8-cut") else kind]
            decoded = quantize(base, quantized, encoding, is_quantized=is_linear)
        write_dense(quantized, dense, decoded)
        return quantized, dense

    return make


def is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


class Recorded(CausalLM):
    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def options_of(kind: str) -> dict[str, Any]:
    return {"adapter": EXPERTS if kind == "mxfp4" else SOME, "init": LoRA()}


def trained(pretrained: Path, output: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    module, strategy = Recorded(pretrained), make_strategy(pretrained, **options)
    callbacks = (
        [] if output is None else [AdapterCheckpoint(output, every_n_train_steps=1, save_top_k=-1, filename="{step}")]
    )
    trainer = make_trainer(strategy, steps=STEPS, callbacks=callbacks, enable_checkpointing=bool(callbacks))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, STEPS))
    trainer.validate(module, loader(0, 1, 1), verbose=False)
    report = strategy.init_report
    assert report is not None
    return {
        "losses": module.losses,
        "logits": module.logits,
        "held": report.residual_bytes_per_rank,
        "errors": {matrix.name: matrix.error / matrix.norm for matrix in report.matrices if matrix.error is not None},
        "read": report.bytes_read / report.checkpoint_bytes,
    }


def compared(pairs: dict[str, tuple[Path, Path, Path | None, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            trained(quantized, output, {**options, "quantization": "as stored"}),
            trained(dense, None, {**options, "quantization": None}),
        ]
        for name, (quantized, dense, output, options) in pairs.items()
    }


def planned_bytes(quantized: Path, ranks: int, options: dict[str, Any]) -> int:
    recipe = ModelRecipe(pretrained=str(quantized), quantization="as stored", **options)
    opened = recipe.open(
        build_skeleton(quantized),
        ShardGroup.single(),
        compute_dtype=torch.float32,
        sharding=Sharding(),
        announce=lambda _: None,
        resume=None,
    )
    shapes, job = planned_run(opened, RunSpec(nodes=1, gpus_per_node=ranks, compute_dtype=torch.float32))
    opened.close()
    return sum(p.shard_bytes for p in parameters(shapes, job) if p.kind in ("codes", "maxima", "dense"))


def refusals(pretrained: dict[str, Path]) -> dict[str, str]:
    found = {}
    for kind, directory in pretrained.items():
        with pytest.raises(CheckpointError) as caught:
            trained(directory, None, {**options_of(kind), "quantization": "as stored"})
        found[kind] = str(caught.value)
    return found


def test_scales_that_are_no_number_are_refused_on_every_rank(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """In fp32, and as exponents in bytes, of which the last is NaN; each in the part of one rank."""
    damaged, names = {}, {}
    for kind in ("fp8-blocks", "mxfp4"):
        damaged[kind] = shutil.copytree(made(kind)[0], tmp_path / kind)
        (file,) = damaged[kind].glob("*.safetensors")
        tensors = load_file(file)
        names[kind] = next(name for name in tensors if name.endswith(("o_proj.weight_scale_inv", "down_proj_scales")))
        tensors[names[kind]].view(-1)[-1] = 255 if kind == "mxfp4" else float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    for said in run_ranks(2, refusals, damaged):
        for kind, name in names.items():
            assert f"{name}: holds a NaN or infinity" in said[kind]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_losses_are_those_of_the_decoded_weights(
    ranks: int, made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """In fp32, to the rounding of sums. `lora/` on stock transformers, which decodes with its own code, has the logits;
    ranks hold what `plan` says.
    """
    kinds = ("fp8-blocks", "mxfp4")
    pairs = {kind: (*made(kind), tmp_path / kind, options_of(kind)) for kind in kinds}
    for kind, (stored, dense) in run_ranks(ranks, compared, pairs)[0].items():
        assert stored["losses"] == pytest.approx(dense["losses"], rel=1e-6), kind
        assert stored["held"] == planned_bytes(made(kind)[0], ranks, options_of(kind))
        assert stored["held"] < dense["held"]
        assert 1 <= stored["read"] < 1.05
        if ranks == 2:
            checkpoint = tmp_path / kind / f"step={STEPS}"
            manifest = json.loads((checkpoint / MANIFEST).read_text())
            assert manifest["quantization"] == "as stored"
            model = AutoModelForCausalLM.from_pretrained(made(kind)[0], dtype=torch.float32)
            (ids,) = loader(0, 1, 1).dataset.tensors
            with torch.no_grad():
                logits = PeftModel.from_pretrained(model, checkpoint / "lora").eval()(input_ids=ids).logits
            torch.testing.assert_close(logits, stored["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.matrix
def test_other_formats(made: Callable[[str], tuple[Path, Path]]) -> None:
    """And a tuner of PEFT, and experts that are stored one by one, which transformers joins."""
    pairs = {kind: (*made(kind), None, options_of(kind)) for kind in OTHERS}
    tuner = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    pairs["tuner"] = (*made("fp8-blocks"), None, {"adapter": tuner, "init": None})
    pairs["core"] = (*made("fp8-blocks"), None, {"adapter": SOME, "init": LoRAXS()})  # of the decoded weights
    pairs["fp8-experts"] = (*made("fp8-experts"), None, {"adapter": EXPERTS, "init": LoRA()})
    for kind, (stored, dense) in run_ranks(2, compared, pairs)[0].items():
        assert stored["losses"] == pytest.approx(dense["losses"], rel=1e-6), kind
        assert stored["held"] < dense["held"]


def with_formats(pairs: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {name: trained(quantized, None, options) for name, (quantized, options) in pairs.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_residuals_of_pissa_are_encoded_again_in_the_same_kind(
    ranks: int, made: Callable[[str], tuple[Path, Path]]
) -> None:
    """As with that residual format, but layers without an adapter stay as they are stored."""
    experts = LoraConfig(r=4, lora_alpha=4, target_modules=[], target_parameters=EXPERTS.target_parameters)
    dora = LoraConfig(r=4, lora_alpha=4, target_modules=SOME.target_modules, use_dora=True)
    cases = {
        "FP8": ("fp8-blocks", SOME, FP8()),
        "FP8, DoRA": ("fp8-blocks", dora, FP8()),
        "MXFP4": ("mxfp4", experts, MXFP4()),
        "INT8": ("ct-int8", SOME, INT8()),
    }
    pairs = {}
    for case, (kind, adapter, same) in cases.items():
        for name, quantization in ((f"{case} as stored", "as stored"), (case, same)):
            pairs[name] = (made(kind)[0], {"adapter": adapter, "init": PiSSA(), "quantization": quantization})
    found = run_ranks(ranks, with_formats, pairs)[0]
    for case in cases:
        stored, encoded = found[f"{case} as stored"], found[case]
        assert stored["losses"] == pytest.approx(encoded["losses"], rel=1e-6), case
        lost = {name: error for name, error in stored["errors"].items() if error > 0}
        assert lost == pytest.approx(encoded["errors"], rel=1e-5), case
        assert max(lost.values()) < 0.2
        quantized, options = pairs[case]
        options = {name: value for name, value in options.items() if name != "quantization"}
        assert stored["held"] == planned_bytes(quantized, ranks, options)
    assert found["FP8 as stored"]["held"] > found["FP8"]["held"]  # the other layers are there too


def test_pissa_over_a_mixture_of_stored_kinds(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Experts in MXFP4 and attention that is stored dense: resumed, opened, refitted to the original."""
    quantized, options = made("mxfp4")[0], {"adapter": EXPERTS, "init": PiSSA(), "quantization": "as stored"}
    whole = run_ranks(2, trained, quantized, tmp_path / "out", options)[0]
    assert {name: error < 1e-6 for name, error in whole["errors"].items()} == {
        name: "experts" not in name for name in whole["errors"]
    }
    checkpoint = tmp_path / "out" / f"step={STEPS}"
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest["quantization"] == "as stored, residuals in MXFP4()"
    assert manifest["residual"] == {"format": "as stored", "dtype": "float32"}
    kind, logits = run_ranks(3, opened, checkpoint)[0]
    assert "its frozen base as stored, residuals in MXFP4()" in kind
    torch.testing.assert_close(logits, whole["logits"], rtol=1e-4, atol=1e-4)
    refitted = refit_checkpoint(checkpoint, tmp_path / "refit", rank=4, base="original")
    for left in refitted.leftovers:  # only experts have lost anything, some of which the fit gives back
        assert (left.before > 1e-3 * left.norm) == ("experts" in left.name)
        assert left.after < left.before or "experts" not in left.name
    (resumed_loss,) = run_ranks(3, resumed, quantized, None, tmp_path / "out" / "step=1", options)[0]
    assert resumed_loss == pytest.approx(whole["losses"][1], rel=1e-5)


def resumed(quantized: Path, output: Path | None, checkpoint: Path | None, options: dict[str, Any]) -> list[float]:
    module, strategy = ByStep(quantized), make_strategy(quantized, **{"quantization": "as stored", **options})
    callbacks = [AdapterCheckpoint(output, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if output else []
    trainer = make_trainer(strategy, steps=2, callbacks=callbacks, enable_checkpointing=bool(callbacks))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 2), ckpt_path=checkpoint)
    return module.losses


def test_a_run_resumes_on_other_ranks(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    quantized, options = made("mxfp4")[0], options_of("mxfp4")
    whole = run_ranks(2, resumed, quantized, tmp_path, None, options)[0]
    found = run_ranks(3, resumed, quantized, None, tmp_path / "step=1", options)[0]
    assert found == pytest.approx(whole[1:], rel=1e-5)


def opened(checkpoint: Path) -> tuple[str, torch.Tensor]:
    found = ModelOnDisk(checkpoint)
    with found.loaded(ShardGroup()) as model:
        logits = model(loader(0, 1, 1).dataset.tensors[0]).logits
    found.close()
    return found.kind, logits


@pytest.mark.matrix
def test_what_goes_with_it(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """DoRA, a LoRA to go on from, only what is adapted kept; a checkpoint that answers, and one that is refitted."""
    quantized, dense = made("fp8-blocks")
    first = run_ranks(2, compared, {"first": (quantized, dense, tmp_path / "out", options_of("fp8-blocks"))})[0]
    checkpoint = tmp_path / "out" / f"step={STEPS}"
    dora = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"], use_dora=True)
    pairs = {
        "dora": (quantized, dense, None, {"adapter": dora, "init": LoRA()}),
        "further": (quantized, dense, None, {"adapter": checkpoint / "lora", "init": None}),
        "adapted": (quantized, dense, None, {**options_of("fp8-blocks"), "encode": "adapted"}),
    }
    found = run_ranks(2, compared, pairs)[0]
    for kind, (stored, of_dense) in found.items():
        assert stored["losses"] == pytest.approx(of_dense["losses"], rel=1e-6), kind
    assert found["adapted"][0]["held"] < first["first"][0]["held"]  # the others are no residuals
    kind, logits = run_ranks(3, opened, checkpoint)[0]
    assert "its frozen base as stored" in kind
    torch.testing.assert_close(logits, first["first"][0]["logits"], rtol=1e-4, atol=1e-4)
    refitted = refit_checkpoint(checkpoint, tmp_path / "refit", rank=4, base="original")
    assert all(leftover.after < 1e-4 * leftover.norm for leftover in refitted.leftovers)


def test_what_cannot_be_kept_is_refused(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Before weights are read, by name."""
    quantized, dense = made("fp8-blocks")
    with pytest.raises(InputError, match="init=CorDA.* looks at data with the whole model before anything is encoded"):
        make_strategy(quantized, quantization="as stored", init=CorDA())
    with pytest.raises(InputError, match="has a format for every matrix, which no residual model in init_cache"):
        make_strategy(quantized, quantization="as stored", init=LoRA(), init_cache=tmp_path)
    with pytest.raises(ValueError, match="quantization='nf4' is neither a format nor 'as stored'"):
        make_strategy(quantized, quantization="nf4", init=LoRA())
    with pytest.raises(InputError, match=r"_proj\S* is stored dense: PiSSA: quantization_iterations=5 alternates"):
        experts = {"adapter": EXPERTS, "init": PiSSA(quantization_iterations=5)}
        planned_bytes(made("mxfp4")[0], 1, experts)
    with pytest.raises(ModelError, match="and no residual format is of the same kind to encode its residual again"):
        planned_bytes(made("modelopt-nvfp4")[0], 1, {"adapter": SOME, "init": PiSSA()})
    with pytest.raises(ModelError, match="is not quantized; leave quantization out"):
        planned_bytes(dense, 1, options_of("fp8-blocks"))
    with pytest.raises(ModelError, match=r"q_proj.weight cannot be kept: GPTQ .* is decoded while it is read"):
        planned_bytes(made("gptq-4-act-order")[0], 1, options_of("gptq"))
