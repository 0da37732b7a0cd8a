"""Ranks whose batches have other kinds of inputs (images on one, only text on another) are refused by name.

Every rank gathers the layers that it runs. If one rank runs a tower that another leaves out, they wait for each other,
or take the bytes of one layer for those of another.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError

_OF_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels"}


class SameInputs:
    """Compares the names of the towers' inputs of a model with several, over the ranks, before every forward.

    Parameters
    ----------
    backbone
        The transformers model.
    group
        The ranks that compute together.

    Notes
    -----
    One all-reduce of two integers a forward, whose result the host waits for. Models of a single tower, and single
    ranks, are left alone. Inputs of the text alone may differ: while ranks generate, they do.
    """

    def __init__(self, backbone: PreTrainedModel, group: ShardGroup) -> None:
        self._backbone, self._group = backbone, group
        if group.size > 1 and len(backbone.config.sub_configs) > 1:
            backbone.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = sorted(name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _OF_TEXT)
        code = crc32(" ".join(given).encode())
        highest, negative = self._group.max(torch.tensor([code, -code], device=self._group.device)).tolist()
        if highest == -negative:
            return
        every = self._group.gather_objects(given)
        for rank, other in enumerate(every):
            if other != every[0]:
                differ = ", ".join(sorted(set(other) ^ set(every[0])))
                has = f"rank {rank if set(other) - set(every[0]) else 0}"
                lacks = f"rank {0 if has != 'rank 0' else rank}"
                raise InputError(
                    f"{type(self._backbone).__name__}: the batch of {has} has {differ}, that of {lacks} has not; ranks "
                    "must run the same parts of the model: give every batch an input of each kind (a blank image whose "
                    "tokens are masked, say), or group batches by their kind over all ranks"
                )
