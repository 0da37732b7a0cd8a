"""Matches an adapter on disk with a model: every tensor needs a parameter, and every parameter a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from lowrank_dist.adapters.source import AdapterSource
from lowrank_dist.errors import ModelError
from lowrank_dist.model.names import PEFT_PREFIX, peft_name, plain_name
from lowrank_dist.model.plan import Plan

# with save_embedding_layers, PEFT 0.21 writes a head under modules_to_save a second time, under these names
_DOUBLES = (".modules_to_save.", ".original_module.")


def changes_tied(backbone: PreTrainedModel, tensors: Iterable[str]) -> bool:
    """Whether an adapter with tensors of these names changes one of two tied weights, which are then no longer equal.

    PEFT adds the adapter to one of the two only.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name.rpartition(".")[0] for same in names.values() if len(same) > 1 for name in same}
    changed = {plain_name(key.removeprefix(PEFT_PREFIX)) for key in tensors}
    # both ...lm_head.lora_A.weight and ...lm_head.weight change ...lm_head
    changed = {name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] for name in changed}
    return bool(tied & changed)


def match_adapter(adapter: AdapterSource, backbone: PreTrainedModel, plan: Plan, base: Path) -> dict[str, str]:
    """Check that `adapter` holds exactly the tensors that the model has adapter parameters for. Only headers are read.

    Parameters
    ----------
    adapter
        The adapter on disk.
    backbone
        The skeleton: on meta, the adapter's layers injected.
    plan
        The plan of `backbone`.
    base
        Directory of the pretrained weights, for the message.

    Returns
    -------
    dict
        Names of the adapter's tensors that hold whole weights outside ``modules_to_save`` (PEFT may save embeddings
        with an adapter), by the name of the parameter.

    Raises
    ------
    ModelError
        If tensors are missing, have no parameter, or have another shape. The error names them.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in backbone.named_parameters(remove_duplicate=False)}
    factors = {peft_name(name): shapes[name] for planned in plan.matrices for name in planned.factor_names.values()}
    whole = {peft_name(t.names[0]): shapes[t.names[0]] for t in plan.parameters if t.trainable}
    whole |= {peft_name(m.magnitude): shapes[m.magnitude] for m in plan.matrices if m.magnitude is not None}
    weights = {plain_name(name): shape for name, shape in shapes.items() if ".lora_" not in name}
    problems, saved_along = [], {}
    for part, expected in zip(adapter.parts, (factors | whole, factors), strict=False):
        for key in part:
            if any(double in key and key.replace(double, ".") in part for double in _DOUBLES):
                continue
            shape, name = part.info(key).shape, plain_name(key.removeprefix(PEFT_PREFIX))
            wanted = expected.get(key, weights.get(name) if part is adapter.trained else None)
            if wanted is None:
                problems.append(f"{key} {list(shape)} has no parameter in the model")
            elif shape != wanted:
                problems.append(f"{key} has shape {list(shape)}, but the model needs {list(wanted)}")
            elif key not in expected:
                saved_along[name] = key
        missing = [key for key in expected if key not in part]
        problems += [f"{key} {list(expected[key])} is missing in {part.directory}" for key in missing]
    if problems:
        more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"{adapter.directory} does not fit {type(backbone).__name__} of {base}; "
            "pass the model that it was trained from:\n  " + "\n  ".join(problems[:5]) + more
        )
    return saved_along
