"""Writes residual models: all ranks fill the files together, and a journal records what is complete."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from lowrank_dist._version import __version__
from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.decomposition.walk import DecomposedMatrix, Walk
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.linalg import full_fp32
from lowrank_dist.model.names import plain_name
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.model.stacking import StackedFactors
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.residual_model.reader import FROZEN_STEM, factor_keys, has_stock_layout, packed_name
from lowrank_dist.storage.atomic import atomic_directory, check_free, flush_directory
from lowrank_dist.storage.layout import MANIFEST, RESIDUAL_STEM, WEIGHTS
from lowrank_dist.storage.reader import FileTensor, check_finite
from lowrank_dist.storage.writer import TensorFiles, copy_other_files, stored_dtype, write_json

FORMAT = 2  # version of the manifest and of what the fingerprint covers
JOURNAL = "journal.jsonl"
FLUSH_BYTES = 64 * 2**20  # bytes of pretrained weights between two flushes; the journal grows after each
COPY_BYTES = 64 * 2**20  # most bytes of an unchanged tensor that are read at once
BESIDE = "beside"  # name of B among the shards of a matrix whose adapter file holds ``f(B)``


class ResidualModelWriter:
    """Writes the results of a walk to a residual model, each rank its own part.

    The directory is built beside its final path and renamed to it at the end, so that it is never visible in part.
    Matrices are recorded in a journal after they have reached the disk, so that a run continues where a killed run
    stopped. All methods are collective.

    Parameters
    ----------
    plan, walk
        The matrices to decompose, and how.
    output
        The final path of the directory.
    key
        The `lowrank_dist.residual_model.fingerprint.fingerprint`.

    Attributes
    ----------
    reports
        Reports of the matrices that are complete, by name.
    """

    def __init__(self, plan: Plan, walk: Walk, output: Path, key: str) -> None:
        self.plan, self.walk, self.output, self.key = plan, walk, output, key
        self.reader, self.group, self.residual = walk.reader, walk.group, walk.residual
        self.reports: dict[str, MatrixReport] = {}
        self._pending: list[MatrixReport] = []
        self._error: Exception | None = None
        # a 4-bit residual has tensors of its own, a dense one takes the place of the stored weight
        adapted = {piece.key for planned in plan.matrices for piece in walk.reader.pieces(planned.key)}
        self._others = [name for name in self.reader if name not in adapted]
        dense = list(self.reader) if self.residual.exact else self._others
        root = {name: FileTensor(shape=self.reader.info(name).shape, dtype=self._dtype(name)) for name in dense}
        factors: dict[str, FileTensor] = {}
        for planned in plan.matrices:
            if not self.residual.exact:
                partition = planned.row_partition(1, block=self.residual.block)
                files = self.residual.files(partition, self._dtype(planned.key))
                root |= {packed_name(planned, self.reader) + suffix: tensor for suffix, tensor in files.items()}
            for factor, shape in planned.parameter_shapes.items():
                factors[factor_keys(planned)[factor]] = FileTensor(shape=shape, dtype=walk.factor_dtype)
        self.stock = all(has_stock_layout(planned, self.residual, self.reader) for planned in plan.matrices)
        self._stacks: dict[str, StackedFactors] = {}
        self._stack_reports: dict[str, list[MatrixReport]] = {}
        one_file: dict[str, Any] = {"max_bytes": sys.maxsize}
        # `building` says where
        self._root = TensorFiles(output, root, stem="model" if self.stock else RESIDUAL_STEM)
        self._factors = TensorFiles(output, factors, stem=Path(WEIGHTS).stem, **one_file)
        self._files = [self._root, self._factors]
        self.layout = walk.init.layout
        if self.layout.folds:
            names = [factor_keys(planned)["lora_B"] for planned in plan.matrices]
            beside = {name: factors[name] for name in names}
            self._beside = TensorFiles(output, beside, stem=FROZEN_STEM, **one_file)
            self._files.append(self._beside)

    def _dtype(self, name: str) -> torch.dtype:
        return stored_dtype(name, self.reader.info(name))

    @contextmanager
    def building(self, *, overwrite: bool) -> Iterator[None]:
        """Build the directory inside, and put it in place at the end; on errors it is kept, for a later run.

        Parameters
        ----------
        overwrite
            Whether a directory that this package wrote is replaced.

        Raises
        ------
        InputError
            On every rank, if another run is building it, or something else is in its place.
        """
        with ExitStack() as stack:
            for files in self._files:
                stack.callback(files.close)
            made = Path()
            with self.group.shared_errors():
                if self.group.rank == 0:
                    directory = atomic_directory(self.output, overwrite=overwrite, resumes=self._resumes)
                    made = stack.enter_context(directory)
            self._build_in(Path(str(self.group.broadcast_object(str(made)))))
            yield
            with self.group.shared_errors():
                stack.pop_all().close()
                if self.group.rank == 0:
                    (self.output / JOURNAL).unlink()

    def _build_in(self, directory: Path) -> None:
        self.staging, self.initial = directory, directory / f"{str(self.walk.init).lower()}_init"
        self._root.directory = directory
        for files in self._files[1:]:
            files.directory = self.initial

    def _resumes(self, directory: Path) -> bool:
        self._build_in(directory)
        return bool(self._journal())

    def begin(self) -> None:
        """Create the files, or fill `reports` with the matrices that a killed run has completed.

        Raises
        ------
        InputError
            On every rank, if the disk has too little space.
        """
        found: list[dict[str, Any]] = []
        with self.group.shared_errors():
            if self.group.rank == 0:
                found = self._journal()
                if not found:
                    self._create()
        reports = self.group.broadcast_object(found[1:])
        assert isinstance(reports, list)
        reported = {entry["name"]: MatrixReport.from_dict(entry) for entry in reports}
        lacking = {planned.layer for planned in self.plan.matrices if planned.name not in reported}
        complete = [planned.name for planned in self.plan.matrices if planned.layer not in lacking]
        self.reports = {name: reported[name] for name in complete}

    def _journal(self) -> list[dict[str, Any]]:
        """Entries of the journal if it has this fingerprint and all files exist; else none.

        The last line may be incomplete: the run may have been killed while it wrote it.
        """
        path = self.staging / JOURNAL
        if not path.is_file() or not all(files.exist() for files in self._files):
            return []
        entries = []
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        return entries if entries and entries[0] == {"fingerprint": self.key} else []

    def _create(self) -> None:
        check_free(self.output, sum(files.nbytes for files in self._files))
        self.initial.mkdir()
        for files in self._files:
            files.create()
        (self.staging / JOURNAL).write_text(json.dumps({"fingerprint": self.key}) + "\n")
        flush_directory(self.staging)

    def matrices(self, decomposed: Iterable[DecomposedMatrix]) -> None:
        """Write this rank's part of every matrix of `decomposed`.

        Raises
        ------
        OSError, RemoteError
            On every rank, if any rank cannot write.
        """
        for matrix in decomposed:
            factors = self._stored_factors(matrix)
            try:
                self._residual(matrix)
                if factors is not None:
                    self._write_factors(matrix.planned, factors)
            except OSError as error:
                self._error = self._error or error
            # experts of a stack share their factors, which are written with the last expert
            reports = self._stack_reports.setdefault(matrix.planned.layer, [])
            reports.append(matrix.report)
            if factors is not None:
                self._pending += self._stack_reports.pop(matrix.planned.layer)
            if sum(report.nbytes for report in self._pending) >= FLUSH_BYTES:
                self.commit()
            del matrix  # before the next one is decomposed
        self.commit()

    def _residual(self, matrix: DecomposedMatrix) -> None:
        planned, reader = matrix.planned, self.reader
        dtype = self._dtype(planned.key)
        for suffix, start, values in self.residual.to_files(matrix.residual, matrix.partition, self.group.rank, dtype):
            if not self.residual.exact:
                self._root.write(packed_name(planned, reader) + suffix, start, values)
                continue
            for name, first, count in reader.places(planned.key, start, start + values.numel()):
                self._root.write(name, first, values[:count])
                values = values[count:]

    def _stored_factors(self, matrix: DecomposedMatrix) -> dict[str, Tensor] | None:
        """This rank's flat shards of A and B as the files hold them; None until all experts that share them are done.

        Collective: one all-gather of each factor of an expert, and one of B if the layout folds.
        """
        planned, shards = matrix.planned, {}
        for factor, shape in planned.factor_shapes.items():
            start, stop = self._bounds(shape)
            shards[factor] = matrix.factors[factor][: stop - start]
        if self.layout.folds:
            self._fold(planned, shards)
        if planned.expert is None:
            return shards
        if planned.layer not in self._stacks:
            self._stacks[planned.layer] = StackedFactors(
                planned.factor_shapes, planned.experts, self.group, self.walk.factor_dtype
            )
        self._stacks[planned.layer].put(planned.expert, shards)
        if len(self._stack_reports.get(planned.layer, [])) + 1 < planned.experts:
            return None
        return self._stacks.pop(planned.layer).shards

    def _bounds(self, shape: Sequence[int]) -> tuple[int, int]:
        """Bounds ``(start, stop)`` of this rank's part of a tensor of `shape` that is sharded evenly."""
        return FlatPartition(numel=math.prod(shape), world_size=self.group.size).bounds(self.group.rank)

    def _write_factors(self, planned: PlannedMatrix, shards: dict[str, Tensor]) -> None:
        keys, starts = factor_keys(planned), {f: self._bounds(s)[0] for f, s in planned.parameter_shapes.items()}
        for factor, start in starts.items():
            self._factors.write(keys[factor], start, shards[factor])
        if BESIDE in shards:
            self._beside.write(keys["lora_B"], starts["lora_B"], shards[BESIDE])

    def _fold(self, planned: PlannedMatrix, shards: dict[str, Tensor]) -> None:
        """Replace B in `shards` by the ``f(B)`` of the layout, and keep B as `BESIDE`. One all-gather of B."""
        shape = planned.factor_shapes["lora_B"]
        flat = FlatPartition(numel=math.prod(shape), world_size=self.group.size)
        shards[BESIDE] = shards["lora_B"]
        padded = shards[BESIDE].new_zeros(flat.shard_numel)
        padded[: shards[BESIDE].numel()] = shards[BESIDE]
        b = self.group.gather_equal(padded)[: flat.numel].view(shape)
        further = {name: value.to(b) for name, value in self.layout.initial(planned).items()}
        with full_fp32():
            folded = self.layout.folded(b, further)
        shards["lora_B"] = folded.flatten()[slice(*flat.bounds(self.group.rank))]

    def commit(self) -> None:
        """Flush what all ranks have written, then record it in the journal. Raises an error of any rank on all."""
        try:
            for files in self._files:
                files.flush()
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
        """Copy every tensor that is not adapted: each rank its flat range, in pieces of at most `COPY_BYTES`.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read.
        OSError, RemoteError
            On every rank, if any rank cannot write.
        """
        with self.group.shared_errors():
            for name in self._others:
                info = self.reader.info(name)
                start, stop = self._bounds(info.shape)
                step = COPY_BYTES // self._dtype(name).itemsize
                for first in range(start, stop, step):
                    values = self.reader.flat(name, first, min(first + step, stop))
                    check_finite(name, values, first)
                    self._root.write(name, first, values)
                self.walk.advance(info.nbytes)
        self.commit()

    def finish(self, adapter: LoraConfig, base: str) -> None:
        """Write configurations and, last, the manifest on rank 0.

        Parameters
        ----------
        adapter
            PEFT's configuration of the adapter; the residual model becomes its base model.
        base
            Name of the pretrained model, for the manifest.
        """
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
            **self.layout.facts(),
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
                flush_directory(self.staging)
                write_json(self.staging / MANIFEST, manifest)

    def _copy_small_files(self) -> None:
        """Copy configuration, tokenizer and licence of the pretrained model.

        If stock transformers can load a 4-bit residual, its format is added to ``config.json``.
        """
        copy_other_files(self.reader.directory, self.staging)
        config_path = self.staging / "config.json"
        if self.stock and isinstance(self.residual, NF4) and config_path.is_file():
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
