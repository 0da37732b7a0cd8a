"""Maps the parameters of a model to tensors of the pretrained weights, as transformers does while loading.

Pretrained weights may lack or add the model's prefix, may use names of an earlier release of transformers, and may
store the experts of a mixture one by one while the model fuses them. Conversions of transformers' table that only
rename or stack are supported; others are refused, and the error names the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lowrank_dist.model.rearrange import rearranged, rearranges_rows
from lowrank_dist.storage.dtypes import FLOAT_DTYPES
from lowrank_dist.storage.reader import PACKED_DTYPES, CheckpointReader, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
#: Suffix of the name of a magnitude of DoRA, whose files say less.
MAGNITUDE = f".lora_magnitude_vector.{ADAPTER}.weight"

# operations of transformers.core_model_loading that only stack: (type, dimension)
_STACK = [("MergeModulelist", 0)]
_STACK_AND_FUSE = [*_STACK, ("Concatenate", 1)]
_FUSE = [("Concatenate", 0)]


def plain_name(name: str) -> str:
    """Name that a parameter had before PEFT's layers were injected."""
    for inserted in (".base_layer", ".original_module", f".modules_to_save.{ADAPTER}"):
        name = name.replace(inserted, "")
    return name


#: Prefix of every name in an adapter file of PEFT.
PEFT_PREFIX = "base_model.model."


def peft_name(name: str) -> str:
    """PEFT's name in adapter files for the parameter `name` of the backbone."""
    name = name.removesuffix(".weight") if name.endswith(MAGNITUDE) else name
    name = name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}.", ".")
    return PEFT_PREFIX + name.removesuffix(f".{ADAPTER}")


def _shared_names(backbone: PreTrainedModel) -> dict[str, set[str]]:
    """The other names of every tied parameter. All names are as before PEFT's layers were injected."""
    names: dict[int, set[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(plain_name(name))
    return {name: same - {name} for same in names.values() if len(same) > 1 for name in same}


class CheckpointKeys:
    """Finds the parameters of a model in pretrained weights.

    Parameters
    ----------
    backbone
        The model, with PEFT's layers or without.
    reader
        Reader of the pretrained weights. Fused parameters that are stored in parts are joined in it.
    tied
        Untied parameters, and the parameters they were tied to: the weights may be stored under either name
        (`lowrank_dist.model.skeleton.untie_embeddings`).
    """

    def __init__(
        self, backbone: PreTrainedModel, reader: CheckpointReader, tied: Mapping[str, str] | None = None
    ) -> None:
        self._backbone, self._reader = backbone, reader
        self._prefix = f"{backbone.base_model_prefix}."
        self._tied = _shared_names(backbone)
        for pair in (tied or {}).items():
            for name, other in (pair, pair[::-1]):
                self._tied.setdefault(name, set()).add(other)
        self._keys: dict[str, str] | None = None
        self._refused: dict[str, str] = {}  # by parameter, the conversion it would need
        self._transposed = {
            f"{plain_name(name)}.weight" for name, module in backbone.named_modules() if isinstance(module, Conv1D)
        }

    def find(self, name: str) -> str | None:
        """Name, in the reader, of the tensor that fills the parameter `name` of the model; None if there is none.

        A tied parameter, or its copy under ``modules_to_save``, may be stored under any of its tied names.
        """
        name = plain_name(name)
        return self.stored_as(name) or next(filter(None, map(self.stored_as, sorted(self._tied.get(name, ())))), None)

    def holds(self, name: str) -> bool:
        """Whether the parameter `name` itself is stored, not only one that it is tied to."""
        return self.stored_as(name) is not None

    def stored_as(self, name: str) -> str | None:
        """Name, in the reader, of the tensor of the parameter `name` itself, not of one that it is tied to."""
        name = plain_name(name)
        for candidate in (name, self._prefix + name, name.removeprefix(self._prefix)):
            if candidate in self._reader:
                if len(self._reader.info(candidate).shape) < 3:
                    return candidate
                # transformers 5.23 converts some stacked experts without renaming them
                converted = self._converted().get(name, candidate)
                return None if name in self._refused else converted
        return self._converted().get(name)

    def check(self, name: str, key: str | None, parameter: Tensor) -> str | None:
        """The reason why `parameter` cannot be loaded from `key`, or None."""
        shape, name = tuple(parameter.shape), plain_name(name)
        if key is None and name in self._refused:
            return f"{name} {list(shape)}: {self._refused[name]}"
        if key is None:
            near = [k for k in self._reader if k.rsplit(".", 2)[-2:] == name.rsplit(".", 2)[-2:]]
            hint = f" (similar: {near[0]})" if near else ""
            return f"{name} {list(shape)}: the pretrained weights hold no such tensor{hint}"
        info = self._reader.info(key)
        if info.shape != shape and not (name in self._transposed and self._reader.decodes(key)):
            return f"{name}: the model has shape {list(shape)}, the pretrained weights {list(info.shape)}"
        readable = [*FLOAT_DTYPES, *(PACKED_DTYPES if self._reader.holds_residuals else ())]
        if torch.is_floating_point(parameter) and info.dtype not in readable:
            hint = "" if info.dtype == "F64" else "; quantization_config of config.json must say how they are quantized"
            return f"{name}: the pretrained weights store {info.dtype}; only {', '.join(readable)} are read{hint}"
        if name in self._transposed and self._reader.decodes(key):
            return (
                f"{name}: is of a Conv1D, and quantized weights are stored transposed; pass the model that it was "
                "quantized from"
            )
        return None

    def _converted(self) -> dict[str, str]:
        """Names of tensors in the reader, by the names that transformers' conversion table gives them."""
        if self._keys is None:
            self._keys = {}
            self._convert(self._keys)
        return self._keys

    def _convert(self, keys: dict[str, str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        table = get_model_conversion_mapping(self._backbone)
        converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in table if not isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        shapes = {plain_name(n): tuple(p.shape) for n, p in self._backbone.named_parameters(remove_duplicate=False)}
        shapes |= {plain_name(n): tuple(b.shape) for n, b in self._backbone.named_buffers()}
        prefix = self._backbone.base_model_prefix or None
        found: dict[str, dict[str | None, list[str]]] = {}
        for key in sorted(self._reader, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, shapes)
            if name in shapes or (pattern is not None and len(by_pattern[pattern].target_patterns) > 1):
                found.setdefault(name, {}).setdefault(pattern, []).append(key)
        for name, sources in found.items():
            converter = next((by_pattern[pattern] for pattern in sources if pattern is not None), None)
            if converter is not None and rearranges_rows(converter):
                keys |= self._rearrange(name, sources, converter, shapes)
                continue
            taken = self._take(name, sources, converter, shapes[name]) if name in shapes else None
            if taken is not None:
                keys[name] = taken

    def _rearrange(
        self,
        name: str,
        sources: Mapping[str | None, list[str]],
        converter: Any,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, str]:
        """Join the parameters that `converter` makes of the rows of `sources`; their names in the reader, by name."""
        stored = {str(p): keys for p, keys in sources.items()}
        rows = {key: self._reader.info(key).shape for keys in stored.values() for key in keys}
        joined = {}
        for target, pieces in rearranged(name, stored, converter, rows, self._backbone).items():
            if target in shapes:
                self._reader.join(target, pieces)
                joined[target] = target
        return joined

    def _take(
        self, name: str, sources: Mapping[str | None, list[str]], converter: Any, shape: tuple[int, ...]
    ) -> str | None:
        """Tensor in the reader that `converter` makes parameter `name` of; None if refused, with a reason noted."""
        first = next(iter(sources.values()))[0]
        if converter is None:
            return first
        operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
        parts = [[Piece(key=key) for key in sources[p]] for p in converter.source_patterns if p in sources]
        if operations in (_STACK, _STACK_AND_FUSE) and len({len(part) for part in parts}) == 1:
            # entry e of the parameter is [part 0 of e; part 1 of e; ...]
            pieces = [piece for entry in zip(*parts, strict=True) for piece in entry]
            self._reader.join_stack(name, pieces, len(parts[0]))
            return name
        if operations == _FUSE and len(converter.target_patterns) == 1:
            self._reader.join(name, [piece for part in parts for piece in part])
            return name
        if [kind for kind, _ in operations] == ["Transpose"] and len(sources) == 1:
            operation, stored = converter.operations[0], self._reader.info(first).shape
            if operation.check_dims and stored == shape:
                return first
            last = {operation.dim0 % len(stored), operation.dim1 % len(stored)} == {len(stored) - 2, len(stored) - 1}
            if last and len(stored) == 3:
                pieces = [Piece(key=first, index=index, transposed=True) for index in range(stored[0])]
                self._reader.join_stack(name, pieces, stored[0])
                return name
        steps = ", ".join(map(str, converter.operations))
        self._refused[name] = (
            f"transformers makes it while loading, of {first} and {sum(map(len, sources.values())) - 1} others "
            f"({steps}); only renaming, stacking and moving rows are done here. Load it with transformers and save it "
            "once with `save_pretrained(directory, save_original_format=False)`"
        )
        return None
