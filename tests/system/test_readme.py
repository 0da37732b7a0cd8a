"""The README's example, run as a user would run it; only the hardware, the model and the data are replaced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.sft import byte_level_tokenizer, tiny_llama, write_jsonl

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = 12  # of two ranks with batches of 4: two steps


def example() -> str:
    """The first block of Python in the README."""
    found = re.search(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def replace_once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the README's example"
    return text.replace(old, new)


def test_the_example_trains_and_writes_a_lora(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    # every linear layer has both sides above the example's r=128
    sizes = {"hidden_size": 160, "intermediate_size": 192, "num_key_value_heads": 4}
    tiny_llama(len(tokenizer), **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [{"query": f"add {i} and {i}", "response": f"It is {2 * i}"} for i in range(EXAMPLES)]
    write_jsonl(tmp_path / "train.jsonl", records)

    program = replace_once(example(), "meta-llama/Meta-Llama-3-70B", "model")
    program = replace_once(program, "meta-math/MetaMathQA", "train.jsonl")
    program = replace_once(program, 'accelerator="gpu", devices=8, num_nodes=4', 'accelerator="cpu", devices=2')
    (tmp_path / "train.py").write_text(program)

    launchers = ("SLURM", "TORCHELASTIC", "LOCAL_", "RANK", "WORLD_SIZE", "MASTER", "NODE_RANK", "GROUP_RANK")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    environment["PYTHONWARNINGS"] = "ignore"
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=environment,
        timeout=240,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (checkpoint,) = (tmp_path / "adapters").iterdir()
    assert checkpoint.name == "step=2"
    assert {path.name for path in checkpoint.iterdir()} == {
        "adapter",
        "adapter_encoded",
        "adapter_init",
        "lora",
        "lowrank_dist.json",
        "optimizer.safetensors",
        "state.json",
        "state.safetensors",
    }

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, checkpoint / "lora")
        assert tuned.peft_config["default"].r == 256
        after = tuned(ids).logits
    assert 0 < (after - before).abs().max() < 1
