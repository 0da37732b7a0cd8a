"""PiSSA to LoRA: convert a checkpoint's adapter into an ordinary LoRA for the original model.

The LoRA is exact (`lowrank_dist.adapters.lora`), or truncated to a lower rank (`lowrank_dist.linalg.truncate`). The
conversion runs on the CPU and needs no trainer and no process group.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_dist.adapters.files import changed_config, whole_tensor
from lowrank_dist.adapters.lora import ExactLora, LoraModule
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.linalg.truncate import EnergyKept, energy_kept, singular_values, truncate
from lowrank_dist.model.stacking import stacked_shapes
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.dtypes import DTYPES
from lowrank_dist.storage.layout import ADAPTER_DIR, INITIAL_DIR, MANIFEST, WEIGHTS
from lowrank_dist.storage.reader import FileTensor
from lowrank_dist.storage.writer import TensorFiles, write_json

# vLLM's --max-lora-rank, the size of its buffers, is one of these; an adapter's rank may be smaller, but must be the
# same for all modules
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert_checkpoint` wrote.

    Attributes
    ----------
    path
        The directory.
    rank
        Rank of the LoRA; the largest, where its modules differ.
    exact_rank
        Rank of the exact LoRA; the largest, where its modules differ.
    uniform
        Whether all modules have the same rank and scaling.
    energy
        Energy of the exact update that is kept; None if no rank was passed.
    spectra
        Singular values of every matrix of the exact update, scaling included, descending, fp64. Empty if they were not
        needed: the LoRA is exact, not rounded, and has a rank that servers accept.
    """

    path: Path
    rank: int
    exact_rank: int
    uniform: bool
    energy: EnergyKept | None
    spectra: dict[str, Tensor]

    @property
    def alternatives(self) -> dict[int, EnergyKept]:
        """The nearest ranks that servers accept, with the energy they keep; empty if they accept this one."""
        if not self.spectra or _served(self.rank, self.uniform):
            return {}
        below = [rank for rank in SERVED_RANKS if rank <= self.rank][-1:]
        above = [rank for rank in SERVED_RANKS if self.rank < rank <= self.exact_rank][:1]
        same = [] if self.uniform else [self.rank]
        return {rank: energy_kept(self.spectra, rank) for rank in sorted({*below, *same, *above})}


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Conversion:
    """Write the LoRA for the original model that is equivalent to a checkpoint's adapter.

    Factors are read, converted and written module by module. Host memory holds the factors of one module and their
    fp64 copies.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote.
    output
        Directory to write: a PEFT adapter plus the manifest. It is complete or absent.
    rank
        Truncate the update of every matrix optimally to this rank (`lowrank_dist.linalg.truncate.truncate`). All
        modules then have this rank and a scaling of 1: ``rank_pattern``, ``alpha_pattern`` and rsLoRA are folded into
        the factors, and the factors of modules with a smaller rank are padded with zeros. None: the exact LoRA, with
        the patterns of its configuration. Its rank is 2r, or r where the method starts at zero.
    dtype
        Dtype of the written factors; None: that of the checkpoint's factors. Modules that were trained whole keep
        their dtype. If this rounds ``[A; A_0]`` and ``[B | -B_0]``, the singular vectors of their product are written
        instead, at the same rank: rounding these makes an error in proportion to the update, and not to the much larger
        products whose difference the update is.
    progress
        Show a progress bar on standard error where singular values are computed.

    Raises
    ------
    InputError
        If `rank` is below 1 or above the rank of the exact LoRA, if `dtype` cannot hold the factors, or if `output` is
        the checkpoint itself, a directory that contains it, or one that the LoRA is made from.
    CheckpointError
        If `checkpoint` is not a checkpoint, is damaged, or holds NaN or infinity; or if `rank` is passed and the
        checkpoint does not record which scaling belongs to which of several ``target_parameters``.

    See Also
    --------
    refit_checkpoint : Fits a LoRA to the trained model, quantization included.
    merge_checkpoint : Adds the adapter to the weights of the original model.

    Examples
    --------
    >>> from lowrank_dist.export import convert_checkpoint
    >>> done = convert_checkpoint("runs/demo/checkpoints/step=40", "my-lora", rank=16)  # doctest: +SKIP
    >>> done.energy.overall  # the kept part of the update's energy  # doctest: +SKIP
    """
    checkpoint, output = Path(checkpoint), Path(output)
    lora = ExactLora(checkpoint)
    if rank is not None:
        _check_rank(rank, lora)
    source = checkpoint.resolve()
    if output.resolve() in (source, *source.parents, source / ADAPTER_DIR, source / INITIAL_DIR):
        raise InputError(
            f"{output}: the LoRA would replace what it is made from, {checkpoint}; choose another directory"
        )
    tensors = _layout(lora, rank, dtype)
    refactor = rank is not None or (lora.cancels and _rounds(lora, tensors))
    written, uniform = rank or lora.rank, rank is not None or lora.uniform
    measure = lora.scalings_known and not _served(written, uniform)
    spectra: dict[str, Tensor] = {}
    with atomic_directory(output) as staging:
        with closing(TensorFiles(staging, tensors, stem=Path(WEIGHTS).stem, max_bytes=sys.maxsize)) as files:
            files.create()
            for name in lora.whole:
                files.write(name, 0, whole_tensor(lora.trained, name).flatten())
            hide = not (progress and (refactor or measure))
            for module in tqdm(lora.modules, desc="Truncating", unit="module", disable=hide):
                factors = lora.factors(module)
                if refactor:
                    factors, values = _truncated(module, factors, rank)
                elif measure:
                    pairs = module.split(*factors)
                    values = [singular_values(a, b, scaling=module.scaling) for a, b in pairs]
                else:
                    values = []
                if lora.scalings_known:
                    spectra.update(zip(module.matrices, values, strict=False))
                for name, factor in zip((module.a, module.b), factors, strict=True):
                    files.write(name, 0, _rounded(name, factor, tensors[name].dtype).flatten())
        energy = None if rank is None else energy_kept(spectra, rank)
        config = lora.config
        if rank is not None:
            config = changed_config(
                config, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}
            )
        config.save_pretrained(str(staging))
        write_json(staging / MANIFEST, _manifest(lora, written, energy))
    return Conversion(
        path=output,
        rank=written,
        exact_rank=lora.rank,
        uniform=uniform,
        energy=energy,
        spectra=spectra,
    )


def _served(rank: int, uniform: bool) -> bool:
    return uniform and rank in SERVED_RANKS


def _check_rank(rank: int, lora: ExactLora) -> None:
    if not 1 <= rank <= lora.rank:
        raise InputError(
            f"rank={rank}: the exact LoRA has rank {lora.rank}; choose one from 1 to {lora.rank}, or leave it out for "
            "the exact LoRA"
        )
    if not lora.scalings_known:
        raise CheckpointError(
            f"rank={rank}: the checkpoint does not say which factors belong to which of the parameters "
            f"{', '.join(lora.config.target_parameters)}, and alpha_pattern gives them scalings of their own; leave "
            "the rank out"
        )


def _layout(lora: ExactLora, rank: int | None, dtype: torch.dtype | None) -> dict[str, FileTensor]:
    """Shapes and dtypes of the written tensors, in the order in which safetensors writes them."""
    tensors = {
        name: FileTensor(shape=lora.trained.info(name).shape, dtype=_stored_dtype(lora, name)) for name in lora.trained
    }
    for module in lora.modules:
        a, b, width = tensors[module.a], tensors[module.b], rank or module.rank
        of_one = {"lora_A": (width, a.shape[1]), "lora_B": (b.shape[0], width)}
        shapes = stacked_shapes(of_one, module.experts)
        tensors[module.a] = FileTensor(shape=shapes["lora_A"], dtype=dtype or a.dtype)
        tensors[module.b] = FileTensor(shape=shapes["lora_B"], dtype=dtype or b.dtype)
    return dict(sorted(tensors.items()))


def _rounds(lora: ExactLora, tensors: dict[str, FileTensor]) -> bool:
    """Whether a tensor is written in a dtype that does not hold its values as they are."""
    return any(
        torch.promote_types(_stored_dtype(lora, name), tensor.dtype) != tensor.dtype for name, tensor in tensors.items()
    )


def _stored_dtype(lora: ExactLora, name: str) -> torch.dtype:
    return DTYPES[lora.trained.info(name).dtype]


def _truncated(
    module: LoraModule, factors: tuple[Tensor, Tensor], rank: int | None
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Factors and spectra, fp64: of rank `rank` with the scaling in them; if None, of the module's rank without it."""
    inside, outside = (1.0, abs(module.scaling)) if rank is None else (module.scaling, 1.0)
    parts = [truncate(a, b, rank or module.rank, scaling=inside) for a, b in module.split(*factors)]
    return module.join([(part.a, part.b) for part in parts]), [part.singular_values * outside for part in parts]


def _rounded(name: str, factor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = factor.to(dtype)
    if not rounded.isfinite().all():
        raise InputError(
            f"{name}: holds {float(factor.abs().max()):.3g}, and {dtype} ends at {torch.finfo(dtype).max:.3g}; choose "
            "bfloat16 or float32"
        )
    return rounded


def _manifest(lora: ExactLora, rank: int, energy: EnergyKept | None) -> dict[str, Any]:
    """The checkpoint's manifest without the entries on its files, plus entries on the LoRA."""
    manifest = {key: value for key, value in lora.manifest.items() if key not in _OF_THE_FILES}
    manifest |= {"kind": "lora", "adapter_is_for": "the base", "rank": rank}
    if energy is not None:
        manifest["energy_kept"] = {
            "overall": energy.overall,
            "least": energy.least,
            "least_of": energy.least_of,
            "matrices": energy.matrices,
        }
    return manifest


_OF_THE_FILES = {"format", "files", "hashes", "seal", "trained", "world_size", "accumulate_grad_batches"}
