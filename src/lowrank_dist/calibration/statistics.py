"""Statistics of adapted layers: formed in fp32 on every rank, brought to the owners of their rows layer by layer."""

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
from lowrank_dist.zero3.layerwise import Unit

TRANSIENT_BYTES = 2**28  # of a product before its rows go to their owners


class Statistics:
    """This rank's rows of the statistics by matrix; lets go of each when the last matrix that wants it has asked.

    Parameters
    ----------
    values
        fp32 tensors by name.
    source
        Which of them each layer has.
    device
        Where they are wanted.
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
    """An adapted weight and the layer that holds it, frozen."""

    planned: PlannedMatrix
    frozen: FrozenLinear

    @property
    def name(self) -> str:
        return self.planned.layer


def adapted_layers(backbone: nn.Module, matrices: Sequence[PlannedMatrix]) -> list[AdaptedLayer]:
    """The frozen layers of `matrices`; ModelError where one is not linear."""
    found = []
    for planned in matrices:
        frozen = getattr(backbone.get_submodule(planned.layer), "base_layer", None)
        if not isinstance(frozen, FrozenLinear):
            raise ModelError(
                f"{planned.layer} is a {type(frozen).__name__}: calibration measures linear layers only; drop it from "
                "target_modules or choose a method that looks at no data"
            )
        found.append(AdaptedLayer(planned, frozen))
    return found


class Measured(ABC):
    """What hooks on the adapted layers collect; subclasses say what."""

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
        """Called before the forward of a unit, never in backward."""
        self.reached.clear()  # a recomputation reaches layers too

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the forwards of the adapted layers are observed."""
        with ExitStack() as stack:
            for layer in self.layers:

                def hook(_: nn.Module, args: Any, y: Tensor, layer: AdaptedLayer = layer) -> Tensor | None:
                    return self.observe(layer, args[0], y)

                stack.callback(layer.frozen.register_forward_hook(hook).remove)
            yield

    @abstractmethod
    def observe(self, layer: AdaptedLayer, x: Tensor, y: Tensor) -> Tensor | None:
        """Forward hook of a frozen layer; what it returns takes the place of `y`."""

    def unit_ends(self, unit: Unit) -> None:
        """Called on all ranks when the forward of a unit is done, never in backward."""
        members = {id(member) for member in unit.members}
        layers = [layer for layer in self.layers if id(layer.frozen) in members]
        if layers:
            self.unit_measured(layers)

    def unit_measured(self, layers: list[AdaptedLayer]) -> None:
        """Called on all ranks when the forward of a unit that holds `layers` is done."""
        with self.group.shared_errors():
            for layer in layers:
                if layer.name not in self.reached:
                    raise ModelError(
                        f"{layer.name} got no input from a calibration batch; drop it from target_modules, or choose a "
                        "method that looks at no data"
                    )

    @abstractmethod
    def finish(self, batches: int) -> Statistics:
        """The statistics, once all `batches` have run. Collective."""

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
                        f"Calibration: the statistic of {name} holds a NaN or infinity; calibrate on other data, or in "
                        "precision 32-true"
                    )


class Covariances(Measured):
    """``X^T X / tokens`` of the inputs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.inputs: dict[str, list[Tensor]] = {}  # of the decoder layer at work
        self.tokens: dict[str, int] = {}

    def observe(self, layer: AdaptedLayer, x: Tensor, y: Tensor) -> None:
        self.reached.add(layer.name)
        self.inputs.setdefault(layer.name, []).append(x)

    def unit_measured(self, layers: list[AdaptedLayer]) -> None:
        super().unit_measured(layers)
        for layer in layers:
            source = self.source.setdefault(layer.name, self._same_input(layer, layers))
            if source != layer.name:
                self._still_shared(layer.name, source)
                continue
            inputs = layer.frozen.in_features
            partition = RowPartition(rows=inputs, columns=inputs, world_size=self.group.size)
            for x in self.inputs[layer.name]:
                counted = select_positions(x, self.positions)
                self.tokens[layer.name] = self.tokens.get(layer.name, 0) + len(counted)
                self.add(layer.name, counted, counted, partition)
        self.inputs.clear()

    def _same_input(self, layer: AdaptedLayer, layers: list[AdaptedLayer]) -> str:
        """The first of `layers` that got the very tensors that `layer` got."""
        return next(other.name for other in layers if self._identical(other.name, layer.name))

    def _identical(self, one: str, other: str) -> bool:
        a, b = self.inputs[one], self.inputs[other]
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))

    def _still_shared(self, name: str, source: str) -> None:
        if not self._identical(name, source):
            raise ModelError(f"{name} and {source} have the same input in one calibration batch and not in another")

    def finish(self, batches: int) -> Statistics:
        tokens = torch.tensor([self.tokens[name] for name in self.values], dtype=torch.float64, device=self.device)
        for (name, value), count in zip(self.values.items(), self.group.sum(tokens).tolist(), strict=True):
            if count == 0:
                raise InputError(
                    f"Calibration: none of the positions that {name} saw counts; take other data or positions='all'"
                )
            value /= count
        self.check_finite()
        return Statistics(self.values, self.source, self.device)


class Gradients(Measured):
    """``dL/dW``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Nothing is trained, yet the graph must begin somewhere.
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
    """The identity on a layer's output, whose backward shows the layer's input and the gradient of its output.

    The input is saved for backward, not held: under checkpointing it is recomputed.
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
    """``into += `` this rank's rows of ``sum over ranks of left^T right``, in true fp32.

    Parameters
    ----------
    left, right
        ``[t, m]`` and ``[t, n]`` of any floating type; every rank's own, t differs.
    partition
        Of the ``m x n`` product.
    group
        The ranks.
    into
        ``[m_p, n]`` fp32, row-sharded; on any device.
    transient_bytes
        The product is formed some columns at a time, in about so many bytes: one reduce-scatter each.
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
    """Inputs ``[..., in]`` that count, ``[t, in]``; all where they are not laid out as `positions`, [batch, length]."""
    if positions is not None:
        if x.shape[:-1] == positions.shape:
            return x[positions]
        if x.shape[:-1] == (positions.numel(),):
            return x[positions.flatten()]
    return x.flatten(0, -2)
