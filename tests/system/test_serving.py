"""Converted LoRAs in the loaders of servers, on the CPU: ``make test-serving`` makes their environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.checkpoints import Made, load_lora, make_checkpoint
from helpers.models import save_checkpoint
from lowrank_dist.demo.assets import fetch_model
from lowrank_dist.export.convert import convert_checkpoint
from lowrank_dist.export.serving import objections

#: Interpreter with vLLM, SGLang and llama.cpp's server, and the directory with llama.cpp's converters.
PYTHON, LLAMA_CPP = os.environ.get("LOWRANK_DIST_SERVING"), os.environ.get("LOWRANK_DIST_LLAMA_CPP", "")
HELPERS, CACHE = (Path(__file__).parents[1] / "helpers", Path(__file__).parents[2] / ".cache" / "serving")
#: What vLLM puts a LoRA around in a LLaMA or Mixtral.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODULES = ",".join([*LINEARS, "embed_tokens", "lm_head", "experts", "experts.base_layer"])
REFUSED = 3

pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs an environment with servers: make test-serving")


def asked(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert PYTHON is not None
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [PYTHON, HELPERS / program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


def loaded(done: subprocess.CompletedProcess[str], output: Path) -> dict[str, Tensor] | str:
    """The factors by the name of the layer, with the scaling in B; or the error of the loader."""
    if done.returncode == REFUSED:
        return done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


def served(lora: Path, output: Path, max_rank: int = 512) -> dict[str, Tensor] | str:
    """What vLLM makes of a LoRA."""
    return loaded(asked("vllm_loader.py", lora, str(max_rank), MODULES, output), output)


def converted(tmp_path: Path, config: LoraConfig, *, architecture: str = "llama", **options: Any) -> tuple[Path, Made]:
    base = save_checkpoint(tmp_path / "base", architecture)
    made = make_checkpoint(tmp_path / "step", base, config)
    return convert_checkpoint(made.directory, tmp_path / "lora", **options).path, made


SHAPES: dict[str, dict[str, Any]] = {
    "one rank": {},
    "rsLoRA": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}
RANKS: dict[str, Any] = {"rank_pattern": {"q_proj": 2}}
SCALINGS: dict[str, Any] = {"alpha_pattern": {"layers.0.mlp.up_proj": 3}}


# -- vLLM --


@pytest.mark.parametrize("shape", [*SHAPES.values(), {**RANKS, **SCALINGS}], ids=str)
def test_vllm_serves_the_exact_update(shape: dict[str, Any], tmp_path: Path) -> None:
    lora, made = converted(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **shape))
    found = served(lora, tmp_path / "found.safetensors")
    assert isinstance(found, dict)
    assert bool(objections(lora)) == bool(shape.get("alpha_pattern"))  # other servers'
    assert {name.rpartition(".")[0] for name in found} == {name.removesuffix(".weight") for name in made.updates}
    for name, update in made.updates.items():
        layer = name.removesuffix(".weight")
        torch.testing.assert_close(found[f"{layer}.b"] @ found[f"{layer}.a"], update.float(), rtol=0, atol=1e-6)


def test_vllm_serves_a_lower_rank(tmp_path: Path) -> None:
    lora, made = converted(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **RANKS), rank=8)
    found = served(lora, tmp_path / "found.safetensors", max_rank=8)
    assert isinstance(found, dict)
    for name, update in made.updates.items():  # of rank 8 at most
        layer = name.removesuffix(".weight")
        assert found[f"{layer}.a"].shape[0] == 8
        torch.testing.assert_close(found[f"{layer}.b"] @ found[f"{layer}.a"], update.float(), rtol=0, atol=1e-5)


def test_vllm_refuses_ranks_above_its_limit(tmp_path: Path) -> None:
    lora, _ = converted(tmp_path, LoraConfig(r=10, target_modules=LINEARS))
    assert "LoRA rank 20 is greater than max_lora_rank 16" in served(lora, tmp_path / "found.safetensors", 16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, "vLLM only supports modules_to_save being either None or"),
        ({"use_dora": True}, "vLLM does not yet support DoRA."),
    ],
)
def test_vllm_refuses_what_it_is_said_to(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    lora, _ = converted(tmp_path, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    assert says in served(lora, tmp_path / "found.safetensors")
    (line,) = objections(lora)
    assert "vLLM" in line


@pytest.mark.parametrize("saved", [["score"], []])
def test_vllm_takes_a_head_for_classification_if_it_is_named(saved: list[str], tmp_path: Path) -> None:
    lora, made = converted(tmp_path, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    file, head = lora / "adapter_model.safetensors", torch.ones(2, 64)
    save_file({**load_file(file), "base_model.model.score.weight": head}, file)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": saved}))
    found = served(lora, tmp_path / "found.safetensors")
    (line,) = objections(lora)
    assert ("vLLM refuses" in line) == isinstance(found, str) == (not saved)
    if not isinstance(found, str):
        torch.testing.assert_close(found["score.whole"], head)
        assert len(found) == 2 * len(made.updates) + 1


def test_vllm_takes_embeddings_where_the_model_declares_them(tmp_path: Path) -> None:
    lora, _ = converted(tmp_path, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "embed_tokens"]))
    found = served(lora, tmp_path / "found.safetensors")
    assert isinstance(found, dict)
    assert {"model.embed_tokens.a", "model.embed_tokens.b"} <= found.keys()
    (line,) = objections(lora)
    assert line.startswith("It adapts the embedding model.embed_tokens, which vLLM takes for models that declare it")


def test_vllm_reads_experts_in_one_tensor(tmp_path: Path) -> None:
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=stacks)
    lora, _ = converted(tmp_path, config, architecture="mixtral")
    found = served(lora, tmp_path / "found.safetensors")
    assert isinstance(found, dict), found
    assert {name for name in found if ".experts" in name}
    (line,) = objections(lora)
    assert line.startswith("It adapts experts in one tensor")


# -- SGLang --

#: What SGLang stacks, in order.
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def by_sglang(tmp_path: Path, lora: Path) -> dict[str, Tensor] | str:
    output = tmp_path / "sglang.safetensors"
    return loaded(asked("sglang_loader.py", lora, tmp_path / "base", output), output)


def update_of(found: dict[str, Tensor], name: str, rank: int, made: Made) -> Tensor:
    """What SGLang adds to a weight, of a layer that it may have stacked."""
    layer, _, leaf = name.removesuffix(".weight").rpartition(".")
    for stack, parts in STACKED.items():
        if leaf in parts:
            place = parts.index(leaf)
            rows = [len(made.updates[f"{layer}.{part}.weight"]) for part in parts]
            a = found[f"{layer}.{stack}.a"].split(rank)[place]
            return found[f"{layer}.{stack}.b"].split(rows)[place] @ a
    return found[f"{layer}.{leaf}.b"] @ found[f"{layer}.{leaf}.a"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_sglang_serves_the_exact_update(shape: dict[str, Any], tmp_path: Path) -> None:
    lora, made = converted(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **shape))
    found = by_sglang(tmp_path, lora)
    assert isinstance(found, dict), found
    assert objections(lora) == []
    for name, update in made.updates.items():
        torch.testing.assert_close(update_of(found, name, 8, made), update.float(), rtol=0, atol=1e-6)


def test_sglang_serves_other_scalings_wrongly_and_one_rank_rightly(tmp_path: Path) -> None:
    lora, made = converted(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **SCALINGS))
    found, name = by_sglang(tmp_path, lora), "model.layers.0.mlp.up_proj.weight"
    assert isinstance(found, dict), found
    torch.testing.assert_close(update_of(found, name, 8, made), made.updates[name].float() * 8 / 3, rtol=0, atol=1e-6)
    (line,) = objections(lora)
    assert "SGLang and llama.cpp do not look, and serve a wrong update without a word" in line
    again = convert_checkpoint(made.directory, tmp_path / "one", rank=8).path
    found = by_sglang(tmp_path, again)
    assert isinstance(found, dict), found
    assert objections(again) == []
    torch.testing.assert_close(update_of(found, name, 8, made), made.updates[name].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": LINEARS, **RANKS}, "Sizes of tensors must match"),
        ({"target_modules": r".*\.[qv]_proj"}, "can be used as the string for target module"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight"),
    ],
)
def test_sglang_refuses_what_it_is_said_to(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    lora, _ = converted(tmp_path, LoraConfig(r=4, lora_alpha=8, **options))
    found = by_sglang(tmp_path, lora)
    assert isinstance(found, str)
    assert says in found
    (line,) = objections(lora)
    assert "SGLang" in line


def test_sglang_leaves_out_a_head_without_a_word(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], modules_to_save=["lm_head"])
    lora, _ = converted(tmp_path, config)
    found = by_sglang(tmp_path, lora)
    assert isinstance(found, dict), found
    assert not [name for name in found if "lm_head" in name]
    (line,) = objections(lora)
    assert "SGLang and llama.cpp leave some out without a word" in line


# -- llama.cpp --

PROMPT = [100, 200, 300, 400]
#: llama.cpp keeps keys and values in 16 bits.
CLOSE = 2e-3


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    """A directory with a tokenizer that llama.cpp's converter knows."""
    return fetch_model(CACHE)


def as_gguf(program: str, source: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    output = source.parent / f"{source.name}.gguf"
    command = [sys.executable, Path(LLAMA_CPP, program), source, "--outtype", "f32", "--outfile", output, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


class Case:
    """A checkpoint of a model that has been converted for llama.cpp, and its LoRA."""

    def __init__(self, tmp_path: Path, tokenizer: Path, config: LoraConfig, architecture: str = "llama") -> None:
        self.base = save_checkpoint(tmp_path / "base", architecture, vocab_size=49152, spectra=False)
        for file in tokenizer.glob("tokenizer*"):
            shutil.copy(file, self.base)
        # so large a change that each of its parts is seen in the answer
        self.made = make_checkpoint(tmp_path / "step", self.base, config, change=2.0)
        self.lora = convert_checkpoint(self.made.directory, tmp_path / "lora").path

    def error(self, lora: Path, trained: Path | None = None) -> float:
        """The largest difference of llama.cpp's log-probabilities with `lora` from stock PEFT's with `trained`."""
        done = as_gguf("convert_hf_to_gguf.py", self.base)
        assert done.returncode == 0, done.stderr[-3000:]
        done = as_gguf("convert_lora_to_gguf.py", lora, "--base", self.base)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [directory.parent / f"{directory.name}.gguf" for directory in (self.base, lora)]
        done = asked("llama_cpp_server.py", *files, ",".join(map(str, PROMPT)))
        assert done.returncode == 0, done.stderr[-3000:]
        told = {int(token): value for token, value in json.loads(done.stdout.splitlines()[-1]).items()}
        assert len(told) == 20
        with torch.inference_mode():
            logits = load_lora(self.base, trained or lora)(torch.tensor([PROMPT])).logits[0, -1]
        wanted = logits.log_softmax(-1)
        return max(abs(value - float(wanted[token])) for token, value in told.items())


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, RANKS, {"target_modules": [*LINEARS, "embed_tokens"]}], ids=str
)
def test_llama_cpp_serves_the_exact_update(options: dict[str, Any], tmp_path: Path, tokenizer: Path) -> None:
    case = Case(tmp_path, tokenizer, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options}))
    assert case.error(case.lora) < CLOSE
    assert not [line for line in objections(case.lora) if "llama.cpp do not" in line]


def test_llama_cpp_serves_other_scalings_wrongly_and_one_rank_rightly(tmp_path: Path, tokenizer: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, alpha_pattern={"down_proj": 80})
    case = Case(tmp_path, tokenizer, config)
    assert case.error(case.lora) > 10 * CLOSE
    (line,) = objections(case.lora)
    assert "SGLang and llama.cpp do not look, and serve a wrong update without a word" in line
    again = convert_checkpoint(case.made.directory, tmp_path / "one", rank=8).path
    assert case.error(again) < CLOSE


def test_llama_cpp_leaves_out_norms_without_a_word(tmp_path: Path, tokenizer: Path) -> None:
    case = Case(tmp_path, tokenizer, LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS))
    without = shutil.copytree(case.lora, tmp_path / "without")
    file = case.lora / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.norm.weight": torch.full((64,), 3.0)}, file)
    assert case.error(case.lora) > 10 * CLOSE
    assert case.error(case.lora, trained=without) < CLOSE
    (line,) = objections(case.lora)
    assert "SGLang and llama.cpp leave some out without a word" in line


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        ("llama", {"use_dora": True}, "lora_magnitude_vector': Not a lora_A or lora_B tensor"),
        ("llama", {"modules_to_save": ["lm_head"]}, "Embeddings is present in the adapter"),
        ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj"]}, "Can not map tensor"),
    ],
)
def test_llama_cpp_refuses_what_it_is_said_to(
    architecture: str, options: dict[str, Any], says: str, tmp_path: Path, tokenizer: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], **options)
    case = Case(tmp_path, tokenizer, config, architecture)
    done = as_gguf("convert_lora_to_gguf.py", case.lora, "--base", case.base)
    assert done.returncode != 0
    assert says in done.stderr
    assert objections(case.lora)
