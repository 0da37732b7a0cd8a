"""Imports point down only, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lowrank_dist

ROOT = Path(lowrank_dist.__file__).parent

# from the top down; a module may import from lines below its own
LAYERS = [
    ["cli"],
    ["slurm"],
    ["trainer_cli"],
    ["demo"],
    ["callbacks"],
    ["strategy"],
    ["calibration_data", "checkpointed", "forecast"],
    ["calibrated_walk", "checkpoints"],
    ["calibration"],
    ["statistics"],
    ["opening"],
    ["pretrained"],
    ["trainable"],
    ["decompose", "materialize", "merge", "inspection", "refit", "starting_adapter"],
    ["decomposed_writer"],
    ["decomposed", "planner", "merge_plan", "restored"],
    ["module", "data", "zero3_optimizer", "adapter_match"],
    ["fused_loss"],
    ["sft", "optim"],
    ["walk"],
    ["skeleton", "experts", "folded", "layerwise"],
    ["zero3", "layers", "methods", "checkpoint_keys"],
    ["norms", "digest", "block_reader"],
    ["trailing"],
    ["linalg", "nf4", "adapter_source"],
    ["nf4_kernel"],
    ["convert"],
    ["exact_lora", "tensor_files", "redistribute"],
    ["adapter_files", "truncate"],
    ["residual", "exact"],
    ["owners"],
    ["health"],
    ["sources"],
    ["attempts", "checkpoint_io", "comm", "directories", "partition"],
    ["allocation", "buffers", "signals"],
    ["errors", "report"],
]
HOMES = {
    "deepspeed": {"zero3", "strategy"},
    "bitsandbytes": {"nf4", "optim"},
    "lightning": {"strategy", "checkpointed", "callbacks", "module", "data", "cli", "trainer_cli", "calibration_data"},
    "submitit": {"slurm"},
}


def modules() -> dict[Path, str]:
    """Every source file and the top-level module that it belongs to."""
    return {path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Dotted names that `path` imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_its_layer() -> None:
    assert {name for layer in LAYERS for name in layer} == set(modules().values()) - {"__init__"}


def test_imports_point_down_only() -> None:
    depth = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path, module in modules().items():
        if module == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "lowrank_dist" and len(parts) > 1 and parts[1] in depth and parts[1] != module:
                assert depth[parts[1]] > depth[module], f"{path.name} imports {name}, which is not below it"


def test_heavy_packages_stay_at_home() -> None:
    for path, module in modules().items():
        for name in imported(path):
            package = name.split(".")[0]
            assert module in HOMES.get(package, {module}), f"{path.name} imports {package}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import lowrank_dist, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [*HOMES, "torch", "transformers", "peft"]
    done = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_zero3_names_deepspeed_attributes() -> None:
    for path, module in modules().items():
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert module == "zero3" or not {name for name in names if name.startswith("ds_")}, path
