"""Statistics of adapted layers: computed in fp32 on every rank and sent to the owners of their rows layer by layer."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.layers.frozen import FrozenLinear
from lowrank_dist.linalg import all_finite, full_fp32
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.zero3.units import Unit

TRANSIENT_BYTES = 2**28  # size of a product before its rows are sent to their owners


class Statistics:
    """This rank's rows of the statistics by matrix. A statistic is freed once its last matrix has fetched it.

    Parameters
    ----------
    values
        fp32 tensors by name.
    source
        Name in `values` of the statistic of every layer.
    device
        Device on which statistics are returned.
    """

    def __init__(self, values: dict[str, Tensor], source: Mapping[str, str], device: torch.device) -> None:
        self.values, self.device = values, device
        self._source = dict(source)

    def __call__(self, planned: PlannedMatrix) -> Tensor:
        name = self._source.pop(planned.layer)
        value = self.values[name] if name in self._source.values() else self.values.pop(name)
        return value.to(self.device)


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted weight and the frozen layer that holds it."""

    planned: PlannedMatrix
    frozen: FrozenLinear

    @property
    def name(self) -> str:
        return self.planned.layer


def adapted_layers(backbone: nn.Module, matrices: Sequence[PlannedMatrix]) -> list[AdaptedLayer]:
    """The frozen layers of `matrices`; raises ModelError if one is not linear."""
    found = []
    for planned in matrices:
        frozen = getattr(backbone.get_submodule(planned.layer), "base_layer", None)
        if not isinstance(frozen, FrozenLinear):
            raise ModelError(
                f"{planned.layer} is a {type(frozen).__name__}, but calibration measures linear layers only; drop it "
                "from target_modules, or choose a method that does not look at data"
            )
        found.append(AdaptedLayer(planned, frozen))
    return found


class Measured(ABC):
    """Collects a statistic by hooks on the adapted layers; subclasses define which."""

    def __init__(
        self,
        layers: list[AdaptedLayer],
        group: ShardGroup,
        residual: ResidualFormat,
        *,
        device: torch.device,
        home: torch.device,
    ) -> None:
        self.layers, self.group, self.residual, self.device, self.home = layers, group, residual, device, home
        self.positions: Tensor | None = None
        self.values: dict[str, Tensor] = {}
        self.source: dict[str, str] = {}
        self.reached: set[str] = set()

    def unit_starts(self, unit: Unit) -> None:
        """Handle the start of a unit's forward; not called in backward."""
        self.reached.clear()  # the recomputation in a backward adds layers too

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the forwards of the adapted layers inside the context."""
        with ExitStack() as stack:
            for layer in self.layers:

                def hook(_: nn.Module, args: Any, y: Tensor, layer: AdaptedLayer = layer) -> Tensor | None:
                    return self.observe(layer, args[0], y)

                stack.callback(layer.frozen.register_forward_hook(hook).remove)
            yield

    @abstractmethod
    def observe(self, layer: AdaptedLayer, x: Tensor, y: Tensor) -> Tensor | None:
        """Forward hook of a frozen layer; a returned tensor replaces `y`."""

    def unit_ends(self, unit: Unit) -> None:
        """Handle the end of a unit's forward, on all ranks; not called in backward."""
        members = {id(member) for member in unit.members}
        layers = [layer for layer in self.layers if id(layer.frozen) in members]
        if layers:
            self.unit_measured(layers)

    def unit_measured(self, layers: list[AdaptedLayer]) -> None:
        """Handle the end of the forward of a unit that contains `layers`, on all ranks."""
        with self.group.shared_errors():
            for layer in layers:
                if layer.name not in self.reached:
                    raise ModelError(
                        f"{layer.name} got no input from a calibration batch; drop it from target_modules, or choose a "
                        "method that does not look at data"
                    )

    @abstractmethod
    def finish(self, batches: int) -> Statistics:
        """Return the statistics after all `batches` have run. Collective."""

    def add(self, name: str, left: Tensor, right: Tensor, partition: RowPartition) -> None:
        """Add this rank's rows of ``left^T right``, summed over the ranks, to statistic `name`."""
        start, stop = partition.bounds(self.group.rank)
        if name not in self.values:
            self.values[name] = torch.zeros(stop - start, partition.columns, device=self.home)
        add_product(left, right, partition, self.group, into=self.values[name])

    def check_finite(self) -> None:
        with self.group.shared_errors():
            for name, value in self.values.items():
                if not all_finite(value):
                    raise InputError(
                        f"Calibration: the statistic of {name} contains a NaN or infinity; calibrate on other data, or "
                        "in precision 32-true"
                    )


class Covariances(Measured):
    """``X^T X / tokens`` of the inputs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inputs: dict[str, list[Tensor]] = {}  # of the current decoder layer
        self.tokens: dict[str, int] = {}

    def observe(self, layer: AdaptedLayer, x: Tensor, y: Tensor) -> None:
        self.reached.add(layer.name)
        self.inputs.setdefault(layer.name, []).append(x)

    def unit_measured(self, layers: list[AdaptedLayer]) -> None:
        super().unit_measured(layers)
        for layer in layers:
            source = self.source.setdefault(layer.name, self._same_input(layer, layers))
            if source != layer.name:
                self._check_still_shared(layer.name, source)
                continue
            inputs = layer.frozen.in_features
            partition = RowPartition(rows=inputs, columns=inputs, world_size=self.group.size)
            for x in self.inputs[layer.name]:
                counted = select_positions(x, self.positions)
                self.tokens[layer.name] = self.tokens.get(layer.name, 0) + len(counted)
                self.add(layer.name, counted, counted, partition)
        self.inputs.clear()

    def _same_input(self, layer: AdaptedLayer, layers: list[AdaptedLayer]) -> str:
        """Name of the first of `layers` whose inputs are the same tensor objects as those of `layer`."""
        return next(other.name for other in layers if self._identical(other.name, layer.name))

    def _identical(self, one: str, other: str) -> bool:
        a, b = self.inputs[one], self.inputs[other]
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))

    def _check_still_shared(self, name: str, source: str) -> None:
        if not self._identical(name, source):
            raise ModelError(
                f"{name} and {source} have the same input in one calibration batch but not in another; drop one of "
                "them from target_modules, or choose a method that does not look at data"
            )

    def finish(self, batches: int) -> Statistics:
        tokens = torch.tensor([self.tokens[name] for name in self.values], dtype=torch.float64, device=self.device)
        for (name, value), count in zip(self.values.items(), self.group.sum(tokens).tolist(), strict=True):
            if count == 0:
                raise InputError(
                    f"Calibration: no position of the inputs of {name} counts; use other data, or positions='all'"
                )
            value /= count
        self.check_finite()
        return Statistics(self.values, self.source, self.device)


class Gradients(Measured):
    """``dL/dW``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # No parameter requires a gradient, so the graph needs another leaf.
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        self.partitions = {
            layer.name: layer.planned.row_partition(self.group.size, block=self.residual.block) for layer in self.layers
        }

    def observe(self, layer: AdaptedLayer, x: Tensor, y: Tensor) -> Tensor:
        self.reached.add(layer.name)
        watched: Tensor = _Watch.apply(y, x, self.anchor, functools.partial(self._collect, layer))
        return watched

    def _collect(self, layer: AdaptedLayer, x: Tensor, grad: Tensor) -> None:
        left, right = grad.flatten(0, -2), x.flatten(0, -2)
        if layer.planned.input_first:
            left, right = right, left
        self.add(layer.name, left, right, self.partitions[layer.name])

    def finish(self, batches: int) -> Statistics:
        for layer in self.layers:
            if layer.name not in self.values:
                raise ModelError(
                    f"{layer.name}: the loss of the calibration batches does not depend on it; drop it from "
                    "target_modules"
                )
        for value in self.values.values():
            value /= batches * self.group.size
        self.check_finite()
        return Statistics(self.values, {layer.name: layer.name for layer in self.layers}, self.device)


class _Watch(torch.autograd.Function):
    """The identity on a layer's output; its backward passes the layer's input and the output's gradient to `show`.

    The input is a saved tensor, so under activation checkpointing it is recomputed instead of kept.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, show: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.show = show
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.show(x, grad)
        return grad, None, None, None


def add_product(
    left: Tensor,
    right: Tensor,
    partition: RowPartition,
    group: ShardGroup,
    *,
    into: Tensor,
    transient_bytes: int = TRANSIENT_BYTES,
) -> None:
    """Add this rank's rows of the sum over ranks of ``left^T right`` to `into`, in true fp32. Collective.

    Parameters
    ----------
    left, right
        ``[t, m]`` and ``[t, n]`` of any floating dtype, different on every rank; t may differ.
    partition
        Partition of the ``m x n`` product.
    group
        The ranks.
    into
        ``[m_p, n]`` fp32, row-sharded, on any device.
    transient_bytes
        Approximate size of the product's columns that are computed at a time; each such part issues one reduce-scatter.
    """
    width = max(1, transient_bytes // (4 * partition.padded_rows))
    with full_fp32(), torch.no_grad(), torch.autocast(left.device.type, enabled=False):
        left = left.float()
        for start in range(0, partition.columns, width):
            columns = slice(start, min(start + width, partition.columns))
            product = left.new_zeros(partition.padded_rows, columns.stop - start)
            product[: partition.rows] = left.mT @ right[:, columns].float()
            into[:, columns] += group.sum_rows(product)[: len(into)].to(into.device)


def select_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """Select the inputs at `positions`, ``[batch, length]``, from ``[..., in]``: ``[t, in]``; all if layouts differ."""
    if positions is not None:
        if x.shape[:-1] == positions.shape:
            return x[positions]
        if x.shape[:-1] == (positions.numel(),):
            return x[positions.flatten()]
    return x.flatten(0, -2)
