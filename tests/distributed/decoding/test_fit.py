"""A fit from a quantized checkpoint is the fit from the dense one that the owner's decoder makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from helpers.models import save_checkpoint
from helpers.quantized import (
    BITSANDBYTES,
    KINDS,
    quantize,
    quantize_experts,
    quantize_with_bitsandbytes,
    set_config,
    write_dense,
    write_gguf,
)
from helpers.ranks import RankFailedError, run_ranks, run_ranks_catching
from helpers.training import ByStep, CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import AdapterCheckpoint, Calibration, CorDA, Method, PiSSA
from lowrank_dist.storage.layout import MANIFEST

STEPS = 2
ONE_FILE: Any = {"max_shard_size": "1GB"}
#: Formats that every number of ranks is tried with.
EVERYWHERE = ("fp8-blocks", "bnb-nf4-nested", "mxfp4", "gptq-4-act-order")
#: Further ones that two ranks are tried with in CI; the others are in the matrix.
TWO_RANKS = (*EVERYWHERE, "bnb-int8", "awq", "modelopt-nvfp4", "ct-fp8-block", "ct-packed-int4-asymmetric")
#: What stock transformers loads on a CPU.
STOCK = ("fp8-blocks", "bnb-nf4-nested", "bnb-int8", "mxfp4", "ct-fp8-channel-fp32", "ct-packed-int4-fp32")
#: What it loads with packages alone that are not here; its place is taken by the dense weights.
DENSE = ("gptq-4-act-order", "awq", "ct-nvfp4")
EXPERTS = LoraConfig(
    r=4,
    lora_alpha=4,
    target_modules=["q_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    lora_dropout=0.0,
)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Makes a quantized checkpoint of a kind, and the dense one; returns their directories."""
    root = tmp_path_factory.mktemp("quantized")
    models: dict[str, Path] = {}

    def base(architecture: str, dtype: torch.dtype) -> Path:
        name = f"{architecture}-{dtype}"
        if name not in models:
            size: dict[str, Any] = {"intermediate_size": 64 if architecture == "gpt_oss" else 192}
            models[name] = save_checkpoint(
                root / name, architecture, dtype=dtype, num_hidden_layers=1, **size, **ONE_FILE
            )
        return models[name]

    def make(kind: str) -> tuple[Path, Path]:
        quantized, dense = root / kind, root / f"{kind}-dense"
        if quantized.exists():
            return quantized, dense
        if kind == "mxfp4":
            decoded = quantize_experts(base("gpt_oss", torch.bfloat16), quantized)
        elif kind in BITSANDBYTES:
            decoded = quantize_with_bitsandbytes(base("llama", torch.float32), quantized, kind, torch.float32)
        else:
            decoded = quantize(base("llama", torch.float32), quantized, KINDS[kind], is_quantized=is_linear)
        write_dense(quantized, dense, decoded)
        return quantized, dense

    return make


class Recorded(CausalLM):
    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def trained(pretrained: Path, output: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Losses, what was read, and the logits of the first batch at the end."""
    module = Recorded(pretrained.with_suffix("") if pretrained.suffix == ".gguf" else pretrained)
    strategy = make_strategy(pretrained, ranks_per_matrix=1, **options)
    callbacks = [] if output is None else [AdapterCheckpoint(output, filename="end", every_n_train_steps=STEPS)]
    trainer = make_trainer(strategy, steps=STEPS, callbacks=callbacks, enable_checkpointing=bool(callbacks))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, STEPS))
    trainer.validate(module, loader(0, 1, 1), verbose=False)
    report = strategy.init_report
    assert report is not None
    return {
        "losses": module.losses,
        "logits": module.logits,
        "read": report.bytes_read,
        "stored": report.checkpoint_bytes,
    }


def compared(pairs: dict[str, tuple[Path, Path, Path | None, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [trained(quantized, output, options), trained(dense, None, options)]
        for name, (quantized, dense, output, options) in pairs.items()
    }


def options_of(kind: str) -> dict[str, Any]:
    return {"adapter": EXPERTS, "init": PiSSA()} if kind == "mxfp4" else {"init": PiSSA()}


def check(found: dict[str, list[dict[str, Any]]], ranks: int) -> None:
    for kind, (quantized, dense) in found.items():
        assert quantized["losses"] == pytest.approx(dense["losses"], rel=1e-6), kind
        assert quantized["stored"] < dense["stored"], kind
        # scales of blocks and words of codes at the bounds of ranks, code books and orders are read by each of them
        assert quantized["stored"] <= quantized["read"] <= quantized["stored"] * (1 if ranks == 1 else 1.15), kind


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_losses_are_those_of_the_dense_weights(ranks: int, made: Callable[[str], tuple[Path, Path]]) -> None:
    kinds = TWO_RANKS if ranks == 2 else EVERYWHERE
    check(run_ranks(ranks, compared, {kind: (*made(kind), None, options_of(kind)) for kind in kinds})[0], ranks)


def test_a_gguf_file(tmp_path: Path) -> None:
    """Like the checkpoint that transformers makes of it, whose configuration the module takes."""
    base = save_checkpoint(tmp_path / "base", hidden_size=256, intermediate_size=512, num_hidden_layers=1, **ONE_FILE)
    write_gguf(base, tmp_path / "model.gguf", ["Q4_K", "Q6_K", "Q8_0", "F16"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    shutil.copytree(base, tmp_path / "model")
    model.config.save_pretrained(tmp_path / "model")
    set_config(tmp_path / "model", quantization_config=None)
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    pairs = {"gguf": (tmp_path / "model.gguf", tmp_path / "model", tmp_path / "out", {"init": PiSSA()})}
    check(run_ranks(2, compared, pairs)[0], 2)
    manifest = json.loads((tmp_path / "out" / "end" / MANIFEST).read_text())
    assert manifest["decoded_from"] == "GGUF F16, Q4_K, Q6_K, Q8_0"


def cached(quantized: Path, cache: Path, output: Path) -> list[dict[str, Any]]:
    """A run that writes the cache, one that reads it, and one of the cached residual model itself."""
    options: dict[str, Any] = {"init": PiSSA(), "init_cache": cache}
    runs = [trained(quantized, output, options), trained(quantized, None, options)]
    (residual,) = (path for path in cache.iterdir() if path.is_dir())
    return [*runs, trained(residual, None, {"init": None, "adapter": None, "quantization": None})]


def test_a_cache_keeps_what_was_decoded(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    quantized, _ = made("fp8-blocks")
    first, second, third = run_ranks(2, cached, quantized, tmp_path / "cache", tmp_path / "out")[0]
    assert first["losses"] == second["losses"] == third["losses"]
    (residual,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    for manifest in (residual / MANIFEST, tmp_path / "out" / "end" / MANIFEST):
        assert json.loads(manifest.read_text())["decoded_from"] == "FP8 with block scales of 32 x 32"
    assert json.loads((residual / "config.json").read_text())["quantization_config"]["load_in_4bit"]


def loss_of(backbone: Any, batch: list[Tensor]) -> Tensor:
    return backbone(input_ids=batch[0], labels=batch[0], use_cache=False).loss


def resumed(quantized: Path, output: Path | None, checkpoint: Path | None, init: Method) -> list[float]:
    module = ByStep(quantized)
    options = (
        {"ranks_per_matrix": 1} if init.statistic is None else {"calibration": Calibration(batches=1, step=loss_of)}
    )
    strategy = make_strategy(quantized, init=init, **options)
    callbacks = [AdapterCheckpoint(output, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if output else []
    trainer = make_trainer(strategy, steps=2, callbacks=callbacks, enable_checkpointing=bool(callbacks))
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 2), ckpt_path=checkpoint)
    return module.losses


@pytest.mark.parametrize("init", [PiSSA(), CorDA()], ids=["pissa", "corda"])
def test_a_run_resumes_on_other_ranks(init: Method, made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Its residual is formed again from the quantized weights, and those must be the same."""
    quantized, dense = made("gptq-4-act-order")
    whole = run_ranks(2, resumed, quantized, tmp_path, None, init)[0]
    assert whole == pytest.approx(run_ranks(2, resumed, dense, None, None, init)[0], rel=1e-6)
    (checkpoint,) = tmp_path.glob("step=1")
    assert run_ranks(1, resumed, quantized, None, checkpoint, init)[0] == pytest.approx(whole[1:], rel=1e-4)
    with pytest.raises(RankFailedError, match="the pretrained weights have changed"):
        run_ranks(1, resumed, dense, None, checkpoint, init)


def test_an_error_while_decoding_reaches_every_rank(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Groups that do not exist are found when they are read; no rank waits for another."""
    quantized, _ = made("gptq-4-act-order")
    shutil.copytree(quantized, tmp_path / "damaged")
    tensors = load_file(quantized / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"].fill_(9)
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    outcomes = run_ranks_catching(2, trained, tmp_path / "damaged", None, {"init": PiSSA()})
    assert all(error is not None and "names groups 9 to 9, but there are 2" in error for _, error in outcomes)


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_format_on_ranks(ranks: int, made: Callable[[str], tuple[Path, Path]]) -> None:
    kinds = (*KINDS, *BITSANDBYTES)
    check(run_ranks(ranks, compared, {kind: (*made(kind), None, options_of(kind)) for kind in kinds})[0], ranks)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("kind", [*STOCK, *DENSE])
def test_the_lora_is_for_the_quantized_original(
    kind: str, made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Stock PEFT on stock transformers, which decodes with its own code, has the logits of the trained model.

    LLM.int8 rounds activations to 8 bits as well, which moves logits by up to 1 %. The sizes are multiples of 64:
    bitsandbytes 0.50 decodes others wrongly with AVX-512.
    """
    quantized, dense = made(kind)
    options: dict[str, Any] = {**options_of(kind), "quantization": None}
    found = run_ranks(2, trained, quantized, tmp_path, options)[0]
    lora = tmp_path / "end" / "lora"
    manifest = json.loads((tmp_path / "end" / MANIFEST).read_text())
    assert manifest["decoded_from"].startswith(("FP8", "MXFP4", "GPTQ", "AWQ", "bitsandbytes", "compressed-tensors"))
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(quantized)
    how: dict[str, Any] = {"dtype": torch.float32}
    if kind in STOCK and kind.startswith("ct-"):
        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(dense if kind in DENSE else quantized, **how), lora
    )
    (ids,) = loader(0, 1, 1).dataset.tensors
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    tolerance = 2e-2 if kind == "bnb-int8" else 1e-4
    torch.testing.assert_close(logits.float(), found["logits"], rtol=tolerance, atol=tolerance)
