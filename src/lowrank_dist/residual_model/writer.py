"""Writes residual models: all ranks fill the files together, and a journal records what is complete."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.linalg import full_fp32
from lowrank_dist.model.names import plain_name
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.model.stacking import StackedFactors
from lowrank_dist.quantization.four_bit import FourBit
from lowrank_dist.residual_model.journal import Journal, Sums, add, sums_of, total
from lowrank_dist.residual_model.reader import factor_keys, has_stock_layout, packed_name
from lowrank_dist.storage.atomic import put_in_place, staging_directory
from lowrank_dist.storage.digest import digest_of_pieces, piece_sums
from lowrank_dist.storage.disk import check_free, flush_directory
from lowrank_dist.storage.dtypes import CODES
from lowrank_dist.storage.layout import CONFIG, MANIFEST, RESIDUAL_STEM, sealed
from lowrank_dist.storage.lock import Lock, Owner, lock_of
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.parse import Record, read_record
from lowrank_dist.storage.reader import FileTensor, check_finite
from lowrank_dist.storage.small_files import copy_small_files, small_files
from lowrank_dist.storage.verify import ENCODED_STEM, FROZEN_STEM, INITIAL, compare, file_digest, label
from lowrank_dist.storage.writer import TensorFiles, stored_dtype, write_json

FORMAT = 3  # version of the manifest and of what the fingerprint covers
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
        # an encoded residual has tensors of its own, a dense one takes the place of the stored weight
        pieces = [piece for planned in plan.matrices for piece in walk.reader.pieces(planned.key)]
        apart = next((piece.key for piece in pieces if not piece.is_ordinary), None)
        if apart is not None:
            raise ModelError(
                f"{apart} is stored fused or transposed and taken apart when loaded, which a residual model on disk "
                "cannot be; leave init_cache out, or load the pretrained model with transformers and save it once with "
                "`save_pretrained(directory, save_original_format=False)`"
            )
        adapted = {piece.key for piece in pieces}
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
        # sums of the bytes that were handed to the files, by matrix (None: those of no matrix), file and tensor
        self._sums: dict[str | None, Sums] = {}
        self._recorded: list[tuple[str | None, Sums]] = []
        self.stock = all(has_stock_layout(planned, self.residual, self.reader) for planned in plan.matrices)
        self._stacks: dict[str, StackedFactors] = {}
        self._encoded_stacks: dict[str, StackedFactors] = {}
        self._stack_reports: dict[str, list[MatrixReport]] = {}
        one_file: dict[str, Any] = {"max_bytes": sys.maxsize}
        self._stem = "model" if self.stock else RESIDUAL_STEM
        self._files = {  # `begin` says where
            self._stem: TensorFiles(output, root, stem=self._stem),
            INITIAL: TensorFiles(output, factors, stem=INITIAL, **one_file),
        }
        self._tensors = {self._stem: root, INITIAL: factors}
        self.layout = walk.init.layout
        if self.layout.folds:
            names = [factor_keys(planned)["lora_B"] for planned in plan.matrices]
            beside = {name: factors[name] for name in names}
            self._files[FROZEN_STEM] = TensorFiles(output, beside, stem=FROZEN_STEM, **one_file)
            self._tensors[FROZEN_STEM] = beside
        if not self.residual.exact and not self.layout.folds:
            self._files[ENCODED_STEM] = TensorFiles(output, factors, stem=ENCODED_STEM, **one_file)
            self._tensors[ENCODED_STEM] = factors

    def _dtype(self, name: str) -> torch.dtype:
        return stored_dtype(name, self.reader.info(name))

    @contextmanager
    def locked(self, announce: Callable[[str], object]) -> Iterator[None]:
        """Hold the lock beside the directory, by rank 0, and close the files at the end.

        While another run holds it, all ranks wait, and rank 0 says it once through `announce`.
        """
        self._lock = Lock(lock_of(self.output), str(self.output))
        with ExitStack() as stack:
            for files in self._files.values():
                stack.callback(files.close)
            stack.callback(self._lock.release)
            said = False
            while (owner := self._attempt()) is not None:
                if not said:
                    announce(f"{self._lock.held_by(owner)}; waiting for its result")
                said = True
                time.sleep(0.5)  # all ranks wait for rank 0 in a collective, none of them for long
            yield

    def _attempt(self) -> Owner | None:
        """Try once to take the lock; return its owner, if there is another. One broadcast and a shared error."""
        owner = None
        with self.group.shared_errors():
            if self.group.rank == 0:
                self.output.parent.mkdir(parents=True, exist_ok=True)
                owner = self._lock.attempt()
        found = self.group.broadcast_object(owner)
        assert found is None or isinstance(found, Owner)
        return found

    def begin(self) -> None:
        """Create the files, or fill `reports` with the matrices that a killed run has completed.

        Raises
        ------
        InputError
            On every rank, if the disk has too little space.
        CheckpointError
            On every rank, if ``config.json`` is a link that is not followed (`small_files`).
        """
        found: list[dict[str, Any]] = []
        staging = ""
        with self.group.shared_errors():
            if self.group.rank == 0:
                self._beside = small_files(self.reader.directory, self.reader.files)
                self._build_in(staging_directory(self.output, resumes=self._resumes))
                complete = self._complete()
                if complete is None:
                    self._create()
                found = complete or []
                staging = str(self.staging)
        self._build_in(Path(str(self.group.broadcast_object(staging))))
        reports = self.group.broadcast_object(found)
        assert isinstance(reports, list)
        reported = {entry["name"]: MatrixReport.from_dict(entry) for entry in reports}
        lacking = {planned.layer for planned in self.plan.matrices if planned.name not in reported}
        done = [planned.name for planned in self.plan.matrices if planned.layer not in lacking]
        self.reports = {name: reported[name] for name in done}
        self._recorded = [(entry["name"], sums_of(entry)) for entry in reports if entry["name"] in self.reports]

    def _build_in(self, directory: Path) -> None:
        self.staging, self.initial = directory, directory / f"{str(self.walk.init).lower()}_init"
        self._journal = Journal(directory, self.key)
        for stem, files in self._files.items():
            files.directory = directory if stem == self._stem else self.initial

    def _resumes(self, directory: Path) -> bool:
        self._build_in(directory)
        return self._complete() is not None

    def _complete(self) -> list[dict[str, Any]] | None:
        """Entries of the journal; None if it is not of this fingerprint, or if a file is missing."""
        return self._journal.entries() if all(files.exist() for files in self._files.values()) else None

    def _create(self) -> None:
        check_free(self.output, sum(files.nbytes for files in self._files.values()))
        self.initial.mkdir()
        for files in self._files.values():
            files.create()
        self._journal.create()
        flush_directory(self.staging)

    def matrices(self, decomposed: Iterable[DecomposedMatrix]) -> None:
        """Write this rank's part of every matrix of `decomposed`.

        Raises
        ------
        OSError, RemoteError
            On every rank, if any rank cannot write.
        """
        for matrix in decomposed:
            factors, encoded_from = self._stored_factors(matrix), self._encoded_from(matrix)
            try:
                self._residual(matrix)
                if factors is not None:
                    self._write_factors(matrix.planned, factors)
                    self._write_further(matrix.planned, ENCODED_STEM, encoded_from)
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
                self._write(planned.name, self._stem, packed_name(planned, reader) + suffix, start, values)
                continue
            for name, first, count in reader.places(planned.key, start, start + values.numel()):
                self._write(planned.name, self._stem, name, first, values[:count])
                values = values[count:]

    def _write(self, matrix: str | None, stem: str, name: str, start: int, values: Tensor) -> None:
        """Write elements of a tensor, and add their bytes to the sums of `matrix`."""
        tensor, values = self._tensors[stem][name], values.detach().cpu()
        sums = self._sums.setdefault(matrix, {}).setdefault(stem, {})
        add(sums, name, piece_sums(label(name, CODES[tensor.dtype], tensor.shape), values, start))
        self._files[stem].write(name, start, values)

    def _stored_factors(self, matrix: DecomposedMatrix) -> dict[str, Tensor] | None:
        """This rank's flat shards of A and B as the files hold them; None until all experts that share them are done.

        Collective: one all-gather of each factor of an expert, and one of B if the layout folds.
        """
        shards = self._unpadded(matrix.planned, matrix.factors)
        if self.layout.folds:
            self._fold(matrix.planned, shards)
        return self._with_experts(matrix.planned, shards, self._stacks)

    def _encoded_from(self, matrix: DecomposedMatrix) -> dict[str, Tensor]:
        """Like `_stored_factors`, of the factors that the residual was encoded from; empty if no file holds these."""
        if ENCODED_STEM not in self._files:
            return {}
        shards = self._unpadded(matrix.planned, matrix.encoded_from or matrix.factors)
        return self._with_experts(matrix.planned, shards, self._encoded_stacks) or {}

    def _unpadded(self, planned: PlannedMatrix, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bounds = {factor: self._bounds(shape) for factor, shape in planned.factor_shapes.items()}
        return {factor: factors[factor][: stop - start] for factor, (start, stop) in bounds.items()}

    def _with_experts(
        self, planned: PlannedMatrix, shards: dict[str, Tensor], stacks: dict[str, StackedFactors]
    ) -> dict[str, Tensor] | None:
        if planned.expert is None:
            return shards
        if planned.layer not in stacks:
            stacks[planned.layer] = StackedFactors(
                planned.factor_shapes, planned.experts, self.group, self.walk.factor_dtype
            )
        stacks[planned.layer].put(planned.expert, shards)
        if len(self._stack_reports.get(planned.layer, [])) + 1 < planned.experts:
            return None
        return stacks.pop(planned.layer).shards

    def _bounds(self, shape: Sequence[int]) -> tuple[int, int]:
        """Bounds ``(start, stop)`` of this rank's part of a tensor of `shape` that is sharded evenly."""
        return FlatPartition(numel=math.prod(shape), world_size=self.group.size).bounds(self.group.rank)

    def _write_factors(self, planned: PlannedMatrix, shards: dict[str, Tensor]) -> None:
        self._write_further(planned, INITIAL, {factor: shards[factor] for factor in planned.parameter_shapes})
        if BESIDE in shards:
            self._write_further(planned, FROZEN_STEM, {"lora_B": shards[BESIDE]})

    def _write_further(self, planned: PlannedMatrix, stem: str, shards: Mapping[str, Tensor]) -> None:
        keys = factor_keys(planned)
        for factor, shard in shards.items():
            self._write(planned.name, stem, keys[factor], self._bounds(planned.parameter_shapes[factor])[0], shard)

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
            for files in self._files.values():
                files.flush()
        except OSError as error:
            self._error = self._error or error
        self.group.raise_together(self._error)
        self.reports |= {report.name: report for report in self._pending}
        done = [None, *(report.name for report in self._pending)]
        everyone = self.group.gather_objects({name: self._sums.pop(name) for name in done if name in self._sums})
        sums = {name: total([each[name] for each in everyone if name in each]) for name in done}
        self._recorded += sums.items()
        if self.group.rank == 0 and self._pending:
            self._journal.record({**report.as_dict(), "sums": sums[report.name]} for report in self._pending)
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
                    self._write(None, self._stem, name, first, values)
                self.walk.advance(info.nbytes)
        self.commit()

    def finish(self, adapter: LoraConfig, base: str) -> None:
        """Compare the files with what was handed to them, and publish them: rank 0 renames the directory to its path.

        It writes the configurations and the manifest before.

        Parameters
        ----------
        adapter
            PEFT's configuration of the adapter; the residual model becomes its base model.
        base
            Name of the pretrained model, for the manifest.

        Raises
        ------
        CheckpointError
            On every rank, if a file does not hold what was written to it.
        HeldError
            On every rank, if another run has taken the lock over.
        """
        matrices = [self.reports[planned.name] for planned in self.plan.matrices]
        manifest = {
            "format": FORMAT,
            "kind": "decomposed",
            "lowrank_dist": __version__,
            "fingerprint": self.key,
            **Original.at(base, self.reader.directory).facts(),
            **({} if self.reader.encoding is None else {"decoded_from": self.reader.encoding}),
            "method": str(self.walk.init),
            "options": repr(self.walk.init),
            "quantization": None if self.residual.exact else str(self.residual),
            "starts_at_zero": self.walk.init.starts_at_zero,
            **self.layout.facts(),
            "factor_dtype": str(self.walk.factor_dtype).removeprefix("torch."),
            "world_size": self.group.size,
            "matrices": [report.as_dict() for report in matrices],
            "tensors": self._digests(),
        }
        with self.group.shared_errors():
            if self.group.rank == 0:
                self._copy_small_files()
                config = copy.deepcopy(adapter)
                config.base_model_name_or_path, config.revision = str(self.output), None
                config.inference_mode = True
                config.save_pretrained(str(self.initial))
                manifest["adapter_config"] = file_digest(self.initial / CONFIG)
        manifest = self.group.broadcast_object(manifest)  # type: ignore[assignment]
        with self.group.shared_errors():
            try:
                compare(self.staging, manifest, self.group)
            except CheckpointError as error:
                self._journal.remove()
                raise CheckpointError(f"{error}; another program or the disk has changed it: start again") from error
        with self.group.shared_errors():
            if self.group.rank == 0:
                write_json(self.staging / MANIFEST, sealed(manifest))
                flush_directory(self.staging)
                self._lock.check()
                put_in_place(self.staging, self.output, overwrite=True, kind="decomposed")
                Journal(self.output, self.key).remove()

    def _digests(self) -> dict[str, dict[str, str]]:
        """Digests of all tensors, from the sums of their pieces."""
        totals = total([sums for _, sums in self._recorded])
        return {
            stem: {
                name: digest_of_pieces(
                    label(name, CODES[tensor.dtype], tensor.shape),
                    totals.get(stem, {}).get(name, [0, 0]),
                    tensor.numel * tensor.dtype.itemsize,
                )
                for name, tensor in tensors.items()
            }
            for stem, tensors in self._tensors.items()
        }

    def _copy_small_files(self) -> None:
        """Copy configuration, tokenizer and licence of the pretrained model.

        What ``config.json`` says about the quantization of weights that were decoded is left out.
        If stock transformers can load a 4-bit residual, its format is added to ``config.json``.
        """
        copy_small_files(self._beside, self.staging)
        config_path = self.staging / "config.json"
        if not config_path.is_file() and self.reader.directory.is_file():  # a GGUF file says its configuration itself
            backbone = build_skeleton(self.reader.directory)
            backbone.config.architectures = [type(backbone).__name__]
            backbone.config.save_pretrained(self.staging)
        if not config_path.is_file():
            return
        config = read_record(config_path)
        if self.reader.encoding is not None:
            write_json(config_path, without_quantization(config))
        if self.stock and isinstance(self.residual, FourBit):
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
                "bnb_4bit_quant_type": self.residual.name,
                "bnb_4bit_use_double_quant": self.residual.double_quant,
                "bnb_4bit_compute_dtype": str(first).removeprefix("torch."),
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_skip_modules": kept,
            }
            write_json(config_path, config)


def without_quantization(config: Record) -> Record:
    """Remove the settings of quantization from a ``config.json``, in place."""
    for record in (config, *(config[name] for name in ("text_config", "llm_config") if config.get(name))):
        for entry in ("quantization_config", "compression_config"):
            record.pop(entry, None)
    return config
