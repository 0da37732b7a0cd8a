"""What commands import: in an interpreter of their own, since this one has imported everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

HEAVY = ("torch", "transformers", "peft", "lightning", "deepspeed", "bitsandbytes")
PROGRAM = """
import sys
try:
    {statement}
finally:
    print({heavy} & sys.modules.keys() or "nothing heavy", file=sys.stderr)
"""
COMMAND = "from lowrank_dist.cli import main; main({arguments})"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_file({"layer.weight": np.ones((4, 3), np.float32)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return directory


@pytest.mark.parametrize(
    "statement",
    [
        "import lowrank_dist",
        COMMAND.format(arguments=["--help"]),
        COMMAND.format(arguments=["--version"]),
        COMMAND.format(arguments=["demo", "--help"]),
        COMMAND.format(arguments=["inspect", "--help"]),
        COMMAND.format(arguments=["inspect", "MODEL"]),
    ],
)
def test_what_should_be_quick_imports_nothing_heavy(statement: str, model: Path) -> None:
    program = PROGRAM.format(statement=statement.replace("MODEL", str(model)), heavy=set(HEAVY))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "nothing heavy\n"
    if "MODEL" in statement:
        assert "12" in done.stdout
