"""What this project writes, opened by stock libraries in a process that cannot import this project.

The other way round, models that others publish are opened here in `test_decompose.py` and adapters that PEFT wrote are
merged in `tests/unit/export/test_merge.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.command import lowrank_dist
from helpers.models import save_checkpoint
from helpers.ranks import run_ranks
from helpers.training import CausalLM, loader, make_trainer
from lowrank_dist import AdapterCheckpoint, PiSSAStrategy, cli

STEPS = 4

# isolated: neither PYTHONPATH nor the working directory; an installed lowrank_dist is kept out
STOCK = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lowrank_dist":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
try:
    import lowrank_dist
except ImportError:
    pass
else:
    raise SystemExit("lowrank_dist can be imported")

import bitsandbytes.nn.modules
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # as in conftest.py
jobs, ids, output = json.loads(sys.argv[1]), load_file(sys.argv[2])["ids"], sys.argv[3]
logits = {}
for name, (base, adapter) in jobs.items():
    model, found = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, found)
    if adapter:
        with safe_open(adapter + "/adapter_model.safetensors", framework="pt") as file:
            assert file.metadata()["format"] == "pt"
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits[name] = model.eval()(input_ids=ids).logits.contiguous()
assert not [name for name in sys.modules if name.partition(".")[0] == "lowrank_dist"]
save_file(logits, output)
"""


def in_stock_libraries(jobs: dict[str, tuple[Path, Path | None]], directory: Path) -> dict[str, Tensor]:
    """Logits of every model, or model and adapter, on the batch of `loader(0, 1, 1)`."""
    (ids,) = loader(0, 1, 1).dataset.tensors
    save_file({"ids": ids.contiguous()}, directory / "ids.safetensors")
    named = {name: [str(base), adapter and str(adapter)] for name, (base, adapter) in jobs.items()}
    arguments = [json.dumps(named), str(directory / "ids.safetensors"), str(directory / "logits.safetensors")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, *arguments], cwd=directory, capture_output=True, text=True, timeout=480
    )
    assert done.returncode == 0, done.stderr
    return load_file(directory / "logits.safetensors")


class Recorded(CausalLM):
    """Keeps the logits of the last validation batch."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def train(decomposed: Path, output: Path) -> tuple[Tensor, Tensor]:
    """Start from a residual model; logits at step 0 and after training."""
    before = Recorded(decomposed)
    trainer = make_trainer(PiSSAStrategy(decomposed, show_progress=False))
    trainer.validate(before, loader(0, 1, 1), verbose=False)
    module = Recorded(decomposed)
    callback = AdapterCheckpoint(dirpath=output, filename="checkpoint", every_n_train_steps=STEPS)
    strategy = PiSSAStrategy(decomposed, show_progress=False)
    trainer = make_trainer(strategy, steps=STEPS, callbacks=[callback], enable_checkpointing=True)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, STEPS), loader(0, 1, 1))
    return before.logits, module.logits


@dataclass(frozen=True)
class Written:
    """A model, everything that is written of it, and the logits of the strategy at step 0 and at the end."""

    base: Path
    decomposed: Path
    checkpoint: Path
    merged: Path
    first: Tensor
    last: Tensor


MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}, ["--method", "pissa"]),
    "gpt2": ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, ["--method", "pissa"]),
    "llama nf4": ("llama", {}, ["--method", "qpissa", "--nf4.double_quant", "true"]),
}


def write(name: str, directory: Path) -> Written:
    """Decompose, train and merge a tiny model in `directory`."""
    architecture, changes, method = MODELS[name]
    base, decomposed = save_checkpoint(directory / "base", architecture, **changes), directory / "decomposed"
    options = ["decompose", "--pretrained", str(base), "--output", str(decomposed), "--rank", "4", *method]
    done = lowrank_dist(*options)
    assert done.returncode == 0, done.stderr
    first, last = run_ranks(2, train, decomposed, directory)[0]
    checkpoint, merged = directory / "checkpoint", directory / "merged"
    assert cli.main(["merge", str(checkpoint), "--output", str(merged), "--max-shard-size", "0.0001"]) == 0
    return Written(base, decomposed, checkpoint, merged, first, last)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """All models by name."""
    return {name: write(name, tmp_path_factory.mktemp("written")) for name in MODELS}


@pytest.fixture(scope="module")
def opened(every: dict[str, Written], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Logits that one stock process finds, by model and what it opened of it."""
    jobs: dict[str, tuple[Path, Path | None]] = {}
    for name, written in every.items():
        (initial,) = written.decomposed.glob("*_init")
        of_model: dict[str, tuple[Path, Path | None]] = {
            "base": (written.base, None),
            "decomposed": (written.decomposed, initial),
            "residual": (written.decomposed, None),
            "adapter": (written.decomposed, written.checkpoint / "adapter"),
            "lora": (written.base, written.checkpoint / "lora"),
            "merged": (written.merged, None),
        }
        jobs |= {f"{name}: {what}": paths for what, paths in of_model.items()}
    return in_stock_libraries(jobs, tmp_path_factory.mktemp("opened"))


@pytest.mark.parametrize("name", MODELS)
def test_everything_opens_without_this_project(every: dict[str, Written], opened: dict[str, Tensor], name: str) -> None:
    """fp32; the sums of a step are in another order, and 4-bit weights are decoded by the same bitsandbytes.

    On the residual the adapter is the trained model, quantized or not. On the original model the LoRA is the trained
    model up to what quantization left over, and the merged model is the LoRA.
    """
    written = every[name]
    found = {what.removeprefix(f"{name}: "): logits for what, logits in opened.items() if what.startswith(f"{name}: ")}
    torch.testing.assert_close(found["decomposed"], written.first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["adapter"], written.last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["merged"], found["lora"], rtol=1e-4, atol=1e-4)
    quantized = "quantization_config" in json.loads((written.decomposed / "config.json").read_text())
    if quantized:
        left_over = (written.first - found["base"]).abs().mean()
        assert 0 < (written.last - found["lora"]).abs().mean() < 2 * left_over
    else:
        torch.testing.assert_close(found["decomposed"], found["base"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["lora"], written.last, rtol=1e-4, atol=1e-4)
    trained = (written.last - written.first).abs().max()
    assert trained > 0.01
    assert (found["residual"] - written.first).abs().max() > 0.01  # without its adapter it is another model


@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_weights_json_and_what_the_base_had(every: dict[str, Written], name: str) -> None:
    """No pickle and no code; only manifests and training state name this project, and nothing stock reads them."""
    written = every[name]
    for directory in (written.decomposed, written.checkpoint, written.merged):
        for file in (path for path in directory.rglob("*") if path.is_file()):
            assert file.suffix in (".safetensors", ".json", ".md"), file
            if file.suffix == ".json" and file.name not in ("lowrank_dist.json", "state.json"):
                text = file.read_text()
                assert "lowrank_dist" not in text
                assert 'auto_map"' not in text
