"""Training that starts from an adapter on disk, written by PEFT or converted from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_dist.adapters.files import whole_tensor
from lowrank_dist.adapters.match import match_adapter, written_twice
from lowrank_dist.adapters.source import find_adapter
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.errors import CheckpointError, ModelError
from lowrank_dist.model.adapter_files import AdapterFiles
from lowrank_dist.model.names import peft_name, plain_name
from lowrank_dist.model.plan import Plan
from lowrank_dist.storage.layout import ADAPTER_DIR, LORA_DIR
from lowrank_dist.storage.reader import CheckpointReader, check_finite
from lowrank_dist.storage.verify import verify_adapter
from lowrank_dist.zero3.partition import local_shard, whole_shape


class StartingAdapter:
    """An adapter whose values the trained parameters start from.

    Parameters
    ----------
    directory
        Directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
    for_residual
        Whether it was trained on the residual of a residual model; otherwise it is for the original model.

    Attributes
    ----------
    directory : Path
        That directory.
    config : peft.PeftConfig
        Its configuration, ready for training; a LoraConfig if `for_residual`.

    Raises
    ------
    CheckpointError
        If the directory holds no adapter, if it is damaged, or if it is for the other kind of base.
    """

    def __init__(self, directory: Path, *, for_residual: bool) -> None:
        self._source, self._for_residual = (
            find_adapter(directory, for_residual=for_residual, any_type=not for_residual),
            for_residual,
        )
        if self._source.initial is not None:
            self._source.close()
            raise CheckpointError(
                f"adapter={str(directory)!r}: this is a checkpoint with two adapters; pass its {LORA_DIR}/ with the "
                f"original model, pass its {ADAPTER_DIR}/ with the residual model that it began from, or resume "
                "with ckpt_path"
            )
        self.directory, self.config = directory, self._source.config

    def verify(self, group: ShardGroup) -> None:
        """Compare the adapter with the hashes that were written with it, each rank its share. Collective.

        Raises
        ------
        CheckpointError
            On every rank, if a hash differs.
        """
        verify_adapter(self._source.directory, group)

    def check(self, backbone: PreTrainedModel, plan: Plan, base: CheckpointReader, group: ShardGroup) -> None:
        """Raise, on every rank, if the adapter does not fit this model. Collective.

        Parameters
        ----------
        backbone, plan
            The model on meta with the adapter's layers injected, and its plan.
        base
            Reader of the weights that fill the model.
        group
            Every rank compares its part of the base weights that PEFT saved with the adapter (embeddings that were
            targets).
        """
        with group.shared_errors():
            saved_along = match_adapter(self._source, backbone, plan, base.directory)
            keys = {plain_name(name): tensor.key for tensor in plan.parameters for name in tensor.names}
            keys |= {f"{plain_name(planned.layer)}.{planned.parameter}": planned.key for planned in plan.matrices}
            for name, along in saved_along.items():
                key = keys[name]
                if key is None or not _equal(base, key, self._source.trained, along, group):
                    raise ModelError(
                        f"{self._source.directory}: {along} differs from {key or name} of {base.directory} and would "
                        "not be trained (it is not in modules_to_save); merge the adapter first (lowrank-dist merge) "
                        "and train a new one on the result"
                    )

    def load(self, backbone: PreTrainedModel, group: ShardGroup, initial: MutableMapping[str, Tensor]) -> None:
        """Overwrite this rank's shards of all trained parameters, cast to their dtypes. Collective.

        Parameters
        ----------
        backbone
            The sharded model.
        group
            The ranks that share it.
        initial
            This rank's shards of the initial factors, by name. They are overwritten too, unless the adapter is for a
            residual: the factors that the residual was formed with then remain the initial factors.

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

    def load_tuned(
        self, root: nn.Module, files: AdapterFiles, made: Mapping[str, Tensor], group: ShardGroup, *, base: Path
    ) -> None:
        """Overwrite what a tuner of PEFT trains and has made. Collective.

        Parameters
        ----------
        root
            The sharded model that computes.
        files
            What adapter files hold of it.
        made
            Buffers of the tuner by their names in the file, whole on every rank.
        group
            The ranks that share the model.
        base
            Directory of the pretrained weights, for the message.

        Raises
        ------
        CheckpointError
            On every rank, if any rank finds a NaN or infinity or cannot read.
        ModelError
            On every rank, if the adapter lacks what is trained, or holds what is not.
        """
        trained = {name: parameter for name, parameter in root.named_parameters() if parameter.requires_grad}
        stored, start = self._source.trained, self._source.directory
        with group.shared_errors():
            left = set(stored) - set(files.derived)
            for name, parameter in trained.items():
                key, shape = files.stored_as(name), whole_shape(parameter)
                if key is None:
                    raise ModelError(
                        f"{start}: PEFT saves no {name} with adapters of this type, so that training cannot go on from "
                        "it; resume the run that wrote it (ckpt_path)"
                    )
                if key not in stored or stored.info(key).shape != tuple(shape):
                    found = "is missing" if key not in stored else f"has shape {list(stored.info(key).shape)}"
                    raise ModelError(
                        f"{start} does not fit {base}: {key} {list(shape)} {found}; pass the model and the options "
                        "(train_also) that it was trained with"
                    )
                left.discard(key)
                first, stop = FlatPartition(numel=shape.numel(), world_size=group.size).bounds(group.rank)
                shard = stored.flat(key, first, stop)
                check_finite(key, shard, first)
                local_shard(parameter)[: stop - first].copy_(shard)
            left = {key for key in left if not written_twice(key, stored)}
            if left:
                raise ModelError(
                    f"{start} does not fit {base}: {min(left)} would not be trained; pass the model and the options "
                    "(train_also) that it was trained with"
                )
            for key, buffer in made.items():
                if key in stored:
                    buffer.copy_(whole_tensor(stored, key))

    def close(self) -> None:
        """Close the files."""
        self._source.close()


def _equal(base: CheckpointReader, key: str, adapter: CheckpointReader, along: str, group: ShardGroup) -> bool:
    """Whether this rank's parts of two tensors are equal, up to rounding to the narrower of their dtypes."""
    numel = torch.Size(adapter.info(along).shape).numel()
    start, stop = FlatPartition(numel=numel, world_size=group.size).bounds(group.rank)
    one, other = base.flat(key, start, stop), adapter.flat(along, start, stop)
    dtype = min(other.dtype, one.dtype, key=lambda dtype: dtype.itemsize)  # the adapter's if they are equally wide
    return torch.equal(one.to(dtype), other.to(dtype))
