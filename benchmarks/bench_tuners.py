"""What PEFT's other tuners cost the host over our base, beside PEFT's own model: their layers are PEFT's in both.

    python benchmarks/bench_tuners.py           # benchmarks/results/tuners.md
    python benchmarks/bench_tuners.py --tiny    # a dry run

Model and measure are those of ``benchmarks/bench_host.py``: CPU seconds of a step of a model whose arithmetic is next
to nothing. Two numbers of layers tell the cost of a layer from that of a step, in which Lightning and DeepSpeed do more
than PEFT's bare loop.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_host import said_of, small_model
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from ranks import run_ranks
from reporting import table, verdict
from steps import DENSE, PEER, Way, by_turns, parser, report, train_bitsandbytes, train_dense, train_ours

ALL: Any = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TUNERS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=8, lora_alpha=8, **ALL),
    "VeRA": lambda: VeraConfig(r=8, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),  # of equal shapes
    "IA3": lambda: IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "OFT": lambda: OFTConfig(oft_block_size=8, **ALL),
    "LoHa": lambda: LoHaConfig(r=8, alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM"),
}
#: Of which PEFT has layers over bitsandbytes.
OVER_BITSANDBYTES = ("LoRA", "VeRA", "IA3", "OFT")
OURS_DENSE, OURS = "ours, dense", "ours, NF4"
WAYS: dict[str, Way] = {
    DENSE: (1, train_dense),
    OURS_DENSE: (1, partial(train_ours, fold="never", quantization=None)),
    PEER: (1, train_bitsandbytes),
    OURS: (1, partial(train_ours, fold="never")),
}
GOAL = 1.05  # of a layer of PEFT, dense

#: By tuner and way: for each number of layers, seconds of a step in every round.
Times = dict[str, dict[str, dict[int, list[float]]]]


def main() -> None:
    known = parser(
        __doc__, "tuners.md", tiny="of 1 and 2 layers", steps="timed steps of a round", n_steps=30, n_rounds=3
    )
    options = known.options()
    few, many = (1, 2) if options.tiny else (4, 16)
    found: Times = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {layers: small_model(Path(folder) / str(layers), layers, options.steps) for layers in (few, many)}
        for name, config in TUNERS.items():
            ways = {way: how for way, how in WAYS.items() if way != PEER or name in OVER_BITSANDBYTES}
            found[name] = {way: {few: [], many: []} for way in ways}
            for way, ranks, train in by_turns(ways, options.rounds):
                for layers, job in jobs.items():
                    (measured,) = run_ranks(ranks, train, replace(job, tuner=config()))
                    found[name][way][layers].append(statistics.median(measured.seconds))
    notes = [
        said_of(jobs[many], options, f"{few} and {many}"),
        "VeRA adapts queries and outputs, whose shapes are equal; ours: under `PiSSAStrategy`, one rank",
        f"milliseconds of a step of {many} layers; of a layer: {many} layers without {few}, divided; the least rounds",
    ]
    parts = [_table(found, few, many), _verdicts(found, few, many)]
    report(options, "CPU time of a training step with PEFT's tuners", "bench_tuners.py", notes, parts)


def _table(found: Times, few: int, many: int) -> str:
    rows = []
    for name, ways in found.items():
        steps = [f"{1e3 * min(ways[way][many]):.1f}" if way in ways else "-" for way in WAYS]
        layers = [f"{1e3 * _of_layer(ways[way], few, many):.2f}" if way in ways else "-" for way in WAYS]
        rows.append([name, *(f"{step} / {layer}" for step, layer in zip(steps, layers, strict=True))])
    return table(["ms a step / a layer", *WAYS], rows)


def _verdicts(found: Times, few: int, many: int) -> str:
    lines = []
    for name, ways in found.items():
        ours, peer = (_of_layer(ways[way], few, many) for way in (OURS_DENSE, DENSE))
        lines.append(
            f"- {name}: a layer takes {ours / peer:.2f} of {DENSE}, goal {GOAL}: {verdict(ours <= GOAL * peer)}"
        )
    return "\n".join(lines)


def _of_layer(times: dict[int, list[float]], few: int, many: int) -> float:
    return (min(times[many]) - min(times[few])) / (many - few)


if __name__ == "__main__":
    main()
