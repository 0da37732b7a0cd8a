"""What ``lowrank-dist decompose`` does on every rank, by its parsed options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig

from lowrank_dist.adapters.files import read_config_file
from lowrank_dist.cli.calibration import calibration_pass, check_calibration
from lowrank_dist.cli.ranks import first_on_host, local_ranks, shard_group
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.decomposition.report import MatrixReport, as_table
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Walk, check_matrices
from lowrank_dist.errors import InputError
from lowrank_dist.methods import Method
from lowrank_dist.model.plan import open_plan
from lowrank_dist.progress import progress_bar
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.residual_model.create import decompose
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.dtypes import FLOAT_DTYPES, NAMED_DTYPES
from lowrank_dist.storage.layout import MANIFEST, read_manifest
from lowrank_dist.storage.resolve import resolve_checkpoint


def decompose_model(options: Any, init: Method, residual: ResidualFormat | None) -> None:
    """Decompose the pretrained model of `options` with `init`, and print the report on the first rank. Collective.

    Parameters
    ----------
    options
        Those of `lowrank_dist.cli.decompose.parser`.
    init
        The method, with its settings.
    residual
        Format of the residual; None: the dtype of the pretrained weights.

    Raises
    ------
    InputError
        If the options contradict each other, the ranks or the model.
    """
    check_calibration(init, options)
    needs_data = init.statistic is not None
    with shard_group(options.accelerator, sharded_model=needs_data) as (group, device):
        with group.shared_errors():
            if options.devices > 1 and group.size != options.devices:
                raise InputError(f"--devices {options.devices}, but {group.size} ranks were started; leave it out")
            if first_on_host():  # one rank per host downloads a hub id
                resolve_checkpoint(options.pretrained, revision=options.revision)
        with group.shared_errors():
            source = resolve_checkpoint(options.pretrained, revision=options.revision)
            _check_source(source, options)
            reader = open_reader(source)
            adapter = _adapter(options)
        opened = open_plan(reader, adapter, group=group)
        plan = opened.plan
        with group.shared_errors():
            source_dtype = FLOAT_DTYPES[reader.info(plan.matrices[0].key).dtype]
            residual = residual or Dense(dtype=source_dtype)
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
            entries = read_manifest(output).records("matrices")
            print(as_table([MatrixReport.from_dict(entry) for entry in entries]))
            if not residual.stock:
                print(f"{residual}: this package loads the residual; stock transformers knows NF4, FP4 and dense ones")
            print(output)


def _check_source(source: Path, options: Any) -> None:
    """Raise InputError for a model that is decomposed already."""
    if ResidualModel.is_at(source):
        base = read_manifest(source).get("base") if (source / MANIFEST).is_file() else None
        raise InputError(
            f"--pretrained {options.pretrained}: is a residual model, whose weights lack what its adapter holds; "
            f"pass the original model{f', {base}' if base else ''}, or train it as it is with "
            f"PiSSAStrategy(pretrained={str(options.pretrained)!r})"
        )


def _adapter(options: Any) -> LoraConfig:
    if options.adapter is not None:
        path = Path(options.adapter)
        if not path.is_file():
            raise InputError(f"--adapter {path}: no such file; pass the adapter_config.json of a PEFT LoRA")
        config = read_config_file(path)
        if not isinstance(config, LoraConfig):
            raise InputError(f"--adapter {path}: a {config.peft_type} configuration, not a LoRA")
        config.init_lora_weights, config.inference_mode = True, False
        return config
    rank = options.rank or 16
    return LoraConfig(
        r=rank,
        lora_alpha=options.alpha or rank,
        use_rslora=options.rslora,
        target_modules=options.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
