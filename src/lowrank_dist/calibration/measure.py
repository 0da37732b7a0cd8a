"""Calibration: the statistics that a method needs before it decomposes, measured on a model too large for one rank.

The statistics take, in fp32 over all ranks (each holds 1/P), ``4 in^2`` bytes for every distinct input of an adapted
layer (q, k and v share one input, as do gate and up), or ``4 in out`` bytes for every gradient. For all linear layers
of LLaMA-3-70B, covariances take 80 x (3 x 8192^2 + 28672^2) x 4 bytes = 328 GB, gradients 68.5e9 x 4 bytes = 274 GB, in
addition to 137 GB of bf16 weights; on 32 GPUs 10.2 or 8.6 GB each. They are freed matrix by matrix as the weights are
decomposed.
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
    """Options of a calibration pass. Every rank runs its own batches; the statistic covers those of all ranks.

    Parameters
    ----------
    batches
        Number of batches per rank. If a rank has fewer, all ranks run that many.
    data
        The batches: an iterable that gives every rank its own part, on any device. Default: the batches that the
        Trainer would train on first.
    step
        ``step(backbone, batch) -> loss``, run once per batch by every rank; it may return nothing for a covariance.
        Default: ``module.calibration_step(batch)`` if the LightningModule has one, else ``backbone(**batch).loss``,
        which requires batches that are dicts, with labels if a gradient is measured.
    positions : {"attended", "labelled", "all"}
        Positions of the sequences that count in a covariance. "attended": those that the batch's ``attention_mask``
        marks, or all without a mask. "labelled": the attended positions whose label is not -100. "all": padding too.
        PEFT's EVA uses "labelled"; its CorDA uses "all", on examples without padding. Layers whose inputs are laid out
        differently from the mask (neither ``[batch, length, in]`` nor ``[batch * length, in]``) count all positions.
    offload
        Keep the statistics in host memory.

    Raises
    ------
    InputError
        If `batches` is below 1 or `positions` is unknown.

    See Also
    --------
    lowrank_dist.CorDA : Initialisation from the covariance of a layer's inputs.
    lowrank_dist.EVA : Initialisation from the covariance of a layer's inputs.
    lowrank_dist.QERA : Quantization error that the covariance of a layer's inputs weighs.
    lowrank_dist.LoRAGA : Initialisation from the gradient of the weight.

    Examples
    --------
    >>> from lowrank_dist import Calibration
    >>> Calibration(batches=16, positions="labelled")
    Calibration(batches=16, data=None, step=None, positions='labelled', offload=False)

    A loss of one's own, for batches that the model does not take as keyword arguments:

    >>> calibration = Calibration(step=lambda model, batch: model(input_ids=batch[0], labels=batch[1]).loss)
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
            raise InputError(
                f"Calibration: positions={self.positions!r} is not one of {', '.join(get_args(Positions))}"
            )


def check_options(init: Method | None, calibration: Calibration | None, **others: object) -> None:
    """Raise InputError if `calibration` does not apply to the method, or if an option of `others` excludes calibration.

    `others` may contain ``ranks_per_matrix``, because a statistic is sharded over all ranks.
    """
    looks = init is not None and init.statistic is not None
    if calibration is not None and not looks:
        raise InputError(
            f"calibration={calibration} has no effect: {init or 'the default initialisation'} does not look at data; "
            "leave it out, or choose CorDA(), EVA(), LoRAGA(), LoRAOne() or QERA()"
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

    The layers' residuals must be the weights themselves. During the pass, adapters are disabled, the model is in
    evaluation mode (no dropout) and nothing is cached; all of this is restored at the end. No parameter gets a
    gradient.

    covariance: ``C = X^T X / tokens`` over the positions that count in the batches of all ranks (CorDA,
    arXiv:2406.05223, section 3). Each rank computes its ``X^T X`` in fp32, some columns at a time
    (`lowrank_dist.calibration.statistics.TRANSIENT_BYTES`), and a reduce-scatter sends the rows to their owners, layer
    by layer. Layers with the same input tensor share one covariance.

    gradient: ``G = dL/dW`` in the layout of the stored weights, where L is the mean loss over batches and ranks. When
    the backward reaches a layer, each rank computes ``dY^T X`` (``X^T dY`` where rows are inputs) and a reduce-scatter
    sends the rows to their owners. As in LoRA-GA (arXiv:2407.05000, algorithm 1), the whole gradient of at most one
    layer exists at a time; none is kept whole.

    Parameters
    ----------
    backbone
        Model from `materialize`, its parameters partitioned over `group`.
    matrices
        The adapted weights, ``plan.matrices``.
    batches
        Batches of this rank, on the device of the model.
    statistic : {"covariance", "gradient"}
        What to measure.
    group
        The ranks.
    residual
        Format that the weights will be decomposed for; gradients are sharded like their rows (`row_partition`).
    calibration
        Options; ``data`` is ignored.
    step
        Overrides ``calibration.step``.
    device
        Where the statistics are computed, and kept unless ``calibration.offload``.

    Returns
    -------
    Statistics
        This rank's rows, fp32: ``[in_p, in]`` of a covariance (`RowPartition` of in x in, block 1), or the matrix's own
        rows of a gradient.

    Raises
    ------
    ModelError
        On every rank, for adapted layers that are not linear or that a batch does not reach.
    InputError
        On every rank, without a batch, for batches without labels, and for statistics with a NaN or infinity.

    Notes
    -----
    One all-reduce of a flag per batch and per decoder layer, in addition to the reduce-scatters above and the
    all-gathers of the weights. It raises the error of one rank on all ranks, except an error inside a layer.
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
        for batch in _equally_many(batches, calibration.batches, group):
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
            "or pass Calibration(data=...)"
        )
    if count < calibration.batches:
        _log.warning("Calibration: ran %d of batches=%d; a rank has no more", count, calibration.batches)
    return measured.finish(count)


def draw(batches: Iterable[Any], most: int, group: ShardGroup) -> tuple[list[Any], str]:
    """Take up to `most` batches of this rank and compute a digest of the batches of all ranks. Collective.

    All ranks take equally many batches. One object all-gather, besides an all-reduce of a flag for every batch.

    Raises
    ------
    InputError
        On every rank, for batches with anything but tensors, numbers and text.
    """
    drawn = list(_equally_many(batches, most, group))
    with group.shared_errors():
        digest = hashlib.sha256()
        _add_to(digest, drawn)
    everyone = group.gather_objects(digest.hexdigest())
    return drawn, hashlib.sha256(" ".join(everyone).encode()).hexdigest()


def _add_to(digest: hashlib._Hash, value: Any) -> None:
    """Add the content and the structure of a batch to `digest`."""
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
            f"Calibration: a batch contains a {type(value).__name__}, which cannot be hashed to check whether a "
            "residual model was made with the same data; use tensors, numbers and text, or leave out init_cache"
        )


def step_name(step: Callable[..., Any] | None) -> str:
    """Name the step for a fingerprint: the qualified name of a function, or the text form of another object."""
    if step is None:
        return step_name(model_loss)
    return f"{step.__module__}.{step.__qualname__}" if hasattr(step, "__qualname__") else str(step)


def model_loss(backbone: Any, batch: Any) -> Any:
    """Compute ``backbone(**batch).loss``; None if the output has no loss.

    Raises
    ------
    InputError
        If `batch` is not a dict.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"Calibration: a batch is a {type(batch).__name__}, but only dicts can be passed to the model as keyword "
            "arguments; pass Calibration(step=lambda model, batch: ...)"
        )
    return getattr(backbone(**batch), "loss", None)


def _check_loss(loss: Any) -> None:
    if not (isinstance(loss, Tensor) and loss.requires_grad):
        raise InputError(
            f"Calibration: the step returned {'None' if loss is None else type(loss).__name__}, not a loss that "
            "depends on the adapted layers; add labels to the batches, or pass Calibration(step=lambda model, batch: "
            "...)"
        )
    if not bool(torch.isfinite(loss).all()):
        raise InputError(
            f"Calibration: the loss of a batch is {loss.tolist()}; check that every batch has a label other than "
            f"{IGNORED_LABEL}"
        )


def _positions(batch: Any, rule: Positions) -> Tensor | None:
    """Positions of `batch` that count, ``[batch, length]`` bool; None if all count."""
    if rule == "all" or not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    counted = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    labels = batch.get("labels")
    if rule == "labelled" and isinstance(labels, Tensor) and labels.ndim == 2:
        labelled = labels != IGNORED_LABEL
        counted = labelled if counted is None else counted & labelled
    return counted


def _equally_many(batches: Iterable[Any], most: int, group: ShardGroup) -> Iterator[Any]:
    """At most `most` batches, and no more than the rank with the fewest has."""
    iterator = iter(batches)
    for _ in range(most):
        with group.shared_errors():
            batch = next(iterator, _END)
        if int(group.max(torch.tensor([batch is _END], dtype=torch.int32, device=group.device))):
            return
        yield batch


_END = object()
