"""Writing decomposed models: the walk's result goes to disk instead of into a model, each rank its own part.

The directory is built beside its final place. What is complete is recorded in a journal after it has reached the disk,
so that a run that was killed goes on where it stopped; the rename at the end makes the whole visible at once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from lowrank_dist import __version__
from lowrank_dist.adapter_files import MANIFEST, WEIGHTS
from lowrank_dist.checkpoint_io import CheckpointReader, copy_other_files, write_json
from lowrank_dist.comm import ShardGroup
from lowrank_dist.decomposed import factor_keys
from lowrank_dist.directories import check_free, empty, exclusive, flush_directory, put_in_place, staging_of
from lowrank_dist.errors import InputError
from lowrank_dist.nf4 import NF4
from lowrank_dist.partition import FlatPartition
from lowrank_dist.planner import Sharding, scheduled
from lowrank_dist.report import MatrixReport
from lowrank_dist.residual import FileTensor
from lowrank_dist.skeleton import ModelError, Plan, plain_name
from lowrank_dist.tensor_files import TensorFiles, stored_dtype
from lowrank_dist.walk import DecomposedMatrix, Walk, check_finite, factor_shapes, row_partition

FORMAT = 2  # of the manifest and of what the fingerprint covers
JOURNAL, LOCK = "journal.jsonl", "lock"
FLUSH_BYTES = 64 * 2**20  # of the source, between two entries of the journal
COPY_BYTES = 64 * 2**20  # of a tensor that is copied as it is, at a time
_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def source_fingerprint(reader: CheckpointReader, group: ShardGroup) -> str:
    """Hexadecimal digest of a checkpoint on disk, or of the fingerprint that a `lowrank_dist.sources.WeightSource` has.

    Covers names, sizes and headers of its safetensors files, and 16 samples of 64 KiB of each, evenly spread (hashing
    all of it would cost a second read). Rank 0 computes it, the others are told. Collective.
    """
    return _told(lambda: _hashed_source(reader).hexdigest(), group)


def fingerprint(walk: Walk, plan: Plan) -> str:
    """Hexadecimal digest of everything that a decomposed model depends on.

    Of the source, what `source_fingerprint` covers. Of the settings: method, residual format, dtype of the factors, and
    for every matrix rank and scaling. Rank 0 computes it, the others are told. Collective.
    """

    def compute() -> str:
        digest = _hashed_source(walk.reader)
        matrices = [[m.name, m.key, m.rank, m.scaling] for m in plan.matrices]
        settings = [FORMAT, repr(walk.init), repr(walk.residual), str(walk.factor_dtype), matrices]
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()

    return _told(compute, walk.group)


def _told(compute: Callable[[], str], group: ShardGroup) -> str:
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
            digest.update(handle.read(header))
            for sample in range(_SAMPLES):
                handle.seek(8 + header + max(0, size - 8 - header - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest


def decompose(
    plan: Plan,
    walk: Walk,
    output: str | os.PathLike[str],
    *,
    adapter: LoraConfig,
    base: str,
    sharding: Sharding | None = None,
    announce: Callable[[str], object] = lambda _: None,
    overwrite: bool = False,
    key: str | None = None,
) -> Path:
    """Decompose a checkpoint and write the result as a decomposed model. Collective: all ranks of the walk call it.

    Parameters
    ----------
    plan
        From `lowrank_dist.skeleton.plan_walk`.
    walk
        The checkpoint, the ranks that share the work (all must see `output`), and how matrices are decomposed.
    output
        Directory to write; complete or absent. What an earlier call with the same source and settings completed,
        in this directory or in the remains of a killed run, is kept.
    adapter
        PEFT configuration of the adapter.
    base
        Name of the source for the manifest.
    sharding, announce
        See `lowrank_dist.planner.scheduled`.
    overwrite
        Replace what else is at `output`.
    key
        The `fingerprint`, where it is known already.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    InputError
        On every rank: another directory is in the way, another run is writing, the disk is too small.
    ModelError
        Where bitsandbytes' layout cannot hold a matrix.
    """
    output, group = Path(output).absolute(), walk.group
    _check_layout(plan, walk)
    key = key or fingerprint(walk, plan)
    if group.broadcast_object(is_complete(output, key)):
        return output
    with group.shared_errors():
        if output.exists() and not overwrite:
            raise InputError(
                f"{output}: exists, and is not this model decomposed with these settings; remove it, choose another "
                "directory or pass overwrite"
            )
    writer = _Writer(plan, walk, output, key)
    with writer.locked():
        writer.begin()
        remaining = [planned for planned in plan.matrices if planned.name not in writer.reports]
        walk.advance(sum(report.nbytes for report in writer.reports.values()))
        writer.matrices(scheduled(walk, remaining, sharding, announce))
        writer.others()
        writer.finish(adapter, base)
    return output


def _check_layout(plan: Plan, walk: Walk) -> None:
    """Raise ModelError where the published layout cannot hold a matrix of `plan`."""
    shared = {parameter.key for parameter in plan.parameters}
    keys = [planned.key for planned in plan.matrices]
    for planned in plan.matrices:
        problem = None
        if walk.init.core is not None:
            problem = f"the layout has no place for the three factors of {walk.init}"
        elif walk.init.statistic is not None:
            problem = f"{walk.init} depends on data, which the fingerprint of a decomposed model does not cover"
        elif planned.input_first and not walk.residual.exact:
            problem = "bitsandbytes stores 4-bit weights as [out, in], this one is [in, out]; use a dense residual"
        elif planned.wrapped:
            problem = "the layout has no place for parameters that are adapted without their module"
        elif planned.key in shared or keys.count(planned.key) > 1:
            problem = f"{planned.key} stands for another parameter too (untied), and the layout keeps names"
        if problem is not None:
            raise ModelError(f"{planned.name}: {problem}; or train without saving a decomposed model (no init_cache)")


def is_complete(output: Path, key: str) -> bool:
    """Whether `output` is a decomposed model with the `fingerprint` `key`."""
    manifest = output / MANIFEST
    if not manifest.is_file():
        return False
    try:
        return bool(json.loads(manifest.read_text()).get("fingerprint") == key)
    except ValueError:
        return False


class _Writer:
    """One decomposed model under construction."""

    def __init__(self, plan: Plan, walk: Walk, output: Path, key: str) -> None:
        self.plan, self.walk, self.output, self.key = plan, walk, output, key
        self.reader, self.group, self.residual = walk.reader, walk.group, walk.residual
        self.staging = staging_of(output)
        self.reports: dict[str, MatrixReport] = {}
        self._pending: list[MatrixReport] = []
        self._error: Exception | None = None
        self._adapted = {planned.key: planned for planned in plan.matrices}
        root: dict[str, FileTensor] = {}
        for name in self.reader:
            if name in self._adapted:
                partition = row_partition(self._adapted[name], self.residual, 1)
                files = self.residual.files(partition, self._dtype(name))
                root |= {name + suffix: tensor for suffix, tensor in files.items()}
            else:
                root[name] = FileTensor(shape=self.reader.info(name).shape, dtype=self._dtype(name))
        factors = {
            factor_keys(planned)[factor]: FileTensor(shape=shape, dtype=walk.factor_dtype)
            for planned in plan.matrices
            for factor, shape in factor_shapes(planned).items()
        }
        self._nbytes = sum(tensor.numel * tensor.dtype.itemsize for tensor in (*root.values(), *factors.values()))
        self.initial = self.staging / f"{str(walk.init).lower()}_init"
        self._root = TensorFiles(self.staging, root)
        self._factors = TensorFiles(self.initial, factors, stem=Path(WEIGHTS).stem, max_bytes=sys.maxsize)

    def _dtype(self, name: str) -> torch.dtype:
        return stored_dtype(name, self.reader.info(name))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the directory under construction; a lock dies with its process."""
        with ExitStack() as stack:
            stack.callback(self._factors.close)
            stack.callback(self._root.close)
            with self.group.shared_errors():
                if self.group.rank == 0:
                    stack.enter_context(exclusive(self.staging))
            yield

    def begin(self) -> None:
        """Make the files, or find what a killed run has completed."""
        found: list[dict[str, Any]] = []
        with self.group.shared_errors():
            if self.group.rank == 0:
                found = self._journal()
                if not found:
                    self._create()
        reports = self.group.broadcast_object(found[1:])
        assert isinstance(reports, list)
        self.reports = {entry["name"]: MatrixReport.from_dict(entry) for entry in reports}

    def _journal(self) -> list[dict[str, Any]]:
        """Entries of the journal of a run with the same fingerprint; the last line may have been cut by its death."""
        path = self.staging / JOURNAL
        if not path.is_file() or not self._root.exist() or not self._factors.exist():
            return []
        entries = []
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        return entries if entries and entries[0] == {"fingerprint": self.key} else []

    def _create(self) -> None:
        empty(self.staging)
        check_free(self.output, self._nbytes)
        self.initial.mkdir()
        self._root.create()
        self._factors.create()
        (self.staging / JOURNAL).write_text(json.dumps({"fingerprint": self.key}) + "\n")
        flush_directory(self.staging)

    def matrices(self, decomposed: Iterable[DecomposedMatrix]) -> None:
        """Write decomposed matrices as they come."""
        for matrix in decomposed:
            try:
                self._matrix(matrix)
            except OSError as error:
                self._error = self._error or error
            self._pending.append(matrix.report)
            if sum(report.nbytes for report in self._pending) >= FLUSH_BYTES:
                self._commit()
        self._commit()

    def _matrix(self, matrix: DecomposedMatrix) -> None:
        planned, rank = matrix.planned, self.group.rank
        dtype = self._dtype(planned.key)
        for suffix, start, values in self.residual.to_files(matrix.residual, matrix.partition, rank, dtype):
            self._root.write(planned.key + suffix, start, values)
        for factor, shape in factor_shapes(planned).items():
            start, stop = FlatPartition(numel=math.prod(shape), world_size=self.group.size).bounds(rank)
            self._factors.write(factor_keys(planned)[factor], start, matrix.factors[factor][: stop - start])

    def _commit(self) -> None:
        """Bring to disk what all ranks have written, then record it."""
        try:
            self._root.flush()
            self._factors.flush()
        except OSError as error:
            self._error = self._error or error
        self.group.raise_together(self._error)
        self.reports |= {report.name: report for report in self._pending}
        if self.group.rank == 0 and self._pending:
            with open(self.staging / JOURNAL, "a") as journal:
                journal.writelines(json.dumps(report.as_dict()) + "\n" for report in self._pending)
                journal.flush()
                os.fsync(journal.fileno())
        self._pending = []

    def others(self) -> None:
        """Copy everything that is not adapted, a flat range per rank, in bounded pieces."""
        with self.group.shared_errors():
            for name in self.reader:
                if name in self._adapted:
                    continue
                info = self.reader.info(name)
                start, stop = FlatPartition(numel=math.prod(info.shape), world_size=self.group.size).bounds(
                    self.group.rank
                )
                step = COPY_BYTES // self._dtype(name).itemsize
                for first in range(start, stop, step):
                    values = self.reader.flat(name, first, min(first + step, stop))
                    check_finite(name, values, first)
                    self._root.write(name, first, values)
                self.walk.advance(info.nbytes)
        self._commit()

    def finish(self, adapter: LoraConfig, base: str) -> None:
        """Add what is not tensors and move the directory to its place."""
        matrices = [self.reports[planned.name] for planned in self.plan.matrices]
        manifest = {
            "format": FORMAT,
            "kind": "decomposed",
            "lowrank_dist": __version__,
            "fingerprint": self.key,
            "base": base,
            "method": str(self.walk.init),
            "options": repr(self.walk.init),
            "quantization": None if self.residual.exact else str(self.residual),
            "starts_at_zero": self.walk.init.starts_at_zero,
            "factor_dtype": str(self.walk.factor_dtype).removeprefix("torch."),
            "world_size": self.group.size,
            "matrices": [report.as_dict() for report in matrices],
        }
        with self.group.shared_errors():
            if self.group.rank == 0:
                self._copy_small_files()
                config = copy.deepcopy(adapter)
                config.base_model_name_or_path, config.inference_mode = str(self.output), True
                config.save_pretrained(str(self.initial))
                write_json(self.staging / MANIFEST, manifest)
                flush_directory(self.staging)
                put_in_place(self.staging, self.output)
                (self.output / JOURNAL).unlink()

    def _copy_small_files(self) -> None:
        """Configuration, tokenizer and licence of the source; what is quantized is said where transformers looks."""
        copy_other_files(self.reader.directory, self.staging)
        config_path = self.staging / "config.json"
        if isinstance(self.residual, NF4) and config_path.is_file():
            config = json.loads(config_path.read_text())
            first = self._dtype(self.plan.matrices[0].key)
            kept = [
                plain_name(name).rpartition(".")[0]
                for parameter in self.plan.parameters
                if parameter.key is not None and len(self.reader.info(parameter.key).shape) > 1
                for name in parameter.names
            ]
            config["quantization_config"] = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": self.residual.double_quant,
                "bnb_4bit_compute_dtype": str(first).removeprefix("torch."),
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": kept,
            }
            write_json(config_path, config)
