"""Merging an adapter into its base model, a block of rows at a time; the output is an ordinary Hugging Face model.

Every adapted matrix becomes ::

    W + s (B A - B_0 A_0),

computed in fp32 and rounded once, to the dtype of the output. ``A_0, B_0`` are the initial factors if the adapter was
trained on a residual (`lowrank_dist.export.convert`); otherwise their product is left out. Modules that were trained
whole replace those of the base, and everything else is copied.

Adapters of other types (DoRA, VeRA, IA3, ...) are merged by PEFT's own layers, in fp32 (`lowrank_dist.export.tuned`).

Host memory does not depend on the size of the model. For a LoRA it holds five blocks of at most `BLOCK_BYTES` (the
rows, their sum with the product, the rounded sum, and temporaries of the checks and of the matrix product) and the
factors of one adapted parameter in fp32. For other adapters it holds what `lowrank_dist.export.tuned` says. Files are
mapped, not loaded.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_dist._version import __version__
from lowrank_dist.adapters.source import AdapterSource, find_adapter
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.export.merge_plan import MergedTensor, MergePlan, find_base, plan_merge
from lowrank_dist.export.tuned import TunedModel
from lowrank_dist.linalg import all_finite, full_fp32, squared_norm
from lowrank_dist.model.names import peft_name
from lowrank_dist.model.plan import PlannedMatrix
from lowrank_dist.model.stacking import concat_a, concat_b, split_a, split_b
from lowrank_dist.progress import progress_bar
from lowrank_dist.storage.atomic import atomic_directory
from lowrank_dist.storage.disk import check_free
from lowrank_dist.storage.layout import MANIFEST
from lowrank_dist.storage.parse import read_record
from lowrank_dist.storage.reader import CheckpointReader, check_finite
from lowrank_dist.storage.replacing import check_parent, check_target
from lowrank_dist.storage.small_files import copy_small_files, small_files
from lowrank_dist.storage.verify import verify_adapter
from lowrank_dist.storage.writer import MAX_BYTES, TensorFiles, write_json

BLOCK_BYTES = 32 * 2**20  # of fp32 values


def merge_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_BYTES,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Path:
    """Merge an adapter into its base model, and write the result.

    Parameters
    ----------
    checkpoint
        Directory that `lowrank_dist.callbacks.AdapterCheckpoint` wrote, or one with an adapter that PEFT or
        `lowrank_dist.export.convert.convert_checkpoint` wrote.
    output
        Directory to write: a model for ``from_pretrained`` of transformers. It is written completely or not at all.
    base
        Directory or hub id of the base model, with safetensors; default: the one that the checkpoint names.
    revision
        Revision of a hub id.
    dtype
        Dtype of all floating-point tensors; default: each keeps its dtype in the base.
    max_file_bytes
        Maximum size of a file of the output; a larger tensor has its own file.
    overwrite
        Replace a directory at `output` that this package wrote.
    show_progress
        Show a progress bar.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        If files are missing, truncated or damaged, or if the base is not the model that training started from.
    ModelError
        If the adapter does not fit the base, or cannot be merged.
    InputError
        If `output` may not be replaced (`lowrank_dist.storage.replacing.check_target`), if the disk is too small, or if
        `max_file_bytes` is not positive.

    See Also
    --------
    convert_checkpoint : Writes the adapter as a LoRA instead, and leaves the weights alone.
    refit_checkpoint : Fits a LoRA of a given rank, quantization error included.

    Notes
    -----
    The error of a weight is the rounding error of an fp32 sum plus that of the output dtype: in bf16 at most ``2^-8``
    of its size, in fp16 ``2^-11``. An adapter that was trained on a quantized residual is merged like any other; the
    result does not contain the leftover error, whose size the checkpoint's manifest records.

    If the adapter changes one of two tied embeddings, the head becomes a separate tensor and ``tie_word_embeddings``
    becomes false.

    Examples
    --------
    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    >>> from lowrank_dist import merge_checkpoint
    >>> work = tempfile.mkdtemp()
    >>> sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
    >>> model = GPT2LMHeadModel(GPT2Config(**sizes))
    >>> model.save_pretrained(f"{work}/base")
    >>> lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    >>> get_peft_model(model, lora).save_pretrained(f"{work}/adapter")
    >>> path = merge_checkpoint(f"{work}/adapter", f"{work}/merged", base=f"{work}/base")
    >>> type(AutoModelForCausalLM.from_pretrained(path)).__name__
    'GPT2LMHeadModel'
    """
    verify_adapter(Path(checkpoint), ShardGroup.single())
    adapter = find_adapter(Path(checkpoint), any_type=True, converted_dora=True, copies=True)
    directory = find_base(adapter, base, revision)
    check_target(output, overwrite=overwrite, kind="merged", inputs=[adapter.directory, directory])
    output = Path(output).absolute()
    check_parent(output)
    if max_file_bytes < 1:
        raise InputError(f"max_file_bytes={max_file_bytes} must be positive")
    plan = plan_merge(adapter, directory, dtype)
    beside = small_files(plan.reader.directory, plan.reader.files)
    check_free(output, plan.nbytes)
    try:
        with (
            progress_bar(plan.nbytes, show=show_progress, doing="Merging") as bar,
            atomic_directory(output, overwrite=overwrite, kind="merged") as staging,
        ):
            _Merge(adapter, plan, bar.update).write(staging, max_file_bytes)
            copy_small_files(beside, staging)
            _change_config(staging / "config.json", plan.config_changes)
    except OSError as error:
        raise CheckpointError(f"{output}: could not be written: {error}") from error
    finally:
        plan.reader.close()
        adapter.close()
    return output


class _Merge:
    """One merge in progress."""

    def __init__(self, adapter: AdapterSource, plan: MergePlan, advance: Callable[[int], object]) -> None:
        self.adapter, self.plan, self.advance = adapter, plan, advance
        self._written: Counter[str] = Counter()
        self._factors_of: tuple[str, Tensor, Tensor] | None = None

    def write(self, staging: Path, max_file_bytes: int) -> None:
        """Write the merged model to the empty directory `staging`."""
        files = TensorFiles(staging, self.plan.files, max_bytes=max_file_bytes)
        files.create()
        try:
            for tensor in self.plan.tensors:
                blocks = self._copied(tensor) if tensor.planned is None else self._merged(tensor, tensor.planned)
                for start, values in blocks:
                    self._put(files, tensor, start, values)
            if self.plan.tuned is not None:
                self._merge_tuned(self.plan.tuned, files)
        finally:
            files.close()
        for name, file_tensor in self.plan.files.items():
            if self._written[name] != file_tensor.numel:  # unwritten elements would be zeros, which look like weights
                raise RuntimeError(f"{name}: {self._written[name]} of {file_tensor.numel} elements were written")
        write_json(staging / MANIFEST, self._manifest())

    def _manifest(self) -> dict[str, Any]:
        return {
            "kind": "merged",
            "lowrank_dist": __version__,
            "adapter": str(self.adapter.directory.absolute()),
            "base": str(self.plan.reader.directory),
        }

    def _merge_tuned(self, tuned: TunedModel, files: TensorFiles) -> None:
        for planned, values in tuned.merged():
            tensor = self.plan.of_tuned[planned.names[0]]
            for start, block in self._copied(tensor) if values is None else [(0, values)]:
                self._put(files, tensor, start, block)

    def _copied(self, tensor: MergedTensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of the first element and the flat values, block by block."""
        step = BLOCK_BYTES // 4
        for start in range(0, tensor.numel, step):
            values = tensor.source.flat(tensor.key, start, min(start + step, tensor.numel))
            check_finite(tensor.key, values, start)
            yield start, values

    def _merged(self, tensor: MergedTensor, planned: PlannedMatrix) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of the first element and the fp32 values, block by block.

        Raises
        ------
        CheckpointError
            After the last block, if the norm shows that the adapter was trained from another matrix.
        """
        left, right = self._factors(planned)
        step, squares = max(1, BLOCK_BYTES // (4 * planned.columns)), 0.0
        for start in range(0, planned.rows, step):
            block = tensor.source.rows(tensor.key, start, min(start + step, planned.rows)).float()
            check_finite(tensor.key, block, start)
            squares += float(squared_norm(block))
            with full_fp32():  # not in place: fp32 rows are a view of the mapped file
                block = torch.addmm(block, left[start : start + step], right, alpha=planned.scaling)
            yield start * planned.columns, block
        if tensor.source is self.plan.reader:
            stored = f"{planned.key} of {self.plan.reader.directory}"
            self.adapter.check_norm(planned.name, math.sqrt(squares), stored)

    def _put(self, files: TensorFiles, tensor: MergedTensor, start: int, values: Tensor) -> None:
        """Round `values`, flat or row-major from element `start` of `tensor` on, and write them."""
        rounded = values.flatten().to(tensor.dtype)
        if not all_finite(rounded):
            raise CheckpointError(
                f"{tensor.key}: {float(values.abs().max()):.3g} is too large for {tensor.dtype}; choose another dtype"
            )
        first = 0
        for span in tensor.target:
            low, high = max(start, first), min(start + rounded.numel(), first + span.numel)
            if low < high:
                files.write(span.name, span.start + low - first, rounded[low - start : high - start])
                self._written[span.name] += high - low
            first += span.numel
        self.advance(rounded.nbytes)

    def _factors(self, planned: PlannedMatrix) -> tuple[Tensor, Tensor]:
        """Factors ``L`` ``[rows, k]`` and ``R`` ``[k, columns]``, fp32; the stored matrix gains ``scaling * L R``.

        k is r, or 2r if the initial product is subtracted: ``L R = [B | -B_0] [A; A_0]``, or its transpose.
        """
        if self._factors_of is None or self._factors_of[0] != planned.layer:
            a, b = [], []
            for part, sign in zip(self.adapter.parts, (1, -1), strict=False):
                a_part, b_part = (self._factor(part, name) for name in planned.factor_names.values())
                a.append(a_part)
                b.append(sign * b_part)
            every_a = split_a(concat_a(a, planned.experts), planned.experts)
            self._factors_of = (planned.layer, every_a, split_b(concat_b(b), planned.experts))
        _, every_a, every_b = self._factors_of
        a_one, b_one = every_a[planned.expert or 0], every_b[planned.expert or 0]
        return (a_one.mT, b_one.mT) if planned.input_first else (b_one, a_one)

    @staticmethod
    def _factor(part: CheckpointReader, name: str) -> Tensor:
        key = peft_name(name)
        values = part.rows(key, 0, part.info(key).shape[0])
        check_finite(key, values, 0)
        return values.float()


def _change_config(path: Path, changes: dict[str, Any]) -> None:
    """Change entries of a ``config.json``."""
    config, changes = dict(read_record(path)), dict(changes)
    if "dtype" in changes and "torch_dtype" in config:  # the name before transformers 5
        changes["torch_dtype"] = changes.pop("dtype")
    if changes:
        inside = {key: changes[key] for key in changes if key in ("tie_word_embeddings", "dtype", "torch_dtype")}
        write_json(path, _changed(config, inside) | changes)


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`config` with `changes` to its existing entries, those of nested configurations (text, vision) included."""
    return {
        key: changes[key] if key in changes else _changed(value, changes) if isinstance(value, dict) else value
        for key, value in config.items()
    }
