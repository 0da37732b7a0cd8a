"""Residual formats: bits for each weight, and how far weights, outputs and the loss are from the original's. A report.

    python benchmarks/bench_formats.py               # benchmarks/results/formats.md
    python benchmarks/bench_formats.py --examples 0  # errors of the weights alone, without the model's outputs
    python benchmarks/bench_formats.py --tiny        # a dry run on a random model of two layers

The model, the data and the errors are those of ``benchmarks/bench_quantized_starts.py``: SmolLM2-135M, all linears.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import models
import torch
from bench_quantized_starts import PACKAGES, Data, batches_of, computed, loss_of, random_data, second_moments, start
from peft import LoraConfig
from reporting import header, table, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_dist.demo.assets import fetch_data, fetch_model
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.methods import LoftQ, LoRA, Method, PiSSA
from lowrank_dist.model.plan import open_plan
from lowrank_dist.quantization import FP4, FP8, INT8, MXFP4, NF4, ResidualFormat
from lowrank_dist.storage.reader import CheckpointReader

FORMATS: list[ResidualFormat] = [NF4(), NF4(double_quant=True), FP4(), MXFP4(), INT8(), FP8()]
STARTS: dict[str, Method] = {
    "LoRA (the format alone)": LoRA(),
    "PiSSA, T = 5": PiSSA(quantization_iterations=5),
    "LoftQ, T = 5": LoftQ(quantization_iterations=5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "formats.md")
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="where `make demo` puts model and data")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--examples", type=int, default=16, help="whose inputs the outputs' errors are for; held out")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--tiny", action="store_true", help="dry run on a random model of two layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            options.rank = 4
            model, data = models.save_tiny_model(Path(folder) / "random-llama"), random_data()
        else:
            model = fetch_model(options.work)
            tokenizer = AutoTokenizer.from_pretrained(model)
            train, test = fetch_data(options.work, tokenizer)
            data = Data(calibration=[], held_out=batches_of(test, tokenizer, options.examples), train=[])
            del train
        (report if data.held_out else report_of_weights)(model, data, options)


def report(model: Path, data: Data, options: argparse.Namespace) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    moments = second_moments(backbone, data.held_out)
    original = loss_of(backbone, data.held_out)
    dry = " This is a dry run on a random model." if options.tiny else ""
    notes = [
        f"all linears of {model.name}, fp32 factors, r = alpha = {options.rank}.{dry} Outputs and losses: "
        f"{len(data.held_out)} examples; loss of the original model {original:.4f}",
    ]
    machine = f"one process, {torch.get_num_threads()} threads"
    parts = [header("Residual formats: measured", Path(__file__).name, PACKAGES, machine, notes)]
    columns = ["format", "bits", "weight error %", "output error %", "loss at step 0"]
    for label in options.starts:
        method = STARTS[label]
        rows = []
        for residual in FORMATS:
            found = start(backbone, model, method, options.rank, (moments, moments), data.held_out, residual)
            row = [str(residual), f"{bits(residual):.3f}", f"{100 * found.weight:.2f}", f"{100 * found.output:.2f}"]
            rows.append([*row, f"{found.loss:.4f}"])
            print(f"{label}: {' | '.join(rows[-1])}", flush=True)
        parts.append(f"## {label}\n\n{table(columns, rows)}")
        write_report(options.output, parts, dry=options.tiny)


def report_of_weights(model: Path, data: Data, options: argparse.Namespace) -> None:
    """Errors of the weights; the model itself is not loaded."""
    notes = [f"all linears of {model.name}, fp32 factors, r = alpha = {options.rank}; means over the matrices"]
    machine = f"one process, {torch.get_num_threads()} threads"
    parts = [header("Residual formats: measured", Path(__file__).name, PACKAGES, machine, notes)]
    for label in options.starts:
        rows = []
        for residual in FORMATS:
            error = weight_error(model, STARTS[label], options.rank, residual)
            rows.append([str(residual), f"{bits(residual):.3f}", f"{100 * error:.2f}"])
            print(f"{label}: {' | '.join(rows[-1])}", flush=True)
        parts.append(f"## {label}\n\n{table(['format', 'bits', 'weight error %'], rows)}")
        write_report(options.output, parts, dry=options.tiny)


def weight_error(model: Path, method: Method, rank: int, residual: ResidualFormat) -> float:
    """Mean of ``||W - (Q + s B A)||_F / ||W||_F``."""
    reader, errors = CheckpointReader(model), list[float]()
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    for planned in open_plan(reader, adapter).plan.matrices:
        weight = reader.rows(planned.key, 0, planned.rows).float()
        lost = weight - computed(planned, weight, method, torch.empty(0), residual)
        errors.append(float(lost.norm() / weight.norm()))
    reader.close()
    return fmean(errors)


def bits(residual: ResidualFormat) -> float:
    """Bits for each weight of a large matrix."""
    partition = RowPartition(rows=4096, columns=4096, world_size=1, block=residual.block)
    return sum(8 * s.numel * s.dtype.itemsize for s in residual.storages(partition).values()) / 4096**2


if __name__ == "__main__":
    main()
