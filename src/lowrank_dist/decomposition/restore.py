"""Form residuals again from the initial factors of a checkpoint, bit for bit and without a decomposition.

A checkpoint holds A_0 and B_0, not the frozen residual ``Q(W - scaling B_0 A_0)``, which is as large as the model. W is
read again, and the factors are subtracted with the same order of summation as before
(`lowrank_dist.linalg.minus_product`). The encoded bytes are then the same on any number of ranks; `check_digests`
verifies that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.distributed.reshard import whole_left
from lowrank_dist.errors import CheckpointError
from lowrank_dist.methods import Decomposition, Factors, Matrix, Method, subtracted, unchanged
from lowrank_dist.methods.base import Work, residual_block
from lowrank_dist.model.factor_layout import FactorLayout
from lowrank_dist.model.names import peft_name
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.model.stacking import FactorReader, positions
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.layout import ENCODED_DIR, INITIAL_DIR, WEIGHTS
from lowrank_dist.storage.reader import CheckpointReader, check_finite


@dataclass(frozen=True, kw_only=True)
class StoredDecompositions:
    """The decompositions of an earlier run, restored bit for bit from the factors in its checkpoint.

    Parameters
    ----------
    checkpoint
        Directory that holds A_0 and B_0 in ``adapter_init/adapter_model.safetensors`` under PEFT's names. If there are
        factors ``Decomposition.encoded_from``, ``adapter_encoded/`` holds them under the same names.
    starts_at_zero
        Whether the residual is W itself, encoded, from which nothing was subtracted.
    """

    checkpoint: Path
    starts_at_zero: bool

    @cached_property
    def initial(self) -> StoredFactors:
        """A_0 and B_0."""
        return StoredFactors(self.checkpoint / INITIAL_DIR)

    @cached_property
    def encoded_from(self) -> StoredFactors | None:
        """The factors that residuals were encoded from; None if these are A_0 and B_0 for every matrix."""
        directory = self.checkpoint / ENCODED_DIR
        return StoredFactors(directory) if directory.is_dir() else None

    def check_factors(self, plan: Plan, factor_dtype: torch.dtype, reports: Mapping[str, MatrixReport]) -> None:
        """Raise CheckpointError if the checkpoint lacks factors that restoring `plan` needs.

        Parameters
        ----------
        plan
            The matrices.
        factor_dtype
            Dtype of the factors in this run.
        reports
            Reports of the earlier run, by the name of the matrix; may be empty.
        """
        for planned in plan.matrices:
            if not planned.factor_names:
                continue
            for stored in (self.initial, self.encoded_from):
                if stored is not None and (stored is self.initial or stored.holds(planned.factor_names)):
                    stored.check(planned, factor_dtype)
            report = reports.get(planned.name)
            fitted = report is not None and report.ended_on == "decompose"
            if fitted and (self.encoded_from is None or not self.encoded_from.holds(planned.factor_names)):
                raise CheckpointError(
                    f"{self.checkpoint}: the factors of {planned.name} were fitted to its residual, and {ENCODED_DIR}/ "
                    "does not hold the factors it was encoded from: the run started from a residual model; resume from "
                    "that residual model (the same `pretrained`, or the same init_cache)"
                )

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        """Restore residual and factors of `matrix`, with the sharding of `matrix`. Collective.

        One all-reduce of a flag, an all-gather of A, and an all-gather of B where rows are inputs. The ranks together
        read every byte of the factors once; the rows of B of a stack of experts are read once for all experts.

        Raises
        ------
        CheckpointError
            On every rank, if any rank cannot read or finds a NaN or infinity.
        """
        factors = self.initial.read(matrix)
        if self.encoded_from is not None and self.encoded_from.holds(matrix.factor_names):
            encoded_from = self.encoded_from.read(matrix)
            encoded = residual.encode(residual_block(matrix, encoded_from), matrix.partition, matrix.group)
            return Decomposition(factors=factors, residual=encoded, ended_on="decompose", encoded_from=encoded_from)
        return (unchanged if self.starts_at_zero else subtracted)(matrix, factors, residual)

    def close(self) -> None:
        """Close the files."""
        for stored in (vars(self).get("initial"), vars(self).get("encoded_from")):  # only what was opened
            if stored is not None:
                stored.close()


@dataclass(frozen=True, kw_only=True)
class RestoredMethod(Method):
    """Restores the decompositions that another initialisation computed in an earlier run.

    Restored decompositions have no ``svd``. They do not depend on how many ranks share a matrix.

    Parameters
    ----------
    original
        The initialisation of the earlier run.
    earlier
        Its decompositions.
    """

    original: Method
    earlier: StoredDecompositions

    def __str__(self) -> str:
        return str(self.original)

    @property
    def starts_at_zero(self) -> bool:
        return self.original.starts_at_zero

    @property
    def looks_at_weights(self) -> bool:
        return False  # at those in the checkpoint

    @property
    def layout(self) -> FactorLayout:
        return self.original.layout

    def objection(self, *, rows: int, columns: int, rank: int, lookup: bool, wrapped: bool) -> str | None:
        return self.original.objection(rows=rows, columns=columns, rank=rank, lookup=lookup, wrapped=wrapped)

    def check(self, residual: ResidualFormat) -> None:
        self.original.check(residual)

    def work(self, rows: int, columns: int, rank: int) -> Work:
        return Work(sharded_flops=2.0 * rows * columns * rank, collectives=4, reduced_bytes=4.0 * rank * columns)

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        return self.earlier.decompose(matrix, residual)


@dataclass(frozen=True, kw_only=True)
class RecordedMethod(Method):
    """An initialisation of which only its record in a checkpoint is known; nothing is decomposed with it.

    Parameters
    ----------
    name
        Its name.
    zero
        Its `starts_at_zero`.
    trained
        Its `layout`.
    """

    name: str
    zero: bool
    trained: FactorLayout

    def __str__(self) -> str:
        return self.name

    @property
    def starts_at_zero(self) -> bool:
        return self.zero

    @property
    def layout(self) -> FactorLayout:
        return self.trained

    def decompose(self, matrix: Matrix, residual: ResidualFormat) -> Decomposition:
        raise AssertionError(f"{self.name}: decompositions of a run are restored from its checkpoint")


class StoredFactors:
    """Factors in an adapter file, read by rows.

    Parameters
    ----------
    directory
        Directory that holds ``adapter_model.safetensors``.

    Raises
    ------
    CheckpointError
        If there is no such file.
    """

    def __init__(self, directory: Path) -> None:
        self._reader = CheckpointReader(directory, stem=Path(WEIGHTS).stem)
        self._of_experts = FactorReader()

    def holds(self, factor_names: Mapping[str, str]) -> bool:
        """Whether the file holds the factors that have these names in the model."""
        return all(peft_name(name) in self._reader for name in factor_names.values())

    def check(self, planned: PlannedMatrix, factor_dtype: torch.dtype) -> None:
        """Raise CheckpointError if the factors of `planned` are missing or have another shape or dtype."""
        for factor, expected in planned.parameter_shapes.items():
            name = peft_name(planned.factor_names[factor])
            if name not in self._reader:
                raise CheckpointError(
                    f"{self._reader.directory}: holds no {name}, which the adapter needs; resume with the adapter "
                    "configuration of the run"
                )
            info = self._reader.info(name)
            if info.shape != expected:
                raise CheckpointError(
                    f"{self._reader.directory}: {name} has shape {list(info.shape)}, the adapter needs "
                    f"{list(expected)}; resume with the adapter configuration of the run"
                )
            stored = FLOAT_DTYPES.get(info.dtype)
            if stored is None or torch.promote_types(stored, factor_dtype) != factor_dtype:
                raise CheckpointError(
                    f"{self._reader.directory}: {name} is stored as {info.dtype}, which factors in {factor_dtype} "
                    "cannot hold; resume with the precision of the run"
                )

    def read(self, matrix: Matrix) -> Factors:
        """Read the factors of `matrix`, sharded like it. Collective: all ranks of its group call it.

        Raises
        ------
        CheckpointError
            On every rank, if any rank cannot read or finds a NaN or infinity.
        """
        group, partition = matrix.group, matrix.partition
        rows_of_a, rows_of_b = _even(matrix.rank, group), partition
        if matrix.input_first:
            rows_of_b = _even(partition.columns, group)
        with group.shared_errors():
            a = self._rows(matrix, "lora_A", rows_of_a)
            b = self._rows(matrix, "lora_B", rows_of_b)
        a = whole_left(a, rows_of_a, group)
        if not matrix.input_first:
            return Factors(left=b.float(), right=a.float())
        b = whole_left(b, rows_of_b, group)
        return Factors(left=a.mT[slice(*partition.bounds(group.rank))].float(), right=b.mT.float())

    def _rows(self, matrix: Matrix, factor: str, partition: RowPartition) -> Tensor:
        """This rank's rows of one factor of one matrix, in the dtype of the file."""
        name, (start, stop) = peft_name(matrix.factor_names[factor]), partition.bounds(matrix.group.rank)
        inputs = matrix.partition.rows if matrix.input_first else matrix.partition.columns
        width = inputs if factor == "lora_A" else matrix.rank
        where = positions(factor, partition.rows * width, *matrix.expert)[start * width : stop * width]
        return self._of_experts.read(self._read, name, where).view(-1, width).to(matrix.block.device)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        """Whole rows of a tensor, flattened: elements ``start:stop``."""
        width = self._reader.info(name).shape[1]
        rows = self._reader.rows(name, start // width, stop // width)
        check_finite(name, rows, start // width)
        return rows.flatten()

    def close(self) -> None:
        """Close the file."""
        self._reader.close()
        self._of_experts.clear()


def check_digests(found: Iterable[MatrixReport], stored: Mapping[str, MatrixReport]) -> None:
    """Raise CheckpointError if a residual differs from that of the earlier run.

    Parameters
    ----------
    found
        Reports of this run (`lowrank_dist.decomposition.report.InitializationReport.matrices`).
    stored
        Reports of the earlier run, by the name of the matrix. Matrices that lack a digest in either run are skipped.
    """
    pairs = [(report, stored[report.name]) for report in found if report.name in stored]
    compared = [(now, before) for now, before in pairs if now.digest is not None and before.digest is not None]
    wrong = [now.name for now, before in compared if now.digest != before.digest]
    if wrong:
        raise CheckpointError(
            f"{wrong[0]}: the residual that the checkpoint was trained with cannot be formed again ({len(wrong)} of "
            f"{len(compared)} matrices differ); resume with the pretrained weights, precision and quantization of the "
            "run, on the same kind of device and library versions; start runs that will change machines with init_cache"
        )


def _even(rows: int, group: ShardGroup) -> RowPartition:
    return RowPartition(rows=rows, columns=1, world_size=group.size)


#: Entries of a recipe under which the same tensors are other weights.
_COMPARED = ("encode", "fp32_norms", "untie_embeddings", "core")


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What a checkpoint records about the frozen base that its run trained on.

    Parameters
    ----------
    checkpoint
        Directory with the factors, see `lowrank_dist.decomposition.restore.StoredDecompositions`.
    pretrained, pretrained_fingerprint
        The pretrained model of the run, as the user named it, and its
        `lowrank_dist.residual_model.fingerprint.source_fingerprint`.
    source
        Fingerprint of the weights that filled the model: the pretrained model, or its residual model in a cache.
    method, quantization
        The method that decomposed the model, and the format of a quantized residual.
    tuner_seed
        Seed of the random numbers that PEFT drew for a tuner; None if there was none.
    recipe
        Further options of the run that decide what its numbers mean.
    adapter
        Configuration of the run's adapter; None if it is unknown, or if copies of layers were trained instead.
    reports
        Reports of the matrices, by their names. These matrices are not measured again.
    """

    checkpoint: Path
    pretrained: str
    pretrained_fingerprint: str
    source: str
    method: str
    quantization: str | None
    tuner_seed: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    adapter: PeftConfig | None = None
    reports: Mapping[str, MatrixReport] = field(default_factory=dict)

    @classmethod
    def from_facts(
        cls,
        checkpoint: Path,
        facts: Mapping[str, Any],
        reports: Iterable[MatrixReport],
        adapter: PeftConfig | None = None,
    ) -> Resume:
        """Make it from entries of a manifest (`lowrank_dist.initialization.build.BuiltModel.facts`); ignore others."""
        known = {entry.name: facts[entry.name] for entry in fields(cls) if entry.name in facts}
        for name in ("pretrained", "pretrained_fingerprint", "source", "method", "quantization"):
            known[name] = facts[name]  # a CheckpointError of a manifest, if it is absent
        for name in ("checkpoint", "adapter", "reports"):
            known.pop(name, None)
        if not isinstance(known.get("recipe"), Mapping):  # an older checkpoint
            known.pop("recipe", None)
        return cls(checkpoint=checkpoint, adapter=adapter, reports={report.name: report for report in reports}, **known)

    def check_settings(self, *, method: str, quantization: str | None, recipe: Mapping[str, Any]) -> None:
        """Raise CheckpointError if a setting differs from that of the run; called before anything is decomposed.

        Entries of `recipe` that the checkpoint does not have, or that other files of it tell, are not compared.
        """
        for name, before, value in (
            ("method", self.method, method),
            ("quantization", self.quantization, quantization),
            *((name, self.recipe.get(name, recipe[name]), recipe[name]) for name in _COMPARED if name in recipe),
        ):
            if before != value:
                raise CheckpointError(
                    f"{self.checkpoint}: {name} is {value!r}, but the run that wrote the checkpoint had {before!r}; "
                    "resume with the same one"
                )

    def check_pretrained(self, fingerprint: str) -> None:
        """Raise CheckpointError if the pretrained weights differ from those that the run began from."""
        if self.pretrained_fingerprint != fingerprint:
            raise CheckpointError(
                f"{self.checkpoint}: the pretrained weights have changed since it was written (it began from "
                f"{self.pretrained!r}, fingerprint {self.pretrained_fingerprint[:12]}, now {fingerprint[:12]}); resume "
                "with the weights of the first run"
            )
