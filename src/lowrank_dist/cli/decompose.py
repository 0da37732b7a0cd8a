"""``lowrank-dist decompose``: its options; `lowrank_dist.cli.decompose_model` does what they say.

The process that starts the ranks, and ``--help``, import no more than the options need.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from lowrank_dist.cli.output import add_overwrite
from lowrank_dist.cli.ranks import launch, launched
from lowrank_dist.errors import InputError
from lowrank_dist.methods import METHODS, Method, method_named
from lowrank_dist.quantization.registry import FORMATS
from lowrank_dist.storage.dtypes import NAMED_DTYPES

QUANTIZED = {"qpissa": "pissa", "qlora": "lora"}  # common names of a method with a quantized residual
NEED_FORMAT = (*QUANTIZED, "loftq", "qera")
ADAPTER_OPTIONS = ("rank", "alpha", "rslora", "target_modules")  # instead of --adapter
FACTOR_DTYPES = [name for name in NAMED_DTYPES if name != "float16"]


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist decompose``; `argv` excludes the command's name. Returns the exit status."""
    name = _method_of(argv)
    options = parser(name).parse_args(list(argv))
    _check(options)
    if options.devices > 1 and not launched():
        return launch(["decompose", *argv], options.devices)
    quantization = options.quantization or ("nf4" if name in NEED_FORMAT else "none")
    if name in QUANTIZED and quantization == "none":
        raise InputError(
            f"--method {name} requires a quantized residual; leave --quantization out, or use {QUANTIZED[name]}"
        )
    _check_unused(options, quantization)
    residual = FORMATS[quantization](**_options_of(options, quantization)) if quantization in FORMATS else None
    settings = options.get("init")  # absent where the method has none
    from lowrank_dist.cli.decompose_model import decompose_model

    init: Method = _method(name)(**({} if settings is None else vars(settings)))
    decompose_model(options, init, residual)
    return 0


def _check(options: Any) -> None:
    """Raise InputError for numbers that cannot be, and for options of the adapter beside a file that has them all."""
    for option in ("rank", "alpha", "devices", "ranks_per_matrix"):
        value = options[option]
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{option} {value} must be positive")
    given = [name for name in ADAPTER_OPTIONS if options[name]]
    if options.adapter is not None and given:
        raise InputError(
            f"--{given[0]} has no effect with --adapter {options.adapter}, which says it; change it there, or leave "
            "--adapter out"
        )


def _options_of(options: Any, name: str) -> dict[str, Any]:
    """The options of a residual format; it has none if the parser knows none."""
    found = options.get(name)
    return {} if found is None else dict(vars(found))


def _check_unused(options: Any, quantization: str) -> None:
    """Raise InputError if options of another format than that of the residual were changed."""
    for name, residual in FORMATS.items():
        given = _options_of(options, name)
        changed = [f.name for f in fields(residual) if given.get(f.name, f.default) != f.default]
        if changed and name != quantization:
            raise InputError(
                f"--{name}.{changed[0]} has no effect on --quantization {quantization}; leave it out, or pass "
                f"--quantization {name}"
            )


def _method_of(argv: Sequence[str]) -> str:
    """The method that `argv` names; the parser is built with its options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default="pissa")
    known, _ = parser.parse_known_args(list(argv))
    name = str(known.method)
    if "." not in name:
        name = name.replace("-", "_")
    _method(name)
    return name


def _method(name: str) -> type[Method]:
    return method_named(QUANTIZED.get(name, name))


def parser(method: str) -> ArgumentParser:
    """The parser of ``lowrank-dist decompose --method METHOD``, those of the method among them."""
    parser = ArgumentParser(
        prog="lowrank-dist decompose",
        description="Decompose a pretrained model and write a residual model: the residual, and the initial adapter "
        "beside it. Stock transformers + peft load it, and PiSSAStrategy(pretrained=DIR) starts from it. A killed run "
        "resumes where it stopped.",
    )
    parser.add_argument("--pretrained", required=True, help="directory with safetensors, or hub id")
    parser.add_argument("--revision", type=str | None, help="revision of a hub id")
    parser.add_argument("--output", required=True, help="directory to write; complete or absent")
    add_overwrite(parser)
    parser.add_argument(
        "--method", default=method, help=f"one of {', '.join(sorted({*METHODS, *QUANTIZED}))} (default: pissa)"
    )
    parser.add_argument("--rank", type=int | None, help="r (default: 16)")
    parser.add_argument("--alpha", type=float | None, help="lora_alpha (default: r)")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    parser.add_argument(
        "--target_modules", type=list[str] | str | None, help="as in peft.LoraConfig (default: all-linear)"
    )
    parser.add_argument(
        "--adapter", type=str | None, help="adapter_config.json of a PEFT LoRA, instead of the four options above"
    )
    parser.add_argument(
        "--quantization",
        choices=[*FORMATS, "none"],
        help=f"format of the residual (default: nf4 for {', '.join(NEED_FORMAT)}; else none: the dtype of "
        "--pretrained). Stock transformers loads nf4, fp4 and none; this package all",
    )
    for residual in FORMATS.values():
        if fields(residual):
            parser.add_class_arguments(residual, residual.name)
    parser.add_argument(
        "--factor_dtype", choices=FACTOR_DTYPES, help="dtype of A and B (default: that of --pretrained)"
    )
    parser.add_argument(
        "--thorough", action="store_true", help="report nuclear norms and excess residuals too; takes longer"
    )
    parser.add_argument("--devices", type=int, default=1, help="ranks to start on this host")
    parser.add_argument(
        "--ranks_per_matrix", type=int | None, help="ranks that share each matrix (default: a cost model decides)"
    )
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="where to compute")
    parser.add_argument(
        "--calibration_data",
        type=str | None,
        help="for methods that need data: path of a .jsonl file, or id of a Hugging Face data set",
    )
    if _method(method).statistic is not None:
        from lowrank_dist.cli.calibration import add_calibration_options

        add_calibration_options(parser)
    parser.add_class_arguments(_method(method), "init")
    return parser
