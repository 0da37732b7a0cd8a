"""Match an adapter on disk with a model: every tensor must have a parameter, and every parameter a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from lowrank_dist.adapters.source import AdapterSource
from lowrank_dist.errors import ModelError
from lowrank_dist.model.names import PEFT_PREFIX, peft_name, plain_name
from lowrank_dist.model.plan import Plan

# PEFT 0.21 writes a head under modules_to_save, with save_embedding_layers, under these names too
_DOUBLES = (".modules_to_save.", ".original_module.")


def changes_tied(backbone: PreTrainedModel, tensors: Iterable[str]) -> bool:
    """Whether an adapter with these tensors changes a tied embedding: PEFT changes one of the two, so they part."""
    names: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name.rpartition(".")[0] for same in names.values() if len(same) > 1 for name in same}
    changed = {plain_name(key.removeprefix(PEFT_PREFIX)) for key in tensors}
    # of ...lm_head.lora_A.weight the part before the factor, of ...lm_head.weight the part before the leaf
    changed = {name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] for name in changed}
    return bool(tied & changed)


def match_adapter(adapter: AdapterSource, backbone: PreTrainedModel, plan: Plan, base: Path) -> dict[str, str]:
    """Check that `adapter` holds exactly the tensors that the model has parameters for.

    Parameters
    ----------
    adapter
        Its headers are read only.
    backbone
        On meta, the adapter's layers injected.
    plan
        Of `backbone`.
    base
        Where the model comes from, for the message.

    Returns
    -------
    dict
        Tensors of the adapter that stand for whole weights which are not under ``modules_to_save`` (PEFT saves
        embeddings along), by the name of the parameter.

    Raises
    ------
    ModelError
        Naming the tensors that are missing, too many or of another shape.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in backbone.named_parameters(remove_duplicate=False)}
    factors = {peft_name(name): shapes[name] for planned in plan.matrices for name in planned.factor_names.values()}
    whole = {peft_name(t.names[0]): shapes[t.names[0]] for t in plan.parameters if t.trainable}
    weights = {plain_name(name): shape for name, shape in shapes.items() if ".lora_" not in name}
    problems, saved_along = [], {}
    for part, expected in zip(adapter.parts, (factors | whole, factors), strict=False):
        for key in part:
            if any(double in key and key.replace(double, ".") in part for double in _DOUBLES):
                continue
            shape, name = part.info(key).shape, plain_name(key.removeprefix(PEFT_PREFIX))
            wanted = expected.get(key, weights.get(name) if part is adapter.trained else None)
            if wanted is None:
                problems.append(f"{key} {list(shape)} has no place in the model")
            elif shape != wanted:
                problems.append(f"{key} has shape {list(shape)}, the model wants {list(wanted)}")
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
