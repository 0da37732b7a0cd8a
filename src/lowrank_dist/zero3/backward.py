"""Whether autograd runs a backward."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Whether this thread runs a backward: then a forward recomputes activations, and its own backward follows."""
    return torch._C._current_graph_task_id() != -1
