"""Forward and backward of one adapted layer: seconds, memory, error; every variant on the same numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.gpu.variants import VARIANTS, Problem, decoded
from models import LLAMA_8B, LLAMA_70B, TINY_LAYER
from reporting import table
from torch import Tensor, nn

ERROR_TOKENS = 64  # of the comparison with fp64


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Which layers, and how often.

    Attributes
    ----------
    shapes
        ``[out, in]`` by name.
    tokens
        Rows of x.
    rank
        r.
    repeats
        Timed runs of each variant.
    """

    shapes: dict[str, tuple[int, int]]
    tokens: tuple[int, ...]
    rank: int
    repeats: int


def scale(*, tiny: bool) -> Scale:
    """Of a LLaMA-3-8B and a LLaMA-3-70B layer, or of one that has a few rows."""
    if tiny:
        return Scale(shapes={"tiny up_proj": TINY_LAYER["up_proj"]}, tokens=(16,), rank=8, repeats=2)
    shapes = {
        f"{size} {name}": layer[name]
        for size, layer in (("8B", LLAMA_8B), ("70B", LLAMA_70B))
        for name in ("q_proj", "k_proj", "up_proj", "down_proj")
    }
    return Scale(shapes=shapes, tokens=(512, 4096, 16384), rank=128, repeats=20)


def layers_table(of: Scale, device: torch.device, dtype: torch.dtype) -> str:
    """Markdown."""
    rows = []
    for name, shape in of.shapes.items():
        problem = _problem(shape, of.rank, device, dtype)
        exact = decoded(problem)
        for tokens in of.tokens:
            times = _measure(problem, exact, tokens, of.repeats)
            ceiling = times["dense, no adapter"].seconds
            for variant, found in times.items():
                rows.append(
                    [
                        name,
                        f"{shape[0]} x {shape[1]}",
                        tokens,
                        variant,
                        f"{1e3 * found.seconds:.3f}",
                        f"{found.seconds / ceiling:.2f}",
                        "-" if found.peak is None else f"{found.peak / 1e6:.0f}",
                        f"{found.output_error:.1e}",
                        "-" if found.gradient_error is None else f"{found.gradient_error:.1e}",
                    ]
                )
    text = (
        f"Forward and backward to x, A and B; r = {of.rank}, arithmetic in {str(dtype).removeprefix('torch.')}, NF4 "
        f"double-quantized; median of {of.repeats} runs after a warm-up, the variants by turns. Over dense: by the "
        "time of the dense layer without an adapter. Peak: allocated above what the layer and x hold. Errors: relative "
        f"Frobenius, of y and of A's gradient, against fp64 on {ERROR_TOKENS} tokens and the same decoded weight "
        "(dense ones: the dense weight)."
    )
    columns = ["layer", "out x in", "tokens", "", "ms", "over dense", "peak MB", "error of y", "of dA"]
    return "\n\n".join(["## One layer (`layers`)", text, table(columns, rows)])


@dataclass(frozen=True, kw_only=True)
class _Found:
    seconds: float
    peak: int | None
    output_error: float
    gradient_error: float | None


def _problem(shape: tuple[int, int], rank: int, device: torch.device, dtype: torch.dtype) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    rows, columns = shape
    weight = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
    a = torch.randn(rank, columns, generator=generator, device=device) / columns**0.5
    b = torch.randn(rows, rank, generator=generator, device=device) * 0.1 / rank**0.5
    return Problem(weight=weight.to(dtype), a=a, b=b, dtype=dtype)


def _measure(problem: Problem, exact: Tensor, tokens: int, repeats: int) -> dict[str, _Found]:
    (rows, columns), device, dtype = problem.weight.shape, problem.weight.device, problem.dtype
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(tokens, rows, generator=generator, device=device, dtype=dtype)
    layers = {name: build(problem) for name, build in VARIANTS.items()}
    runs = {name: _step(layer, x, grad) for name, layer in layers.items()}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_seconds(run, device))
    found = {}
    for name, run in runs.items():
        dense = name.startswith("dense")
        weight = (problem.weight if dense else exact).double()
        errors = _errors(layers[name], problem, weight, x, grad, adapted=name != "dense, no adapter")
        found[name] = _Found(
            seconds=statistics.median(times[name]),
            peak=_peak(run, device),
            output_error=errors[0],
            gradient_error=errors[1],
        )
    return found


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(grad)

    return run


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _peak(run: Callable[[], None], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _errors(
    layer: nn.Module, problem: Problem, weight: Tensor, x: Tensor, grad: Tensor, *, adapted: bool
) -> tuple[float, float | None]:
    x, grad = x.detach()[:ERROR_TOKENS].clone().requires_grad_(), grad[:ERROR_TOKENS]
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(grad)
    a, b, x64, grad64 = (t.detach().double() for t in (problem.a, problem.b, x, grad))
    wanted = x64 @ weight.mT
    if not adapted:
        return _relative(y, wanted), None
    wanted += x64 @ a.mT @ b.mT
    (to_a,) = [p.grad for p in layer.parameters() if p.grad is not None and p.shape == problem.a.shape][:1]
    return _relative(y, wanted), _relative(to_a, (grad64 @ b).mT @ x64)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).norm() / wanted.norm())
