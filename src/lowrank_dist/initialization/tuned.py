"""A tuner of PEFT on top of a filled model: what it makes is partitioned, what it trains of the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.initialization.loading import Loading
from lowrank_dist.initialization.open import OpenedModel
from lowrank_dist.model.adapter_files import AdapterFiles
from lowrank_dist.tuners.adalora.allocation import RankAllocation
from lowrank_dist.tuners.adalora.penalty import OrthogonalityPenalty
from lowrank_dist.tuners.files import exported, peft_files
from lowrank_dist.tuners.tuner import Injected
from lowrank_dist.zero3.partition import Partitioner, gathered, release
from lowrank_dist.zero3.units import uses


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A model with the layers of a tuner, sharded.

    Attributes
    ----------
    root
        What computes: the backbone, or PEFT's model around it.
    files
        What adapter files hold of it.
    derived
        Computes the tensors of the adapter file that are not parameters. Collective.
    buffers
        Those among them that are buffers, whole on every rank.
    allocation
        Allocates ranks while it is trained; None for all tuners but AdaLoRA.
    """

    root: nn.Module
    files: AdapterFiles
    derived: Callable[[], dict[str, Tensor]]
    buffers: Mapping[str, Tensor]
    allocation: RankAllocation | None = None


def put_on(opened: OpenedModel, partitioner: Partitioner, loading: Loading, *, seed: int) -> TunedModel:
    """Put the tuner of `opened` on top of its filled model. Collective.

    The collectives are those of `Tuner.inject`, a broadcast of every parameter and buffer that PEFT has made, and a
    gather of these parameters, once, for the names that PEFT's files give them.

    Parameters
    ----------
    opened
        The model, filled; changed in place.
    partitioner
        Its groups share the parameters.
    loading
        Loads the parameters of the model itself that the tuner trains, or of which it has made copies.
    seed
        Seed of the random numbers that PEFT draws, the same on every rank.
    """
    assert opened.tuner is not None
    backbone, dtype = opened.backbone, loading.factor_dtype
    held = set(backbone.parameters())
    injected = opened.tuner.inject(backbone, opened.plan, seed=seed)
    _check_trained(opened, injected)
    loading.parameters(injected.loaded)
    release(held - set(injected.model.parameters()))
    for parameter in injected.made:
        partitioner.adopt(parameter, dtype if parameter.is_floating_point() else parameter.dtype)
    _share_buffers(injected, partitioner, dtype)
    for module in injected.model.modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is not None:
            uses(module, module.tied_adapter.trainable_tokens_delta.values())
    config = opened.tuner.config
    if config.is_prompt_learning:
        injected.model.register_forward_pre_hook(_refuse_positions, with_kwargs=True)
    names = {parameter: name for name, parameter in injected.root.named_parameters()}
    own = {backbone.get_parameter(planned.names[0]) for planned in injected.loaded if planned.trainable}
    is_lora = isinstance(config, LoraConfig) and not isinstance(config, AdaLoraConfig)
    with gathered(injected.made):
        saved = exported(injected.model)
        files = peft_files(injected.model, names, own=own, is_lora=is_lora)
    allocation = None
    if isinstance(config, AdaLoraConfig):
        if config.orth_reg_weight:
            OrthogonalityPenalty(config.orth_reg_weight).add_to(backbone)
        allocation = RankAllocation(config, dict(backbone.named_parameters()), files, partitioner.group)

    def derived() -> dict[str, Tensor]:
        if not files.derived:
            return {}
        with gathered(injected.made), torch.no_grad():
            found = exported(injected.model)
            return {key: found[key].detach().to("cpu", copy=True) for key in files.derived}

    made = {id(getattr(module, name)) for module, name in injected.buffers}
    buffers = {key: saved[key] for key in files.derived if id(saved[key]) in made}
    return TunedModel(
        root=injected.root,
        files=files if allocation is None else allocation.files,
        derived=derived,
        buffers=buffers,
        allocation=allocation,
    )


def _check_trained(opened: OpenedModel, injected: Injected) -> None:
    """Raise ModelError if PEFT trains other parameters than on meta, where memory, files and resumes were planned."""
    assert opened.tuner is not None
    assert opened.tuner_plan is not None
    inside = {parameter: name for name, parameter in opened.backbone.named_parameters()}
    planned, made = opened.tuner_plan.trained, set(injected.made)
    trained = {inside.get(p, name): p for name, p in injected.model.named_parameters() if p.requires_grad}
    if differing := sorted(trained.keys() ^ planned.keys()):
        raise ModelError(
            f"adapter is a {opened.tuner.name} of PEFT, which trains {differing[0]} "
            f"{'only where weights have' if differing[0] in trained else 'only where they do not have'} values: what "
            "is trained must be known before weights are read; use another adapter"
        )
    for name, parameter in trained.items():
        if parameter in made and tuple(parameter.shape) != planned[name]:
            raise ModelError(
                f"adapter is a {opened.tuner.name} of PEFT, whose {name} is {list(parameter.shape)} for these weights "
                f"and {list(planned[name])} without values: shapes must be known before weights are read; use another "
                "adapter"
            )


def _refuse_positions(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """PEFT would ignore positions, and with them the boundaries of packed examples."""
    if kwargs.get("position_ids") is not None:
        raise InputError(
            "position_ids with virtual tokens: PEFT ignores them, so that packed examples would attend to each other; "
            "set packing=False and padding_free=False"
        )


def _share_buffers(injected: Injected, partitioner: Partitioner, dtype: torch.dtype) -> None:
    """Give every rank the buffers of rank 0, on its device; those of floating-point numbers in `dtype`."""
    for module, name in injected.buffers:
        buffer: Tensor = getattr(module, name)
        value = buffer.to(partitioner.device, dtype if buffer.is_floating_point() else buffer.dtype).contiguous()
        partitioner.group.broadcast(value.view(-1).view(torch.uint8), source=0)
        setattr(module, name, value)
