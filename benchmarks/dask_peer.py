"""dask's compressed SVD on a cluster of processes of one thread; run by peers.py, prints JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import dask
import dask.array as da
import numpy as np
from meters import repeat, seconds_of
from safetensors import safe_open

from distributed import Client, LocalCluster, wait


def rows_of(path: str, start: int, stop: int) -> np.ndarray:
    from safetensors import safe_open  # workers get this function pickled, with what it refers to

    with safe_open(path, "np") as file:
        return file.get_slice("weight")[start:stop]


def matrix(path: str, ranks: int) -> da.Array:
    """The matrix in blocks of rows, one per worker, in the memory of the workers."""
    with safe_open(path, "np") as file:
        rows, columns = file.get_slice("weight").get_shape()
    step = -(-rows // ranks)
    blocks = [
        da.from_delayed(
            dask.delayed(rows_of)(path, start, min(start + step, rows)),
            (min(start + step, rows) - start, columns),
            np.float32,
        )
        for start in range(0, rows, step)
    ]
    stacked = da.concatenate(blocks).persist()
    wait(stacked)
    return stacked


def sent(client: Client) -> int:
    return sum(client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())


def measure(client: Client, options: dict[str, Any]) -> dict[str, Any]:
    w = matrix(options["path"], options["ranks"])

    def decompose() -> tuple[Any, ...]:
        triplets = dask.persist(
            *da.linalg.svd_compressed(
                w,
                options["rank"],
                n_power_iter=options["power_iterations"],
                n_oversamples=options["oversampling"],
                iterator=options["iterator"],
                seed=0,
            )
        )
        wait(triplets)
        return triplets

    first = seconds_of(decompose)
    seconds = repeat(lambda _: decompose(), repeats=options["repeats"], budget=options["budget"], first=first)
    before = sent(client)
    triplets = decompose()
    moved = sent(client) - before
    u, s, v = (np.asarray(part.compute(), dtype=np.float64) for part in triplets)
    error = np.linalg.norm(np.asarray(w.compute(), dtype=np.float64) - (u * s) @ v)
    return {"seconds": seconds, "sent": moved, "excess": float(error / options["best"] - 1)}


def main() -> None:
    options = json.loads(sys.argv[1])
    workers = {"n_workers": options["ranks"], "threads_per_worker": 1, "processes": True}
    with LocalCluster(dashboard_address=None, **workers) as cluster, Client(cluster) as client:
        print(json.dumps(measure(client, options)), flush=True)


if __name__ == "__main__":
    main()
