"""Digests of everything that a residual model depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from lowrank_dist.decomposition.walk import Calibrated, Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.model.plan import Plan
from lowrank_dist.residual_model.writer import FORMAT
from lowrank_dist.storage.parse import MAX_HEADER
from lowrank_dist.storage.reader import CheckpointReader

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def source_fingerprint(reader: CheckpointReader, group: ShardGroup) -> str:
    """Hexadecimal digest of the weights that a run starts from.

    The digest covers the fingerprint of a `lowrank_dist.storage.source.WeightSource`. If the weights are files, it
    covers the names, sizes and headers of the safetensors files, and 16 evenly spread samples of 64 KiB of each file:
    hashing whole files would read them a second time. Rank 0 computes it and broadcasts it. Collective.
    """
    return computed_on_rank_0(lambda: _hashed_source(reader).hexdigest(), group)


def fingerprint(walk: Walk, plan: Plan, calibrated: Calibrated | None = None) -> str:
    """Hexadecimal digest of everything that a residual model depends on.

    The digest covers the source like `source_fingerprint`, the method, the residual format, the dtype of the factors,
    rank and scaling of every matrix, and the fingerprint of `calibrated`. Rank 0 computes it and broadcasts it.
    Collective.
    """
    data = [] if calibrated is None else [calibrated.fingerprint()]

    def compute() -> str:
        digest = _hashed_source(walk.reader)
        matrices = [[m.name, m.key, m.rank, m.scaling] for m in plan.matrices]
        settings = [FORMAT, repr(walk.init), repr(walk.residual), str(walk.factor_dtype), matrices, *data]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()

    return computed_on_rank_0(compute, walk.group)


def computed_on_rank_0(compute: Callable[[], str], group: ShardGroup) -> str:
    """Call `compute` on rank 0 and return its text on every rank; its error is raised on every rank. Collective."""
    text = None
    with group.shared_errors():
        if group.rank == 0:
            text = compute()
    return str(group.broadcast_object(text))


def _hashed_source(reader: CheckpointReader) -> hashlib._Hash:
    digest = hashlib.sha256(reader.identity)
    for path in reader.files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
            if header > min(MAX_HEADER, size - 8):  # not of safetensors; `identity` covers the header of others
                header = 0
            digest.update(handle.read(header))
            for sample in range(_SAMPLES):
                handle.seek(8 + header + max(0, size - 8 - header - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest
