"""Magnitudes of DoRA at the start: the norms of the rows of the weight that the model computes with."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.errors import ModelError
from lowrank_dist.layers.dora import row_norms
from lowrank_dist.model.factor_layout import FactorLayout
from lowrank_dist.model.names import ADAPTER
from lowrank_dist.model.plan import Plan
from lowrank_dist.zero3.partition import Partitioner, gathered


def start_magnitudes(
    backbone: PreTrainedModel, plan: Plan, partitioner: Partitioner, dtype: torch.dtype, layout: FactorLayout
) -> None:
    """Make the magnitudes ``||W_res + s f(B) A||_row`` of all layers with DoRA, ``[out]`` in `dtype`, sharded.

    f is that of `layout`. The residual is taken as it is decoded, as PEFT does. Collective: layers are gathered one by
    one, as in training.

    Raises
    ------
    ModelError
        On every rank, for a row of zeros: it has no direction, and DoRA divides by its norm.
    """
    for planned in plan.matrices:
        if planned.magnitude is None:
            continue
        layer = backbone.get_submodule(planned.layer)
        base = layer.get_submodule("base_layer")
        a, b = (backbone.get_parameter(planned.factor_names[f"lora_{x}"]) for x in "AB")
        further = {name.rpartition(".")[2]: backbone.get_parameter(name) for name in layout.parameter_shapes(planned)}
        with gathered([*base.stored(), a, b, *further.values()]), torch.no_grad():
            whole = layout.folded(b.float(), further)
            norms = row_norms(base.dense(torch.float32), a.float(), whole, planned.scaling)
        zeros = int((norms == 0).sum())
        if zeros:
            raise ModelError(
                f"use_dora=True: {zeros} of {len(norms)} outputs of {planned.name} have weights that are all zero (the "
                f"first is {int(norms.argmin())}), and DoRA divides by their norms; drop it from target_modules, or "
                "leave use_dora out"
            )
        start, stop = FlatPartition(numel=len(norms), world_size=partitioner.group.size).bounds(partitioner.group.rank)
        parameter = partitioner.parameter(norms.shape, dtype, norms[start:stop].to(dtype), requires_grad=True)
        layer.get_submodule(f"lora_magnitude_vector.{ADAPTER}").register_parameter("weight", parameter)
