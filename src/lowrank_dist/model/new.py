"""Parameters that a task adds to pretrained weights: heads and poolers, which are trained; tables that are computed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft import LoraConfig, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from lowrank_dist.model.names import CheckpointKeys

#: Modules that PEFT trains whole for a task, whatever ``modules_to_save`` says.
_HEADS = {
    TaskType.SEQ_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.TOKEN_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def train_heads(backbone: PreTrainedModel, adapter: LoraConfig, keys: CheckpointKeys) -> None:
    """Add to ``modules_to_save`` the heads of the adapter's task, and modules of which the weights hold nothing.

    The first are those that PEFT adds. The second are heads, the modules outside the base model, and poolers: PEFT
    would leave them at random values, which are in no file. The output embedding of a language model is not among them.

    Parameters
    ----------
    backbone
        The model on meta, without PEFT's layers.
    adapter
        Changed in place.
    keys
        The names of its parameters in the pretrained weights.
    """
    named = dict(backbone.named_modules())
    wanted = [name for name in _HEADS.get(adapter.task_type, ()) if any(n.rpartition(".")[2] == name for n in named)]
    given = list(adapter.modules_to_save or ())
    new = [
        name
        for name in new_modules(backbone, keys)
        if not any(
            name == other or name.endswith(f".{other}") or f".{other}." in f".{name}." for other in [*given, *wanted]
        )
    ]
    added = [name for name in (*wanted, *new) if name not in given]
    if added:
        adapter.modules_to_save = [*given, *added]


def new_modules(backbone: PreTrainedModel, keys: CheckpointKeys) -> list[str]:
    """The outermost heads and poolers none of whose parameters the pretrained weights hold."""
    base, output = f"{backbone.base_model_prefix}.", backbone.get_output_embeddings()
    found: list[str] = []
    for name, module in backbone.named_modules():
        parameters = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        is_head = name and not f"{name}.".startswith(base) and backbone.base_model is not backbone
        if not parameters or module is output or not (is_head or name.rpartition(".")[2] == "pooler"):
            continue
        if output is not None and any(inner is output for inner in module.modules()):
            continue
        if any(name.startswith(f"{outer}.") for outer in found) or any(keys.find(p) is not None for p in parameters):
            continue
        if not all(is_computed(backbone, parameter) for parameter in parameters):
            found.append(name)
    return found


def is_computed(backbone: PreTrainedModel, name: str) -> bool:
    """Whether a parameter is not stored because transformers computes it (sinusoidal positions, say)."""
    return any(
        re.search(pattern, name) is not None
        for model in (backbone, backbone.base_model)
        for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    )
