"""Residual models on disk: the layout of their files, and their reader.

The layout is the one that the authors of PiSSA publish. The root is an ordinary model directory that holds the
residual, dense or in the 4-bit serialization of bitsandbytes (NF4, FP4). A directory ``pissa_init/`` (``loftq_init/``,
...) in it holds the initial adapter in PEFT's format. Stock transformers and peft load both. Here every rank reads its
own part.

The published layout cannot hold two things, for which this package adds its own files:

- Residuals in INT8, FP8 and MXFP4, and 4-bit ones of anything but the ``[out, in]`` weight of a linear layer: experts,
  embeddings, ``Conv1D``, parameters that PEFT adapts without their module, weights that transformers fuses while
  loading. The root then holds
  ``residual.safetensors`` (or several files and an index) instead of ``model.safetensors``: transformers does not find
  its file and refuses the directory, instead of initialising the weights that it cannot read. The tensors have the
  names and suffixes of bitsandbytes' serialization. Each expert of a stack has its own, ``<parameter>[<expert>]``.
- The frozen B of LoRA-XS, in ``frozen_factors.safetensors`` beside the initial adapter, which holds A and ``B R``.

Beside the initial adapter of an encoded residual, ``encoded_factors.safetensors`` holds the factors that it was encoded
from: those of the last step but one where the last step fitted the initial adapter to the residual. Checkpoints
keep them, so that a run can resume without the residual model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from lowrank_dist.adapters.files import read_config
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
from lowrank_dist.quantization.registry import FORMATS
from lowrank_dist.quantization.state import read_quant_state
from lowrank_dist.storage.layout import (
    CONFIG,
    MANIFEST,
    QUANT_STATES,
    WEIGHTS,
    encoded_weight,
    read_manifest,
    residual_stem,
)
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.prefetch import read_ahead
from lowrank_dist.storage.reader import PACKED_DTYPES, CheckpointReader, TensorInfo, check_finite
from lowrank_dist.storage.verify import ENCODED_STEM, FROZEN_STEM, damage

_STACK_ENTRY = re.compile(r"(.+)\[(\d+)\]")


def initial_directory(directory: Path) -> Path | None:
    """The directory of the initial adapter in a residual model (``*_init``), or None if there is none.

    Raises
    ------
    CheckpointError
        If there are several.
    """
    found = sorted(path.parent for path in directory.glob(f"*_init/{CONFIG}"))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(found)} initial adapters ({', '.join(path.name for path in found)}); remove all "
            "but one"
        )
    return found[0] if found else None


def starts_at_zero(directory: Path) -> bool:
    """Whether the residuals of the residual model in `directory` are the original matrices, possibly quantized."""
    return bool(_manifest(directory).get("starts_at_zero", False))


def _manifest(directory: Path) -> Record:
    """The manifest of a residual model; empty if this package did not write the model."""
    return read_manifest(directory) if (directory / MANIFEST).is_file() else Record({}, str(directory / MANIFEST))


def factor_keys(planned: PlannedMatrix) -> dict[str, str]:
    """Names of A (``lora_A``) and B (``lora_B``) in the files of the initial adapter."""
    return {factor: peft_name(name) for factor, name in planned.factor_names.items()}


def packed_name(planned: PlannedMatrix, source: CheckpointReader) -> str:
    """Name of an encoded residual in the files: the name of its weight in `source`, if that is one tensor there.

    Otherwise it is the name of the weight in the model: `source` joins several tensors to it, or it is one expert of a
    stack.
    """
    return planned.key if planned.key in source else planned.weight


def has_stock_layout(planned: PlannedMatrix, residual: ResidualFormat, source: CheckpointReader) -> bool:
    """Whether stock transformers can load the residual of a matrix of `source`."""
    linear = not (planned.input_first or planned.lookup or planned.wrapped)
    return residual.exact or (residual.stock and linear and planned.key in source)


class ResidualReader(CheckpointReader):
    """Reader of the root of a residual model.

    `info` describes an encoded weight by the shape of the matrix that it encodes and a dtype that is the name of its
    format (``NF4``, ...). The files hold the matrices of an encoded stack one by one; the name of the stack stands for
    all of them.
    """

    holds_residuals = True

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, stem=residual_stem(directory))
        self._depths: dict[str, int] = {}
        #: Names of the formats of encoded weights.
        self.kinds = dict(filter(None, map(encoded_weight, self)))
        for match in filter(None, map(_STACK_ENTRY.fullmatch, self.kinds)):
            self._depths[match[1]] = max(self._depths.get(match[1], 0), int(match[2]) + 1)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._depths

    def info(self, name: str) -> TensorInfo:
        if name in self._depths:
            each = [self.info(self.entry(name, index)) for index in range(self._depths[name])]
            nbytes = sum(info.nbytes for info in each)
            return TensorInfo(shape=(len(each), *each[0].shape), dtype=each[0].dtype, nbytes=nbytes)
        info = super().info(name)
        if name not in self.kinds:
            return info
        state = self.quant_state(name)
        return TensorInfo(shape=tuple(state["shape"]), dtype=self.kinds[name].upper(), nbytes=info.nbytes)

    def entry(self, name: str, index: int) -> str:
        return f"{name}[{index}]" if name in self._depths else super().entry(name, index)

    def quant_state(self, name: str) -> dict[str, Any]:
        """The quantization state of the encoded weight `name`, the JSON beside it.

        Raises
        ------
        CheckpointError
            If it cannot be read.
        """
        key = name + QUANT_STATES[self.kinds[name]]
        info = self.stored(key)
        if info.dtype != "U8" or info.nbytes > 2**16:
            raise CheckpointError(f"{key}: {list(info.shape)} {info.dtype} is no text; fetch the model again")
        return read_quant_state(self._open(self._file_of[key]).get_tensor(key), f"{self.directory}: {key}")


class ResidualModel:
    """A residual model on disk.

    Parameters
    ----------
    directory
        Its root.
    dense
        Format of the residual if the model holds no encoded weights.

    Attributes
    ----------
    reader : ResidualReader
        Reads the residuals and every parameter that is not adapted.
    adapter : peft.LoraConfig
        Configuration of the initial adapter, ready for training.
    residual : ResidualFormat
        Format of the residual: the one that encoded weights are stored in, or `dense` if there are none.
    manifest : Record
        The manifest; empty if this package did not write the model.
    original : Original
        The pretrained model, the base model of converted adapters. Without a manifest: the base model of the initial
        adapter, else the one at `directory`.
    method : str
        The initialisation. Without a manifest: the name of the initial adapter's directory, without ``_init``.
    starts_at_zero : bool
        Whether the residual is W, possibly quantized. Without a manifest: False.
    layout : FactorLayout
        Which parameters of an update are trained.
    init : None
        Nothing is decomposed, because all residuals and factors are stored.

    Raises
    ------
    CheckpointError
        If `directory` is not a residual model or cannot be read.
    """

    init: Method | None = None
    fills_cache = False
    verified = False  # whether the files were compared with the manifest

    def __init__(self, directory: str | Path, dense: ResidualFormat) -> None:
        self.directory = Path(directory)
        initial = initial_directory(self.directory)
        if initial is None:
            raise CheckpointError(
                f"{directory}: not a residual model, because it holds no *_init/{CONFIG}; pass the root of one"
            )
        self.reader = ResidualReader(self.directory)
        self._initial = CheckpointReader(initial, stem=Path(WEIGHTS).stem)
        config, self.manifest = read_config(initial), _manifest(self.directory)
        if not isinstance(config, LoraConfig):
            raise CheckpointError(
                f"{initial}: a {config.peft_type} adapter, not a LoRA; pass a residual model with an initial LoRA"
            )
        config.init_lora_weights, config.inference_mode = True, False
        self.adapter: LoraConfig = config
        self.residual = self._stored_format() or dense
        self.original = self._recorded_original(config)
        self.decoded_from: str | None = self.manifest.get("decoded_from")
        self.method: str = self.manifest.get("method") or initial.name.removesuffix("_init")
        self.starts_at_zero: bool = self.manifest.get("starts_at_zero", False)
        self.layout = stored_layout(self.manifest)
        self._factors = {"lora_A": self._initial, "lora_B": self._initial}
        if self.layout.folds:
            self._factors["lora_B"] = CheckpointReader(initial, stem=FROZEN_STEM)
        self._encoded: CheckpointReader | None = None
        if (initial / f"{ENCODED_STEM}.safetensors").exists():
            self._encoded = CheckpointReader(initial, stem=ENCODED_STEM)

    def _recorded_original(self, config: LoraConfig) -> Original:
        name = config.base_model_name_or_path or str(self.directory)
        return Original.recorded(self.manifest) or Original(name=name, location=name, commit=config.revision)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, including the initial adapter."""
        encoded = self._encoded.nbytes if self._encoded is not None and self.keeps_encoded else 0
        return self.reader.nbytes + self._initial.nbytes + encoded

    @property
    def keeps_encoded(self) -> bool:
        """Whether it keeps other factors that its residual was encoded from, for a matrix at least."""
        ends = (entry.get("ended_on") for entry in self.manifest.get("matrices", []))
        return self._encoded is not None and "decompose" in ends

    @staticmethod
    def is_at(directory: Path) -> bool:
        """Whether `directory` is the root of a residual model."""
        return initial_directory(directory) is not None

    def _stored_format(self) -> ResidualFormat | None:
        found: dict[ResidualFormat, str] = {}
        for name, kind in self.reader.kinds.items():
            block, nested = self.reader.quant_state(name)["blocksize"], f"{name}.nested_absmax" in self.reader
            found.setdefault(FORMATS[kind].of(block, nested=nested), name)
        if len(found) > 1:
            shown = "; ".join(f"{name}: {fmt}" for fmt, name in found.items())
            raise CheckpointError(
                f"{self.directory}: its residuals are stored in {len(found)} formats, but one is supported ({shown}); "
                "decompose the original again"
            )
        return next(iter(found), None)

    def check_settings(
        self, *, adapter: LoraConfig | None, init: Method | None, quantization: ResidualFormat | None
    ) -> None:
        """Raise ModelError if an option differs from what is stored; None accepts what is stored."""
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
        """Raise ModelError if `plan` has other targets, shapes or formats than are stored."""
        for parameter in plan.parameters:
            if parameter.key is not None and self.reader.info(parameter.key).dtype in PACKED_DTYPES:
                raise ModelError(
                    f"{parameter.names[0]} is stored quantized, and the adapter does not target it; leave `adapter` "
                    "out to use the stored configuration"
                )
        for planned in plan.matrices:
            dtype = self.reader.info(planned.key).dtype
            if (dtype in PACKED_DTYPES) == self.residual.exact:
                raise ModelError(
                    f"{planned.layer}: its residual is stored as {dtype}, those of other layers as {self.residual}; "
                    "leave `adapter` out to use the stored configuration"
                )
            for factor, shape in planned.parameter_shapes.items():
                key = factor_keys(planned)[factor]
                stored = self._initial.info(key).shape if key in self._initial else None
                if stored != shape:
                    what = "holds none" if stored is None else f"holds {list(stored)}"
                    raise ModelError(
                        f"{planned.layer}: the adapter needs {factor} {list(shape)}, but {self._initial.directory} "
                        f"{what}; leave `adapter` out to use the stored configuration"
                    )

    def verify(self, group: ShardGroup) -> None:
        """Compare every file with the digests in the manifest, once. Collective, see `damage`.

        Raises
        ------
        CheckpointError
            On every rank, if a tensor or a setting differs from what was written.
        """
        if not self.verified:
            found = damage(self.directory, group)
            if found is not None:
                raise CheckpointError(f"{found}: the file is damaged; fetch or decompose it again")
            self.verified = True

    def plan_of(self, plan: Plan, source: CheckpointReader) -> Plan:
        """`plan`, which was made with the pretrained weights `source`, in the names of this residual model of them."""
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
        """Return this model and `plan`, because a cache would hold the same model. Nothing is communicated."""
        return self, plan

    def from_cache(self, plan: Plan, factor_dtype: torch.dtype) -> tuple[ResidualModel, Plan]:
        """Return this model and `plan`; see `through_cache`."""
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
        """Read this rank's shards of every matrix of `plan`. Collective: all ranks of `group` iterate to the end.

        The ranks exchange only errors, once per matrix.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read.
        """
        self.verify(group)
        device, residual = device or torch.device("cpu"), self.residual
        factor_reader, encoded_reader = FactorReader(), FactorReader()
        stored = {entry["name"]: MatrixReport.from_dict(entry) for entry in self.manifest.get("matrices", [])}

        def read(planned: PlannedMatrix) -> DecomposedMatrix:
            partition = planned.row_partition(group.size, block=residual.block)
            report = stored.get(planned.name) or MatrixReport(
                name=planned.name, rows=planned.rows, columns=planned.columns, rank=planned.rank
            )

            def shards_of(readers: Mapping[str, CheckpointReader], through: FactorReader) -> dict[str, Tensor]:
                found = {}
                for factor, shape in planned.factor_shapes.items():
                    key = factor_keys(planned)[factor]
                    flat = FlatPartition(numel=math.prod(shape), world_size=group.size)
                    start, stop = flat.bounds(group.rank)
                    where = positions(factor, flat.numel, planned.expert or 0, planned.experts)[start:stop]
                    found[factor] = through.read(readers[factor].flat, key, where).to(device, factor_dtype)
                    check_finite(key, found[factor], start)
                return found

            factors, encoded_from = shards_of(self._factors, factor_reader), dict[str, Tensor]()
            if self._encoded is not None and report.ended_on == "decompose":
                encoded_from = shards_of(dict.fromkeys(planned.factor_shapes, self._encoded), encoded_reader)
            shards = self._shards(planned, partition, group.rank)
            return DecomposedMatrix(
                planned=planned,
                partition=partition,
                residual={name: shard.to(device) for name, shard in shards.items()},
                factors=factors,
                encoded_from=encoded_from,
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
        """This rank's shards of one residual on `device`, and a decoder of this rank's rows. Collective.

        One all-gather of each storage. Every rank holds the whole stored residual of the matrix as long as it keeps the
        result.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read.
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
        """Shards of `rank` of one residual, by storage name; CPU."""

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
        for reader in {self._initial, *self._factors.values(), *filter(None, [self._encoded])}:
            reader.close()
