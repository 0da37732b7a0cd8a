"""From a checkpoint to what a server takes: one rank and scaling for all modules, in a file that PEFT and servers read.

python examples/tiny.py && python examples/chat.py && python examples/serve.py
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from lowrank_dist import convert_checkpoint

BASE, CHECKPOINT, OUTPUT, RANK = "runs/examples/llama", "runs/examples/chat/step=4", "runs/examples/served", 8

if __name__ == "__main__":
    convert_checkpoint(CHECKPOINT, OUTPUT, rank=RANK, overwrite=True)
    config = json.loads(Path(OUTPUT, "adapter_config.json").read_text())
    # what all servers read alike: LoRA without patterns, biases and whole modules, one rank and scaling, A with B
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == RANK
    assert config["bias"] == "none"
    others = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_rslora")
    assert not any(config.get(key) for key in others)
    with safe_open(Path(OUTPUT, "adapter_model.safetensors"), framework="pt") as file:
        names = set(file.keys())
        for name in names:
            side = "lora_A" if ".lora_A." in name else "lora_B"
            assert name.startswith("base_model.model.")
            assert name.endswith(f".{side}.weight")
            assert file.get_slice(name).get_shape()[0 if side == "lora_A" else 1] == RANK
        layers = [{name.replace(f".{side}.", ".") for name in names if side in name} for side in ("lora_A", "lora_B")]
        assert layers[0] == layers[1]
    print(f"vllm serve {BASE} --enable-lora --lora-modules mine={OUTPUT} --max-lora-rank {RANK}")
