"""Writes checkpoints. Every tensor has an owner rank; all owners write at once into the same files.

A save has two parts. `CheckpointWriter.snapshot` runs between two steps: every rank copies its own shards to the host.
`CheckpointWriter.write` sends the copies to their owners, one all-to-all per 16 MiB of a rank's shards. The owners
convert, hash, write and flush them. It may run in another thread, over a process group of its own, during training.
A checkpoint is either complete or absent.
"""

from __future__ import annotations

import copy
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from lowrank_dist._version import __version__
from lowrank_dist.adapters.lora import lora_config
from lowrank_dist.checkpoints.contents import Contents, tensor_files
from lowrank_dist.distributed.gather_to_owner import Parcel, assign_owners, deliver, gather_to_owners, pack_for_owners
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import naming
from lowrank_dist.initialization.materialize import Materialized
from lowrank_dist.model.adapter_files import AdapterFiles
from lowrank_dist.model.names import peft_name
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.disk import check_free, flush_directory
from lowrank_dist.storage.layout import ADAPTER_DIR, INITIAL_DIR, LORA_DIR, MANIFEST, OPTIMIZER, STATE, sealed
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.reader import FileTensor
from lowrank_dist.storage.verify import FORMAT, file_digest, tensor_digest
from lowrank_dist.storage.writer import TensorFiles, write_json, write_tensors
from lowrank_dist.tuners.adalora import files as adalora
from lowrank_dist.tuners.adalora.allocation import RankAllocation
from lowrank_dist.tuners.adalora.files import AdaLoraFiles
from lowrank_dist.zero3.optimizer import MASTER, ShardedOptimizer
from lowrank_dist.zero3.partition import local_shard, whole_shape


@dataclass(kw_only=True)
class Snapshot:
    """One rank's part of a checkpoint, copied so that training cannot change it.

    Attributes
    ----------
    contents, config
        What the checkpoint holds, and PEFT's configuration of the adapter, at this step.
    parcels
        Copies of this rank's shards, on the CPU: all states in the optimizer, and trained parameters that are not in
        the optimizer.
    states
        Names of the optimizer's states of a parameter, beside its fp32 copy.
    optimized
        Names of the parameters in the optimizer.
    state
        Lightning's checkpoint without weights, encoded (`lowrank_dist.checkpoints.codec`). None: weights only.
    facts
        Entries for the manifest: step, epoch, ...
    derived
        On rank 0, the tensors of the adapter file that are not parameters, on the CPU.
    further
        Names of parameters and of states that are not the optimizer's.
    """

    contents: Contents
    config: PeftConfig
    parcels: deque[Parcel]
    states: tuple[str, ...] = ()
    optimized: tuple[str, ...] = ()
    state: tuple[Any, dict[str, Tensor]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, Tensor] = field(default_factory=dict)
    further: tuple[tuple[str, str], ...] = ()


class CheckpointWriter:
    """Writes the adapters and the training state of a sharded model.

    Parameters
    ----------
    model
        The sharded model.
    config
        PEFT configuration of the adapter.
    materialized
        Result of the walk: initial factors and measurements. The constructor moves the factors to their owners, one
        all-to-all per 16 MiB of shards, and removes them from `materialized`.
    group
        The ranks that share the model.
    original
        Pretrained model; its name becomes ``base_model_name_or_path``, its commit ``revision``.
    starts_at_zero
        Whether the adapter is a LoRA for the unmodified `original`.
    facts
        Further entries of the manifest: method, quantization, fingerprint of the base, ...
    files
        What adapter files hold of the model. Default: what the layout of `materialized` says.
    derived
        Computes the tensors of the adapter file that are not parameters; called with every snapshot. Collective.
    allocation
        What changes the ranks of the adapter while it is trained; its state is part of every snapshot.

    Attributes
    ----------
    model
        The model.
    trained
        The trained parameters, by name.
    initial
        A0 and B0 of the layers that this rank owns, whole, by parameter name. Every factor has one owner.
    files
        What adapter files hold of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig,
        materialized: Materialized,
        group: ShardGroup,
        *,
        original: Original,
        starts_at_zero: bool,
        facts: Mapping[str, Any],
        files: AdapterFiles | None = None,
        derived: Callable[[], dict[str, Tensor]] = dict,
        allocation: RankAllocation | None = None,
    ) -> None:
        self.model, parameters = model, dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in parameters.items() if parameter.requires_grad}
        self.trained = {name: parameters[name] for name in self._names.values()}
        # factors that are frozen belong to the adapter too
        self._frozen = {name: parameters[name] for name in materialized.initial if name not in self.trained}
        self._config = copy.deepcopy(config)
        self._config.base_model_name_or_path, self._config.revision = original.name, original.revision
        self._config.inference_mode = True
        self._group, self._starts_at_zero, self._derived = group, starts_at_zero, derived
        self.files = materialized.layout if files is None else files
        self.allocation = allocation
        experts = {peft_name(name): count for name, count in materialized.experts.items()}
        self._shapes = {name: whole_shape(p) for name, p in (self.trained | self._frozen).items()}
        self._dtypes = {name: p.dtype for name, p in (self.trained | self._frozen).items()}
        units: dict[str, int] = {}
        for name, shape in self._shapes.items():
            units[_unit(name)] = units.get(_unit(name), 0) + shape.numel()
        owners = assign_owners(units, group.size)
        self._owner = {name: owners[_unit(name)] for name in self._shapes}
        self._trained_of = Counter(map(_unit, self.trained))  # how many tensors of a layer are trained
        self.initial = self._to_owners(materialized.initial)
        self._encoded = self._to_owners(materialized.encoded_from)
        self._laid_out: dict[bool, tuple[tuple[Any, ...], dict[str, dict[str, FileTensor]]]] = {}
        self._contents = Contents(
            shapes=self._shapes,
            dtypes=self._dtypes,
            trained=list(self.trained),
            initial=list(materialized.initial),
            adapter=self.files,
            derived={
                key: FileTensor(shape=tuple(value.shape), dtype=value.dtype) for key, value in sorted(derived().items())
            },
            encoded=list(materialized.encoded_from),
            experts=experts,
            starts_at_zero=starts_at_zero,
        )
        materialized.initial.clear()
        materialized.encoded_from.clear()
        self._facts: dict[str, Any] = {
            "format": FORMAT,
            "kind": "checkpoint",
            "lowrank_dist": __version__,
            **original.facts(),
            "starts_at_zero": starts_at_zero,
            "adapter_is_for": "the base" if starts_at_zero else "the residual",
            "experts": experts,
            # under target_parameters PEFT nests layers, so that names in the file do not identify the parameter
            "parameters": {peft_name(name): weight for name, weight in materialized.parameters.items()},
            "world_size": group.size,
            "trained": sorted(self.trained),
            "matrices": [matrix.as_dict() for matrix in materialized.report.matrices],
            **facts,
        }

    def _to_owners(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = ((name, shard, self._shapes[name].numel()) for name, shard in shards.items())
        whole = gather_to_owners(named, self._owner.__getitem__, self._group)
        return {name: tensor.view(self._shapes[name]) for name, tensor in whole}

    def snapshot(
        self,
        optimizer: ShardedOptimizer | None = None,
        *,
        state: tuple[Any, dict[str, Tensor]] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Snapshot:
        """Copy this rank's shards that a checkpoint needs to the host. No communication, but for what is derived.

        A rank needs host memory for its shards of the adapters or, with an optimizer, of their fp32 copies and moments.
        """
        kinds: dict[str, None] = {}
        optimized: dict[str, None] = {}
        further: list[tuple[str, str]] = []

        def named() -> Iterator[tuple[str, Tensor, int]]:
            for name, kind, shard in self._shards(optimizer):
                if kind:
                    kinds[kind] = optimized[name] = None
                yield _key(name, kind), shard, self._shapes[name].numel()

            if optimizer is not None and self.allocation is not None:
                for name, kind, shard in self.allocation.shards():
                    further.append((name, kind))
                    yield _key(name, kind), shard, self._shapes[name].numel()

        parcels = deque(pack_for_owners(named(), self._owner_of, self._group, device=torch.device("cpu")))
        states = tuple(kind for kind in kinds if kind != MASTER)
        derived = self._derived()
        contents, config = self._contents, self._config
        if self.allocation is not None:
            config = self.allocation.with_ranks(config)
            contents = replace(contents, adapter=self.allocation.files)
        return Snapshot(
            contents=contents,
            config=config,
            parcels=parcels,
            states=states,
            optimized=tuple(optimized),
            state=state,
            facts=dict(facts or {}),
            derived=derived if self._group.rank == 0 else {},
            further=tuple(further),
        )

    def _owner_of(self, key: str) -> int:
        return self._owner[_name_and_kind(key)[0]]

    def _shards(self, optimizer: ShardedOptimizer | None) -> Iterator[tuple[str, str, Tensor]]:
        left = dict(self.trained)
        for parameter, shards in () if optimizer is None else optimizer.shards():
            name = self._names[id(parameter)]
            del left[name]
            for kind, shard in shards.items():
                yield name, kind, shard
        for name, parameter in left.items():
            yield name, "", local_shard(parameter)

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, taken: Snapshot, directory: Path, group: ShardGroup) -> None:
        """Write a snapshot to `directory`, replacing an existing one. Collective over `group`.

        Parameters
        ----------
        taken
            Result of `snapshot`; its parcels are freed as they are sent.
        directory
            Directory on a file system that all ranks see.
        group
            The ranks of the snapshot, in the same order. No other collective of the group may run at the same time.

        Raises
        ------
        OSError, InputError
            On every rank if writing fails, or if `directory` is something else than a checkpoint
            (`lowrank_dist.storage.replacing.check_target`); it is then unchanged.
        """
        with ExitStack() as stack:
            contents, staging = self._laid_out_for(taken), Path()
            with group.shared_errors():
                if group.rank == 0:
                    staging = stack.enter_context(atomic_directory(directory, overwrite=True, kind="checkpoint"))
            staging = Path(str(group.broadcast_object(str(staging))))
            files = tensor_files(contents, staging)
            for part in files.values():
                stack.callback(part.close)
            with group.shared_errors():
                if group.rank == 0:
                    self._begin(staging, files)
            with group.shared_errors():  # `_tensors` ends its collectives before it raises
                hashes = self._tensors(taken, files, group)
                for part in files.values():
                    part.flush()
            everyone = group.gather_objects(hashes)
            with group.shared_errors():
                if group.rank == 0:
                    self._finish(taken, staging, contents, everyone)
                stack.pop_all().close()

    def _laid_out_for(self, taken: Snapshot) -> dict[str, dict[str, FileTensor]]:
        """Names, shapes and dtypes of the tensors by part; the same on every rank.

        The result is cached: operations on meta tensors hold the GIL, and the training thread would wait for it.
        """
        whole = taken.state is not None
        states = (taken.states, taken.optimized, taken.further) if whole else ()
        key = (*states, taken.contents.adapter)
        if whole not in self._laid_out or self._laid_out[whole][0] != key:
            self._laid_out[whole] = key, taken.contents.files(*states)
        return self._laid_out[whole][1]

    def _begin(self, staging: Path, files: Mapping[str, TensorFiles]) -> None:
        check_free(staging, sum(part.nbytes for part in files.values()))
        for part in files.values():
            part.directory.mkdir(exist_ok=True)
            part.create()

    def _tensors(
        self, taken: Snapshot, files: Mapping[str, TensorFiles], group: ShardGroup
    ) -> dict[str, dict[str, str]]:
        """Write this rank's own tensors as they arrive; return hashes by part and name. Collective, also on error."""
        hashes: dict[str, dict[str, str]] = {part: {} for part in files}

        def write(part: str, name: str, tensor: Tensor) -> None:
            if part in files:
                tensor = tensor.contiguous()
                hashes[part][name] = tensor_digest(tensor)
                files[part].write(name, 0, tensor.flatten())

        for name, tensor in taken.derived.items():
            for part in (ADAPTER_DIR, LORA_DIR):
                write(part, name, tensor)
        values: dict[str, dict[str, Tensor]] = {}
        with _to_the_end(deliver(_consumed(taken.parcels), group)) as arriving:
            for key, whole in arriving:
                name, kind = _name_and_kind(key)
                tensor = whole.view(self._shapes[name])
                if kind and not (kind == MASTER and self._dtypes[name] == torch.float32):
                    write(OPTIMIZER, f"{name}.{kind}", tensor)
                if kind in ("", MASTER):
                    layer = values.setdefault(_unit(name), {})
                    layer[name] = tensor.to(self._dtypes[name])
                    if len(layer) == self._trained_of[_unit(name)]:
                        self._layer(values.pop(_unit(name)), taken.contents, write)
        return hashes

    def _layer(self, values: dict[str, Tensor], contents: Contents, write: Callable[[str, str, Tensor], None]) -> None:
        """Write one layer's tensors of every part, given all of its trained values."""
        unit = _unit(next(iter(values)))
        values |= {name: self.initial[name] for name in self._frozen if _unit(name) == unit}
        own = {name: self.initial[name] for name in values if name in self.initial}
        encoded = {name: self._encoded[name] for name in values if name in self._encoded}
        for part, tensors in contents.parts(values, own, encoded).items():
            for name, tensor in tensors.items():
                write(part, name, tensor)

    def _finish(
        self,
        taken: Snapshot,
        staging: Path,
        contents: Mapping[str, Mapping[str, FileTensor]],
        everyone: list[dict[str, dict[str, str]]],
    ) -> None:
        """Write the configurations, the training state and, last, the manifest. Called by rank 0."""
        taken.config.save_pretrained(str(staging / ADAPTER_DIR))
        if INITIAL_DIR in contents:
            taken.config.save_pretrained(str(staging / INITIAL_DIR))
        if LORA_DIR in contents:
            self._lora_config(taken).save_pretrained(str(staging / LORA_DIR))
        hashes: dict[str, dict[str, str]] = {}
        for one in everyone:
            for part, found in one.items():
                hashes.setdefault(part, {}).update(found)
        lacking = [name for part, tensors in contents.items() for name in tensors if name not in hashes[part]]
        if lacking:  # a bug; the file would hold zeros that no later check finds
            raise RuntimeError(f"{lacking[0]} and {len(lacking) - 1} more tensors were planned but not written")
        if taken.state is not None:
            value, tensors = taken.state
            with naming(staging / f"{STATE}.json"):
                (staging / f"{STATE}.json").write_text(json.dumps(value, allow_nan=False))
            write_tensors(staging / f"{STATE}.safetensors", tensors)
            hashes[STATE] = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        files = sorted(path for path in staging.rglob("*.json"))
        facts = {
            **self._facts,
            **taken.facts,
            "hashes": hashes,
            "files": {str(path.relative_to(staging)): file_digest(path) for path in files},
        }
        flush_directory(staging)
        write_json(staging / MANIFEST, sealed(facts))

    def _lora_config(self, taken: Snapshot) -> PeftConfig:
        adapter = taken.contents.adapter
        if isinstance(adapter, AdaLoraFiles):
            return adalora.lora_config(taken.config, adapter.lora_rank or taken.config.init_r)
        if not isinstance(self._config, LoraConfig):
            return self._config
        return lora_config(self._config, doubled=not self._starts_at_zero)


def _consumed(parcels: deque[Parcel]) -> Iterator[Parcel]:
    while parcels:
        yield parcels.popleft()


@contextmanager
def _to_the_end(arriving: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """Run the remaining collectives before an exception of the body leaves: the other ranks wait in them.

    If a collective itself has failed, nothing remains to run: the group is then unusable on every rank.
    """
    try:
        yield arriving
    except BaseException:
        for _ in arriving:
            pass
        raise


def _key(name: str, kind: str) -> str:
    return f"{name}\n{kind}"


def _name_and_kind(key: str) -> tuple[str, str]:
    name, _, kind = key.rpartition("\n")
    return name, kind


def _unit(name: str) -> str:
    """Name of the layer of a factor, whose tensors are written together; other parameters stand for themselves."""
    for mark in (".lora_A", ".lora_B", ".lora_E", ".lora_embedding_A", ".lora_embedding_B"):
        if mark in name:
            return name.partition(mark)[0]
    return name
