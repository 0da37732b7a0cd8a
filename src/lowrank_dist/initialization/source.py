"""Sources of decomposed matrices: pretrained weights that are decomposed during the run, or a residual model on disk.

`lowrank_dist.initialization.open_source` returns one or the other, depending on the directory; callers know both as
`MatrixSource`. If a run is resumed, the pretrained weights are not decomposed again:
`lowrank_dist.decomposition.restore` takes the factors from the run's checkpoint.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig

from lowrank_dist.decoding.open import open_reader
from lowrank_dist.decomposition.restore import RestoredMethod, Resume, StoredDecompositions
from lowrank_dist.decomposition.schedule import Sharding, scheduled
from lowrank_dist.decomposition.walk import Calibrated, DecomposedMatrix, Walk, check_matrices
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError
from lowrank_dist.methods import Method
from lowrank_dist.model.expansion import Expansion
from lowrank_dist.model.factor_layout import FactorLayout
from lowrank_dist.model.plan import Plan
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.residual_model.create import decompose, is_complete
from lowrank_dist.residual_model.fingerprint import fingerprint, source_fingerprint
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.disk import check_writable
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.source import WeightSource


class MatrixSource(Protocol):
    """A source of the decomposed matrices of a model: `PretrainedSource` or `ResidualModel`."""

    @property
    def reader(self) -> CheckpointReader:
        """Reader of the pretrained weights, or of the root of the residual model."""

    @property
    def adapter(self) -> LoraConfig:
        """PEFT's configuration of the adapter, ready for training."""

    @property
    def init(self) -> Method | None:
        """The method that decomposes the matrices; None if they are stored decomposed."""

    @property
    def residual(self) -> ResidualFormat:
        """Format of the residuals."""

    @property
    def original(self) -> Original:
        """The pretrained model, the base model of converted adapters."""

    @property
    def method(self) -> str:
        """The initialisation as text."""

    @property
    def starts_at_zero(self) -> bool:
        """Whether the residual is the original matrix itself, possibly quantized."""

    @property
    def layout(self) -> FactorLayout:
        """Which parameters of an update are trained."""

    @property
    def decoded_from(self) -> str | None:
        """The format that the pretrained weights are or were decoded from; None if they are dense."""

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""

    @property
    def fills_cache(self) -> bool:
        """Whether `through_cache` writes a residual model if it finds none."""

    def check(self, plan: Plan) -> None:
        """Raise ModelError or InputError if the source cannot provide the matrices of `plan`."""

    def matrices(
        self,
        plan: Plan,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Iterator[DecomposedMatrix]:
        """All matrices of `plan`, sharded over the ranks of `group`. Collective: all of them iterate to the end.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read.
        """

    def through_cache(
        self,
        plan: Plan,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
        calibrated: Calibrated | None = None,
    ) -> tuple[MatrixSource, Plan]:
        """Return the source that a run reads, and `plan` in its names. Collective.

        With a cache, that is the residual model in the cache, which is written first if it does not exist. A source
        that is replaced is closed.
        """

    def from_cache(self, plan: Plan, factor_dtype: torch.dtype) -> tuple[MatrixSource, Plan]:
        """Return the complete residual model in the cache, else this source; and `plan` in its names.

        For a single process; nothing is written.
        """

    def close(self) -> None:
        """Close the files."""


class PretrainedSource:
    """Pretrained weights that are decomposed as they are read.

    Parameters
    ----------
    directory
        The pretrained model, or a weight source.
    adapter, init, residual
        PEFT's configuration of the adapter, the method, and the residual format.
    base
        Name of the pretrained model as the user gave it.
    cache
        Directory for residual models: the first run writes one there, see
        `lowrank_dist.residual_model.create.decompose`.
    sharding, announce
        How matrices are shared while they are decomposed, and a callback for lines about it. See
        `lowrank_dist.decomposition.schedule.scheduled`.
    resume
        State of the run that is resumed: `init` becomes a `RestoredMethod`, and nothing is written to `cache`.
    expansion
        Copies of layers that the model has in addition to the stored ones.
    """

    def __init__(
        self,
        directory: Path | WeightSource,
        *,
        adapter: LoraConfig,
        init: Method,
        residual: ResidualFormat,
        base: str,
        cache: str | os.PathLike[str] | None = None,
        sharding: Sharding | None = None,
        announce: Callable[[str], object] = lambda _: None,
        resume: Resume | None = None,
        expansion: Expansion | None = None,
    ) -> None:
        reader = open_reader(directory)
        self.reader, self.resume = reader if expansion is None else expansion.reader(reader), resume
        self._earlier: StoredDecompositions | None = None
        if resume is not None:
            self._earlier = StoredDecompositions(checkpoint=resume.checkpoint, starts_at_zero=init.starts_at_zero)
            init = RestoredMethod(original=init, earlier=self._earlier)
        self.adapter, self.init, self.residual, self.cache = adapter, init, residual, cache
        self.original = Original.at(base, reader.directory)
        self.method, self.starts_at_zero, self.layout = str(init), init.starts_at_zero, init.layout
        self.sharding, self.announce = sharding, announce

    @property
    def decoded_from(self) -> str | None:
        """The format that the weights are decoded from as they are read; None if they are dense."""
        return self.reader.encoding

    @property
    def nbytes(self) -> int:
        """Bytes of the pretrained weights."""
        return self.reader.nbytes

    @property
    def fills_cache(self) -> bool:
        """Whether `through_cache` writes a residual model if it finds none."""
        return self.cache is not None and self.resume is None

    def check(self, plan: Plan) -> None:
        """Raise InputError if the method cannot decompose the matrices of `plan`, or not with this residual format."""
        self.init.check(self.residual)
        check_matrices(plan, self.init)

    def matrices(
        self,
        plan: Plan,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> Iterator[DecomposedMatrix]:
        """All matrices of `plan`, sharded over the ranks of `group`. Collective: all of them iterate to the end.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read, or if the checkpoint of a run that is
            resumed lacks factors.
        """
        self.check_resumed(plan, group, factor_dtype)
        walk = self._walk(group, factor_dtype, device, advance)
        yield from scheduled(walk, plan.matrices, self.sharding, self.announce)

    def check_resumed(self, plan: Plan, group: ShardGroup, factor_dtype: torch.dtype) -> None:
        """Raise CheckpointError, on every rank, if a run that is resumed lacks factors of `plan`. Collective."""
        if self.resume is not None and self._earlier is not None:
            with group.shared_errors():
                self._earlier.check_factors(plan, factor_dtype, self.resume.reports)

    def _walk(
        self,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        device: torch.device | None,
        advance: Callable[[int], object],
    ) -> Walk:
        return Walk(
            self.reader,
            group,
            init=self.init,
            residual=self.residual,
            factor_dtype=factor_dtype,
            device=device,
            advance=advance,
            known=None if self.resume is None else self.resume.reports,
        )

    def through_cache(
        self,
        plan: Plan,
        group: ShardGroup,
        factor_dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        advance: Callable[[int], object] = lambda _: None,
        calibrated: Calibrated | None = None,
    ) -> tuple[MatrixSource, Plan]:
        """Return the residual model of these weights in the cache, written first if absent; and `plan` in its names.

        Collective with a cache. Without one, this source is returned and nothing is communicated. If a run is resumed,
        the residual model is returned if the run started from it, else this source. `calibrated`: see
        `lowrank_dist.residual_model.create.decompose`.
        """
        if self.cache is None:
            return self, plan
        if self.resume is not None:
            started_from = self._started_from(Path(self.cache), group, self.resume.source)
            return (self, plan) if started_from is None else self._replaced_by(started_from, plan)
        with group.shared_errors():
            if not any(self._cached(Path(self.cache))):  # what is there may be read where nothing can be written
                check_writable(Path(self.cache), "init_cache")
        walk = self._walk(group, factor_dtype, device, advance)
        key, directory = self._cache_key(walk, plan, self.cache, calibrated)
        decompose(
            plan,
            walk,
            directory,
            key=key,
            adapter=self.adapter,
            base=self.original.name,
            sharding=self.sharding,
            announce=self.announce,
            calibrated=calibrated,
        )
        with group.shared_errors():  # a shared file system may show new files late on some ranks
            stored = ResidualModel(directory, self.residual)
        stored.verified = True  # by `decompose`
        return self._replaced_by(stored, plan)

    def from_cache(self, plan: Plan, factor_dtype: torch.dtype) -> tuple[MatrixSource, Plan]:
        """Return the complete residual model in the cache, else this source; and `plan` in its names.

        For a single process. With methods that look at data, this source is returned: what they see is part of the
        fingerprint of a residual model and is not known here.
        """
        if self.cache is None or self.init.statistic is not None:
            return self, plan
        walk = self._walk(ShardGroup.single(), factor_dtype, None, lambda _: None)
        key, directory = self._cache_key(walk, plan, self.cache)
        if not is_complete(directory, key):
            return self, plan
        return self._replaced_by(ResidualModel(directory, self.residual), plan)

    def _replaced_by(self, stored: ResidualModel, plan: Plan) -> tuple[MatrixSource, Plan]:
        self.close()
        return stored, stored.plan_of(plan, self.reader)

    def _cache_key(
        self, walk: Walk, plan: Plan, cache: str | os.PathLike[str], calibrated: Calibrated | None = None
    ) -> tuple[str, Path]:
        """Fingerprint and directory of the residual model. Collective."""
        key = fingerprint(walk, plan, calibrated)
        return key, Path(cache) / f"{self._cached_name}-{key[:12]}"

    @property
    def _cached_name(self) -> str:
        return f"{self.reader.directory.name}-{self.method}"

    def _cached(self, cache: Path) -> Iterator[Path]:
        """Residual models in the cache that were made from a model of this name by this method."""
        candidates = cache.glob(f"{glob.escape(self._cached_name)}-*")
        return (path for path in candidates if ResidualModel.is_at(path))

    def _started_from(self, cache: Path, group: ShardGroup, source: str) -> ResidualModel | None:
        """The residual model in the cache whose `source_fingerprint` is `source`, or None. Collective."""
        found: list[Path] = []
        with group.shared_errors():
            if group.rank == 0:
                found = sorted(self._cached(cache))
        directories = group.broadcast_object(found)
        assert isinstance(directories, list)
        for directory in directories:
            try:
                with group.shared_errors():
                    stored = ResidualModel(directory, self.residual)
                if source_fingerprint(stored.reader, group) == source:
                    stored.verify(group)
                    return stored
                stored.close()
            except CheckpointError as error:  # on every rank
                self.announce(f"{error}; the residual is formed again from the pretrained weights")
        return None

    def close(self) -> None:
        """Close the files."""
        self.reader.close()
        if self._earlier is not None:
            self._earlier.close()
