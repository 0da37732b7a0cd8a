"""The tokens of a batch, counted on its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError
from lowrank_dist.training.token_mean import trained_tokens


@dataclass(frozen=True)
class BatchTokens:
    """This rank's batch; all tensors are int64 of shape [batch, length], or None where it has none of that shape."""

    input_ids: Tensor
    labels: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @classmethod
    def of(cls, batch: Any) -> BatchTokens:
        """From a mapping with `input_ids`, or from `input_ids` as a tensor or as the first item of a tuple or list.

        Raises
        ------
        InputError
            If the batch is nothing of this, or `input_ids` are not of shape [batch, length].
        """
        parts: Mapping[str, Any]
        if isinstance(batch, Mapping):
            parts = batch
        else:
            parts = {"input_ids": batch[0] if isinstance(batch, tuple | list) and batch else batch}
        ids = parts.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            keys = f" with {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
            shape = f"; its `input_ids` are of shape {list(ids.shape)}" if isinstance(ids, Tensor) else ""
            raise InputError(
                f"the tokens of a batch are counted by its `input_ids` of shape [batch, length], but a batch is a "
                f"{type(batch).__name__}{keys}{shape}; let the loader return a dictionary with `input_ids`, or leave "
                "StepMonitor out"
            )
        others = {name: parts.get(name) for name in ("labels", "attention_mask", "position_ids")}
        return cls(
            ids, **{name: one for name, one in others.items() if isinstance(one, Tensor) and one.shape == ids.shape}
        )

    @property
    def positions(self) -> int:
        """Number of tokens, padding included."""
        return self.input_ids.numel()

    def real(self) -> Tensor:
        """Number of tokens that are no padding: int64 scalar.

        Without a mask these are all, except last stretches of packed rows that have no label.
        """
        if self.attention_mask is not None:
            return (self.attention_mask != 0).sum()
        if self.position_ids is not None and self.labels is not None:
            return self.positions - self._packed_padding(self.position_ids, self.labels)
        return torch.full((), self.positions, dtype=torch.int64, device=self.input_ids.device)

    def trained(self) -> Tensor:
        """Number of trained tokens, of real ones if there are no labels: int64 scalar."""
        return self.real() if self.labels is None else trained_tokens(self.labels)

    @staticmethod
    def _packed_padding(position_ids: Tensor, labels: Tensor) -> Tensor:
        length = labels.shape[1]
        index = torch.arange(length, device=labels.device)
        last_start = torch.where(position_ids == 0, index, 0).amax(dim=1)
        last_label = torch.where(labels != IGNORE_INDEX, index, -1).amax(dim=1)
        return torch.where(last_label < last_start, length - last_start, 0).sum()
