"""Tensors in the parts of a checkpoint: their names, shapes and dtypes, before any values exist."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowrank_dist.adapters.lora import to_lora
from lowrank_dist.model.adapter_files import AdapterFiles
from lowrank_dist.model.names import peft_name
from lowrank_dist.storage.layout import ADAPTER_DIR, ENCODED_DIR, INITIAL_DIR, LORA_DIR, OPTIMIZER, PARTS
from lowrank_dist.storage.reader import FileTensor
from lowrank_dist.storage.writer import TensorFiles
from lowrank_dist.tuners.adalora.files import AdaLoraFiles
from lowrank_dist.zero3.optimizer import MASTER


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The adapter of a model, as far as checkpoints are concerned.

    Attributes
    ----------
    shapes, dtypes
        Of the trained parameters, and of the factors that are frozen, by name in the backbone.
    trained
        Names of the trained ones.
    initial, encoded
        Names of the factors whose initial values, and whose values that the residual was encoded from, are written.
    adapter
        What adapter files hold of the parameters.
    derived
        Shapes and dtypes of the tensors in the adapter file that are not parameters.
    experts
        How many experts share a factor, by PEFT's name; only factors of more than one expert.
    starts_at_zero
        Whether the adapter is a LoRA for the unmodified base.
    """

    shapes: Mapping[str, Sequence[int]]
    dtypes: Mapping[str, torch.dtype]
    trained: Sequence[str]
    initial: Sequence[str]
    adapter: AdapterFiles
    derived: Mapping[str, FileTensor] = field(default_factory=dict)
    encoded: Sequence[str] = ()
    experts: Mapping[str, int] = field(default_factory=dict)
    starts_at_zero: bool = False

    def parts(
        self, values: Mapping[str, Tensor], initial: Mapping[str, Tensor], encoded: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Tensors of every adapter file under PEFT's names, from those of whole layers; on meta too.

        Under their own names, beside the optimizer's, the trained ones that no adapter file holds.
        """
        adapter = self.adapter.adapter(values)
        start = {peft_name(name): tensor for name, tensor in initial.items()}
        parts = {ADAPTER_DIR: adapter}
        if self.initial:
            parts[INITIAL_DIR] = start
        if self.adapter.is_lora:
            parts[LORA_DIR] = adapter if self.starts_at_zero else to_lora(adapter, start, self.experts)
        if isinstance(self.adapter, AdaLoraFiles):
            parts[LORA_DIR] = self.adapter.lora(values)
        if self.encoded:
            parts[ENCODED_DIR] = {peft_name(name): tensor for name, tensor in encoded.items()}
        parts[OPTIMIZER] = {name: tensor for name, tensor in values.items() if self.adapter.stored_as(name) is None}
        return parts

    def files(
        self,
        states: Sequence[str] | None = None,
        optimized: Sequence[str] | None = None,
        further: Sequence[tuple[str, str]] = (),
    ) -> dict[str, dict[str, FileTensor]]:
        """Names, shapes and dtypes by part.

        Parameters
        ----------
        states
            Names of the optimizer's states of a parameter. None: no optimizer state is written.
        optimized
            Names of the parameters in the optimizer. None: all trained parameters.
        further
            Names of parameters and of states that the optimizer does not keep, such as those of AdaLoRA.
        """
        meta = {
            name: torch.empty(tuple(shape), dtype=self.dtypes[name], device="meta")
            for name, shape in self.shapes.items()
        }
        tensors = self.parts(
            meta, {name: meta[name] for name in self.initial}, {name: meta[name] for name in self.encoded}
        )
        if states is None:
            del tensors[OPTIMIZER]
        else:
            for name in self.trained if optimized is None else optimized:
                kinds = [*states, *([] if self.dtypes[name] == torch.float32 else [MASTER])]
                tensors[OPTIMIZER] |= {f"{name}.{kind}": meta[name].float() for kind in kinds}
            tensors[OPTIMIZER] |= {f"{name}.{kind}": meta[name].float() for name, kind in further}
        files = {
            part: {name: FileTensor(shape=tuple(t.shape), dtype=t.dtype) for name, t in of_part.items()}
            for part, of_part in tensors.items()
        }
        for part in files.keys() & {ADAPTER_DIR, LORA_DIR}:
            files[part] |= self.derived
        return {part: dict(sorted(of_part.items())) for part, of_part in files.items()}


def tensor_files(files: Mapping[str, Mapping[str, FileTensor]], directory: Path) -> dict[str, TensorFiles]:
    """The safetensors files of every part of `Contents.files`, in a checkpoint at `directory`."""
    return {
        part: TensorFiles(
            directory / PARTS[part][0],
            tensors,
            stem=PARTS[part][1],
            **({} if part == OPTIMIZER else {"max_bytes": sys.maxsize}),
        )
        for part, tensors in files.items()
    }
