"""Tied parameters that are stored with different values: they are not tied, as transformers decides on loading.

A configuration may tie parameters of which the weights hold several (T5 1.1 and Flan-T5 have a head of their own, and
every T5 is tied in transformers 5). `PreTrainedModel.tie_weights` then compares the values that it has loaded. Here
they are compared before the plan is made, and only if the headers show more than one of them.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.model.names import CheckpointKeys
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.reader import PACKED_DTYPES, CheckpointReader

log = logging.getLogger(__name__)

COMPARED = 2**22  # elements that are read of each of two tensors at a time


def separate_ties(backbone: PreTrainedModel, reader: CheckpointReader, group: ShardGroup) -> None:
    """Give tied parameters that are stored with different values their own parameters. Collective over `group`.

    Every pair that the model ties is looked up in the headers. Where both are stored, each rank compares its share of
    the values and stops at its first difference: two all-reduces of a flag for each such pair, and one for the headers.
    All ranks decide the same, and rank 0 warns of each pair that differs. The configuration is unchanged, as with
    transformers: some encoder-decoders scale their logits according to it.

    Parameters
    ----------
    backbone
        Skeleton on meta, tied, without PEFT's layers; changed in place.
    reader
        Reader of the pretrained weights or of a residual model.
    group
        The ranks that share the comparison.

    Raises
    ------
    CheckpointError
        On every rank, if any rank cannot read.
    """
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    tied = {
        name: source
        for name, source in backbone.get_expanded_tied_weights_keys(all_submodels=True).items()
        if name in parameters and parameters[name] is parameters.get(source)
    }
    names = [*tied.values(), *tied]
    with group.shared_errors():
        keys = CheckpointKeys(backbone, reader)
        stored = {name: keys.stored_as(name) for name in names}
    # The steps of `PreTrainedModel.tie_weights` with `missing_keys`, on names: `stored` becomes the tensor that fills a
    # parameter. Other orders would tie other parameters where more than two belong together.
    pairs = list(tied.items())
    for place, (name, source) in enumerate(pairs):
        first, second = stored[source], stored[name]
        if first is not None and second is not None and _differ(reader, first, second, group):
            backbone.all_tied_weights_keys.pop(name, None)
            if group.rank == 0:
                log.warning(
                    "%s: %s and %s are stored with different values, so they are not tied",
                    reader.directory,
                    source,
                    name,
                )
        elif first is None and second is not None:
            stored[source] = second
        elif first is None:
            others = (stored[other] for other, same in pairs[place + 1 :] if same == source)
            stored[name] = next((key for key in others if key is not None), None)
        else:
            stored[name] = first
    _separate(backbone, {name: key for name, key in stored.items() if key is not None})


def _differ(reader: CheckpointReader, first: str, second: str, group: ShardGroup) -> bool:
    """Whether two tensors differ in shape or values; the same on every rank. Collective unless headers tell."""
    if first == second:
        return False
    one, other = reader.info(first), reader.info(second)
    # an encoded residual belongs to an adapted parameter, which was not tied when the model was decomposed
    if one.shape != other.shape or not {one.dtype, other.dtype}.isdisjoint(PACKED_DTYPES):
        return True
    if one.dtype != other.dtype and not {one.dtype, other.dtype} <= FLOAT_DTYPES.keys():
        return True
    share = FlatPartition(numel=torch.Size(one.shape).numel(), world_size=group.size).bounds(group.rank)
    differs = False
    with group.shared_errors():
        for start in range(*share, COMPARED):
            stop = min(start + COMPARED, share[1])
            a, b = reader.flat(first, start, stop), reader.flat(second, start, stop)
            if a.dtype == b.dtype:
                differs = not torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            else:
                differs = not torch.equal(a.float(), b.float())
            if differs:
                break
    return bool(group.max(torch.tensor([differs], dtype=torch.int32, device=group.device)))


def _separate(backbone: PreTrainedModel, stored: dict[str, str]) -> None:
    """Let parameters be shared only by names that the same tensor fills."""
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    kept: dict[int, str] = {}  # by parameter, the tensor that goes on filling it
    made: dict[str, nn.Parameter] = {}
    for name, key in stored.items():
        parameter = parameters[name]
        if kept.setdefault(id(parameter), key) != key:
            own = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
            owner, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(owner), leaf, made.setdefault(key, own))
