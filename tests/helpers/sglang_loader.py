"""Loads a LoRA with SGLang's own loader, on the CPU: a program for the environment that ``make test-serving`` makes.

``python sglang_loader.py DIRECTORY BASE OUTPUT`` writes the factors that SGLang would put into its buffers, its scaling
in B, as safetensors, or prints the error that it raises, with exit status 3. The engine around the loader needs a GPU
to be imported, so that the names which the loader's modules import from it, and do not use here, are empty classes.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ENGINE = {
    "configs.load_config": "LoadConfig",
    "lora.backend.base_backend": "BaseLoRABackend",
    "model_executor.forward_batch_info": "ForwardBatch",
    "model_loader.loader": "DefaultModelLoader",
    "utils.hf_transformers_utils": "AutoConfig",
}
STACKED = {"qkv_proj": 3, "gate_up_proj": 2}


def without_engine() -> None:
    """Make the modules of ``sglang.srt.lora`` importable."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent.parent
    for name in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.lora.backend", "sglang.srt.layers"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package
    file = root / "sglang" / "srt" / "layers" / "utils" / "common.py"
    layers = importlib.util.spec_from_file_location("sglang.srt.layers.utils", file)
    assert layers is not None
    assert layers.loader is not None
    module = importlib.util.module_from_spec(layers)
    layers.loader.exec_module(module)
    sys.modules[module.__name__] = module
    for name, used in ENGINE.items():
        module = ModuleType(f"sglang.srt.{name}")
        setattr(module, used, type(used, (), {}))
        sys.modules[module.__name__] = module


def main(directory: str, base: str, output: str) -> int:
    without_engine()
    from safetensors.torch import load_file, save_file
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from transformers import AutoConfig

    factors = {}
    try:
        config = LoRAConfig(directory)
        adapter = LoRAAdapter("it", config, AutoConfig.from_pretrained(base), None, None)
        adapter.initialize_weights_from_tensors(load_file(f"{directory}/adapter_model.safetensors"))
        for layer in adapter.layers:
            for name, tensor in layer.weights.items():
                if ".lora_A." not in name:
                    continue
                name = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                rows = config.r * STACKED.get(name.rpartition(".")[2], 1)
                if len(tensor) != rows:  # as sglang/srt/lora/mem_pool.py does
                    raise ValueError(f"LoRA buffer shape {rows} does not match weight shape {len(tensor)}")
                b = layer.weights[f"base_model.model.{name}.lora_B.weight"]
                factors |= {f"{name}.a": tensor.contiguous(), f"{name}.b": (adapter.scaling * b).contiguous()}
    except (ValueError, RuntimeError, KeyError) as error:
        print(" ".join(str(error).split()))
        return 3
    factors |= {name: tensor.contiguous() for name, tensor in adapter.embedding_layers.items()}
    save_file(factors, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
