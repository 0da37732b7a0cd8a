"""The table of large models on GPUs: a cost model, and how well it predicts what was measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence

import models
from bench import Bench
from reporting import table
from tables import timed_walks

from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.forecast.rates import Cluster
from lowrank_dist.forecast.startup import Seconds, predict
from lowrank_dist.methods import PiSSA
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.storage.reader import CheckpointReader


def projection(bench: Bench) -> str:
    """Predicted over measured, then large models."""
    cluster = Cluster()
    rows = []
    for model, shapes, layers in (("LLaMA-3-70B", models.LLAMA_70B, 80), ("LLaMA-3.1-405B", models.LLAMA_405B, 126)):
        matrices = models.matrices(shapes, 128, layers)
        for method, label in ((PiSSA(), "QPiSSA T = 1"), (PiSSA(quantization_iterations=5), "QPiSSA T = 5")):
            for gpus in (8, 32, 256):
                rows.append([model, label, gpus, *_cells(_project(matrices, method, gpus, cluster))])
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
            "The model of `lowrank_dist.forecast.startup`, fed with the figures of this machine (measured in this "
            "run), against the walks of the other tables:",
            _check(bench),
            "The same model for all linears, r = 128, NF4 with double quantization, ranks per matrix as the planner "
            f"decides. **A projection: nothing here was measured on GPUs.** Assumed: {cluster}.",
            table(columns, rows),
        ]
    )


def _project(matrices: Sequence[PlannedMatrix], method: PiSSA, gpus: int, cluster: Cluster) -> Seconds:
    residual = NF4(double_quant=True)
    return predict(
        matrices,
        method,
        residual,
        cluster.host(gpus, residual),
        gpus,
        sharding=Sharding(ranks_per_node=cluster.node),
        read=cluster.read_rate(gpus),
        write=cluster.write_rate(gpus),
    )


def _cells(seconds: Seconds) -> list[str]:
    parts = (seconds.read, seconds.products, seconds.small, seconds.communicate, seconds.encode, seconds.write)
    return [f"{value:.1f}" for value in (*parts, seconds.in_memory, seconds.total)]


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
