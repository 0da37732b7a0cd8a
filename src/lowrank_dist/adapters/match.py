"""Matches an adapter on disk with a model: every tensor needs a parameter, and every parameter a tensor."""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from lowrank_dist.adapters.source import AdapterSource
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.model.names import PEFT_PREFIX, peft_name, plain_name
from lowrank_dist.model.plan import Plan
from lowrank_dist.storage.parse import printable

if TYPE_CHECKING:
    from peft import PeftConfig

# with save_embedding_layers, PEFT 0.21 writes a head under modules_to_save a second time, under these names
_DOUBLES = (".modules_to_save.", ".original_module.")
_KEEPS_TIES = ".trainable_tokens_delta"


def changes_tied(backbone: PreTrainedModel, tensors: Iterable[str], whole: Collection[str] | None) -> bool:
    """Whether an adapter changes one of two tied weights, which are then no longer equal.

    PEFT adds an adapter to one of the two only, apart from trained rows (``trainable_tokens``). A weight itself, in the
    file under its own name, is both of them.

    Parameters
    ----------
    backbone
        The model on meta, without PEFT's layers.
    tensors
        Names in the adapter file.
    whole
        ``modules_to_save`` of the adapter, whose copies are trained and not the weights themselves.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    modules = {name.rpartition(".")[0] for name in tied}

    def changes(key: str) -> bool:
        name = plain_name(key.removeprefix(PEFT_PREFIX))
        if name in tied:
            return name.rpartition(".")[0].endswith(tuple(whole or ()))
        # ...lm_head.lora_A.weight changes ...lm_head
        return name.startswith(tuple(f"{module}." for module in modules)) and not key.endswith(_KEEPS_TIES)

    return any(map(changes, tensors))


def written_twice(key: str, tensors: Container[str]) -> bool:
    """Whether PEFT has saved the tensor `key` under another name, too, among `tensors`."""
    return any(double in key and key.replace(double, ".") in tensors for double in _DOUBLES)


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
            if written_twice(key, part):
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
        raise mismatch(adapter, backbone, base, problems)
    return saved_along


def check_same_meaning(before: PeftConfig, now: PeftConfig, where: Path) -> None:
    """Check that the tensors of an adapter mean under `now` what they meant under `before`, whose names they have.

    Parameters
    ----------
    before
        Configuration in the checkpoint at `where`.
    now
        Configuration of the run that resumes from it.

    Raises
    ------
    CheckpointError
        If a scaling, the positions of entries or another setting of the update differs. The error names it.
    """
    was, is_now = _settings(before), _settings(now)
    changed = [
        f"{name}={printable(str(was.get(name)))} (now {value})"
        for name, value in is_now.items()
        if value is not None and was.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{where}: the run that wrote it had {', '.join(changed)}, which decides what the trained tensors mean; "
            "resume with the same configuration of the adapter"
        )


#: Options that change which tensors there are, which the names in the files tell, where they start, or how they are
#: trained; those that PEFT fills in itself.
_OTHER_OPTIONS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_version",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
}
#: AdaLoRA's ranks and schedule, which its own state compares.
_OF_ADALORA = {
    "beta1",
    "beta2",
    "deltaT",
    "orth_reg_weight",
    "rank_pattern",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
}


def _settings(config: PeftConfig) -> dict[str, Any]:
    """What the update depends on beside its tensors, as JSON values."""
    other = _OTHER_OPTIONS | (_OF_ADALORA if config.peft_type == "ADALORA" else set())
    return {
        name: json.loads(json.dumps(value, default=lambda one: sorted(one) if isinstance(one, set) else str(one)))
        for name, value in config.to_dict().items()
        if name not in other and "dropout" not in name and not name.startswith("init_") and not name.endswith("_config")
    }


def mismatch(adapter: AdapterSource, backbone: PreTrainedModel, base: Path, problems: list[str]) -> ModelError:
    """The error that names why an adapter does not fit a model at `base`."""
    more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
    return ModelError(
        f"{adapter.directory} does not fit {type(backbone).__name__} of {base}; "
        "pass the model that it was trained from:\n  " + "\n  ".join(problems[:5]) + more
    )
