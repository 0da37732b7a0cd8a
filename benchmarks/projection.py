"""The table of large models on GPUs: a cost model, and how well it predicts what was measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import models
from bench import Bench
from costs import Host, Seconds, predict
from reporting import table
from tables import timed_walks

from lowrank_dist.checkpoint_io import CheckpointReader
from lowrank_dist.methods import PiSSA
from lowrank_dist.nf4 import NF4
from lowrank_dist.planner import Machine, Sharding
from lowrank_dist.skeleton import PlannedMatrix

NODE = 8  # GPUs of a node


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Figures of a GPU cluster; none of them was measured here.

    Attributes
    ----------
    gemm
        fp32 flop/s (no tf32) of products as thin as the ones of the SVD, one GPU.
    lapack
        flop/s of a symmetric eigenvalue problem on one GPU, as 10 D^3: latency-bound, 512 x 512 in some 25 ms.
    encode
        Elements/s of forming, quantizing and measuring a residual, one GPU.
    disk, rows
        bytes/s of a node's storage, and of one rank that turns bf16 rows into checked fp32 on one core.
    written
        bytes/s to a node's storage.
    latency, bandwidth
        All-reduce of a small tensor in seconds; bytes/s of a large one. Within a node, and across nodes.
    """

    gemm: float = 30e12
    lapack: float = 5e10
    encode: float = 2e10
    disk: float = 3e9
    rows: float = 1e9
    written: float = 1.5e9
    latency: tuple[float, float] = (30e-6, 80e-6)
    bandwidth: tuple[float, float] = (100e9, 20e9)

    def host(self, ranks: int) -> Host:
        sizes = {NODE, ranks}
        machine = Machine(
            flops=self.gemm,
            latency={size: self.latency[size > NODE] for size in sizes},
            bandwidth={size: self.bandwidth[size > NODE] for size in sizes},
        )
        return Host(
            machine=machine,
            gemm=self.gemm,
            lapack=self.lapack,
            raw_read=self.disk,
            read=self.rows,
            encode={str(NF4(double_quant=True)): self.encode},
        )

    def __str__(self) -> str:
        eigh = 10 * 512**3 / self.lapack * 1e3
        inside, across = (
            f"{latency * 1e6:.0f} us + {bandwidth / 1e9:.0f} GB/s"
            for latency, bandwidth in zip(self.latency, self.bandwidth, strict=True)
        )
        return (
            f"{self.gemm / 1e12:.0f} Tflop/s in fp32 products; eigenvalue problems at {self.lapack / 1e9:.0f} Gflop/s "
            f"(10 D^3 flops: 512 x 512 in {eigh:.0f} ms); {self.encode / 1e9:.0f} G elements/s to quantize and "
            f"measure; storage of {self.disk / 1e9:g} GB/s a node for reading, {self.written / 1e9:g} for writing; "
            f"{self.rows / 1e9:g} GB/s a rank from file to checked fp32 rows; all-reduce {inside} within a node of "
            f"{NODE}, {across} across nodes"
        )


def projection(bench: Bench) -> str:
    """Predicted over measured, then large models."""
    assumptions = Assumptions()
    rows = []
    for model, shapes, layers in (("LLaMA-3-70B", models.LLAMA_70B, 80), ("LLaMA-3.1-405B", models.LLAMA_405B, 126)):
        matrices = models.matrices(shapes, 128, layers)
        for method, label in ((PiSSA(), "QPiSSA T = 1"), (PiSSA(quantization_iterations=5), "QPiSSA T = 5")):
            for gpus in (8, 32, 256):
                rows.append([model, label, gpus, *_cells(_project(matrices, method, gpus, assumptions))])
    columns = [
        "",
        "",
        "GPUs",
        "read",
        "products",
        "small problems",
        "communicate",
        "quantize",
        "write",
        "in memory, s",
        "on disk, s",
    ]
    return "\n\n".join(
        [
            "The model of `benchmarks/costs.py`, fed with the figures of this machine (measured in this run), against "
            "the walks of the other tables:",
            _check(bench),
            "The same model for all linears, r = 128, NF4 with double quantization, ranks per matrix as the planner "
            f"decides. **A projection: nothing here was measured on GPUs.** Assumed: {assumptions}.",
            table(columns, rows),
        ]
    )


def _project(matrices: Sequence[PlannedMatrix], method: PiSSA, gpus: int, assumed: Assumptions) -> Seconds:
    nodes = gpus // NODE
    return predict(
        matrices,
        method,
        NF4(double_quant=True),
        assumed.host(gpus),
        gpus,
        sharding=Sharding(ranks_per_node=NODE),
        read=min(nodes * assumed.disk, gpus * assumed.rows),
        write=nodes * assumed.written,
    )


def _cells(seconds: Seconds) -> list[str]:
    parts = (seconds.read, seconds.products, seconds.small, seconds.communicate, seconds.encode, seconds.write)
    return [f"{value:.1f}" for value in (*parts, seconds.in_memory, seconds.in_memory + seconds.write)]


def _check(bench: Bench) -> str:
    rows = []
    for label, job, ranks in timed_walks(bench):
        measured, host = min(bench.timed(job, ranks)[0].seconds), bench.host(ranks)
        matrices = models.planned(job.checkpoint, CheckpointReader(job.checkpoint), job.rank)
        predicted = predict(
            matrices,
            job.method,  # type: ignore[arg-type]
            job.residual,
            host,
            ranks,
            sharding=Sharding(ranks_per_matrix=job.ranks_per_matrix),
            read=host.read * ranks,
        )
        seconds = [f"{predicted.in_memory:.2f}", f"{measured:.2f}", f"{predicted.in_memory / measured:.2f}"]
        rows.append([label, *_cells(predicted)[:5], *seconds])
    columns = ["", "read", "products", "small problems", "communicate", "quantize", "predicted", "measured", "ratio"]
    return table(columns, rows)
