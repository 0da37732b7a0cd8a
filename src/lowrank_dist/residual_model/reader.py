"""Residual models on disk: the residual at the root, the initial adapter beside it, read back by rows.

The layout is the one in which the authors of PiSSA publish: an ordinary checkpoint that holds the residual, dense or in
bitsandbytes' own 4-bit serialization, and a directory ``pissa_init/`` (``loftq_init/``, ...) with a PEFT adapter that
belongs to it. Stock transformers + peft load both; here every rank reads its own part.

Two things have no place in it, and are kept beside it:

- Residuals in 4 bits of anything but the ``[out, in]`` weight of a linear layer: experts, embeddings, ``Conv1D``,
  parameters without their module, weights that are fused while loading. The root then is ``residual.safetensors`` (or
  several and an index) instead of ``model.safetensors``, so that transformers refuses it by name instead of filling in
  what it cannot read. Tensors have the names and suffixes of bitsandbytes' serialization; each expert of a stack its
  own, ``<parameter>[<expert>]``.
- The frozen B of LoRA-XS: ``frozen_factors.safetensors`` beside the adapter, which holds A and ``B R``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from lowrank_dist.decomposition.report import MatrixReport
from lowrank_dist.decomposition.walk import Calibrated, DecomposedMatrix
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition, RowPartition
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.methods import Method
from lowrank_dist.model.factor_layout import stored_layout
from lowrank_dist.model.names import peft_name
from lowrank_dist.model.plan import Plan, PlannedMatrix
from lowrank_dist.model.stacking import FactorReader, positions
from lowrank_dist.quantization.format import Encoded, ResidualFormat
from lowrank_dist.quantization.nf4 import NF4, read_quant_state
from lowrank_dist.storage.layout import CONFIG, MANIFEST, QUANT_STATE, WEIGHTS, read_manifest, residual_stem
from lowrank_dist.storage.reader import PACKED_DTYPE, CheckpointReader, TensorInfo, check_finite, read_ahead

FROZEN_STEM = "frozen_factors"
_OF_STACK = re.compile(r"(.+)\[(\d+)\]" + re.escape(QUANT_STATE))


def initial_directory(directory: Path) -> Path | None:
    """The directory of the initial adapter inside a residual model (``*_init``), or None where there is none."""
    found = sorted(path.parent for path in directory.glob(f"*_init/{CONFIG}"))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(found)} initial adapters ({', '.join(path.name for path in found)}); leave one"
        )
    return found[0] if found else None


def starts_at_zero(directory: Path) -> bool:
    """Whether the residual of a residual model is the original itself, maybe quantized."""
    return bool(_manifest(directory).get("starts_at_zero", False))


def _manifest(directory: Path) -> dict[str, Any]:
    """What this package wrote beside a residual model; empty for models of other origin."""
    return read_manifest(directory) if (directory / MANIFEST).is_file() else {}


def factor_keys(planned: PlannedMatrix) -> dict[str, str]:
    """Names of A (``lora_A``) and B (``lora_B``) in the file of the initial adapter."""
    return {factor: peft_name(name) for factor, name in planned.factor_names.items()}


def packed_name(planned: PlannedMatrix, source: CheckpointReader) -> str:
    """Name in the files of a residual in 4 bits: of the weight in `source`, of the model where that joins tensors."""
    return planned.key if planned.key in source else planned.weight


def has_stock_layout(planned: PlannedMatrix, residual: ResidualFormat, source: CheckpointReader) -> bool:
    """Whether transformers has a place for the residual of a matrix of `source`."""
    linear = not (planned.input_first or planned.lookup or planned.wrapped)
    return residual.exact or (linear and planned.key in source)


class ResidualReader(CheckpointReader):
    """The root of a residual model: 4-bit weights have the shape of the matrix they stand for, and dtype ``NF4``.

    Stacks of matrices in 4 bits, which the files hold one by one, are there under the name of the stack too.
    """

    holds_residuals = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, stem=residual_stem(directory))
        self._depths: dict[str, int] = {}
        for match in filter(None, map(_OF_STACK.fullmatch, self)):
            self._depths[match[1]] = max(self._depths.get(match[1], 0), int(match[2]) + 1)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._depths

    def info(self, name: str) -> TensorInfo:
        if name in self._depths:
            each = [self.info(self.entry(name, index)) for index in range(self._depths[name])]
            nbytes = sum(info.nbytes for info in each)
            return TensorInfo(shape=(len(each), *each[0].shape), dtype=PACKED_DTYPE, nbytes=nbytes)
        info = super().info(name)
        if name + QUANT_STATE not in self:
            return info
        state = self.quant_state(name)
        return TensorInfo(shape=tuple(state["shape"]), dtype=PACKED_DTYPE, nbytes=info.nbytes)

    def entry(self, name: str, index: int) -> str:
        return f"{name}[{index}]" if name in self._depths else super().entry(name, index)

    def quant_state(self, name: str) -> dict[str, Any]:
        """The JSON that bitsandbytes keeps beside the 4-bit weight `name`."""
        key = name + QUANT_STATE
        try:
            return read_quant_state(self._open(self._file_of[key]).get_tensor(key))
        except ValueError as error:
            raise CheckpointError(f"{key}: no quantization state of bitsandbytes ({error}); fetch it again") from error


class ResidualModel:
    """A residual model on disk.

    Parameters
    ----------
    directory
        Its root.
    dense
        Format that a residual gets which is not quantized.

    Attributes
    ----------
    reader : ResidualReader
        The residual, and every parameter that is not adapted.
    adapter : peft.LoraConfig
        Configuration of the initial adapter, ready for training.
    residual : ResidualFormat
        How the residual is stored: NF4 where the model holds 4-bit weights, else `dense`.
    manifest : dict
        What this package wrote beside it; empty for models of other origin.
    base, method, starts_at_zero
        The pretrained model (for which converted adapters are), the initialisation, and whether the residual is W;
        where there is no manifest, what the initial adapter says.
    layout : FactorLayout
        What of its updates is trained.
    init : None
        Nothing is decomposed: the directory holds all residuals and factors.

    Raises
    ------
    CheckpointError
        Where `directory` is no residual model or cannot be read.
    """

    init: Method | None = None
    fills_cache = False

    def __init__(self, directory: str | Path, dense: ResidualFormat) -> None:
        self.directory = Path(directory)
        initial = initial_directory(self.directory)
        if initial is None:
            raise CheckpointError(f"{directory}: no residual model: it holds no *_init/{CONFIG}")
        self.reader = ResidualReader(self.directory)
        self._initial = CheckpointReader(initial, stem=Path(WEIGHTS).stem)
        try:
            config = LoraConfig.from_peft_type(**json.loads((initial / CONFIG).read_text()))
            self.manifest = _manifest(self.directory)
        except ValueError as error:
            raise CheckpointError(f"{directory}: damaged JSON: {error}; fetch or decompose it again") from error
        if not isinstance(config, LoraConfig):
            raise CheckpointError(f"{initial}: a {config.peft_type} adapter, not a LoRA")
        config.init_lora_weights, config.inference_mode = True, False
        self.adapter: LoraConfig = config
        self.residual = self._stored_format() or dense
        self.base: str = self.manifest.get("base") or config.base_model_name_or_path or str(directory)
        self.method: str = self.manifest.get("method") or initial.name.removesuffix("_init")
        self.starts_at_zero: bool = self.manifest.get("starts_at_zero", False)
        self.layout = stored_layout(self.manifest)
        self._factors = {"lora_A": self._initial, "lora_B": self._initial}
        if self.layout.folds:
            self._factors["lora_B"] = CheckpointReader(initial, stem=FROZEN_STEM)

    @property
    def nbytes(self) -> int:
        """Of all stored tensors, the initial adapter included."""
        return self.reader.nbytes + self._initial.nbytes

    @staticmethod
    def is_at(directory: Path) -> bool:
        """Whether `directory` is the root of a residual model."""
        return initial_directory(directory) is not None

    def _stored_format(self) -> ResidualFormat | None:
        found: dict[ResidualFormat, str] = {}
        for key in self.reader:
            if key.endswith(QUANT_STATE):
                name = key.removesuffix(QUANT_STATE)
                block_size = self.reader.quant_state(name)["blocksize"]
                found.setdefault(NF4(block_size=block_size, double_quant=f"{name}.nested_absmax" in self.reader), name)
        if len(found) > 1:
            shown = "; ".join(f"{name}: {fmt}" for fmt, name in found.items())
            raise CheckpointError(f"{self.directory}: residuals in {len(found)} formats are not supported: {shown}")
        return next(iter(found), None)

    def check_settings(
        self, *, adapter: LoraConfig | None, init: Method | None, quantization: ResidualFormat | None
    ) -> None:
        """Raise ModelError where a user asks for anything else than what is stored; None asks for nothing."""
        asked_and_stored: list[tuple[str, Any, Any]] = []
        if adapter is not None:
            for option in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
                pair = getattr(adapter, option) or None, getattr(self.adapter, option) or None
                asked_and_stored.append((f"adapter: {option}", *pair))
        if init is not None and "options" in self.manifest:
            asked_and_stored.append(("init", repr(init), self.manifest["options"]))
        if quantization is not None:
            asked_and_stored.append(("quantization", quantization, self.residual))
        for what, asked, stored in asked_and_stored:
            if asked != stored:
                raise ModelError(
                    f"{what} is {asked!r}, but {self.directory} was decomposed with {stored!r}; leave "
                    f"`{what.split(':')[0]}` out to use the stored value, or decompose the original again"
                )

    def check(self, plan: Plan) -> None:
        """Raise ModelError where what `plan` asks for is not what is stored: other targets, shapes or formats."""
        for parameter in plan.parameters:
            if parameter.key is not None and self.reader.info(parameter.key).dtype == PACKED_DTYPE:
                raise ModelError(
                    f"{parameter.names[0]} is stored in 4 bits, and the adapter does not target it; leave `adapter` "
                    "out to take the stored configuration"
                )
        for planned in plan.matrices:
            dtype = self.reader.info(planned.key).dtype
            if (dtype == PACKED_DTYPE) == self.residual.exact:
                raise ModelError(f"{planned.layer}: the residual is stored as {dtype}, others as {self.residual}")
            for factor, shape in planned.parameter_shapes.items():
                key = factor_keys(planned)[factor]
                stored = self._initial.info(key).shape if key in self._initial else None
                if stored != shape:
                    what = "has none" if stored is None else f"has shape {list(stored)}"
                    raise ModelError(
                        f"{planned.layer}: the adapter wants {factor} {list(shape)}, {self._initial.directory} {what}; "
                        "leave `adapter` out to take the stored configuration"
                    )

    def plan_of(self, plan: Plan, source: CheckpointReader) -> Plan:
        """A plan that was made with `source`, in the names of this residual model of it."""
        self.reader.join_as(source)
        if self.residual.exact:
            return plan
        matrices = [replace(planned, key=packed_name(planned, source)) for planned in plan.matrices]
        return replace(plan, matrices=matrices)

    def through_cache(
        self,
        plan: Plan,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
        calibrated: Calibrated | None = None,
    ) -> tuple[ResidualModel, Plan]:
        """Return this model itself; a cache would hold the same. Communicates nothing."""
        return self, plan

    def from_cache(self, plan: Plan, factor_dtype: torch.dtype) -> tuple[ResidualModel, Plan]:
        """Return this model itself, see `through_cache`."""
        return self, plan

    def matrices(
        self,
        plan: Plan,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Iterator[DecomposedMatrix]:
        """Read every matrix of `plan`, this rank its own shards. Collective: all ranks of `group` iterate to the end.

        Raises
        ------
        CheckpointError
            On every rank, if any rank cannot read or finds a NaN or infinity.
        """
        device, residual = device or torch.device("cpu"), self.residual
        factor_reader = FactorReader()
        stored = {entry["name"]: MatrixReport.from_dict(entry) for entry in self.manifest.get("matrices", [])}

        def read(planned: PlannedMatrix) -> DecomposedMatrix:
            partition = planned.row_partition(group.size, block=residual.block)
            report = stored.get(planned.name) or MatrixReport(
                name=planned.name, rows=planned.rows, columns=planned.columns, rank=planned.rank
            )

            factors = {}
            for factor, shape in planned.factor_shapes.items():
                key = factor_keys(planned)[factor]
                flat = FlatPartition(numel=math.prod(shape), world_size=group.size)
                start, stop = flat.bounds(group.rank)
                where = positions(factor, flat.numel, planned.expert or 0, planned.experts)[start:stop]
                factors[factor] = factor_reader.read(self._factors[factor].flat, key, where).to(device, factor_dtype)
                check_finite(key, factors[factor], start)
            shards = self._shards(planned, partition, group.rank)
            return DecomposedMatrix(
                planned=planned,
                partition=partition,
                residual={name: shard.to(device) for name, shard in shards.items()},
                factors=factors,
                report=report,
            )

        matrices = read_ahead(read, plan.matrices)
        for planned in plan.matrices:
            with group.shared_errors():
                matrix = next(matrices)
            yield matrix
            advance(self.reader.stored(planned.key).nbytes)

    def residual_of(
        self, planned: PlannedMatrix, partition: RowPartition, group: ShardGroup, device: torch.device
    ) -> Encoded:
        """The residual of one matrix as this rank holds it on `device`, and what its rows stand for. Collective.

        One all-gather of each storage: for a moment every rank holds the stored residual of the matrix whole.

        Raises
        ------
        CheckpointError
            On every rank, if any rank cannot read or finds a NaN or infinity.
        """
        with group.shared_errors():
            shards = {n: shard.to(device) for n, shard in self._shards(planned, partition, group.rank).items()}
        whole = {name: group.gather_equal(shard) for name, shard in shards.items()}
        own = torch.arange(*partition.bounds(group.rank), device=device)
        return Encoded(
            shards=shards,
            rows=lambda some: self.residual.decode_rows(whole, partition, own[some], torch.float32),
        )

    def _shards(self, planned: PlannedMatrix, partition: RowPartition, rank: int) -> dict[str, Tensor]:
        """This rank's shards of one residual, by storage name."""

        def read_file(suffix: str, start: int, stop: int | None) -> Tensor:
            name = planned.key + suffix
            if stop is None:
                stop = torch.Size(self.reader.stored(name).shape).numel()
            values = self.reader.flat(name, start, stop)
            if values.is_floating_point():
                check_finite(name, values, start)
            return values

        return self.residual.from_files(read_file, partition, rank)

    def close(self) -> None:
        """Close the files."""
        self.reader.close()
        for reader in {self._initial, *self._factors.values()}:
            reader.close()
