"""Ways to start an adapter on an NF4 base: how far weights and outputs are from the original. A Markdown report.

    python benchmarks/bench_quantized_starts.py                        # benchmarks/results/quantized_starts.md
    python benchmarks/bench_quantized_starts.py --train 40 200         # and losses after training; hours on a CPU
    python benchmarks/bench_quantized_starts.py --tiny                 # a dry run on a random model of two layers

SmolLM2-135M and the pairs of `make demo`, fetched into runs/demo unless they are there. One process decomposes all
linears with this package, given the second moments R of the layers' inputs in the original model. Errors are those of
``D = W - (Q + s B A)``, means over all matrices: of the weight ``||D||_F / ||W||_F``; of the output
``sqrt(tr D R D^T / tr W R W^T)``, with R of the calibration data and of held-out data. The loss is that of stock
transformers with the weights ``Q + s B A``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import models
import torch
from peft import LoraConfig
from ranks import preload, run_alone
from reporting import header, table, write_report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_dist.demo.assets import fetch_data, fetch_model
from lowrank_dist.demo.evaluate import encode
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.methods import EVA, QERA, CorDA, LoftQ, LoRA, Matrix, Method, PiSSA
from lowrank_dist.model.plan import PlannedMatrix, open_plan
from lowrank_dist.quantization import NF4, ResidualFormat
from lowrank_dist.storage.reader import CheckpointReader

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
STARTS: dict[str, Method] = {
    "QLoRA": LoRA(),
    "EVA": EVA(),
    "CorDA": CorDA(),
    "LoftQ, T = 1": LoftQ(),
    "LoftQ, T = 5": LoftQ(quantization_iterations=5),
    "QPiSSA, T = 1": PiSSA(),
    "QPiSSA, T = 5": PiSSA(quantization_iterations=5),
    "QERA, approximate": QERA(approximate=True),
    "QERA, exact": QERA(),
}
FORMAT = NF4(double_quant=True)
SINGLE = ShardGroup.single()
MAX_LENGTH = 256
BATCH_KEYS = ("input_ids", "labels", "attention_mask")

Batches = list[dict[str, Tensor]]


@dataclass
class Data:
    """Batches of one example each."""

    calibration: Batches
    held_out: Batches
    train: Batches


@dataclass
class Start:
    """What one way to start leaves: means over the matrices, and the loss of the model."""

    weight: float
    output: float
    held_out: float
    loss: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quantized_starts.md")
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="where `make demo` puts model and data")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--examples", type=int, default=64, help="for calibration, and as many held out")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--train", type=int, nargs="*", default=[], metavar="STEPS", help="report losses after these")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--tiny", action="store_true", help="dry run on a random model of two layers")
    options = parser.parse_args()
    if options.train:
        preload("lightning", "deepspeed")
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            options.ranks, options.rates = [4], options.rates[:1]
            model, data = models.save_tiny_model(Path(folder) / "random-llama"), random_data()
        else:
            model = fetch_model(options.work)
            tokenizer = AutoTokenizer.from_pretrained(model)
            train, test = fetch_data(options.work, tokenizer)
            data = Data(
                calibration=batches_of(train, tokenizer, options.examples),
                held_out=batches_of(test, tokenizer, options.examples),
                train=batches_of(train, tokenizer, None),
            )
        report(model, data, options)


def report(model: Path, data: Data, options: argparse.Namespace) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    calibration, held_out = (second_moments(backbone, batches) for batches in (data.calibration, data.held_out))
    tokens, others = (sum(batch["input_ids"].numel() for batch in part) for part in (data.calibration, data.held_out))
    original = loss_of(backbone, data.held_out)
    dry = " This is a dry run on a random model." if options.tiny else ""
    notes = [
        f"all linears of {model.name}, NF4 with double quantization, fp32 factors, alpha = r.{dry} Calibration: "
        f"{len(data.calibration)} training examples, {tokens} tokens; held out: {len(data.held_out)} others, {others} "
        f"tokens, on whose completions the loss is taken; original model {original:.4f}",
    ]
    machine = f"one process, {torch.get_num_threads()} threads"
    parts = [header("Starts on a quantized base: measured", Path(__file__).name, PACKAGES, machine, notes)]
    for rank in options.ranks:
        columns = ["", "weight error %", "output error %", "held out %", "loss at step 0", "seconds"]
        columns += [f"after {steps} steps (rate)" for steps in options.train]
        rows = []
        for label in options.starts:
            method = STARTS[label]
            found = start(backbone, model, method, rank, (calibration, held_out), data.held_out)
            row = [label, *(f"{100 * value:.2f}" for value in (found.weight, found.output, found.held_out))]
            row += [f"{found.loss:.4f}", f"{found.seconds:.0f}"]
            row += best(model, method, rank, data, options.train, options.rates) if options.train else []
            rows.append(row)
            print(f"r = {rank}: {' | '.join(row)}", flush=True)
        parts.append(f"## r = {rank}\n\n{table(columns, rows)}")
        write_report(options.output, parts, dry=options.tiny)


def batches_of(path: Path, tokenizer: Any, limit: int | None) -> Batches:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:limit]]
    encoded = (encode(row, tokenizer, MAX_LENGTH) for row in rows)
    return [batch_of(torch.tensor([ids]), torch.tensor([labels])) for ids, labels in encoded]


def batch_of(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return dict(zip(BATCH_KEYS, (ids, labels, torch.ones_like(ids)), strict=True))


def random_data() -> Data:
    drawn = [torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    batches = [batch_of(ids, ids) for ids in drawn]
    return Data(calibration=batches[:4], held_out=batches[4:8], train=batches[8:])


@contextmanager
def hooks(backbone: nn.Module, hook: Any) -> Iterator[None]:
    handles = [
        module.register_forward_hook(partial(hook, name))
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def second_moments(backbone: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """``X^T X / tokens`` of every linear but the head; layers with the same input share the tensor."""
    sums: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    last: dict[str, Any] = {"x": None, "name": ""}

    def hook(name: str, _: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        (x,) = args
        if name == "lm_head":
            return
        if x is last["x"]:
            source[name] = last["name"]
            return
        last["x"], last["name"], source[name] = x, name, name
        flat = x.flatten(0, -2)
        sums[name] = sums[name].addmm_(flat.mT, flat) if name in sums else flat.mT @ flat

    with hooks(backbone, hook):
        for batch in batches:
            backbone(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    for value in sums.values():
        value /= tokens
    return {name: sums[of] for name, of in source.items()}


@torch.no_grad()
def loss_of(backbone: Any, batches: Batches) -> float:
    """Mean over the trained tokens of all batches."""
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(backbone(**batch, use_cache=False).loss) * tokens
        count += tokens
    return total / count


@torch.no_grad()
def start(
    backbone: Any,
    model: Path,
    method: Method,
    rank: int,
    moments: tuple[dict[str, Tensor], dict[str, Tensor]],
    held_out: Batches,
    residual: ResidualFormat = FORMAT,
) -> Start:
    """Decompose all linears and put what the model then computes with in their place, until it has been measured."""
    reader = CheckpointReader(model)
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    errors: list[tuple[float, float, float]] = []
    seconds = 0.0
    originals: dict[str, Tensor] = {}
    for planned in open_plan(reader, adapter).plan.matrices:
        weight = backbone.get_submodule(planned.layer).weight
        originals[planned.layer] = weight.data.clone()
        started = time.monotonic()
        at_start = computed(planned, weight.data, method, moments[0][planned.layer], residual)
        seconds += time.monotonic() - started
        lost = weight.data - at_start
        on = (relative(lost, weight.data, of[planned.layer]) for of in moments)
        errors.append((float(lost.norm() / weight.data.norm()), *on))  # type: ignore[arg-type]
        weight.data.copy_(at_start)
    loss = loss_of(backbone, held_out)
    for name, original in originals.items():
        backbone.get_submodule(name).weight.data.copy_(original)
    weight_error, output, other = (fmean(values) for values in zip(*errors, strict=True))
    return Start(weight=weight_error, output=output, held_out=other, loss=loss, seconds=seconds)


def computed(
    planned: PlannedMatrix, weight: Tensor, method: Method, moments: Tensor, residual: ResidualFormat
) -> Tensor:
    """``Q + s B A``, ``[out, in]``: the weight that the model computes with at step 0."""
    matrix = Matrix.of(
        planned,
        weight.clone(),
        SINGLE,
        partition=planned.row_partition(1, block=residual.block),
        factor_dtype=torch.float32,
        statistic=moments if method.statistic == "covariance" else None,
    )
    found = method.decompose(matrix, residual)
    product = found.factors.left @ found.factors.right
    return found.residual.rows(slice(None)) + matrix.scaling * product


def relative(lost: Tensor, weight: Tensor, moments: Tensor) -> float:
    """``sqrt(tr D R D^T / tr W R W^T)``."""
    parts = [float(((matrix @ moments).double() * matrix.double()).sum()) for matrix in (lost, weight)]
    return (max(parts[0], 0.0) / parts[1]) ** 0.5


def best(model: Path, method: Method, rank: int, data: Data, steps: Sequence[int], rates: Sequence[float]) -> list[str]:
    """The lowest held-out loss after each number of steps, and the rate that gave it."""
    curves = {rate: run_alone(trained, model, method, rank, data, tuple(steps), rate, threads=2) for rate in rates}
    found = [min((curve[step], rate) for rate, curve in curves.items()) for step in steps]
    return [f"{loss:.4f} ({rate:g})" for loss, rate in found]


def trained(
    model: Path, method: Method, rank: int, data: Data, steps: tuple[int, ...], rate: float
) -> dict[int, float]:
    """Held-out losses after training with `rate`: one example a step, a constant rate after a warm-up."""
    import lightning as L

    from lowrank_dist import Calibration, CausalLMModule, PiSSAStrategy

    found: dict[int, float] = {}

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step in steps:
                module.eval()
                found[trainer.global_step] = loss_of(module.model, data.held_out)
                module.train()

    needs_data = {"calibration": Calibration(batches=len(data.calibration), data=data.calibration)}
    strategy = PiSSAStrategy(
        str(model),
        adapter=LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        init=method,
        quantization=FORMAT,
        gradient_checkpointing=False,
        show_progress=False,
        **(needs_data if method.statistic else {}),
    )
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=max(steps),
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        CausalLMModule(str(model), lr=rate, scheduler="constant"), torch.utils.data.DataLoader(data.train, None)
    )
    return found


if __name__ == "__main__":
    main()
