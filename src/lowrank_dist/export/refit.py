"""Refit: the LoRA of a given rank that fits a trained model best on a base other than its residual.

A model with a quantized residual computes ``M = Q(W_res) + s B A``. The exact conversion ``s (B A - B_0 A_0)``
(`lowrank_dist.adapters.lora`) leaves out the quantization error ``Q(W_res) - W_res``. A refit computes the difference
between M and the base of the LoRA, row-sharded and one matrix at a time, and takes its best approximation of rank K
(Eckart-Young)::

    D = M - base,   base = W, or Q(W) as bitsandbytes quantizes it on loading;   s' B' A' = SVD_K(D).

The residual is computed again from W and the checkpoint's factors, bit for bit (`lowrank_dist.decomposition.restore`),
or read from the residual model that the run began from. In both cases its digest must match the checkpoint's.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_dist.adapters.files import changed_config, open_adapter, read_config, whole_tensor
from lowrank_dist.adapters.match import changes_tied
from lowrank_dist.adapters.source import refuse_copies
from lowrank_dist.decoding.as_stored import AsStored
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.decoding.reader import DecodingReader
from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.decomposition.restore import StoredDecompositions, StoredFactors
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.reshard import whole_left
from lowrank_dist.errors import CheckpointError, InputError, ModelError
from lowrank_dist.linalg import full_fp32, randomized_svd, seed_from_name, squared_norm
from lowrank_dist.methods import Factors, Matrix
from lowrank_dist.model.names import peft_name
from lowrank_dist.model.plan import PlannedMatrix, open_plan, plan_walk
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.model.stacking import positions, put_factor
from lowrank_dist.progress import progress_bar
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import Encoded, ResidualFormat
from lowrank_dist.quantization.nf4 import NF4
from lowrank_dist.quantization.registry import format_from_dict
from lowrank_dist.residual_model.fingerprint import source_fingerprint
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.digest import digest_sums, digests
from lowrank_dist.storage.dtypes import DTYPES, NAMED_DTYPES
from lowrank_dist.storage.layout import ADAPTER_DIR, MANIFEST, WEIGHTS, parts_of, read_manifest
from lowrank_dist.storage.original import Original, find_original
from lowrank_dist.storage.reader import FileTensor, check_finite
from lowrank_dist.storage.replacing import check_parent, check_target
from lowrank_dist.storage.resolve import is_hub_id, resolve_checkpoint
from lowrank_dist.storage.verify import verify_checkpoint
from lowrank_dist.storage.writer import TensorFiles, write_json
from lowrank_dist.tuners.support import adds_product, said

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the SVD; the leftover error is measured, whatever it is


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Leftover error of one matrix, as Frobenius norms.

    Attributes
    ----------
    name
        Name of the matrix.
    norm
        Norm of D, the difference between the trained model and the base.
    before
        Norm of the remainder of D after the exact conversion is subtracted.
    after
        Norm of the remainder of D after the fitted LoRA is subtracted.
    """

    name: str
    norm: float
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Refit:
    """Result of `refit_checkpoint`.

    Attributes
    ----------
    path, rank
        The directory that was written, and K.
    leftovers
        Leftover errors of all matrices.
    not_quantized
        For a base in NF4: linear layers that were dense in training, to be listed in ``llm_int8_skip_modules`` of the
        `BitsAndBytesConfig` that it is loaded with.
    """

    path: Path
    rank: int
    leftovers: list[Leftover]
    not_quantized: list[str]

    @property
    def before(self) -> float:
        """Relative leftover error of the exact conversion: ``sqrt(sum before^2 / sum norm^2)`` over all matrices."""
        return _ratio([(left.before, left.norm) for left in self.leftovers])

    @property
    def after(self) -> float:
        """Relative leftover error of the fitted LoRA: ``sqrt(sum after^2 / sum norm^2)`` over all matrices."""
        return _ratio([(left.after, left.norm) for left in self.leftovers])


def refit_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int,
    base: Literal["original", "nf4"],
    group: ShardGroup | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    pretrained: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Refit:
    """Write the LoRA of rank K that best fits the trained model on `base`. Collective over `group`.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote.
    output
        Directory to write: a PEFT adapter with the same rank and scaling for all modules. It is written completely or
        not at all.
    rank
        K. The factors of a matrix whose short side is smaller are padded with zeros.
    base
        Base model of the LoRA: the ``"original"`` model, or the original as transformers loads it in NF4 with
        bitsandbytes (``"nf4"``). Block size and double quantization are those of training; if training used no NF4,
        they are 64 and off. Embeddings, the head and stacked or single parameters stay dense in NF4 too.
    group
        The ranks among which the rows of every matrix are divided. Default: this process alone.
    device
        Device on which matrices are decomposed. Default: the CPU.
    dtype
        Dtype of the written factors. Default: that of the checkpoint's factors.
    pretrained, revision
        Directory or hub id of the original model, and the revision of a hub id. Default: the recorded ones.
    overwrite
        Replace a directory at `output` that this package wrote.
    show_progress
        Show a progress bar, in bytes of the base.

    Returns
    -------
    Refit
        The leftover errors before and after; the same on every rank.

    Raises
    ------
    CheckpointError, ModelError, InputError
        On every rank: if `output` may not be replaced (`lowrank_dist.storage.replacing.check_target`), if the residual
        of the run cannot be restored (the base has changed, or the factors were fitted to a residual that only an
        ``init_cache`` holds), if `rank` is below 1, if `base` is unknown, or if a base in NF4 has adapted Conv1D
        layers.

    See Also
    --------
    convert_checkpoint : Converts exactly, on the CPU, and leaves the quantization error out.
    merge_checkpoint : Adds the adapter to the weights of its base model.

    Notes
    -----
    A rank holds six row blocks in fp32 and the Krylov basis of K (`lowrank_dist.linalg.randomized_svd`), the output
    factors of one matrix at a time, B of all experts that share one, and one stored residual if it reads a residual
    model. Every byte of the adapted matrices in the base is read once.

    Examples
    --------
    Fit a LoRA of rank 64 to a QPiSSA run, for the original model in its own dtype:

    >>> from lowrank_dist import refit_checkpoint
    >>> refit = refit_checkpoint("checkpoints/step=200", "lora-64", rank=64, base="original")  # doctest: +SKIP
    >>> refit.after < refit.before  # doctest: +SKIP
    True
    """
    group, device = group or ShardGroup(), device or torch.device("cpu")
    if rank < 1:
        raise InputError(f"rank={rank} must be at least 1")
    if base not in ("original", "nf4"):
        raise InputError(f"base={base!r} is neither 'original' nor 'nf4'")
    with group.shared_errors():
        check_target(output, overwrite=overwrite, kind="lora", inputs=parts_of(Path(checkpoint)))
        if group.rank == 0:
            check_parent(Path(output))
    job = _Refit(Path(checkpoint), rank, base, group, device, dtype, pretrained, revision)
    if len(set(group.gather_objects(job.decomposed is None))) > 1:
        raise CheckpointError(
            f"{job.manifest['pretrained']}: only some ranks see the residual model that the run began from; put it "
            "where all ranks see it"
        )
    output = Path(output).absolute()
    leftovers: list[Leftover] = []
    with ExitStack() as stack:
        with group.shared_errors():
            if group.rank == 0:
                staging = stack.enter_context(atomic_directory(output, overwrite=overwrite, kind="lora"))
                files = stack.enter_context(closing(job.files(staging)))
        total = sum(job.reader.info(planned.key).nbytes for planned in job.plan.matrices)
        bar = stack.enter_context(progress_bar(total, show=show_progress and group.rank == 0, doing="Fitting"))
        for planned in job.plan.matrices:
            factors, leftover = job.fit(planned)
            leftovers.append(leftover)
            with group.shared_errors():
                if group.rank == 0:
                    job.write(files, planned, factors)
            bar.update(job.reader.info(planned.key).nbytes)
        with group.shared_errors():
            if group.rank == 0:
                job.finish(staging, leftovers)
            stack.pop_all().close()
    return Refit(path=output, rank=rank, leftovers=leftovers, not_quantized=job.not_quantized)


class _Refit:
    """One checkpoint and the base that its LoRA is fitted for. Made by all ranks of `group` together."""

    def __init__(
        self,
        checkpoint: Path,
        rank: int,
        base: Literal["original", "nf4"],
        group: ShardGroup,
        device: torch.device,
        dtype: torch.dtype | None,
        pretrained: str | os.PathLike[str] | None,
        revision: str | None,
    ) -> None:
        self.checkpoint, self.rank, self.group, self.device = checkpoint, rank, group, device
        with group.shared_errors():
            refuse_copies(checkpoint)
            self.manifest = read_manifest(checkpoint)
            self.original = Original.recorded(self.manifest)
        verify_checkpoint(checkpoint, group)
        with group.shared_errors():
            config = read_config(checkpoint / ADAPTER_DIR)
            if not adds_product(config):
                raise InputError(
                    f"base={base!r} fits the factors of a LoRA, but the adapter of {checkpoint} is of {said(config)}; "
                    "leave it out (--base): the nearest LoRA of its update needs the rank only"
                )
            for key in ("residual", "pretrained", "matrices"):
                if key not in self.manifest:
                    raise CheckpointError(
                        f"{checkpoint}: its {MANIFEST} has no {key}; it was written by an older version"
                    )
            self.reports = {e["name"]: MatrixReport.from_dict(e) for e in self.manifest.records("matrices")}
            residual = format_from_dict(self.manifest["residual"])
            # where a run kept the stored bytes, the base is the decoded weight
            self.format: ResidualFormat = Dense(dtype=torch.float32) if isinstance(residual, str) else residual
            self.target = None
            if base == "nf4":
                self.target = self.format if isinstance(self.format, NF4) else NF4()
            self.trained, self.config = open_adapter(checkpoint / ADAPTER_DIR)
            self.factors = StoredFactors(checkpoint / ADAPTER_DIR)
            self.earlier = StoredDecompositions(checkpoint=checkpoint, starts_at_zero=self.manifest["starts_at_zero"])
            directory = find_original(self.original, pretrained, revision, of=checkpoint, option="pretrained")
            self.reader = open_reader(directory)
            backbone = build_skeleton(directory)
            self.config.init_lora_weights = True
            head = {name for name, module in backbone.named_modules() if module is backbone.get_output_embeddings()}
            linears = {name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
            untie = changes_tied(backbone, self.trained, self.config.modules_to_save)
        opened = open_plan(self.reader, self.config, backbone=backbone, untie=untie, new_adapter=False, group=group)
        self.plan = opened.plan
        if isinstance(residual, str) and not self.earlier.starts_at_zero:
            with group.shared_errors():
                self.format = self._encoded_again()
        elif isinstance(residual, str):  # their digests are those of the stored bytes
            self.reports = {name: replace(report, digest=None) for name, report in self.reports.items()}
            fingerprint = source_fingerprint(self.reader, group)
            with group.shared_errors():
                if fingerprint != self.manifest.get("pretrained_fingerprint"):
                    raise CheckpointError(
                        f"{directory}: the weights have changed since {checkpoint} was written; use those of the "
                        "run, or convert without --base"
                    )
        with group.shared_errors():
            self.dense = {planned.layer for planned in self.plan.matrices if planned.lookup or planned.wrapped} | head
            fitted = {planned.layer for planned in self.plan.matrices} - self.dense
            self.not_quantized = sorted(linears - fitted) if base == "nf4" else []
            self._check_quantizable()
            self.decomposed = self._decomposed(directory)
            self.stored: dict[str, PlannedMatrix] = {}  # matrices under their names in its files
            if self.decomposed is not None:
                plan = plan_walk(backbone, self.decomposed.reader, opened.tied, new_adapter=False)
                self.stored = {planned.name: planned for planned in plan.matrices}
            if self.decomposed is None and not self.earlier.starts_at_zero:
                self.earlier.check_factors(self.plan, torch.float32, self.reports)
            first = peft_name(next(iter(self.plan.matrices[0].factor_names.values())))
            self.dtype = dtype or DTYPES[self.trained.info(first).dtype]

    def _encoded_again(self) -> AsStored:
        """The formats of a run that encoded residuals in the kinds that their matrices are stored in."""
        dtype = NAMED_DTYPES[self.manifest.record("residual").expect("dtype", NAMED_DTYPES.__contains__, "a dtype")]
        if not isinstance(self.reader, DecodingReader):
            raise CheckpointError(
                f"{self.checkpoint}: the run kept a quantized base, but {self.reader.directory} is not quantized; use "
                "the weights of the run, or convert without --base"
            )
        return AsStored.of(self.plan, self.reader, dtype, leaves_residual=lambda planned: True)

    def _check_quantizable(self) -> None:
        """Raise ModelError for layers that transformers quantizes in another orientation than the stored one."""
        for planned in self.plan.matrices if self.target is not None else ():
            if planned.input_first and planned.layer not in self.dense:
                raise ModelError(
                    f"{planned.name}: transformers quantizes the transpose of a Conv1D, which cannot be computed from "
                    "the row blocks of the ranks; use base='original'"
                )

    def _decomposed(self, original: Path) -> ResidualModel | None:
        """The residual model that the run began from; None if it began from pretrained weights or it is missing."""
        name = self.manifest.text("pretrained")
        if self.original is not None and name == self.original.location and not ResidualModel.is_at(original):
            return None
        try:
            commit = self.manifest.text("pretrained_commit", None)
            directory = resolve_checkpoint(name, revision=commit if is_hub_id(name) else None)
        except CheckpointError as error:
            log.warning(
                "Residual model of the run not found; its residual is computed from the original model: %s", error
            )
            return None
        return ResidualModel(directory, self.format) if ResidualModel.is_at(directory) else None

    def fit(self, planned: PlannedMatrix) -> tuple[dict[str, Tensor], Leftover]:
        """A' ``[K, in]`` and B' ``[out, K]``, replicated, on the CPU; and the leftover error. Collective."""
        matrix = self._matrix(planned)
        residual, initial = self._residual(planned, matrix)
        trained, rows = self.factors.read(matrix), matrix.partition.rows
        with full_fp32():
            wanted = residual.decoded.addmm(trained.left, trained.right, alpha=matrix.scaling)
            base_block = matrix.block
            if self.target is not None and planned.layer not in self.dense:
                base_block = self.target.encode(matrix.block, matrix.partition, self.group).decoded
            wanted -= base_block
            exact = wanted.addmm(trained.left, trained.right, alpha=-matrix.scaling)
            if initial is not None:
                exact.addmm_(initial.left, initial.right, alpha=matrix.scaling)
            squares = [squared_norm(wanted), squared_norm(exact)]
            del exact
            k = min(self.rank, rows, planned.columns)
            svd = randomized_svd(
                wanted,
                k,
                rows=rows,
                group=self.group,
                seed=seed_from_name(planned.key, 1),
                tolerance=TOLERANCE,
            )
            root = svd.s.sqrt()
            left, right = (svd.u * root).to(self.dtype).float(), (root[:, None] * svd.vh).to(self.dtype).float()
            squares.append(squared_norm(wanted.addmm_(left, right, alpha=-1)))
        norm, before, after = self.group.sum(torch.stack(squares)).sqrt().tolist()
        whole = whole_left(left, matrix.partition, self.group)
        a, b = (whole.mT, right.mT) if planned.input_first else (right, whole)
        padded_a, padded_b = a.new_zeros(self.rank, a.shape[1]), b.new_zeros(b.shape[0], self.rank)
        padded_a[:k], padded_b[:, :k] = a, b
        factors = {"lora_A": padded_a.to(self.dtype).cpu(), "lora_B": padded_b.to(self.dtype).cpu()}
        return factors, Leftover(name=planned.name, norm=norm, before=before, after=after)

    def _residual(self, planned: PlannedMatrix, matrix: Matrix) -> tuple[Encoded, Factors | None]:
        """The residual of the run, and A_0 and B_0 unless their product is zero. Collective.

        Raises
        ------
        CheckpointError
            On every rank, if its digest differs from the checkpoint's.
        """
        if self.decomposed is None:
            found = self.earlier.decompose(matrix, self.format.of_matrix(planned.key))
            residual, initial = found.residual, found.factors
        else:
            stored = self.stored[planned.name]
            residual = self.decomposed.residual_of(stored, matrix.partition, self.group, self.device)
            initial = self.earlier.initial.read(matrix)
        storages = self.format.of_matrix(planned.key).storages(matrix.partition)
        sums = digest_sums(residual.shards, storages, self.group.rank)
        (digest,) = digests([sums.to(self.group.device)], self.group)
        if self.reports[planned.name].digest not in (None, digest):
            raise CheckpointError(
                f"{planned.name}: the residual that {self.checkpoint} was trained with cannot be restored from "
                f"{self.reader.directory if self.decomposed is None else self.decomposed.directory}: the weights have "
                "changed since, or this machine rounds differently; use the weights of the run, or convert without "
                "--base"
            )
        return residual, None if self.earlier.starts_at_zero else initial

    def _matrix(self, planned: PlannedMatrix) -> Matrix:
        partition = planned.row_partition(self.group.size, block=self.format.of_matrix(planned.key).block)
        with self.group.shared_errors():
            start, stop = partition.bounds(self.group.rank)
            block = self.reader.rows(planned.key, start, stop).float()
            check_finite(planned.key, block, start)
        return Matrix.of(planned, block.to(self.device), self.group, partition=partition, factor_dtype=torch.float32)

    def files(self, staging: Path) -> TensorFiles:
        """Create the adapter's file and write the tensors that are not fitted (`modules_to_save`). One rank only."""
        tensors: dict[str, FileTensor] = {}
        for planned in self.plan.matrices:
            for factor, shape in replace(planned, rank=self.rank).parameter_shapes.items():
                tensors[peft_name(planned.factor_names[factor])] = FileTensor(shape=shape, dtype=self.dtype)
        others = [name for name in self.trained if name not in tensors]
        for name in others:
            info = self.trained.info(name)
            tensors[name] = FileTensor(shape=info.shape, dtype=DTYPES[info.dtype])
        files = TensorFiles(staging, tensors, stem=Path(WEIGHTS).stem, max_bytes=sys.maxsize)
        files.create()
        for name in others:
            files.write(name, 0, whole_tensor(self.trained, name).flatten())
        return files

    def write(self, files: TensorFiles, planned: PlannedMatrix, factors: dict[str, Tensor]) -> None:
        """Write the factors of one matrix; B of stacked experts once it is complete. One rank only."""
        expert, experts = planned.expert or 0, planned.experts
        for factor, name in planned.factor_names.items():
            values = factors[factor].flatten()
            where = positions(factor, values.numel(), expert, experts)
            if where.step == 1:
                files.write(peft_name(name), where.start, values)
                continue
            if expert == 0:
                self._stack = values.new_empty(experts * values.numel())
            put_factor(self._stack, 0, values, where)
            if expert == experts - 1:
                files.write(peft_name(name), 0, self._stack)

    def finish(self, staging: Path, leftovers: list[Leftover]) -> None:
        """Write the configuration and the manifest. One rank only."""
        config = changed_config(
            self.config, r=self.rank, lora_alpha=self.rank, use_rslora=False, rank_pattern={}, alpha_pattern={}
        )
        if self.original is not None:
            config.revision = self.original.revision
        config.save_pretrained(str(staging))
        kept = ("lowrank_dist", "base", "decoded_from", "method", "quantization", "step")
        manifest = {key: self.manifest[key] for key in kept if key in self.manifest}
        manifest |= {} if self.original is None else self.original.facts()
        manifest |= {
            "kind": "lora",
            "adapter_is_for": "the base" if self.target is None else f"the base in {self.target}",
            "rank": self.rank,
            "not_quantized": self.not_quantized,
            "leftovers": [vars(leftover) for leftover in leftovers],
        }
        write_json(staging / MANIFEST, manifest)


def _ratio(pairs: list[tuple[float, float]]) -> float:
    total = sum(norm**2 for _, norm in pairs)
    return (sum(left**2 for left, _ in pairs) / total) ** 0.5 if total else 0.0
