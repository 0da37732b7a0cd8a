"""``lowrank-dist decompose``: decompose a pretrained model into a residual model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from peft import LoraConfig

from lowrank_dist.cli.calibration import add_calibration_options, calibration_pass, check_calibration
from lowrank_dist.cli.ranks import first_on_host, launch, launched, local_ranks, shard_group
from lowrank_dist.decomposition.report import MatrixReport, as_table
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Walk, check_matrices
from lowrank_dist.errors import InputError
from lowrank_dist.methods import METHODS, Method, method_named
from lowrank_dist.model.plan import open_plan
from lowrank_dist.progress import progress_bar
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.residual_model.create import decompose
from lowrank_dist.storage.dtypes import FLOAT_DTYPES, NAMED_DTYPES
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.reader import CheckpointReader, resolve_checkpoint

QUANTIZED = {"qpissa": "pissa", "qlora": "lora"}  # common names of a method with an NF4 residual
NEED_NF4 = (*QUANTIZED, "loftq", "qera")
FACTOR_DTYPES = [name for name in NAMED_DTYPES if name != "float16"]


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist decompose``; `argv` excludes the command's name. Returns the exit status."""
    name = _method_of(argv)
    options = parser(name).parse_args(list(argv))
    if options.devices > 1 and not launched():
        return launch(["decompose", *argv], options.devices)
    quantized = options.quantization == "nf4" or (options.quantization is None and name in NEED_NF4)
    if name in QUANTIZED and not quantized:
        raise InputError(
            f"--method {name} requires an NF4 residual; leave --quantization out, or use {QUANTIZED[name]}"
        )
    settings = options.get("init")  # absent where the method has none
    init: Method = _method(name)(**({} if settings is None else vars(settings)))
    check_calibration(init, options)
    needs_data = init.statistic is not None
    with shard_group(options.accelerator, sharded_model=needs_data) as (group, device):
        with group.shared_errors():
            if options.devices > 1 and group.size != options.devices:
                raise InputError(f"--devices {options.devices}, but {group.size} ranks were started; leave it out")
            if first_on_host():  # one rank per host downloads a hub id
                resolve_checkpoint(options.pretrained, revision=options.revision)
        with group.shared_errors():
            reader = CheckpointReader(resolve_checkpoint(options.pretrained, revision=options.revision))
            adapter = _adapter(options)
        opened = open_plan(reader, adapter, group=group)
        plan = opened.plan
        with group.shared_errors():
            source_dtype = FLOAT_DTYPES[reader.info(plan.matrices[0].key).dtype]
            residual = NF4(**vars(options.nf4)) if quantized else Dense(dtype=source_dtype)
            init.check(residual)
            check_matrices(plan, init)
        # the calibration pass reads the weights too
        with progress_bar((2 if needs_data else 1) * reader.nbytes, show=group.rank == 0) as bar:
            walk = Walk(
                reader,
                group,
                init=init,
                residual=residual,
                factor_dtype=NAMED_DTYPES[options.factor_dtype] if options.factor_dtype else source_dtype,
                device=device,
                advance=bar.update,
                thorough=options.thorough,
            )
            output = decompose(
                plan,
                walk,
                options.output,
                adapter=adapter,
                base=str(options.pretrained),
                sharding=Sharding(ranks_per_matrix=options.ranks_per_matrix, ranks_per_node=local_ranks()),
                announce=bar.write,
                overwrite=options.overwrite,
                calibrated=calibration_pass(options, opened.backbone, plan, walk, source_dtype) if needs_data else None,
            )
        if group.rank == 0:
            entries = json.loads((output / MANIFEST).read_text())["matrices"]
            print(as_table([MatrixReport.from_dict(entry) for entry in entries]))
            print(output)
    return 0


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
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output")
    parser.add_argument(
        "--method", default=method, help=f"one of {', '.join(sorted({*METHODS, *QUANTIZED}))} (default: pissa)"
    )
    parser.add_argument("--rank", type=int, default=16, help="r")
    parser.add_argument("--alpha", type=float | None, help="lora_alpha (default: r)")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    parser.add_argument("--target_modules", type=list[str] | str, default="all-linear", help="as in peft.LoraConfig")
    parser.add_argument(
        "--adapter", type=str | None, help="adapter_config.json of a PEFT LoRA, instead of the four options above"
    )
    parser.add_argument(
        "--quantization",
        choices=["nf4", "none"],
        help=f"format of the residual (default: nf4 for {', '.join(NEED_NF4)}; else none: the dtype of --pretrained)",
    )
    parser.add_class_arguments(NF4, "nf4")
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
        add_calibration_options(parser)
    parser.add_class_arguments(_method(method), "init")
    return parser


def _adapter(options: Any) -> LoraConfig:
    if options.adapter is not None:
        path = Path(options.adapter)
        if not path.is_file():
            raise InputError(f"--adapter {path}: no such file; pass the adapter_config.json of a PEFT LoRA")
        config = LoraConfig.from_peft_type(**json.loads(path.read_text()))
        if not isinstance(config, LoraConfig):
            raise InputError(f"--adapter {path}: a {config.peft_type} configuration, not a LoRA")
        config.init_lora_weights, config.inference_mode = True, False
        return config
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        use_rslora=options.rslora,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
