"""A base that keeps the bytes of a quantized checkpoint.

An adapter that starts at zero leaves every matrix as it is: nothing is decoded or encoded when a run begins. A method
that takes its part from the weights leaves residuals, which the walk encodes again in the format of the same kind;
matrices without an adapter are kept then too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.decoding.as_stored import AsStored, StoredMatrix, read_stored
from lowrank_dist.decoding.reader import DecodingReader
from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.decomposition.walk import DecomposedMatrix, check_matrices, factor_shards
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.initialization.source import PretrainedSource
from lowrank_dist.methods import Matrix, Method
from lowrank_dist.methods.frozen import method_for
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import AS_STORED, Encoded
from lowrank_dist.storage.prefetch import read_ahead


class _Nothing(Dense):
    """Takes the place of a residual format while factors are made for a matrix that stays as it is stored."""

    def encode(self, block: Tensor, partition: RowPartition, group: ShardGroup) -> Encoded:
        return Encoded(shards={}, rows=lambda some: block[some])


class StoredSource(PretrainedSource):
    """Pretrained weights that stay as they are stored, but for those that the method takes its part from.

    Parameters
    ----------
    *args, **options
        See `PretrainedSource`; `residual` is an `AsStored`, whose formats the plan decides.
    """

    residual: AsStored

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        check_options(self.init, self.cache)
        if not isinstance(self.reader, DecodingReader) or self.reader.encoding is None:
            raise ModelError(
                f"quantization={AS_STORED!r}: {self.reader.directory} is not quantized; leave quantization out to keep "
                "its weights in the compute dtype, or pass NF4() or another format"
            )
        self.stored_reader: DecodingReader = self.reader

    def check(self, plan: Plan) -> None:
        """Decide the formats of the matrices of `plan`, and say what is encoded again and what is decoded.

        Raises
        ------
        InputError
            If the method cannot decompose a matrix into the format of its residual: one that is stored dense, say.
        ModelError
            If a quantized matrix cannot be kept, or its residual not be encoded again.
        """
        check_matrices(plan, self.init)

        def leaves_residual(planned: PlannedMatrix) -> bool:
            return not method_for(planned, self.init).starts_at_zero

        self.residual = AsStored.of(plan, self.stored_reader, self.residual.dtype, leaves_residual=leaves_residual)
        if not self.residual.formats:
            raise ModelError(
                f"quantization={AS_STORED!r}: no linear layer and no adapted parameter of {self.reader.directory} is "
                "quantized; leave quantization out"
            )
        for planned in filter(leaves_residual, plan.matrices):
            residual = self.residual.of_matrix(planned.key)
            try:
                self.init.check(residual)
            except InputError as error:
                held = "is stored dense" if residual.exact else f"is encoded again in {residual}"
                raise InputError(f"{planned.name} {held}: {error}, or leave it out of the adapter") from None
        dense, again = len(plan.matrices) - len(self.residual.formats), sum(self.residual.again.values())
        keys = [tensor.key for tensor in plan.parameters if tensor.key is not None]
        decoded = [key for key in keys if self.reader.decodes(key)]
        kept = len(self.residual.formats) - again
        lines = [f"{kept} matrices stay in {self.reader.encoding}"] if kept else []
        if again:
            kinds = " and ".join(sorted(self.residual.again))
            lines.append(f"what {self.method} leaves of {again} matrices is encoded again, in {kinds}")
        if dense:
            lines.append(f"{dense} that are stored dense stay dense")
        if decoded:
            sizes = [torch.Size(self.reader.info(key).shape).numel() for key in decoded]
            nbytes = sum(sizes) * self.residual.dtype.itemsize
            lines.append(
                f"{len(decoded)} quantized parameters that are neither linear layers nor adapted are decoded, "
                f"{nbytes / 1e9:.2f} GB in all ({decoded[0]}, ...): name stacks of experts in target_parameters to "
                "keep them"
            )
        self.announce(f"{AS_STORED}: {'; '.join(lines)}")

    def matrices(
        self,
        plan: Plan,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Iterator[DecomposedMatrix]:
        """All matrices of `plan`: those of the walk, which are dense or leave a residual, then those that are kept.

        Collective: all ranks of `group` iterate to the end.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read, or if the checkpoint of a run that is
            resumed lacks factors.
        """
        kept = {
            m.name: stored for m in plan.matrices if isinstance(stored := self.residual.of_matrix(m.key), StoredMatrix)
        }
        self.check_resumed(plan, group, factor_dtype)
        rest = replace(plan, matrices=[planned for planned in plan.matrices if planned.name not in kept])
        if rest.matrices:
            yield from super().matrices(rest, group, factor_dtype, device=device, advance=advance)
        known = {} if self.resume is None else self.resume.reports
        device = device or torch.device("cpu")
        stay = [planned for planned in plan.matrices if planned.name in kept]
        read = read_ahead(lambda planned: self._read(planned, kept[planned.name], group), stay)
        for planned in stay:
            started = time.monotonic()
            with group.shared_errors():
                shards, rows = next(read)
            partition = planned.row_partition(group.size, block=1)
            start, stop = partition.bounds(group.rank)
            nothing = torch.empty(1, 1, device=device).expand(stop - start, planned.columns)  # takes no memory
            block = nothing if rows is None else rows.to(device)
            matrix = Matrix.of(planned, block, group, partition=partition, factor_dtype=factor_dtype)
            found = method_for(planned, self.init).decompose(matrix, _Nothing(dtype=torch.float32))
            report = known.get(planned.name) or MatrixReport(
                name=planned.name, rows=planned.rows, columns=planned.columns, rank=planned.rank
            )
            nbytes = self.reader.info(planned.key).nbytes
            yield DecomposedMatrix(
                planned=planned,
                partition=partition,
                residual={name: shard.to(device) for name, shard in shards.items()},
                factors=factor_shards(planned, partition, found.factors, group, factor_dtype),
                report=replace(
                    report, seconds=time.monotonic() - started, nbytes=nbytes, group_size=group.size, digest=None
                ),
            )
            advance(nbytes)

    def _read(
        self, planned: PlannedMatrix, stored: StoredMatrix, group: ShardGroup
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """This rank's shards of a matrix that is kept, and its decoded rows in fp32 for a method that looks at them."""
        partition = planned.row_partition(group.size, block=1)
        shards = read_stored(planned.key, stored, self.stored_reader, partition, group.rank)
        if not method_for(planned, self.init).looks_at_weights:
            return shards, None
        return shards, self.reader.rows(planned.key, *partition.bounds(group.rank)).float()


def check_options(init: Method | None, cache: object) -> None:
    """Raise InputError if options contradict a base that stays as it is stored."""
    if init is not None and init.statistic is not None:
        raise InputError(
            f"quantization={AS_STORED!r}: init={init} looks at data with the whole model before anything is encoded, "
            "which needs one format for all weights; pass quantization=FP8(), MXFP4() or NF4(), or another init"
        )
    if cache is not None:
        raise InputError(
            f"quantization={AS_STORED!r} has a format for every matrix, which no residual model in init_cache="
            f"{str(cache)!r} can hold; leave init_cache out"
        )
