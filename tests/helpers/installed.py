"""What must be true of an installed package; ``package.sh`` runs it in a fresh environment."""

from __future__ import annotations

import sys
from importlib.metadata import files, version
from pathlib import Path

import lowrank_dist

assert Path(sys.prefix) in Path(lowrank_dist.__file__).parents, f"{lowrank_dist.__file__} is not the installed package"
assert version("lowrank-dist") == lowrank_dist.__version__
installed = {str(file) for file in files("lowrank-dist") or ()}
for name in ("py.typed", "configs/smollm2-135m_qpissa_2cpu.yaml", "configs/models/Meta-Llama-3-70B.json"):
    assert f"lowrank_dist/{name}" in installed, f"the package lacks {name}"
top = {name.partition("/")[0] for name in installed if not name.startswith("..")}
assert top == {"lowrank_dist", f"lowrank_dist-{lowrank_dist.__version__}.dist-info"}, f"also installed: {top}"
for name in lowrank_dist.__all__:
    getattr(lowrank_dist, name)
