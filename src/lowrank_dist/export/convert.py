"""PiSSA to LoRA: converts a checkpoint's adapter to an ordinary LoRA for the original model.

The LoRA is exact (`lowrank_dist.adapters.lora`), or truncated to a lower rank (`lowrank_dist.linalg.truncate`).
Adapters of other types (DoRA, VeRA, ...) have a nearest LoRA of a given rank (`lowrank_dist.export.nearest`).
The conversion runs on the CPU and needs neither a trainer nor a process group.
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

from lowrank_dist.adapters.files import changed_config, read_config, whole_tensor
from lowrank_dist.adapters.lora import ExactLora, LoraModule
from lowrank_dist.adapters.source import refuse_copies
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.export.serving import SERVED_RANKS
from lowrank_dist.linalg.truncate import EnergyKept, energy_kept, singular_values, truncate
from lowrank_dist.model.stacking import stacked_shapes
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.dtypes import DTYPES
from lowrank_dist.storage.layout import ADAPTER_DIR, LORA_DIR, MANIFEST, WEIGHTS, parts_of, read_manifest, sealed
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.parse import Record
from lowrank_dist.storage.reader import FileTensor
from lowrank_dist.storage.replacing import check_parent, check_target
from lowrank_dist.storage.verify import hashes_of_root, verify_checkpoint
from lowrank_dist.storage.writer import TensorFiles, write_json


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Result of `convert_checkpoint`.

    Attributes
    ----------
    path
        The directory that was written.
    rank
        Rank of the LoRA; the largest if its modules differ.
    exact_rank
        Rank of the exact LoRA; the largest if its modules differ. For adapters of other types: the largest that an
        update may have.
    uniform
        Whether all modules have the same rank and scaling.
    energy
        Share of the exact update that truncation kept; None if no rank was given.
    spectra
        Singular values of every matrix of the exact update, scaling included, descending, fp64. Empty if they were not
        needed: the LoRA is exact, not rounded, and of a rank that servers accept. Empty for a DoRA, too.
    is_dora
        Whether it is a DoRA: the exact conversion of a DoRA is one of the same magnitudes.
    """

    path: Path
    rank: int
    exact_rank: int
    uniform: bool
    energy: EnergyKept | None
    spectra: dict[str, Tensor]
    is_dora: bool = False

    @property
    def alternatives(self) -> dict[int, EnergyKept]:
        """Energy that truncation to the nearest ranks accepted by servers keeps, by rank.

        Empty if servers accept the LoRA as it is. If its modules differ, its own rank is among them.
        """
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
    pretrained: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a checkpoint's adapter to a LoRA for the original model, and write it.

    Factors are read, converted and written module by module: host memory holds the factors of one module and their
    fp64 copies.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote.
    output
        Directory to write: a PEFT adapter plus the manifest. It is written completely or not at all.
    rank
        Truncate the update of every matrix to this rank, with the least possible error
        (`lowrank_dist.linalg.truncate.truncate`). All modules then have this rank and a scaling of 1: ``rank_pattern``,
        ``alpha_pattern`` and rsLoRA are folded into the factors, and the factors of modules with a smaller rank are
        padded with zeros. None: the exact LoRA of rank 2r, or r if the method starts at zero, with the patterns of its
        configuration. Adapters of other types need it: their update is the difference between the merged and the
        original weights, of linear layers, and its approximation is that of `lowrank_dist.export.nearest`. It is what a
        rank gives of a DoRA, too, whose exact conversion is a DoRA.
    dtype
        Dtype of the written factors; None: that of the checkpoint's factors. Whole modules keep theirs. If this rounds
        ``[A; A_0]`` and ``[B | -B_0]``, singular vectors of their product are written instead, at the same rank. Their
        rounding error is proportional to the update, not to the much larger products whose difference it is.
    pretrained, revision
        Directory or hub id of the original model, and the revision of a hub id. Default: the recorded ones. Only the
        nearest LoRA to an adapter of another type is made with its weights.
    overwrite
        Replace a directory at `output` that this package wrote.
    progress
        Show a progress bar on standard error if singular values are computed.

    Returns
    -------
    Conversion
        The directory, the ranks, and the energy that truncation kept.

    Raises
    ------
    InputError
        If `output` may not be replaced (`lowrank_dist.storage.replacing.check_target`), if `rank` is below 1 or above
        that of the exact LoRA, or missing where there is none, if `dtype` cannot hold the factors, if `pretrained` is
        given where no weights are read, or if `output` is the checkpoint itself, one of its parents, or a directory
        that the LoRA is made from.
    CheckpointError
        If `checkpoint` is not a checkpoint, is damaged, or holds NaN or infinity.
    ModelError
        If an adapter of another type cannot be merged, or changes more than linear layers.

    See Also
    --------
    refit_checkpoint : Fits a LoRA of a given rank, quantization error included.
    merge_checkpoint : Adds the adapter to the weights of its base model.

    Examples
    --------
    Write the exact LoRA of a checkpoint, then one of rank 16 in bfloat16:

    >>> import torch
    >>> from lowrank_dist import convert_checkpoint
    >>> convert_checkpoint("checkpoints/step=200", "lora").exact_rank  # doctest: +SKIP
    32
    >>> conversion = convert_checkpoint(  # doctest: +SKIP
    ...     "checkpoints/step=200", "lora-16", rank=16, dtype=torch.bfloat16
    ... )
    >>> conversion.energy.overall  # doctest: +SKIP
    0.9987

    The result is an ordinary PEFT adapter: ``PeftModel.from_pretrained(original, "lora")`` loads it.
    """
    check_target(output, overwrite=overwrite, kind="lora", inputs=parts_of(Path(checkpoint)))
    checkpoint, output = Path(checkpoint), Path(output).absolute()
    check_parent(output)
    refuse_copies(checkpoint)
    manifest = read_manifest(checkpoint)
    verify_checkpoint(checkpoint, ShardGroup.single())

    from lowrank_dist.tuners.support import adds_product, needs_peft, said  # takes seconds to import

    config = read_config(checkpoint / ADAPTER_DIR)
    if not adds_product(config) and rank is not None:
        return _nearest(
            checkpoint,
            output,
            manifest,
            rank=rank,
            dtype=dtype,
            pretrained=pretrained,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    if needs_peft(config) and (checkpoint / LORA_DIR).is_dir():
        raise InputError(
            f"{checkpoint}: its adapter is of {said(config)}, and {checkpoint / LORA_DIR} is the exact LoRA already; "
            "use or copy that directory, or choose a lower rank (--rank)"
        )
    if needs_peft(config):
        raise InputError(
            f"{checkpoint}: its adapter is of {said(config)} and has no exact LoRA. {checkpoint / ADAPTER_DIR} is "
            "for the original model already, and stock PEFT loads it. "
            + (
                "Its virtual tokens are in no weight, so that there is no LoRA or merged model either"
                if config.is_prompt_learning
                else "For servers that take a LoRA or a plain model only, choose the rank of the nearest LoRA "
                "(--rank), or merge it (lowrank-dist merge)"
            )
        )
    if pretrained is not None or revision is not None:
        raise InputError(
            f"{checkpoint}: a LoRA is converted from its factors alone; leave pretrained and revision out, or fit it "
            "to the original model (--base)"
        )
    lora = ExactLora(checkpoint)
    if rank is not None:
        _check_rank(rank, lora)
    tensors = _layout(lora, rank, dtype)
    refactor = rank is not None or (lora.cancels and _rounds(lora, tensors))
    written, uniform = rank or lora.rank, rank is not None or lora.uniform
    measure = lora.scalings_known and not lora.config.use_dora and not _served(written, uniform)
    spectra: dict[str, Tensor] = {}
    with atomic_directory(output, overwrite=overwrite, kind="lora") as staging:
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
        original = Original.recorded(manifest)
        if original is not None:
            config.revision = original.revision
        config.save_pretrained(str(staging))
        described = _manifest(manifest, written, energy) | {"hashes": hashes_of_root(staging)}
        write_json(staging / MANIFEST, sealed(described))
    return Conversion(
        path=output,
        rank=written,
        exact_rank=lora.rank,
        uniform=uniform,
        energy=energy,
        spectra={} if lora.config.use_dora else spectra,
        is_dora=lora.config.use_dora,
    )


def _nearest(
    checkpoint: Path,
    output: Path,
    manifest: Record,
    *,
    rank: int,
    dtype: torch.dtype | None,
    pretrained: str | os.PathLike[str] | None,
    revision: str | None,
    overwrite: bool,
    progress: bool,
) -> Conversion:
    """Convert an adapter whose update is no product of two factors."""
    from lowrank_dist.export.nearest import write_nearest  # builds the model, which LoRAs do not need

    with atomic_directory(output, overwrite=overwrite, kind="lora") as staging:
        found = write_nearest(
            checkpoint,
            staging,
            rank=rank,
            dtype=dtype,
            pretrained=pretrained,
            revision=revision,
            show_progress=progress,
        )
        write_json(
            staging / MANIFEST, sealed(_manifest(manifest, rank, found.energy) | {"hashes": hashes_of_root(staging)})
        )
    return Conversion(
        path=output, rank=rank, exact_rank=found.exact_rank, uniform=True, energy=found.energy, spectra={}
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
            f"{', '.join(lora.config.target_parameters)}, whose scalings alpha_pattern sets separately; leave "
            "the rank out"
        )


def _layout(lora: ExactLora, rank: int | None, dtype: torch.dtype | None) -> dict[str, FileTensor]:
    """Shape and dtype of every written tensor, in the order in which safetensors writes them."""
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
    """Whether a tensor is written in a dtype that does not hold its values exactly."""
    return any(
        torch.promote_types(_stored_dtype(lora, name), tensor.dtype) != tensor.dtype for name, tensor in tensors.items()
    )


def _stored_dtype(lora: ExactLora, name: str) -> torch.dtype:
    return DTYPES[lora.trained.info(name).dtype]


def _truncated(
    module: LoraModule, factors: tuple[Tensor, Tensor], rank: int | None
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Truncated factors in fp64, and the spectra.

    With a `rank`, the factors include the scaling; without one, they have the module's rank and exclude it.
    """
    inside, outside = (1.0, abs(module.scaling)) if rank is None else (module.scaling, 1.0)
    parts = [truncate(a, b, rank or module.rank, scaling=inside) for a, b in module.split(*factors)]
    return module.join([(part.a, part.b) for part in parts]), [part.singular_values * outside for part in parts]


def _rounded(name: str, factor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = factor.to(dtype)
    if not rounded.isfinite().all():
        raise InputError(
            f"{name}: holds {float(factor.abs().max()):.3g}, but the largest {dtype} is {torch.finfo(dtype).max:.3g}; "
            "choose bfloat16 or float32"
        )
    return rounded


def _manifest(of_checkpoint: dict[str, Any], rank: int, energy: EnergyKept | None) -> dict[str, Any]:
    """Manifest of the LoRA: the checkpoint's, without the entries about its files, with those of the conversion."""
    manifest = {key: value for key, value in of_checkpoint.items() if key not in _OF_THE_FILES}
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
