"""The nearest LoRA to an adapter of another type: the SVD of what its merge adds to every matrix.

With the merged weight M (`lowrank_dist.export.tuned`) and the original W, the LoRA of rank K is the best approximation
of that rank to ``M - W`` (Eckart-Young). The update must be one of linear layers. What the adapter file holds of the
model itself (modules trained whole, norms, biases) goes along.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_dist.adapters.files import whole_tensor
from lowrank_dist.adapters.source import AdapterSource, find_adapter
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.export.merge_plan import find_base, plan_merge
from lowrank_dist.export.tuned import TunedModel
from lowrank_dist.linalg import full_fp32, randomized_svd, seed_from_name, squared_norm
from lowrank_dist.linalg.truncate import EnergyKept
from lowrank_dist.model.names import PEFT_PREFIX
from lowrank_dist.model.plan import PlannedTensor
from lowrank_dist.progress import progress_bar
from lowrank_dist.storage.dtypes import DTYPES, FLOAT_DTYPES
from lowrank_dist.storage.layout import WEIGHTS
from lowrank_dist.storage.reader import FileTensor
from lowrank_dist.storage.writer import TensorFiles
from lowrank_dist.tuners.support import said

TOLERANCE = 1e-4  # of the SVD; the energy is measured, whatever it is


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """What `write_nearest` wrote.

    Attributes
    ----------
    exact_rank
        Rank that holds every update: the largest ``min(out, in)``.
    energy
        Share of the update that the LoRA keeps, before rounding to its dtype.
    """

    exact_rank: int
    energy: EnergyKept


def write_nearest(
    checkpoint: Path,
    staging: Path,
    *,
    rank: int,
    dtype: torch.dtype | None,
    pretrained: str | os.PathLike[str] | None,
    revision: str | None,
    show_progress: bool,
) -> Nearest:
    """Write the LoRA of rank `rank` that is nearest to the update of a checkpoint, as PEFT's files.

    Host memory holds what `lowrank_dist.export.tuned.TunedModel` holds, and a few fp32 copies of one matrix.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote.
    staging
        Directory to write to.
    rank
        Rank of all modules, whose scaling is 1. The factors of a matrix whose short side is smaller are padded with
        zeros.
    dtype
        Dtype of the factors. Default: that of the checkpoint's adapter.
    pretrained, revision
        The original model. Default: the recorded one.
    show_progress
        Show a progress bar.

    Raises
    ------
    CheckpointError
        If files are missing or damaged, or if the base is not the model that training started from.
    InputError
        If `rank` is below 1 or above every ``min(out, in)``, or if `dtype` cannot hold the factors.
    ModelError
        If PEFT cannot merge the adapter, or if it changes more than linear layers and whole modules.
    """
    with ExitStack() as stack:
        adapter = stack.enter_context(closing(find_adapter(checkpoint, any_type=True, converted_dora=True)))
        plan = plan_merge(adapter, find_base(adapter, pretrained, revision, option="pretrained"))
        stack.enter_context(closing(plan.reader))
        tuned = plan.tuned
        assert tuned is not None
        layers = _linear_layers(adapter, tuned)
        shapes = {name: tuned.shape(f"{name}.weight") for name in layers}
        exact = max(min(shape) for shape in shapes.values())
        if not 1 <= rank <= exact:
            raise InputError(
                f"rank={rank}: the updates of {checkpoint} have at most rank {exact}; choose one from 1 to {exact}"
            )
        stored = (adapter.trained.info(key).dtype for key in adapter.trained)
        dtype = dtype or next((DTYPES[code] for code in stored if code in FLOAT_DTYPES), torch.float32)
        tensors: dict[str, FileTensor] = {}
        for name, (rows, columns) in shapes.items():
            outputs, inputs = (columns, rows) if tuned.modules[name] is Conv1D else (rows, columns)
            a, b = _keys(name)
            tensors[a] = FileTensor(shape=(rank, inputs), dtype=dtype)
            tensors[b] = FileTensor(shape=(outputs, rank), dtype=dtype)
        for key in tuned.along.values():
            info = adapter.trained.info(key)
            tensors[key] = FileTensor(shape=info.shape, dtype=DTYPES[info.dtype])
        files = stack.enter_context(
            closing(TensorFiles(staging, dict(sorted(tensors.items())), stem=Path(WEIGHTS).stem, max_bytes=sys.maxsize))
        )
        files.create()
        for key in tuned.along.values():
            files.write(key, 0, whole_tensor(adapter.trained, key).flatten())
        squares: dict[str, tuple[float, float]] = {}
        total = sum(4 * rows * columns for rows, columns in shapes.values())
        bar = stack.enter_context(progress_bar(total, show=show_progress, doing="Fitting"))
        for tensor, merged in tuned.merged():
            name, _, leaf = tensor.names[0].rpartition(".")
            if _is_along(tuned, tensor):
                continue
            if leaf != "weight":
                if merged is not None and not torch.equal(merged, tuned.original(tensor)):
                    raise _not_linear(adapter, tensor)
                continue
            update = torch.zeros(shapes[name]) if merged is None else merged - tuned.original(tensor)
            del merged
            left, right, squares[name] = _factors(update, rank, tensor.names[0])
            factors = (left.mT, right.mT) if tuned.modules[name] is Conv1D else (right, left)
            for key, factor in zip(_keys(name), factors, strict=True):
                files.write(key, 0, _rounded(key, factor, dtype).flatten())
            bar.update(update.nbytes)
        _config(adapter, tuned, layers, rank).save_pretrained(str(staging))
    return Nearest(exact_rank=exact, energy=_energy(squares))


def _keys(layer: str) -> tuple[str, str]:
    return f"{PEFT_PREFIX}{layer}.lora_A.weight", f"{PEFT_PREFIX}{layer}.lora_B.weight"


def _linear_layers(adapter: AdapterSource, tuned: TunedModel) -> list[str]:
    """Names of the adapted layers, all of them linear.

    Raises
    ------
    ModelError
        If others are changed.
    """
    layers = []
    for tensor in tuned.changed:
        name, _, leaf = tensor.names[0].rpartition(".")
        if _is_along(tuned, tensor):
            continue
        if not issubclass(tuned.modules[name], nn.Linear | Conv1D):
            raise _not_linear(adapter, tensor)
        if leaf == "weight":
            layers.append(name)
    if not layers:
        raise ModelError(
            f"{adapter.directory}: an adapter of {said(adapter.config)} that updates no linear layer; merge it "
            "(lowrank-dist merge)"
        )
    return layers


def _is_along(tuned: TunedModel, tensor: PlannedTensor) -> bool:
    """Whether a parameter was trained itself, or with its whole module, so that it goes along."""
    return tensor in tuned.in_place or tensor.names[0].startswith(tuned.whole)


def _not_linear(adapter: AdapterSource, tensor: PlannedTensor) -> ModelError:
    return ModelError(
        f"{adapter.directory}: an adapter of {said(adapter.config)} that changes {tensor.names[0]}, but the "
        "factors of a LoRA update weights of linear layers only; merge it (lowrank-dist merge)"
    )


def _factors(update: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """``[rows, rank]`` and ``[rank, columns]``, and the energies of the update and of what they leave out."""
    rows, columns = update.shape
    left, right = update.new_zeros(rows, rank), update.new_zeros(rank, columns)
    energy = float(squared_norm(update))
    if energy == 0:
        return left, right, (0.0, 0.0)
    k = min(rank, rows, columns)
    svd = randomized_svd(
        update, k, rows=rows, group=ShardGroup.single(), seed=seed_from_name(name, 1), tolerance=TOLERANCE
    )
    root = svd.s.sqrt()
    left[:, :k], right[:k] = svd.u * root, root[:, None] * svd.vh
    with full_fp32():
        return left, right, (energy, float(squared_norm(update.addmm_(left, right, alpha=-1))))


def _energy(squares: dict[str, tuple[float, float]]) -> EnergyKept:
    def kept(total: float, lost: float) -> float:
        return max(0.0, 1 - lost / total) if total else 1.0

    return EnergyKept(
        overall=kept(sum(total for total, _ in squares.values()), sum(lost for _, lost in squares.values())),
        matrices={name: kept(*pair) for name, pair in squares.items()},
    )


def _rounded(key: str, factor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = factor.to(dtype)
    if not rounded.isfinite().all():
        raise InputError(
            f"{key}: holds {float(factor.abs().max()):.3g}, but the largest {dtype} is {torch.finfo(dtype).max:.3g}; "
            "choose bfloat16 or float32"
        )
    return rounded


def _config(adapter: AdapterSource, tuned: TunedModel, layers: list[str], rank: int) -> LoraConfig:
    last = {name.rpartition(".")[2] for name in layers}
    named_so = {name for name in tuned.modules if name.rpartition(".")[2] in last}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(last if named_so == set(layers) else layers),
        modules_to_save=getattr(adapter.config, "modules_to_save", None) if tuned.whole else None,
        fan_in_fan_out=any(tuned.modules[name] is Conv1D for name in layers),
        task_type=adapter.config.task_type,
        base_model_name_or_path=None if adapter.original is None else adapter.original.name,
        revision=None if adapter.original is None else adapter.original.revision,
        inference_mode=True,
    )
