"""Assumed rates of a GPU cluster, from which seconds are computed. They are not measured; bytes do not need them."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_dist.decomposition.schedule import Machine
from lowrank_dist.forecast.startup import Host
from lowrank_dist.quantization.format import ResidualFormat


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Assumed rates, each for one GPU or for one node of `node` GPUs.

    Parameters
    ----------
    node
        GPUs per node.
    flops
        flop/s of bf16 products in training.
    memory_rate
        bytes/s of the GPU's memory.
    gemm
        fp32 flop/s (no tf32) of products as thin as those of the SVD.
    lapack
        flop/s of a symmetric eigenvalue problem, as 10 D^3: latency-bound, 512 x 512 in some 25 ms.
    encode
        Elements/s of forming, quantizing and measuring a residual.
    disk
        bytes/s of reading from a node's storage.
    rows
        bytes/s at which one rank converts bf16 rows to fp32 and checks them, on one core.
    written
        bytes/s of writing to a node's storage.
    latency
        Seconds of an all-reduce of a small tensor, within a node and across nodes.
    bandwidth
        bytes/s of an all-reduce of a large tensor, within a node and across nodes.
    """

    node: int = 8
    flops: float = 4e14
    memory_rate: float = 2e12
    gemm: float = 30e12
    lapack: float = 5e10
    encode: float = 2e10
    disk: float = 3e9
    rows: float = 1e9
    written: float = 1.5e9
    latency: tuple[float, float] = (30e-6, 80e-6)
    bandwidth: tuple[float, float] = (100e9, 20e9)

    def host(self, ranks: int, residual: ResidualFormat) -> Host:
        """Rates of one of `ranks` ranks during the walk."""
        sizes = {min(self.node, ranks), ranks}
        machine = Machine(
            flops=self.gemm,
            latency={size: self.latency[size > self.node] for size in sizes},
            bandwidth={size: self.bandwidth[size > self.node] for size in sizes},
        )
        return Host(
            machine=machine,
            gemm=self.gemm,
            lapack=self.lapack,
            raw_read=self.disk,
            read=self.rows,
            encode={str(residual): self.encode},
        )

    def read_rate(self, ranks: int) -> float:
        """bytes/s at which `ranks` ranks together read pretrained weights."""
        return min(-(-ranks // self.node) * self.disk, ranks * self.rows)

    def write_rate(self, ranks: int) -> float:
        """bytes/s at which `ranks` ranks together write."""
        return -(-ranks // self.node) * self.written

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
            f"{self.node}, {across} across nodes"
        )
