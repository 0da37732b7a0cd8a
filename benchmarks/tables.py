"""The tables of bench_init.py: each function measures and returns Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import peers as others
from bench import Bench
from meters import shown
from peers import PeerError, PeftOutcome
from ranks import run_alone, run_ranks
from reporting import table, verdict
from safetensors.torch import save_file
from walks import FP32, Outcome, RunSpec, SVDOutcome, measure_svd

from lowrank_dist.methods import LoftQ, PiSSA
from lowrank_dist.quantization.nf4 import NF4

MEMORY_GOAL = 150  # MB of a rank above an idle interpreter
SPEED_UP_GOAL = 1.8
PEFT_GOALS = {"pissa_niter_4": (1.0, 0.1), "pissa_niter_16": (0.5, 0.01)}  # of its time, of its excess
LIMIT_GOAL = 1.3


def peft(bench: Bench) -> str:
    """Initialisation of a whole model: PEFT's against the walk."""
    s = bench.settings
    inits = ["pissa_niter_4"] if s.tiny else ["pissa_niter_4", "pissa_niter_16", "pissa"]
    theirs = {init: bench.peft(s.model, s.rank, init) for init in inits}
    jobs = model_jobs(bench)
    ours = {label: bench.timed(job, s.ranks) for label, job in jobs.items()}
    compared = {label: job for label, job in jobs.items() if ours[label][0].excess and job.residual == FP32}
    turns = bench.time_shares(list(compared.values()), [init for init in inits if init in PEFT_GOALS], s.rounds(5))
    shares = {init: dict(zip(compared, found, strict=True)) for init, found in turns.items()}
    rows = [_peft_row(f"PEFT `{init}`", outcome) for init, outcome in theirs.items()]
    rows += [_our_row(label, outcomes) for label, outcomes in ours.items()]
    columns = ["", "seconds", "worst excess", "mean excess", "peak MB", "with mapped files", "bytes read", "before, s"]
    lines = [
        f"All linears of {s.model.name}, r = {s.rank}, fp32 factors and residual. PEFT: one process, {s.ranks} "
        f"threads, the model in memory as fp32; ours: {s.ranks} ranks of one thread, from the files to factors and "
        "residual. Seconds are min / median. Excess: ||W - s B A|| / min ||W - X|| - 1 against exact singular values. "
        "Peak: memory of a process, of the largest rank, above an idle interpreter with the same imports; PEFT's with "
        "the model that it holds. Before: PEFT loading the model, ours planning from its configuration; neither is in "
        "the seconds. Bytes read: by all ranks, over those of the adapted matrices. Shares of PEFT's time: the median "
        "(lowest to highest) of rounds in which all took turns, each in new processes.",
        table(columns, rows),
        *_peft_goals(theirs, ours, shares),
        f"- Peak memory of a rank under {MEMORY_GOAL} MB: " + _memory_goal(ours),
    ]
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def model_jobs(bench: Bench) -> dict[str, RunSpec]:
    """The walks of the model table."""
    s = bench.settings
    common: dict[str, Any] = {"checkpoint": s.model, "rank": s.rank}
    jobs = {"ours, `PiSSA()`": RunSpec(**common), "ours, `PiSSA()`, NF4": RunSpec(**common, residual=NF4())}
    if not s.tiny:
        fast = {"oversampling": 5 * s.rank // 2, "power_iterations": 13}
        fine = {"oversampling": 4 * s.rank, "power_iterations": 19}
        for options in (fast, fine, {"tolerance": 1e-5}):
            label = ", ".join(f"{name}={value}" for name, value in options.items())
            jobs[f"ours, `{label}`"] = RunSpec(**common, method=PiSSA(**options))
    jobs["ours, QPiSSA T = 5, NF4"] = RunSpec(**common, method=PiSSA(quantization_iterations=5), residual=NF4())
    return jobs


def _excess_cells(excess: Mapping[str, float]) -> list[str]:
    if not excess:
        return ["-", "-"]
    return [f"{max(excess.values()):.1e}", f"{statistics.mean(excess.values()):.1e}"]


def _peft_row(label: str, outcome: PeftOutcome) -> list[str]:
    memory = [f"{outcome.private:.0f}", f"{outcome.resident:.0f}"]
    return [label, shown(outcome.seconds), *_excess_cells(outcome.excess), *memory, "-", shown(outcome.loading)]


def _our_row(label: str, outcomes: Sequence[Outcome]) -> list[str]:
    first = outcomes[0]
    adapted = sum(report.nbytes for report in first.reports)
    memory = [f"{max(o.private for o in outcomes):.0f}", f"{max(o.resident for o in outcomes):.0f}"]
    read = f"{sum(o.bytes_read for o in outcomes) / adapted:.2f}"
    return [label, shown(first.seconds), *_excess_cells(first.excess), *memory, read, f"{first.setup:.1f}"]


def _peft_goals(
    theirs: Mapping[str, PeftOutcome],
    ours: Mapping[str, Sequence[Outcome]],
    shares: Mapping[str, Mapping[str, Sequence[float]]],
) -> list[str]:
    """A line for every goal; `shares` of PEFT's time by its method and our label."""
    lines = []
    for init, found in shares.items():
        time_goal, excess_goal = PEFT_GOALS[init]
        excess = {label: _excess_ratios(ours[label][0], theirs[init]) for label in found}
        met = [
            label
            for label, times in found.items()
            if statistics.median(times) <= time_goal and max(excess[label]) <= excess_goal
        ]
        details = "; ".join(
            f"{label.removeprefix('ours, ')} {_spread(times)} of the time, {excess[label][0]:.2g} of the worst and "
            f"{excess[label][1]:.2g} of the mean excess"
            for label, times in found.items()
        )
        by = " by " + ", ".join(label.removeprefix("ours, ") for label in met) if met else ""
        lines.append(
            f"- At most {time_goal:g} of the time of `{init}` at {excess_goal:g} of its excess (worst and mean): "
            f"{verdict(bool(met))}{by} ({details})"
        )
    return lines


def _excess_ratios(ours: Outcome, theirs: PeftOutcome) -> tuple[float, float]:
    """Worst and mean excess, ours over theirs."""
    mine, other = ours.excess.values(), theirs.excess.values()
    return max(mine) / max(other), statistics.mean(mine) / statistics.mean(other)


def _spread(values: Sequence[float]) -> str:
    """Median of several, and between what they are."""
    median = f"{statistics.median(values):.2f}"
    return median if len(values) == 1 else f"{median} ({min(values):.2f} to {max(values):.2f})"


def _memory_goal(ours: Mapping[str, Sequence[Outcome]]) -> str:
    peak = max(outcome.private for outcomes in ours.values() for outcome in outcomes)
    return f"{verdict(peak < MEMORY_GOAL)} ({peak:.0f} MB at most)"


def svd(bench: Bench) -> str:
    """One distributed SVD: dask's and Heat's against `randomized_svd`."""
    s = bench.settings
    sizes = [(256, 128)] if s.tiny else [(4096, 4096), (8192, 2048)]
    parts = [
        f"The r = {s.layer_rank} leading triplets of an fp32 matrix with singular values i^-0.5 that lies in the "
        f"memory of {s.ranks} processes of one thread, cut by rows. Bytes: sent by all processes for one SVD; ours "
        "counted at the collectives, as their bandwidth-optimal algorithms move them; dask's by its workers; Heat's by "
        "Open MPI. p: oversampling, q: power iterations, orthonormalized between them unless the row says otherwise."
    ]
    for rows, columns in sizes:
        path, best = bench.note(f"writing {rows} x {columns}", lambda r=rows, c=columns: _matrix_file(bench, r, c))
        cells = [*_our_svds(bench, path, best), *_peer_svds(bench, path, best)]
        heading = f"{rows} x {columns}"
        parts.append(table([heading, "seconds", "excess residual", "MB on the network"], cells))
    return "\n\n".join(parts)


def _matrix_file(bench: Bench, rows: int, columns: int) -> tuple[Path, float]:
    """A matrix, and the smallest residual."""
    path = bench.settings.scratch / f"{rows}x{columns}.safetensors"
    weight = models.with_spectrum(rows, columns)
    save_file({"weight": weight}, path)
    best = run_alone(models.best_residual, weight, bench.settings.layer_rank, threads=bench.settings.ranks)
    return path, best


def _our_svds(bench: Bench, path: Path, best: float) -> list[list[str]]:
    s, rows = bench.settings, []
    settings: list[dict[str, float]] = [{}, {"power_iterations": 3}, {"tolerance": 1e-4}]
    for options in settings[:1] if s.tiny else settings:
        label = ", ".join(f"{name}={value}" for name, value in options.items()) or "default"
        outcomes: list[SVDOutcome] = bench.note(
            f"ours: {label}",
            lambda o=options: run_ranks(s.ranks, measure_svd, path, s.layer_rank, o, s.repeats, s.budget, best),
        )
        first, sent = outcomes[0], sum(o.sent for o in outcomes)
        rows.append([f"ours, {label}", shown(first.seconds), f"{first.excess:.1e}", f"{sent / 1e6:.1f}"])
    return rows


def _peer_svds(bench: Bench, path: Path, best: float) -> list[list[str]]:
    s, r, rows = bench.settings, bench.settings.layer_rank, []
    peers = {
        "dask `svd_compressed`": (others.run_dask, [(4, 10, "power"), (4, r, "QR"), (8, r, "QR")]),
        "Heat `rsvd`": (others.run_heat, [(4, 10, "QR"), (4, r, "QR"), (8, r, "QR")]),
    }
    common = {"path": str(path), "rank": r, "repeats": s.repeats, "budget": s.budget, "best": best}
    for name, (run, settings) in peers.items():
        for q, p, iterator in settings[1:2] if s.tiny else settings:
            options = {**common, "power_iterations": q, "oversampling": p, "iterator": iterator}
            label = f"{name}, q = {q}, p = {p}{', not orthonormalized' if iterator == 'power' else ''}"
            try:
                found = bench.note(label, lambda o=options, run=run: run(o, s.ranks))
            except PeerError as error:
                rows.append([f"{name}: skipped, {error}", "-", "-", "-"])
                break
            sent = "-" if found["sent"] is None else f"{found['sent'] / 1e6:.1f}"
            rows.append([label, shown(found["seconds"]), f"{found['excess']:.1e}", sent])
    return rows


def layers(bench: Bench) -> str:
    """Layers of large models, on one rank and on several."""
    s = bench.settings
    parts = [
        f"The seven linears of one layer, spectra i^-0.5, bf16 on disk, r = {s.layer_rank}, `PiSSA()` with fp32 "
        f"factors and residual; ranks of one thread and core, PEFT {s.ranks} of them. Speed-up: against one rank, the "
        "median (lowest to highest) of rounds in which all took turns, each in new processes. Peak: MB of the largest "
        "rank above an idle interpreter, without mapped files; PEFT's with the fp32 layer that it holds.",
        _layer_table(bench, "LLaMA-3-8B", bench.layer_8b(), rounds=7, peers=True),
    ]
    if s.large:
        large = bench.layer("llama3-70b-layer", models.LLAMA_70B)
        parts.append(_layer_table(bench, "LLaMA-3-70B", large, rounds=3, peers=False))
    return "\n\n".join(parts)


def layer_job(bench: Bench, checkpoint: Path, ranks_per_matrix: int | None = None, **options: Any) -> RunSpec:
    """The walk of the layer tables."""
    rank = bench.settings.layer_rank
    return RunSpec(checkpoint=checkpoint, rank=rank, ranks_per_matrix=ranks_per_matrix, method=PiSSA(**options))


def _layer_table(bench: Bench, name: str, checkpoint: Path, *, rounds: int, peers: bool) -> str:
    s = bench.settings
    job, shared = layer_job(bench, checkpoint), layer_job(bench, checkpoint, s.ranks)
    jobs = {f"ours, {s.ranks} ranks": job, f"ours, {s.ranks} ranks, rows shared": shared}
    measured = {"ours, 1 rank": bench.timed(job, 1)} | {label: bench.timed(j, s.ranks) for label, j in jobs.items()}
    ceilings, turns = bench.speed_ups(list(jobs.values()), s.ranks, s.rounds(rounds))
    faster = dict(zip(jobs, turns, strict=True))
    rows = [_layer_row(label, outcomes, faster.get(label)) for label, outcomes in measured.items()]
    cheaper = (
        {}
        if s.tiny
        else {
            f"ours, {s.ranks} ranks, `oversampling={3 * s.layer_rank // 2}`": bench.timed(
                layer_job(bench, checkpoint, oversampling=3 * s.layer_rank // 2), s.ranks
            )
        }
    )
    rows += [_layer_row(label, outcomes, None) for label, outcomes in cheaper.items()]
    inits = ["pissa_niter_4"] if s.tiny else ["pissa_niter_4", "pissa_niter_16"]
    theirs = {init: bench.peft(checkpoint, s.layer_rank, init) for init in inits} if peers else {}
    for init, outcome in theirs.items():
        cells = [shown(outcome.seconds), "-", *_excess_cells(outcome.excess), f"{outcome.private:.0f}"]
        rows.append([f"PEFT `{init}`", *cells])
    several = {label: outcomes for label, outcomes in (measured | cheaper).items() if len(outcomes) > 1}
    shares = {  # far from the goals: of the fastest repeats, which took no turns
        init: {label: [min(o[0].seconds) / min(outcome.seconds)] for label, o in several.items()}
        for init, outcome in theirs.items()
    }
    speed_up = max(statistics.median(found) for found in faster.values())
    memory = max(o.private for o in bench.timed(shared, s.ranks)) / measured["ours, 1 rank"][0].private
    goals = [
        f"- Speed-up of {SPEED_UP_GOAL} on {s.ranks} ranks: {verdict(speed_up >= SPEED_UP_GOAL)} ({speed_up:.2f}; "
        f"{s.ranks} processes with a layer each, which share nothing, do {_spread(ceilings)} times what one does)",
        f"- Half the memory where rows are shared: {verdict(memory <= 0.55)} ({memory:.2f})",
        *_peft_goals(theirs, several, shares),
        f"- Planner: {measured[f'ours, {s.ranks} ranks'][0].schedule}",
    ]
    columns = [name, "seconds", "speed-up", "worst excess", "mean excess", "peak MB"]
    return table(columns, rows) + "\n\n" + "\n".join(goals)


def _layer_row(label: str, outcomes: Sequence[Outcome], faster: Sequence[float] | None) -> list[str]:
    first = outcomes[0]
    return [
        label,
        shown(first.seconds),
        _spread(faster) if faster else "-",
        *_excess_cells(first.excess),
        f"{max(o.private for o in outcomes):.0f}",
    ]


def limit(bench: Bench) -> str:
    """How far the walk is from what the machine allows."""
    s, rows = bench.settings, []
    for label, job, ranks in timed_walks(bench):
        outcomes, host = bench.timed(job, ranks), bench.host(ranks)
        flops = sum(o.flops for o in outcomes)
        nbytes = sum(o.bytes_read for o in outcomes)
        read, compute = nbytes / (host.raw_read * ranks), flops / (host.gemm * ranks)
        seconds = min(outcomes[0].seconds)
        cells = [f"{seconds:.2f}", f"{read:.2f}", f"{flops / 1e9:.0f}", f"{compute:.2f}"]
        rows.append([label, *cells, f"{seconds / max(read, compute):.2f}"])
    host = bench.host(s.ranks)
    best = min(float(row[-1]) for row in rows)
    columns = ["", "seconds", "reading", "Gflop in products", "at the GEMM rate", "seconds / limit"]
    return "\n\n".join(
        [
            "Limit: the larger of the time to read the matrices (page cache) and that of the flops of all matrix "
            "products made, at the rate of a large square fp32 product "
            f"({host.gemm / 1e9:.0f} Gflop/s a rank with {s.ranks} busy ranks). Factorizations, quantization, norms "
            "and checks are not in it; flops are those made, not those that the mathematics needs.",
            table(columns, rows),
            f"- Under {LIMIT_GOAL} times the limit: {verdict(best < LIMIT_GOAL)} (best {best:.2f})",
        ]
    )


def timed_walks(bench: Bench) -> list[tuple[str, RunSpec, int]]:
    """The walks that other tables time: the model's, and the layer's on one rank and on several."""
    s = bench.settings
    walks = [
        (f"{s.model.name}, {label.removeprefix('ours, ')}", job, s.ranks) for label, job in model_jobs(bench).items()
    ]
    checkpoint = bench.layer_8b()
    walks.append((f"{checkpoint.name}, 1 rank", layer_job(bench, checkpoint), 1))
    walks.append((f"{checkpoint.name}, {s.ranks} ranks", layer_job(bench, checkpoint), s.ranks))
    walks.append((f"{checkpoint.name}, {s.ranks} ranks, rows shared", layer_job(bench, checkpoint, s.ranks), s.ranks))
    if s.large:
        large = bench.layer("llama3-70b-layer", models.LLAMA_70B)
        walks.append((f"{large.name}, {s.ranks} ranks", layer_job(bench, large), s.ranks))
    return walks


# arXiv:2404.02948, nuclear norm, %: model, r, T, QPiSSA, LoftQ
PUBLISHED = [
    ("LLaMA-2-7B", 128, 5, "19.4", "14.6"),
    ("LLaMA-3-8B", 128, 5, "22.9", "18.1"),
    ("LLaMA-3-70B", 64, 5, "13.4", "8.5"),
    ("LLaMA-3-70B", 128, 1, "13.0", "-"),
    ("LLaMA-3-70B", 128, 5, "20.3", "-"),
]


def reduction(bench: Bench) -> str:
    """How much of the quantization error QPiSSA and LoftQ take away."""
    s, rows = bench.settings, []
    for rank in (8,) if s.tiny else (16, 64, 128):
        for rounds in (1, 5):
            cells = []
            for method in (PiSSA, LoftQ):
                job = RunSpec(
                    checkpoint=s.model,
                    rank=rank,
                    method=method(quantization_iterations=rounds),
                    residual=NF4(),
                    thorough=True,
                )
                reports = bench.reports(job, s.ranks)
                cells.append(f"{100 * statistics.mean(r.nuclear_reduction for r in reports):.1f}")
                cells.append(f"{100 * statistics.mean(r.error_reduction for r in reports):.1f}")
            rows.append([s.model.name, rank, rounds, cells[0], cells[2], cells[1], cells[3]])
    rows += [[f"{name} (published)", *row, "-", "-"] for name, *row in PUBLISHED]
    columns = ["", "r", "T", "QPiSSA nuclear %", "LoftQ nuclear %", "QPiSSA Frobenius %", "LoftQ Frobenius %"]
    return "\n\n".join(
        [
            "1 - ||W - (Q(W_res) + s B A)|| / ||W - Q(W)||, NF4, mean over all matrices. Published rows: PiSSA, "
            "arXiv:2404.02948. A small model has small matrices, of which rank r is a larger part: compare methods "
            "within a row, not rows of different models.",
            table(columns, rows),
        ]
    )
