"""Block expansion (LLaMA Pro): copies of decoder layers that compute the identity at first, and alone are trained.

A decoder layer adds the outputs of its attention and of its feed-forward network to its input. A copy whose two output
projections are zero adds nothing, so that the expanded model equals the pretrained one exactly at step 0. The L layers
are divided into P groups of L / P, and a copy of the last layer of every group follows it.

Source: Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", arXiv:2401.02415, section 3.2 (equations 4 to 7:
zero-initialised W^O and W_3).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowrank_dist.errors import ModelError
from lowrank_dist.storage.expanded import ExpandedReader
from lowrank_dist.storage.parse import printable
from lowrank_dist.storage.reader import CheckpointReader

#: Names of output projections, in transformers' models, of an attention and of a feed-forward network.
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2")

#: Options with which what a layer computes depends on its place.
_BY_PLACE = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers", "add_cross_attention")


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Which layers of an expanded model are copies, and of which they are copies.

    Attributes
    ----------
    layers
        Name of the list of decoder layers in the model.
    prefix
        Name of the base model in it, which stored names may lack or have in addition.
    origins
        For every layer of the expanded model, the index of the layer that it is, or is a copy of.
    copies
        Indices, in the expanded model, of the copies.
    zeros
        Names, within a layer, of the parameters that are zero in a copy.
    changes
        Entries of the configuration of the expanded model.
    """

    layers: str
    prefix: str
    origins: tuple[int, ...]
    copies: tuple[int, ...]
    zeros: tuple[str, ...]
    changes: dict[str, Any]

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns for the names of the parameters of the copies (`lowrank_dist.model.skeleton.train_also`)."""
        return tuple(f"{self.layers}.{index}.*" for index in self.copies)

    @property
    def after(self) -> tuple[int, ...]:
        """Layers of the pretrained model that a copy follows."""
        return tuple(self.origins[index] for index in self.copies)

    def reader(self, inner: CheckpointReader) -> ExpandedReader:
        """The weights of the expanded model, read from those of the pretrained model.

        Raises
        ------
        ModelError
            If they do not name their layers as the model does, or lack output projections.
        """
        bare = self.layers.removeprefix(f"{self.prefix}.")
        before = [f"{name}." for name in dict.fromkeys((self.layers, bare, f"{self.prefix}.{self.layers}"))]
        names: dict[str, tuple[str, bool]] = {}
        of_layer: dict[int, list[tuple[str, str]]] = {}
        for key in inner:
            start = next((start for start in before if key.startswith(start)), None)
            index, _, rest = ("" if start is None else key.removeprefix(start)).partition(".")
            if start is None or not index.isdigit() or not rest:
                names[key] = (key, False)
            else:
                of_layer.setdefault(int(index), []).append((start, rest))
        for place, origin in enumerate(self.origins):
            stored = of_layer.get(origin, [])
            held = {rest for _, rest in stored}
            lacking = [name for name in self.zeros if name not in held]
            if lacking:
                raise ModelError(
                    f"expand_blocks: {inner.directory} holds no {self.layers}.{origin}.{lacking[0]}; save the model "
                    "with transformers' save_pretrained(directory, save_original_format=False) and pass that"
                )
            for start, rest in stored:
                zero = place in self.copies and rest in self.zeros
                names[f"{start}{place}.{rest}"] = (f"{start}{origin}.{rest}", zero)
        return ExpandedReader(inner, names, f"expanded after {self.after}")


def expand(backbone: PreTrainedModel, blocks: int | Sequence[int]) -> Expansion:
    """Give a model on meta copies of its decoder layers, in place; its configuration is that of the expanded model.

    No parameter requires a gradient then.

    Parameters
    ----------
    backbone
        The model, without adapters.
    blocks
        Number of copies, spread evenly as in the paper, or the indices of the layers that a copy follows.

    Raises
    ------
    ModelError
        If the model is no stack of decoder layers that add to their input what an attention and a feed-forward network
        return, if what a layer computes depends on its place, or if `blocks` does not fit. The error names what.
    """
    name, layers = _layer_list(backbone)
    after = _after(blocks, len(layers), name)
    zeros = _outputs(layers, name)
    origins = tuple(sorted((*range(len(layers)), *after)))
    copies = tuple(i for i, origin in enumerate(origins) if i > 0 and origins[i - 1] == origin)
    config = backbone.config
    changes: dict[str, Any] = {"num_hidden_layers": len(origins)}
    for entry, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == len(layers) and entry != "architectures":
            changes[entry] = [value[origin] for origin in origins]
    expanded = copy.deepcopy(config)
    for entry, value in changes.items():
        setattr(expanded, entry, value)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        built = type(backbone)._from_config(expanded, dtype=backbone.dtype)
    _, stack = _layer_list(built)
    for index, origin in enumerate(origins):
        difference = _difference(layers[origin], stack[index])
        if difference is not None:
            raise ModelError(
                f"expand_blocks: layer {origin} of {type(backbone).__name__} would be layer {index} of the expanded "
                f"model, where its {difference}: what a layer computes depends on its place; train a LoRA instead"
            )
    for module in stack.modules():
        if getattr(module, "config", None) is built.config:
            module.config = config
    for entry, value in changes.items():
        setattr(config, entry, value)
    owner, _, leaf = name.rpartition(".")
    stack.train(layers.training)
    setattr(backbone.get_submodule(owner), leaf, stack)
    backbone.requires_grad_(False)  # what is trained is said by `Expansion.trained`
    stored = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changes[stored] = changes.pop("num_hidden_layers")
    return Expansion(
        layers=name,
        prefix=backbone.base_model_prefix,
        origins=origins,
        copies=copies,
        zeros=zeros,
        changes=changes,
    )


def check_blocks(blocks: int | Sequence[int] | None) -> None:
    """Raise ModelError if `blocks` is of no use for any model."""
    if blocks is None:
        return
    one = isinstance(blocks, int)
    values = [blocks] if isinstance(blocks, int) else list(blocks)
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v >= int(one) for v in values):
        raise ModelError(
            f"expand_blocks={printable(blocks)} must be a positive number of copies, or a list of the layers to copy"
        )
    if not one and len(set(values)) < len(values):
        raise ModelError(f"expand_blocks={printable(blocks)} names a layer twice; a layer has one copy")


def _after(blocks: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    check_blocks(blocks)
    if not isinstance(blocks, int):
        beyond = [index for index in blocks if index >= count]
        if beyond:
            raise ModelError(f"expand_blocks: there is no {name}.{beyond[0]}; the model has layers 0 to {count - 1}")
        return tuple(sorted(blocks))
    if count % blocks:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ModelError(
            f"expand_blocks={blocks}: the {count} layers of the model cannot be divided into {blocks} equal groups; "
            f"choose one of {fitting}, or list the layers to copy"
        )
    step = count // blocks
    return tuple(range(step - 1, count, step))


def _layer_list(backbone: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    config, kind = backbone.config, type(backbone).__name__
    if config.is_encoder_decoder or config.get_text_config() is not config:
        parts = "an encoder-decoder" if config.is_encoder_decoder else "a model with towers"
        raise ModelError(f"expand_blocks: {kind} is {parts}; only decoders of text are expanded")
    for option in _BY_PLACE:
        if getattr(config, option, None):
            raise ModelError(
                f"expand_blocks: {kind} has {option}={getattr(config, option)!r}, with which what a layer computes "
                "depends on its place; train a LoRA instead"
            )
    count = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    found = [(n, m) for n, m in found if not any(n.startswith(f"{outer}.") for outer, _ in found)]
    if len(found) != 1:
        names = ", ".join(n for n, _ in found) or "none"
        raise ModelError(f"expand_blocks: {kind} has no single list of its {count} decoder layers (found: {names})")
    return found[0]


def _outputs(layers: nn.ModuleList, name: str) -> tuple[str, ...]:
    """Names within a layer of the parameters of its two output projections, the same in every layer."""
    of_each = [_outputs_of(layer, f"{name}.{index}") for index, layer in enumerate(layers)]
    for index, found in enumerate(of_each):
        if found != of_each[0]:
            raise ModelError(
                f"expand_blocks: {name}.{index} has the output projections {', '.join(found)}, {name}.0 has "
                f"{', '.join(of_each[0])}; only layers of one kind are expanded"
            )
    return of_each[0]


def _outputs_of(layer: nn.Module, name: str) -> tuple[str, ...]:
    found = [
        (n, m)
        for n, m in layer.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and n.rpartition(".")[2] in _OUTPUTS
    ]
    homes = {n: type(layer.get_submodule(n.partition(".")[0])).__name__ for n, _ in found}
    in_attention = [n for n, home in homes.items() if "attention" in home.lower()]
    if len(found) != 2 or len(in_attention) != 1:
        raise ModelError(
            f"expand_blocks: {name} ({type(layer).__name__}) must have one output projection of an attention and one "
            f"of a feed-forward network, found {', '.join(n for n, _ in found) or 'none'}; of its kind no copy is "
            "known to compute the identity"
        )
    known = {n.partition(".")[0] for n in homes if "." in n} | {"fc1", "fc2"}
    matrices = [(n, p.ndim) for n, p in layer.named_parameters() if p.ndim > 1]
    others = [n for n, ndim in matrices if ndim > 2 or n.partition(".")[0] not in known]
    if others:
        raise ModelError(
            f"expand_blocks: {name} ({type(layer).__name__}) has {others[0]} beside an attention and a feed-forward "
            "network; of its kind no copy is known to compute the identity"
        )
    return tuple(f"{n}.{leaf}" for n, m in found for leaf, _ in m.named_parameters())


def _difference(before: nn.Module, now: nn.Module) -> str | None:
    """What differs between a layer and the one that takes its place; None: they compute the same."""
    own = dict(now.named_modules())
    for name, module in before.named_modules():
        other = own.get(name, nn.Identity())
        if type(other) is not type(module):
            return f"{name or 'class'} is a {type(other).__name__} and no {type(module).__name__}"
        for entry, value in vars(module).items():
            plain = isinstance(value, int | float | str | bool | None) and not entry.startswith("_")
            if plain and entry != "training" and "layer_id" not in entry and value != vars(other).get(entry):
                where = f"{name}.{entry}" if name else entry
                return f"{where} would be {vars(other).get(entry)!r} instead of {value!r}"
        shapes = {n: p.shape for n, p in module.named_parameters(recurse=False)}
        if shapes != {n: p.shape for n, p in other.named_parameters(recurse=False)}:
            return f"{name} has other parameters"
    return None
