"""Heat's randomized SVD; run by peers.py under mpirun, prints JSON on rank 0."""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open

# Heat imports torchvision for data sets that are not used here; its build would have to match that of torch.
sys.modules["torchvision"] = sys.modules["torchvision.transforms"] = mock.MagicMock()
import heat as ht  # noqa: E402


def block_of(path: str) -> torch.Tensor:
    """The rows of this process."""
    rank, size = ht.MPI_WORLD.rank, ht.MPI_WORLD.size
    with safe_open(path, "pt") as file:
        weight = file.get_slice("weight")
        rows = weight.get_shape()[0]
        step = -(-rows // size)
        return weight[rank * step : min((rank + 1) * step, rows)]


def largest(value: float) -> float:
    return float(ht.MPI_WORLD.handle.allreduce(value, op=ht.MPI.MAX))


def measure(options: dict[str, Any]) -> dict[str, Any]:
    w = ht.array(block_of(options["path"]), is_split=0)

    def decompose() -> tuple[Any, ...]:
        return ht.linalg.rsvd(
            w, options["rank"], n_oversamples=options["oversampling"], power_iter=options["power_iterations"]
        )

    if "counted" in options:  # only for the bytes that MPI counts
        for _ in range(options["counted"]):
            decompose()
        return {}
    seconds: list[float] = []
    u, s, v = decompose()
    while len(seconds) < options["repeats"] and sum(seconds) < options["budget"]:
        ht.MPI_WORLD.handle.Barrier()
        started = time.perf_counter()
        u, s, v = decompose()
        seconds.append(largest(time.perf_counter() - started))
    u, s, v = (part.resplit(None).larray.double() for part in (u, s, v))
    error = (w.resplit(None).larray.double() - (u * s) @ v).norm()
    return {"seconds": seconds, "excess": float(error / options["best"] - 1)}


def main() -> None:
    torch.set_num_threads(1)
    outcome = measure(json.loads(sys.argv[1]))
    if ht.MPI_WORLD.rank == 0:
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
