"""A quantized matrix of a checkpoint: the tensors that it is stored in, and the decoding of some of its rows.

A format is one module. It finds the matrices of a checkpoint from the names and headers of its tensors, and refuses
what it cannot decode before any weight is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_dist.errors import ModelError
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.reader import CheckpointReader, TensorInfo

#: Reads a part of a stored tensor, ``read(name, slice(2, 4), ...)``: integers and slices, one for each dimension.
Read = Callable[..., Tensor]

#: Part of a dimension.
ALL = slice(None)

#: Codes of the dtypes of eight bits in safetensors headers.
FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, kw_only=True)
class EncodedMatrix(ABC):
    """A matrix, or a stack of them, that a checkpoint stores quantized.

    Attributes
    ----------
    shape
        Its decoded shape, ``[rows, columns]`` or ``[entries, rows, columns]``.
    dtype
        The dtype that it is decoded to: the one that the decoder of the format's owner returns.
    tensors
        Names of the stored tensors.
    is_quantized
        Whether it is a weight of a linear layer, as quantizers store it; else its dtype alone is another.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: tuple[str, ...]
    is_quantized: ClassVar[bool] = True

    @abstractmethod
    def rows(self, read: Read, start: int, stop: int, entry: int | None = None) -> Tensor:
        """Decode rows ``start:stop`` of a matrix, or of entry `entry` of a stack; ``[rows, columns]``, `dtype`.

        The values do not depend on `start` and `stop`. Only the parts of the tensors that these rows need are read. At
        both ends that may be a scale, or a word of packed codes, which other rows need too.
        """


@dataclass(frozen=True, kw_only=True)
class Found:
    """The quantized matrices of a checkpoint.

    Attributes
    ----------
    format
        The format in words, for messages and manifests.
    matrices
        The matrices by the name that the weight would have if it were dense.
    unused
        Stored tensors that are not needed to decode weights (scales of activations).
    """

    format: str
    matrices: dict[str, EncodedMatrix] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)


#: Finds the matrices of a checkpoint in a format, given its reader, its settings and the dtype of the model.
Finder = Callable[[CheckpointReader, Record, torch.dtype], Found]


class Parts:
    """The tensors beside one another that make up a quantized layer, for checks whose errors name what is wrong.

    Parameters
    ----------
    reader
        Reader of the stored tensors.
    layer
        Name of the layer, or of the weight, that the suffixes are appended to.
    format
        The format in words.
    """

    def __init__(self, reader: CheckpointReader, layer: str, format: str) -> None:
        self.reader, self.layer, self.format = reader, layer, format

    def __contains__(self, suffix: object) -> bool:
        return f"{self.layer}{suffix}" in self.reader

    def name(self, suffix: str) -> str:
        """Name of a tensor."""
        return f"{self.layer}{suffix}"

    def info(self, suffix: str, dtypes: Iterable[str]) -> TensorInfo:
        """Shape and dtype of a tensor, which must exist and have one of `dtypes`."""
        name, dtypes = self.name(suffix), tuple(dtypes)
        if name not in self.reader:
            raise ModelError(
                f"{self.reader.directory}: {name} is missing, which {self.format} needs to decode {self.layer}; fetch "
                "the model again"
            )
        info = self.reader.stored(name)
        if info.dtype not in dtypes:
            raise self.wrong(suffix, f"one of {', '.join(dtypes)}")
        return info

    def expect(self, suffix: str, dtypes: Iterable[str], *shapes: tuple[int, ...]) -> TensorInfo:
        """Shape and dtype of a tensor, which must also have one of `shapes`."""
        info = self.info(suffix, dtypes)
        if info.shape not in shapes:
            raise self.wrong(suffix, " or ".join(str(list(shape)) for shape in shapes))
        return info

    def scalar(self, suffix: str, dtypes: Iterable[str]) -> TensorInfo:
        """Shape and dtype of a tensor of one element."""
        return self.expect(suffix, dtypes, (), (1,), (1, 1))

    def wrong(self, suffix: str, must: str) -> ModelError:
        """The error of a tensor that must be something else."""
        info = self.reader.stored(self.name(suffix))
        return ModelError(
            f"{self.reader.directory}: {self.name(suffix)} is {list(info.shape)} {info.dtype}, but {self.format} needs "
            f"{must}; pass the model that it was quantized from, or save it dense"
        )


def layers_with(reader: CheckpointReader, suffix: str) -> list[str]:
    """Names of the tensors that end with `suffix`, without it."""
    return [name.removesuffix(suffix) for name in reader if name.endswith(suffix)]


def float_dtype(info: TensorInfo) -> torch.dtype:
    """The dtype of a tensor of scales, one of fp32, fp16 and bf16."""
    return FLOAT_DTYPES[info.dtype]


def refuse(directory: Any, found: str, remedy: str = "") -> ModelError:
    """The error of a quantized model in a format, or with an option, that is not decoded here."""
    return ModelError(
        f"{directory}: {found}, which is not decoded here; "
        + (remedy or "pass the model that it was quantized from, or load it with its own library and save it dense")
    )


def cover(start: int, stop: int, block: int) -> tuple[int, int]:
    """The blocks of `block` elements that elements ``start:stop`` lie in: the first, and the one after the last."""
    return start // block, -(-stop // block)


def spread(values: Tensor, start: int, stop: int, block: int, dim: int) -> Tensor:
    """Repeat the values of the blocks that cover ``start:stop`` along `dim`, once for each of these elements."""
    first = start // block
    return values.repeat_interleave(block, dim).narrow(dim, start - first * block, stop - start)
