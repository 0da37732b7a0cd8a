"""The trained parameters as they are before the first step, kept beside those that are trained.

An objective that compares the model with itself at the start of the run (DPO's reference) needs them. To switch the
adapter off gives that model only for methods whose update starts at zero: PiSSA and its kin subtract the initial
update from the base, so that base without adapter is not the pretrained model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatStorage
from lowrank_dist.storage.digest import digest_sums, digests
from lowrank_dist.zero3.partition import is_partitioned, local_shard, whole_shape


class StepZero:
    """The present values of parameters, kept on this rank and put into their place on demand.

    Of a ZeRO-3 parameter, this rank's shard is kept, where the shard is; of any other one, the whole. So the ranks
    together keep one more copy of what is trained, in its own dtype: 2 bytes an element in bf16, beside the 14 of its
    gradient, fp32 master and two moments.

    Parameters
    ----------
    parameters
        The parameters by name; those that are not trained are ignored.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._kept = {name: _held(p).detach().clone() for name, p in self._parameters.items()}

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(kept.nbytes for kept in self._kept.values())

    def digest(self, group: ShardGroup) -> str:
        """Digest of the values of ZeRO-3 parameters, the same on any number of ranks; one all-reduce.

        Parameters
        ----------
        group
            The ranks that share the parameters.
        """
        shapes = {name: whole_shape(parameter) for name, parameter in self._parameters.items()}
        storages = {
            f"{name} {list(shapes[name])}": FlatStorage(
                numel=shapes[name].numel(), shard_numel=kept.numel(), dtype=kept.dtype
            )
            for name, kept in self._kept.items()
        }
        shards = {label: kept.contiguous() for label, kept in zip(storages, self._kept.values(), strict=True)}
        (digest,) = digests([digest_sums(shards, storages, group.rank).to(group.device)], group)
        return digest

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters have the kept values, which must not be changed; nothing is copied.

        What has been gathered of the parameters before is not changed.
        """
        trained = self._exchanged(self._kept)
        try:
            yield
        finally:
            self._exchanged(trained)

    def _exchanged(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put `values` into their place; return those that were there."""
        with torch.inference_mode(False), torch.no_grad():  # they stay for training, also in validation
            found = {name: _held(parameter).data for name, parameter in self._parameters.items()}
            for name, value in values.items():
                holder = _held(self._parameters[name])
                if value.device != holder.device:  # a module is moved after it was made
                    value = self._kept[name] = value.to(holder.device)
                holder.data = value
        return found


def _held(parameter: nn.Parameter) -> Tensor:
    """What holds the values of a parameter on this rank."""
    return local_shard(parameter) if is_partitioned(parameter) else parameter
