"""Loads a LoRA with vLLM's own loader, on the CPU: a program for the environment that ``make test-serving`` makes.

``python vllm_loader.py DIRECTORY MAX_RANK MODULES OUTPUT`` writes the factors that vLLM would serve, its scaling in B,
as safetensors, or prints the error of one line that vLLM raises, with exit status 3.
"""

from __future__ import annotations

import sys


def main(directory: str, max_rank: str, modules: str, output: str) -> int:
    from safetensors.torch import save_file
    from vllm.config.lora import LoRAConfig
    from vllm.lora import lora_model
    from vllm.lora.peft_helper import PEFTHelper

    lora_model.PIN_MEMORY = False  # there is no device to copy to
    try:  # as vllm/lora/worker_manager.py does
        helper = PEFTHelper.from_local_dir(directory, None)
        helper.validate_legal(LoRAConfig(max_lora_rank=int(max_rank)))
        found = lora_model.LoRAModel.from_local_checkpoint(
            directory, set(modules.split(",")), peft_helper=helper, lora_model_id=1, device="cpu"
        )
    except ValueError as error:
        print(" ".join(str(error).split()))
        return 3
    factors = {}
    for name, weights in found.loras.items():
        weights.optimize()
        factors |= {f"{name}.a": weights.lora_a.contiguous(), f"{name}.b": weights.lora_b.contiguous()}
    factors |= {f"{name}.whole": module.weight for name, module in found.modules_to_save.items()}
    save_file(factors, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
