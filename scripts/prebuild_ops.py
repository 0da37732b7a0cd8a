"""Build DeepSpeed's one CPU operator before any rank needs it.

DeepSpeed compiles ``deepspeed_shm_comm`` just in time, about half a minute on an idle machine. Several ranks that
start together wait for the first through a lock file, and a process killed while it holds that file leaves it
behind: every later run then hangs. This script removes such leftovers, builds once, and notes for which versions,
so that it costs nothing the next time. Where CUDA is available and ``DS_ACCELERATOR=cpu`` is not set, DeepSpeed does
not use the operator and nothing is built.

Usage: ``TORCH_EXTENSIONS_DIR=DIR python scripts/prebuild_ops.py`` with ninja and a C++ compiler on PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

NAME = "deepspeed_shm_comm"


def held(path: Path) -> bool:
    """Tell whether a live process has `path` open, as torch's FileBaton has for as long as it builds."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        # processes end, and those of other users cannot be read
        with contextlib.suppress(OSError):
            if descriptor.samefile(path):
                return True
    return False


def clear_stale_locks(root: Path) -> None:
    for lock in root.glob("*/lock"):
        if not held(lock):
            print(f"removing {lock.relative_to(root)}: the process that held it is gone")
            lock.unlink(missing_ok=True)


def build() -> bool:
    """Build the operator where DeepSpeed will load it; returns whether it did."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return False
    for tool in ("ninja", os.environ.get("CXX", "c++")):
        if shutil.which(tool) is None:
            sys.exit(f"`{tool}` is not on PATH and DeepSpeed needs it to build {NAME}; install it (ninja-build, g++)")
    # only for this process: which accelerator a run uses is the package's decision
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return False
    print(f"building {NAME} (once, about 30 s) ...", flush=True)
    start = time.monotonic()
    builder.load(verbose=False)
    print(f"built {NAME} in {time.monotonic() - start:.0f} s")
    return True


def main() -> None:
    directory = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not directory:
        sys.exit("TORCH_EXTENSIONS_DIR is not set; set it to a directory of this checkout, as the Makefile does")
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    wanted = {name: version(name) for name in ("torch", "deepspeed")} | {"python": platform.python_version()}
    done = root / "prebuilt.json"
    with open(root / ".prebuild.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # released by the kernel, however this process ends
        clear_stale_locks(root)
        if done.is_file() and json.loads(done.read_text()) == wanted:
            return
        shutil.rmtree(root / NAME, ignore_errors=True)
        done.unlink(missing_ok=True)
        if build():
            temporary = done.with_suffix(".tmp")
            temporary.write_text(json.dumps(wanted) + "\n")
            temporary.replace(done)


if __name__ == "__main__":
    main()
