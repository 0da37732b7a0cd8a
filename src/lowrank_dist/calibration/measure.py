"""Calibration: what a method wants to know of the data before it decomposes, measured on a model no rank can hold.

Memory of the statistics, fp32, over all ranks (each holds 1/P): ``4 in^2`` bytes for every distinct input of an adapted
layer (q, k, v see the same one, gate and up too), or ``4 in out`` for every gradient. LLaMA-3-70B, all linear layers:
80 x (3 x 8192^2 + 28672^2) x 4 bytes = 328 GB of covariances, or 68.5e9 x 4 bytes = 274 GB of gradients, beside the 137
GB of its bf16 weights; on 32 GPUs 10.2 or 8.6 GB each. They go, matrix by matrix, as the weights are decomposed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_dist.calibration.statistics import Covariances, Gradients, Measured, Statistics, adapted_layers
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.methods import Method
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.quantization.format import ResidualFormat
from lowrank_dist.zero3.layerwise import inert, layer_by_layer

_log = logging.getLogger(__name__)

Step = Callable[[Any, Any], Any]  # (backbone, batch) -> loss
Positions = Literal["attended", "labelled", "all"]

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a calibration pass is run. Every rank runs its own batches; the statistic is over those of all ranks.

    Parameters
    ----------
    batches
        Batches of every rank; fewer, on all ranks, where one has fewer.
    data
        The batches: an iterable that gives every rank its own part, on any device. None: what the Trainer would train
        on first.
    step
        ``step(backbone, batch) -> loss``, run once per batch by every rank; for a covariance it may return nothing.
        None: ``module.calibration_step(batch)`` where the LightningModule has one, else ``backbone(**batch).loss``,
        which wants batches that are dicts, with labels where a gradient is measured.
    positions : {"attended", "labelled", "all"}
        Which positions of the sequences count in a covariance. attended: those that the batch's ``attention_mask``
        holds, all where it has none. labelled: of these, those whose label is not -100. all: padding too. PEFT's EVA is
        "labelled"; its CorDA is "all", on examples without padding. Layers whose inputs are not laid out as the mask
        is (``[batch, length, in]`` or ``[batch * length, in]``) count all that they get.
    offload
        Keep the statistics in host memory.
    """

    batches: int = 8
    data: Iterable[Any] | None = None
    step: Step | None = None
    positions: Positions = "attended"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise InputError(f"Calibration: batches={self.batches} must be at least 1")
        if self.positions not in get_args(Positions):
            raise InputError(f"Calibration: positions={self.positions!r} is none of {', '.join(get_args(Positions))}")


def check_options(init: Method | None, calibration: Calibration | None, **others: object) -> None:
    """Raise InputError where a method and a `calibration` do not fit, or a set option of `others` with calibration.

    `others` may be ``ranks_per_matrix`` (a statistic is cut over all ranks).
    """
    looks = init is not None and init.statistic is not None
    if calibration is not None and not looks:
        raise InputError(
            f"calibration={calibration} has no effect: {init or 'the default initialisation'} looks at no data; leave "
            "it out, or choose CorDA(), EVA() or LoRAGA()"
        )
    for option, value in others.items():
        if looks and value is not None:
            raise InputError(f"{option}={value!r} cannot be used with {init}, which looks at data; leave it out")


def calibrate(
    backbone: PreTrainedModel,
    matrices: Sequence[PlannedMatrix],
    batches: Iterable[Any],
    *,
    statistic: Literal["covariance", "gradient"],
    group: ShardGroup,
    residual: ResidualFormat,
    calibration: Calibration | None = None,
    step: Step | None = None,
    device: torch.device | None = None,
) -> Statistics:
    """Run batches through a sharded `backbone` and measure `statistic` of its adapted layers. Collective.

    The layers' residuals must stand for the weights themselves. Adapters are switched off, the model is in evaluation
    mode (no dropout), nothing is cached, and all that is put back at the end; no parameter gets a gradient.

    covariance: ``C = X^T X / tokens`` over the positions that count in the batches of all ranks (CorDA,
    arXiv:2406.05223, section 3). Each rank forms its ``X^T X`` in fp32, some columns at a time
    (`lowrank_dist.calibration.statistics.TRANSIENT_BYTES`), and a reduce-scatter brings the rows to their owners, layer
    by layer. Layers that get the same tensor share one covariance.

    gradient: ``G = dL/dW``, L the mean over batches and ranks of the loss, as the weights are stored. When the backward
    comes to a layer, each rank forms ``dY^T X`` (``X^T dY`` where rows are inputs) and a reduce-scatter brings the rows
    to their owners: at no time is there a whole gradient of more than one layer, as in LoRA-GA (arXiv:2407.05000,
    algorithm 1), and none is kept whole.

    Parameters
    ----------
    backbone
        From `materialize`, its parameters partitioned over `group`.
    matrices
        The adapted weights, ``plan.matrices``.
    batches
        Of this rank, on the device of the model.
    statistic : {"covariance", "gradient"}
        What to measure.
    group
        The ranks.
    residual
        Format that the weights will be decomposed for: gradients are cut as their rows will be (`row_partition`).
    calibration
        Options; ``data`` is not looked at.
    step
        Stands in for ``calibration.step``.
    device
        Where the statistics are computed, and kept unless ``calibration.offload``.

    Returns
    -------
    Statistics
        Gives this rank's rows: ``[in_p, in]`` (`RowPartition` of in x in, block 1) or as the matrix's own, fp32.

    Raises
    ------
    ModelError
        On every rank: for adapted layers that are not linear, or that a batch passes by.
    InputError
        On every rank: without a batch, for batches without labels, for statistics with a NaN or infinity.

    Notes
    -----
    One all-reduce of a flag per batch and per decoder layer, beside those above and the all-gathers of the weights:
    an error on one rank is raised on all. Not so an error inside a layer.
    """
    calibration, device = calibration or Calibration(), device or torch.device("cpu")
    home = torch.device("cpu") if calibration.offload else device
    layers = adapted_layers(backbone, matrices)
    kind: type[Measured] = Covariances if statistic == "covariance" else Gradients
    measured = kind(layers, group, residual, device=device, home=home)
    step = step or calibration.step or model_loss
    count = 0
    with ExitStack() as stack:
        stack.enter_context(inert(backbone))
        stack.enter_context(layer_by_layer(backbone, before=measured.unit_starts, after=measured.unit_ends))
        stack.enter_context(measured.watching())
        stack.enter_context(torch.set_grad_enabled(statistic == "gradient"))
        for batch in _agreed(batches, calibration.batches, group):
            measured.positions = _positions(batch, calibration.positions)
            loss = step(backbone, batch)
            if statistic == "gradient":
                with group.shared_errors():
                    _check_loss(loss)
                loss.backward()
            del loss
            count += 1
    if count == 0:
        raise InputError(
            "Calibration: there is no batch on at least one rank; give the training set at least one batch per rank, "
            "or Calibration(data=...)"
        )
    if count < calibration.batches:
        _log.warning("Calibration: %d of batches=%d; a rank has no more", count, calibration.batches)
    return measured.finish(count)


def draw(batches: Iterable[Any], most: int, group: ShardGroup) -> tuple[list[Any], str]:
    """The first `most` batches of this rank, no more than every rank has, and a digest of those of all. Collective.

    Raises
    ------
    InputError
        On every rank, for batches that hold anything but tensors, numbers and text.
    """
    drawn = list(_agreed(batches, most, group))
    with group.shared_errors():
        digest = hashlib.sha256()
        _add_to(digest, drawn)
    everyone = group.gather_objects(digest.hexdigest())
    return drawn, hashlib.sha256(" ".join(everyone).encode()).hexdigest()


def _add_to(digest: hashlib._Hash, value: Any) -> None:
    """Add what a batch holds, and how, to `digest`."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"mapping of {len(value)}".encode())
        for key in sorted(value, key=str):
            _add_to(digest, key)
            _add_to(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"sequence of {len(value)}".encode())
        for entry in value:
            _add_to(digest, entry)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        digest.update(repr(value).encode() + b";")
    else:
        raise InputError(
            f"Calibration: a batch holds a {type(value).__name__}, of which no digest can be taken to tell whether a "
            "residual model was made with the same data; give tensors, numbers and text, or leave out init_cache"
        )


def step_name(step: Callable[..., Any] | None) -> str:
    """What is run for a batch, for a fingerprint: the name of a function, or what an object says of itself."""
    if step is None:
        return step_name(model_loss)
    return f"{step.__module__}.{step.__qualname__}" if hasattr(step, "__qualname__") else str(step)


def model_loss(backbone: Any, batch: Any) -> Any:
    """``backbone(**batch).loss``, or None where there is none.

    Raises
    ------
    InputError
        If `batch` is not a dict.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"Calibration: a batch is a {type(batch).__name__}, and only dicts can be given to the model as they are; "
            "pass Calibration(step=lambda model, batch: ...)"
        )
    return getattr(backbone(**batch), "loss", None)


def _check_loss(loss: Any) -> None:
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        raise InputError(
            f"Calibration: a batch gave {'None' if loss is None else type(loss).__name__}, no loss that depends on the "
            "adapted layers; add labels to the batches, or pass Calibration(step=lambda model, batch: ...)"
        )
    if not bool(torch.isfinite(loss).all()):
        raise InputError(
            f"Calibration: the loss of a batch is {loss.tolist()}; does every batch have a label to learn?"
        )


def _positions(batch: Any, rule: Positions) -> Tensor | None:
    """Positions of `batch` that count, [batch, length] bool; None for all."""
    if rule == "all" or not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    counted = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    labels = batch.get("labels")
    if rule == "labelled" and isinstance(labels, Tensor) and labels.ndim == 2:
        labelled = labels != IGNORED_LABEL
        counted = labelled if counted is None else counted & labelled
    return counted


def _agreed(batches: Iterable[Any], most: int, group: ShardGroup) -> Iterator[Any]:
    """At most `most` batches, and no more than every rank has."""
    iterator = iter(batches)
    for _ in range(most):
        with group.shared_errors():
            batch = next(iterator, _END)
        if int(group.max(torch.tensor([batch is _END], dtype=torch.int32, device=group.device))):
            return
        yield batch


_END = object()
