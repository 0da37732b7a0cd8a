"""AdaLoRA's allocation of ranks from sharded gradients: importance, choice, mask.

Of every element of the factors, this rank keeps a smoothed sensitivity and a smoothed uncertainty where its shard of
the optimizer's state is. The means over a triplet's elements are sums over shards, so that one all-reduce of a number
per triplet, of all layers together, is the whole communication of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig
from torch import Tensor
from torch.nn import functional as F

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.errors import CheckpointError
from lowrank_dist.tuners.adalora.files import TRIPLETS, AdaLoraFiles, is_factor, layer_and_factor, scaling_of
from lowrank_dist.tuners.adalora.schedule import BudgetSchedule
from lowrank_dist.tuners.files import PeftFiles
from lowrank_dist.zero3.gradients import copied_gradients
from lowrank_dist.zero3.optimizer import ShardedOptimizer
from lowrank_dist.zero3.partition import local_shard, whole_shape

#: Names of the state per element in checkpoints.
STATES = ("sensitivity", "uncertainty")


class RankAllocation:
    """Which triplets of an AdaLoRA adapter are kept.

    As in PEFT and in the authors' code, the sensitivity of an element is ``|w g|`` with the gradient g of a step, after
    clipping, and the value w that the step has left; the paper's Algorithm 1 has the value before it. Importance
    changes once a step, whatever the number of accumulated batches. All triplets whose importance is at most that of
    the best pruned one are pruned. Pruned triplets have their Lambda set to 0, and all three factors are trained on.

    Parameters
    ----------
    config
        PEFT's configuration, whose schedule has no objection.
    parameters
        Parameters of the model by name; PEFT's factors among them are ZeRO-3 parameters, sharded over `group`.
    files
        The adapter file that PEFT would write without pruning.
    group
        All ranks.

    Attributes
    ----------
    step : int
        Number of optimizer steps taken.
    """

    def __init__(
        self, config: AdaLoraConfig, parameters: Mapping[str, Tensor], files: PeftFiles, group: ShardGroup
    ) -> None:
        self.step, self._config, self._group, self._whole = 0, config, group, files
        self._factors = {name: p for name, p in parameters.items() if p.requires_grad and is_factor(name)}
        layers = dict.fromkeys(layer for layer, _ in map(layer_and_factor, self._factors))
        self._layers = {layer: index for index, layer in enumerate(layers)}
        self._schedule = BudgetSchedule.of(config)
        self._smoothed: dict[str, Tensor] = {}
        self._gradients: Tensor | None = None
        self._kept: Tensor | None = None

    def before_step(self, engine: Any) -> None:
        """Copy the gradients of a step that DeepSpeed's engine is about to take. No communication."""
        if self._schedule.measures(self.step):
            self._gradients = copied_gradients(engine.optimizer)

    def after_step(self, engine: Any) -> None:
        """Take account of a step that DeepSpeed's engine has taken.

        Where triplets are chosen, one all-reduce of an fp64 number per triplet. The host does not wait for the device.
        """
        masters = dict(ShardedOptimizer(engine.optimizer).masters())
        if self._gradients is not None:
            if engine.was_step_applied():
                _clip(self._gradients, engine)
                self._measure(masters, self._gradients)
            self._gradients = None
        if self._schedule.chooses(self.step) and self._smoothed:
            self._choose()
        if self._schedule.masks(self.step) and self._kept is not None:
            self._mask(masters)
        self.step += 1
        if not self._schedule.measures(self.step - 1):
            self._smoothed.clear()

    def _measure(self, masters: Mapping[Tensor, Tensor], gradients: Tensor) -> None:
        by_parameter = dict(zip(masters, gradients.split([master.numel() for master in masters.values()]), strict=True))
        now = self._joined(masters).mul_(self._joined(by_parameter)).abs_()
        if not self._smoothed:
            self._smoothed = {state: torch.zeros_like(now) for state in STATES}
        sensitivity, uncertainty = self._smoothed["sensitivity"], self._smoothed["uncertainty"]
        sensitivity.lerp_(now, 1 - self._config.beta1)
        uncertainty.lerp_(now.sub_(sensitivity).abs_(), 1 - self._config.beta2)

    def _joined(self, shards: Mapping[Tensor, Tensor]) -> Tensor:
        """A new flat tensor of the shards of the factors, one after the other."""
        return torch.cat([shards[parameter] for parameter in self._factors.values()])

    def _split(self, joined: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The factors' names, and views of their shards in what `_joined` returned."""
        sizes = [local_shard(parameter).numel() for parameter in self._factors.values()]
        return zip(self._factors, joined.split(sizes), strict=True)

    def _choose(self) -> None:
        scores = self._importance()
        pruned = len(scores) - self._schedule.budget(self.step, len(self._layers))
        if pruned <= 0:
            self._kept = torch.ones_like(scores, dtype=torch.bool)
            return
        self._kept = scores > torch.kthvalue(scores, pruned).values

    def _importance(self) -> Tensor:
        """Importance of all triplets, fp64, layer after layer; replicated on the device of the group."""
        products = self._smoothed["sensitivity"] * self._smoothed["uncertainty"]
        scores = torch.zeros(len(self._layers), self._schedule.initial, dtype=torch.float64, device=products.device)
        for name, product in self._split(products):
            layer, factor = layer_and_factor(name)
            start, stop = self._bounds(name)
            rows, columns = whole_shape(self._factors[name])
            add_means(scores[self._layers[layer]], product[: stop - start], start, (rows, columns), TRIPLETS[factor])
        return self._group.sum(scores.to(self._group.device)).flatten()

    def _mask(self, masters: Mapping[Tensor, Tensor]) -> None:
        assert self._kept is not None
        pruned, rank = ~self._kept, self._schedule.initial
        on = {pruned.device: pruned}
        for name, parameter in self._factors.items():
            layer, factor = layer_and_factor(name)
            if factor != "lora_E":
                continue
            first, (start, stop) = self._layers[layer] * rank, self._bounds(name)
            for shard in (masters[parameter], local_shard(parameter)):
                if shard.device not in on:  # the optimizer, or everything, is offloaded
                    on[shard.device] = pruned.to(shard.device)
                shard[: stop - start].masked_fill_(on[shard.device][first + start : first + stop], 0)

    # -- what is saved ------------------------------------------------------------------------------------------

    @property
    def kept(self) -> dict[str, tuple[bool, ...]]:
        """Whether each triplet is kept, by layer; empty before the first choice. Waits for the device."""
        if self._kept is None:
            return {}
        rows = self._kept.view(len(self._layers), -1).tolist()
        return {layer: tuple(row) for layer, row in zip(self._layers, rows, strict=True)}

    @property
    def rank_by_layer(self) -> dict[str, int]:
        """Number of triplets that are kept, by layer. Waits for the device."""
        kept = self.kept
        return {layer: sum(kept[layer]) if kept else self._schedule.initial for layer in self._layers}

    @property
    def files(self) -> AdaLoraFiles:
        """What the adapter file holds now. Waits for the device."""
        return AdaLoraFiles(whole=self._whole, kept=self.kept, scaling=scaling_of(self._config))

    def with_ranks(self, config: PeftConfig) -> PeftConfig:
        """A copy of PEFT's configuration with the ``rank_pattern`` of now. Waits for the device."""
        config, kept = copy.copy(config), self.kept
        config.rank_pattern = {f"{layer}.lora_E": list(keeps) for layer, keeps in kept.items()} or None
        return config

    def shards(self) -> Iterator[tuple[str, str, Tensor]]:
        """Parameter, state and this rank's flat fp32 shard, padding included, of the state per element."""
        for state, joined in self._smoothed.items():
            for name, shard in self._split(joined):
                yield name, state, shard

    def state(self) -> dict[str, Any]:
        """The rest of the state, replicated, for JSON."""
        return {
            "step": self.step,
            "kept": {layer: list(keeps) for layer, keeps in self.kept.items()},
            "measured": bool(self._smoothed),
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        return {**self._schedule.as_dict(), "beta1": self._config.beta1, "beta2": self._config.beta2}

    def load(self, state: Mapping[str, Any], shard: Callable[[str, str], Tensor], engine: Any) -> None:
        """Continue from a checkpoint, of any number of ranks. No communication.

        Parameters
        ----------
        state
            What `state` returned.
        shard
            Returns this rank's flat shard of a state of a parameter, without padding.
        engine
            DeepSpeed's engine, beside whose optimizer state this state is kept.

        Raises
        ------
        CheckpointError
            If the run that wrote the checkpoint had another schedule.
        """
        mine = self._settings()
        for name, value in state["settings"].items():
            if mine[name] != value:
                raise CheckpointError(
                    f"AdaLoRA's {name} was {value} in the run that wrote the checkpoint and is {mine[name]} now; "
                    "resume with the AdaLoraConfig of that run"
                )
        self.step = state["step"]
        if state["kept"]:
            rows = [state["kept"][layer] for layer in self._layers]
            self._kept = torch.tensor(rows, dtype=torch.bool, device=self._group.device).flatten()
        if state["measured"]:
            masters = dict(ShardedOptimizer(engine.optimizer).masters())
            self._smoothed = {kind: torch.zeros_like(self._joined(masters)) for kind in STATES}
            for name, kind, loaded in self.shards():
                found = shard(name, kind)
                loaded[: found.numel()] = found

    def _bounds(self, name: str) -> tuple[int, int]:
        numel = whole_shape(self._factors[name]).numel()
        return FlatPartition(numel=numel, world_size=self._group.size).bounds(self._group.rank)


def add_means(scores: Tensor, values: Tensor, start: int, shape: tuple[int, int], triplets: int) -> None:
    """Add to `scores` this rank's part of the means over the triplets of a factor.

    Parameters
    ----------
    scores
        fp64 ``[r]``.
    values
        This rank's elements of the flattened factor, from `start` on; may be empty.
    start
        Place of the first of them.
    shape
        Shape of the whole factor.
    triplets
        Dimension of the triplets in it; the mean is over the other one.
    """
    if not values.numel():
        return
    _, columns = shape
    before = start % columns
    rows = F.pad(values, (before, -(before + values.numel()) % columns)).view(-1, columns)
    sums = rows.sum(1 - triplets, dtype=torch.float64) / shape[1 - triplets]
    first = start // columns if triplets == 0 else 0
    scores[first : first + len(sums)] += sums


def _clip(gradients: Tensor, engine: Any) -> None:
    """Scale `gradients` in place as the engine has scaled those of its last step, whose norm it limits."""
    limit = engine.gradient_clipping()
    if limit:
        excess = torch.as_tensor((engine.get_global_grad_norm() + 1e-6) / limit).clamp(min=1.0)
        gradients.div_(excess.to(gradients.device))
