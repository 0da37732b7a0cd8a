"""Packages import one way only, and the heavy libraries stay in their homes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank_dist

ROOT = Path(lowrank_dist.__file__).parent

#: From the top down: a package imports only from lines below its own.
LAW = """
cli
slurm callbacks
training
forecast inference
calibration checkpoints
initialization export
residual_model
decomposition
tuners
methods adapters layers
decoding
quantization model
storage
linalg zero3 cluster
distributed
errors progress seeds _lazy _version
"""
LEVELS = {name: level for level, names in enumerate(LAW.split("\n")) for name in names.split()}
#: These stand beside the others: what they import, and who imports them.
BESIDE = {
    "data": ({"storage", "errors", "seeds"}, {"training", "inference", "cli"}),
    "demo": ({"storage", "errors"}, {"cli"}),
}
#: Libraries that take seconds to import or whose internals change, and the packages that may.
HOMES = {
    "deepspeed": {"zero3"},
    "bitsandbytes": {"quantization", "zero3", "training"},
    "lightning": {"training", "callbacks", "data", "cli"},
    "submitit": {"slurm"},
    "lm_eval": {"inference"},
}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.name != "__init__.py")


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that `path` imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> Iterator[tuple[str, str, Path]]:
    """Importing package, imported package, file; within the project, packages apart."""
    for path in SOURCES:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "lowrank_dist" and len(parts) > 1 and parts[1] != package_of(path):
                yield package_of(path), parts[1], path


def test_every_package_has_its_place() -> None:
    assert set(map(package_of, SOURCES)) == set(LEVELS) | set(BESIDE)


def test_imports_point_down_only() -> None:
    for here, there, path in arrows():
        if here in BESIDE or there in BESIDE:
            allowed = there in BESIDE.get(here, ({there},))[0] and here in BESIDE.get(there, ((), {here}))[1]
        else:
            allowed = LEVELS[here] < LEVELS[there]
        assert allowed, f"{path.relative_to(ROOT)}: {here} may not import {there}"


def test_no_module_imports_itself_through_others() -> None:
    modules = {module_name(path): path for path in SOURCES}
    graph = {
        name: {
            module for wanted in imports(path) for module in (wanted, wanted.rpartition(".")[0]) if module in modules
        }
        for name, path in modules.items()
    }
    while leaves := [name for name, wanted in graph.items() if not wanted & graph.keys()]:
        graph = {name: wanted for name, wanted in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle: {', '.join(graph)}"


def test_heavy_libraries_stay_at_home() -> None:
    for path in SOURCES:
        for name in imports(path):
            library = name.split(".")[0]
            assert package_of(path) in HOMES.get(library, {package_of(path)}), f"{path.name} imports {library}"


@pytest.mark.parametrize("module", ["lowrank_dist", "lowrank_dist.errors", "lowrank_dist.cli"])
def test_importing_the_package_imports_nothing_heavy(module: str) -> None:
    program = f"import {module}, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = [*HOMES, "torch", "transformers", "peft"]
    done = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_zero3_names_deepspeed_attributes() -> None:
    for path in SOURCES:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        found = {name for name in names if name.startswith("ds_")}
        assert package_of(path) == "zero3" or not found, f"{path.name} names {found}"


def test_one_function_writes_safetensors() -> None:
    """safetensors' own makes files that only their owner can read, and its error for a full disk names none."""
    assert {path.relative_to(ROOT) for path in SOURCES if "safetensors.torch.save_file" in imports(path)} == {
        Path("storage/writer.py")
    }
