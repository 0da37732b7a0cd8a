"""What a rank does while all of them work, measured: the figures that the cost model of the walk is fed with."""

from __future__ import annotations

from pathlib import Path

import torch
from meters import fastest
from walks import FP32

from lowrank_dist.decomposition.schedule import candidates, measure
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.forecast.startup import Host
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.storage.reader import CheckpointReader, check_finite


def measure_host(checkpoint: Path, side: int) -> Host:
    """Measure a `Host`; every rank runs it."""
    group = ShardGroup()
    machine = measure(group, candidates(group, group.size), torch.device("cpu"))
    square, symmetric = torch.randn(side, side), torch.randn(512, 512)
    symmetric = symmetric @ symmetric.mT
    rates = {
        "gemm": 2.0 * side**3 / fastest(lambda: square @ square),
        "lapack": 10.0 * 512**3 / fastest(lambda: torch.linalg.eigh(symmetric)),
        "raw_read": _raw_read(checkpoint, group),
        "read": _read(checkpoint),
    }
    rates |= {str(residual): _encode(residual, side) for residual in (FP32, NF4())}
    slowest = (-group.max(-torch.tensor(list(rates.values()), dtype=torch.float64))).tolist()
    known = dict(zip(rates, slowest, strict=True))
    encode = {str(residual): known.pop(str(residual)) for residual in (FP32, NF4())}
    return Host(machine=machine, encode=encode, **known)


def _raw_read(checkpoint: Path, group: ShardGroup) -> float:
    """Every rank reads its part of the first file."""
    path = CheckpointReader(checkpoint).files[0]
    size = path.stat().st_size // group.size
    buffer = bytearray(size)

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(size * group.rank)
            file.readinto(buffer)

    return size / fastest(read)


def _read(checkpoint: Path) -> float:
    reader = CheckpointReader(checkpoint)
    name = max(reader, key=lambda name: reader.info(name).nbytes)
    rows = min(reader.info(name).shape[0], 4096)

    def read() -> None:
        check_finite(name, reader.rows(name, 0, rows).float(), 0)

    return reader.rows(name, 0, rows).nbytes / fastest(read)


def _encode(residual: ResidualFormat, side: int) -> float:
    """One round: residual, encoding, and the norm of what is left."""
    block, single = torch.randn(side, side), ShardGroup.single()
    partition = RowPartition(rows=side, columns=side, world_size=1, block=residual.block)

    def encode() -> None:
        encoded = residual.encode(block - 0.5, partition, single)
        torch.linalg.vector_norm(block - encoded.decoded, dtype=torch.float64)

    return block.numel() / fastest(encode)
