"""Time and excess residual of the leading r triplets, on one process and one thread.

Compares `torch.svd_lowrank` as PEFT calls it for ``pissa_niter_4`` and ``pissa_niter_16`` with `randomized_svd`:

    python benchmarks/bench_svd_iterations.py                            # spectra i^-0.5, 1024 x 1024 and 1024 x 4096
    python benchmarks/bench_svd_iterations.py --checkpoint FOLDER --layer 5   # every linear of one layer

Processor seconds of the fastest of three runs; excess = ||W - U S V^T||_F / ||W - W_r||_F - 1, the largest over the
matrices, against the singular values in fp64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.linalg import randomized_svd

Triplets = tuple[Tensor, Tensor, Tensor]


def synthetic(rows: int, columns: int) -> Tensor:
    k = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(side, k))[0] for side in (rows, columns))
    return (u * torch.arange(1, k + 1) ** -0.5) @ v.mT


def layer_weights(folder: Path, layer: int) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if f"layers.{layer}." in name and len(tensors.get_slice(name).get_shape()) == 2:
                    found[name] = tensors.get_tensor(name).float()
    return found


def lowrank(rank: int, passes: int) -> Callable[[Tensor], Triplets]:
    def compute(w: Tensor) -> Triplets:
        u, s, v = torch.svd_lowrank(w, q=rank, niter=passes)
        return u, s, v.mT

    return compute


def krylov(rank: int, **options: float | None) -> Callable[[Tensor], Triplets]:
    group = ShardGroup.single()
    return lambda w: randomized_svd(w, rank, rows=w.shape[0], group=group, seed=0, **options)[:3]


def measure(compute: Callable[[Tensor], Triplets], w: Tensor, exact: Tensor) -> tuple[float, float]:
    seconds = []
    for _ in range(3):
        started = time.process_time()
        u, s, vh = compute(w)
        seconds.append(time.process_time() - started)
    error = (w.double() - (u.double() * s.double()) @ vh.double()).norm()
    return min(seconds), float(error / exact[len(s) :].norm()) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.checkpoint:
        weights = layer_weights(args.checkpoint, args.layer)
    else:
        weights = {f"{m} x {n}": synthetic(m, n) for m, n in ((1024, 1024), (1024, 4096))}
    exact = {name: torch.linalg.svdvals(w.double()) for name, w in weights.items()}
    for rank in args.ranks:
        rows: dict[str, Callable[[Tensor], Triplets]] = {
            "svd_lowrank niter=4": lowrank(rank, 4),
            "svd_lowrank niter=16": lowrank(rank, 16),
            "oversampling=2r, power_iterations=7": krylov(rank, oversampling=2 * rank, power_iterations=7),
            "power_iterations=4": krylov(rank, power_iterations=4),
            "power_iterations=7": krylov(rank, power_iterations=7),
            "power_iterations=15 (default)": krylov(rank, power_iterations=15),
            "tolerance=1e-3": krylov(rank, tolerance=1e-3),
            "tolerance=1e-5": krylov(rank, tolerance=1e-5),
        }
        print(f"r = {rank}, {len(weights)} matrices")
        for label, compute in rows.items():
            measured = [measure(compute, w, exact[name]) for name, w in weights.items()]
            total, worst = sum(s for s, _ in measured), max(e for _, e in measured)
            print(f"  {label:36s} {total:7.3f} s   excess {worst:.1e}", flush=True)


if __name__ == "__main__":
    main()
