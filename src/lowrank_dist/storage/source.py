"""Weights that are not stored in files: any object that returns rows of named tensors can be decomposed and trained.

`PiSSAStrategy(pretrained=...)` takes a `WeightSource` in place of a directory. The rest of the package reads it through
a `SourceReader`, so that partitions, experts, fingerprints and resumed runs are those of a model on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowrank_dist.errors import CheckpointError
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.reader import CheckpointReader, TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class WeightSource(Protocol):
    """Returns rows of the tensors of a model.

    See Also
    --------
    CheckpointReader : Reads weights from safetensors files.
    TensorInfo : Describes a tensor.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.storage import TensorInfo, WeightSource
    >>> class Ones:
    ...     name, fingerprint = "ones", "ones-1"
    ...     tensors = {"layer.weight": TensorInfo(shape=(4, 3), dtype="F32", nbytes=48)}
    ...
    ...     def rows(self, name, start, stop):
    ...         return torch.ones(stop - start, *self.tensors[name].shape[1:])
    >>> isinstance(Ones(), WeightSource)
    True
    """

    @property
    def name(self) -> str:
        """Name of the source in messages and in the files of adapters."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the values, apart from the rounding of devices; a run resumes only with the same one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name; each has at least one dimension."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of the first dimension, ``start < stop``, on any device.

        The values must not depend on `start` and `stop`. A thread calls it, one call at a time; on CUDA the current
        stream is not that of the decomposition.
        """


class SourceReader(CheckpointReader):
    """A `CheckpointReader` of a `WeightSource`.

    Parameters
    ----------
    source
        Returns the values.
    """

    def __init__(self, source: WeightSource) -> None:
        # the parent's __init__ looks for files
        self.source, self.directory = source, Path(source.name)
        self.identity = source.fingerprint.encode()
        self.bytes_read = 0
        self._info = dict(source.tensors)
        self._file_of = dict.fromkeys(self._info, "")
        self._files, self._joined = {}, {}

    @property
    def returns_values(self) -> bool:
        return True

    @property
    def files(self) -> list[Path]:
        return []

    def _load(self, name: str, start: int, stop: int, entry: int | None = None) -> Tensor:
        if entry is None:
            return self.source.rows(name, start, stop)
        return self.source.rows(name, entry, entry + 1)[0, start:stop]


@dataclass(frozen=True)
class ShapesOnly:
    """A weight source without values, for a model of which only the configuration is available.

    Parameters
    ----------
    backbone
        The model on the meta device, without adapters.
    stored_bytes
        Bytes of the weights, by name, that are stored in less than the dtype of the model.
    """

    backbone: PreTrainedModel
    stored_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.backbone.config._name_or_path or type(self.backbone).__name__

    @property
    def fingerprint(self) -> str:
        return repr(sorted(self.tensors.items()))

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: replace(info, nbytes=self.stored_bytes.get(name, info.nbytes))
            for name, info in tensors_of(self.backbone).items()
        }

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        raise CheckpointError(f"{self.name}: only the shape of {name} is known; pass a model with weights")


def tensors_of(backbone: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, TensorInfo]:
    """The tensors of the weights of `backbone`, in `dtype` (default: that of its configuration, else bf16)."""
    codes = {of_code: code for code, of_code in FLOAT_DTYPES.items()}
    dtype = dtype or getattr(backbone.config, "dtype", None) or torch.bfloat16
    return {
        name: TensorInfo(
            shape=tuple(parameter.shape), dtype=codes.get(dtype, "BF16"), nbytes=parameter.numel() * dtype.itemsize
        )
        for name, parameter in backbone.named_parameters()
    }
