"""Forward passes of a sharded model by ranks that have different work.

Every forward pass of a ZeRO-3 model gathers its layers, which is collective. Ranks that answer different prompts need
different numbers of passes. So before every pass the ranks tell each other whether they still have work, and a rank
that has none joins the passes of the others with a single token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowrank_dist.distributed.group import ShardGroup


class Lockstep:
    """Makes the forward passes of `backbone` collective although every rank has its own.

    Parameters
    ----------
    backbone
        The transformers model; all passes go through its ``__call__``.
    group
        The ranks that share it.
    """

    def __init__(self, backbone: nn.Module, group: ShardGroup) -> None:
        self._backbone, self._group = backbone, group
        self._raised = False  # an error of another rank, which all know of

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, every rank runs passes as it needs them; it leaves the context when no rank has passes left.

        One all-reduce of two flags before every pass, and one at the end. Nothing else inside may communicate.

        Raises
        ------
        Exception
            On every rank, if any rank raises inside (`ShardGroup.raise_together`).
        """
        if self._group.size == 1:
            yield
            return
        self._raised = False
        hook = self._backbone.register_forward_pre_hook(self._before)
        try:
            yield
        except Exception as error:
            if not self._raised:
                self._tell(working=False, failed=True)
                self._group.raise_together(error)
            raise
        finally:
            hook.remove()
        self._join()

    def _before(self, *_: Any) -> None:
        self._tell(working=True, failed=False)

    def _join(self) -> None:
        """Take part in the passes of the others until none has any."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self._group.device)
        while self._tell(working=False, failed=False):
            with torch.no_grad():
                self._backbone(input_ids=token, attention_mask=torch.ones_like(token), use_cache=False)

    def _tell(self, *, working: bool, failed: bool) -> bool:
        """Whether any rank has work. Raises the error of a rank that has failed, but not on that rank."""
        flags = torch.tensor([int(working), int(failed)], dtype=torch.int32, device=self._group.device)
        someone_works, someone_failed = self._group.sum(flags).tolist()
        if someone_failed and not failed:
            self._raised = True
            self._group.raise_together(None)
        return bool(someone_works)
