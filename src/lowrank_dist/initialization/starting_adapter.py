"""Training that goes on from an adapter on disk: one that PEFT wrote, or that a checkpoint was converted to."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_dist.adapters.match import match_adapter
from lowrank_dist.adapters.source import find_adapter
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.model.names import peft_name, plain_name
from lowrank_dist.model.plan import Plan
from lowrank_dist.storage.layout import ADAPTER_DIR, LORA_DIR
from lowrank_dist.storage.reader import CheckpointReader, check_finite
from lowrank_dist.zero3.partition import local_shard, whole_shape


class StartingAdapter:
    """An adapter whose values trained parameters take at the start.

    Parameters
    ----------
    directory
        With ``adapter_config.json`` and ``adapter_model.safetensors``.
    for_residual
        It was trained on the residual of a residual model; else it is a LoRA for the original model.

    Attributes
    ----------
    config : peft.LoraConfig
        Its configuration, ready for training.

    Raises
    ------
    CheckpointError
        Where there is none, it is damaged, or it is for another kind of base.
    """

    def __init__(self, directory: Path, *, for_residual: bool) -> None:
        self._source, self._for_residual = find_adapter(directory, for_residual=for_residual), for_residual
        if self._source.initial is not None:
            self._source.close()
            raise CheckpointError(
                f"adapter={str(directory)!r}: a checkpoint of two adapters; pass its {LORA_DIR}/ to go on from there "
                f"with the original model, its {ADAPTER_DIR}/ with the residual model that it began from, or resume "
                "with ckpt_path"
            )
        self.config = self._source.config

    def check(self, backbone: PreTrainedModel, plan: Plan, base: CheckpointReader, group: ShardGroup) -> None:
        """Raise, on every rank, where the adapter is not for this model. Collective.

        Parameters
        ----------
        backbone, plan
            The model on meta, the adapter's layers injected, and its plan.
        base
            What the model is filled from.
        group
            Every rank compares a part of the weights that PEFT saved along (embeddings, where they were targets).
        """
        with group.shared_errors():
            saved_along = match_adapter(self._source, backbone, plan, base.directory)
            keys = {plain_name(name): tensor.key for tensor in plan.parameters for name in tensor.names}
            keys |= {f"{plain_name(planned.layer)}.{planned.parameter}": planned.key for planned in plan.matrices}
            for name, along in saved_along.items():
                key = keys[name]
                if key is None or not _equal(base, key, self._source.trained, along, group):
                    raise ModelError(
                        f"{self._source.directory}: {along} differs from {key or name} of {base.directory}, and is not "
                        "trained further (it is not in modules_to_save); merge the adapter first (lowrank-dist merge) "
                        "and train a new one on the result"
                    )

    def load(self, backbone: PreTrainedModel, group: ShardGroup, initial: MutableMapping[str, Tensor]) -> None:
        """Overwrite this rank's partitions of all trained parameters, casting to their dtypes. Collective.

        Parameters
        ----------
        backbone
            The sharded model.
        group
            The ranks that share it.
        initial
            This rank's shards of what the factors began from, by name: overwritten too, unless the adapter is for a
            residual, which the factors that it was formed with belong to.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read.
        """
        with group.shared_errors():
            for name, parameter in backbone.named_parameters():
                if not parameter.requires_grad:
                    continue
                numel, key = whole_shape(parameter).numel(), peft_name(name)
                start, stop = FlatPartition(numel=numel, world_size=group.size).bounds(group.rank)
                shard = self._source.trained.flat(key, start, stop)
                check_finite(key, shard, start)
                local_shard(parameter)[: stop - start].copy_(shard)
                if name in initial and not self._for_residual:
                    initial[name] = local_shard(parameter).detach().to("cpu", copy=True)

    def close(self) -> None:
        """Close the files."""
        self._source.close()


def _equal(base: CheckpointReader, key: str, adapter: CheckpointReader, along: str, group: ShardGroup) -> bool:
    """Whether this rank's part of two tensors is equal, up to the rounding to the dtype of the adapter."""
    numel = torch.Size(adapter.info(along).shape).numel()
    start, stop = FlatPartition(numel=numel, world_size=group.size).bounds(group.rank)
    one, other = base.flat(key, start, stop), adapter.flat(along, start, stop)
    dtype = min(other.dtype, one.dtype, key=lambda dtype: dtype.itemsize)  # of equally long ones the adapter's
    return torch.equal(one.to(dtype), other.to(dtype))
