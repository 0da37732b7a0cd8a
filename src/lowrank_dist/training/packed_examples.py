"""Packed examples must not see each other: a check of the model itself, before its first packed batch.

Models of transformers find the borders of packed examples in `position_ids`, which begin again with every example. Not
all do: convolutions, state spaces and linear attention carry their state across borders, some attentions build their
mask without `position_ids`, and flash attention looks for borders only in batches of one row. The signature of a model
does not tell, so the model is asked: an example that is packed between others must get the same hidden states whatever
the others are and wherever it stands. A model that does not look at `position_ids`, but takes a mask as it is given
(gpt-oss, Falcon, OPT), is given one that they make.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError

# Lengths of the example that is watched and of its neighbours, which change places.
_WATCHED, _LONG, _SHORT = 6, 6, 4

#: With fewer tokens in the batch, others of the vocabulary are taken: neighbours must differ.
_DISTINCT = 16

#: Arguments of a forward that follow from the labels.
_OF_THE_LOSS = ("labels", "num_items_in_batch", "logits_to_keep")

#: Relative differences up to this many machine epsilons of the dtype are rounding.
_ROUNDING = 8

#: What models raise that do not take a mask, or a mask for each kind of layer, as it is given.
_NO_SUCH_MASK = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
#: RuntimeErrors that say nothing of masks.
_OF_THE_MACHINE = (torch.OutOfMemoryError, torch.distributed.DistError)


class PackedExamples:
    """Refuses packed batches for models in which packed examples see each other, with a mask too.

    Parameters
    ----------
    backbone
        The transformers model.
    group
        The ranks that compute together. Default: this process alone.

    Notes
    -----
    The first call with `position_ids`, without an `attention_mask` and without a key-value cache to continue is
    preceded by three forward passes of 16 tokens (two of one row, one of two rows) without gradient, on all ranks, with
    the arguments of that call, and by two object all-gathers. If the model keeps examples apart, nothing is done in
    later calls. If not, three more passes and one more all-gather ask whether it does with masks of `[rows, 1, length,
    length]`, which every later call then gets. If that fails too, every later call asks whether positions begin again
    within a row, and issues the collectives of `ShardGroup.shared_errors`.
    """

    def __init__(self, backbone: PreTrainedModel, group: ShardGroup | None = None) -> None:
        self._backbone = backbone
        self._group = group or ShardGroup.single()
        self._leaks: dict[bool, float] | None = None  # by whether there are several rows
        self._probing = self._without_cache = self._masked = False
        self._forward = inspect.signature(backbone.forward)
        self._hook = backbone.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._probing:
            return None
        call = self._arguments(args, kwargs)
        positions = call.pop("position_ids", None)
        if positions is None or call.pop("attention_mask", None) is not None:
            return None
        if call.get("past_key_values") is not None:  # generation, which ranks need not do together
            return None
        if self._leaks is None:
            tokens = call.pop("input_ids", None)
            unknown = [name for name, value in call.items() if isinstance(value, Tensor)]
            obstacle = ", ".join(unknown) or ("no input_ids" if tokens is None else "")
            # images may be on one rank only, and the question is a forward pass of all
            obstacle = next(filter(None, self._group.gather_objects(obstacle)), "")
            if obstacle:
                self._hook.remove()
                rank_zero_warn(
                    f"position_ids without attention_mask, but with {obstacle}: it was not checked that "
                    f"{type(self._backbone).__name__} keeps packed examples apart"
                )
                return None
            assert tokens is not None
            self._without_cache = call.get("use_cache") is False
            self._leaks = self._asked(tokens, call)
            if not any(self._leaks.values()):
                self._hook.remove()
                return None
            if self._leaks[False] and self._without_cache:
                self._masked = not any(self._asked(tokens, call, masked=True).values())
            if self._masked:
                rank_zero_info(
                    f"{type(self._backbone).__name__} does not tell packed examples apart by position_ids: it is given "
                    "masks of [rows, 1, length, length] that do"
                )
        if self._masked:
            bound = self._forward.bind_partial(*args, **kwargs)
            bound.arguments["attention_mask"] = self._mask(positions)
            return bound.args, bound.kwargs
        with self._group.shared_errors():
            self._check(positions)
        return None

    def _asked(self, tokens: Tensor, arguments: dict[str, Any], *, masked: bool = False) -> dict[bool, float]:
        """The largest differences that any rank has found. Collective."""
        # ranks ask with tokens of their own, and one that finds nothing must not leave the others waiting
        every = self._group.gather_objects(self._probe(tokens, arguments, masked=masked))
        return {several: max(found[several] for found in every) for several in (False, True)}

    def _mask(self, positions: Tensor) -> Any:
        """What keeps examples apart, as transformers makes it: a mask, one for each kind of layer, or None."""
        positions = torch.atleast_2d(positions)
        rows, length = positions.shape
        weight = self._backbone.get_input_embeddings().weight
        like = torch.empty(rows, length, 1, dtype=weight.dtype, device=positions.device)
        return create_masks_for_generate(self._backbone.config, like, None, None, position_ids=positions)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name, without those of the loss; none if the model does not take them."""
        try:
            bound = self._forward.bind_partial(*args, **kwargs).arguments
        except TypeError:  # the call itself raises it
            return {}
        for name, parameter in self._forward.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        return {name: value for name, value in bound.items() if name not in _OF_THE_LOSS}

    def _check(self, positions: Tensor) -> None:
        """Raise InputError if positions begin again within a row and examples see each other in such batches."""
        assert self._leaks is not None
        leak = self._leaks[positions.ndim > 1 and len(positions) > 1]
        if not leak or not bool((positions.diff(dim=-1) != 1).any()):
            return
        if not self._leaks[False]:
            attention = self._backbone.config._attn_implementation
            remedy = (
                f"{attention} attention tells them apart only in batches of one row: use padding_free=True, another "
                "attn_implementation"
            )
        elif not self._without_cache:
            remedy = "it was called with a key-value cache, which mixes them in most models: pass use_cache=False"
        else:
            remedy = "it does not keep to the borders that position_ids mark: use batches without packed rows"
        raise InputError(
            f"packed examples see each other in {type(self._backbone).__name__}: hidden states of an example differ by "
            f"{leak:.1%} with what it is packed with; {remedy}, or packing=False and padding_free=False (and "
            "group_by_length=True)"
        )

    @torch.no_grad()
    def _probe(self, tokens: Tensor, arguments: dict[str, Any], *, masked: bool) -> dict[bool, float]:
        """Relative difference that neighbours make to an example, in batches of one row and of several.

        A forward pass of the model on all ranks, three times; 0 where differences are rounding. Infinite if the model
        does not take a mask.
        """
        rows = self._rows(tokens)
        positions = torch.stack([_positions(_LONG, _SHORT), _positions(_SHORT, _LONG)]).to(rows.device)
        modes = {module: module.training for module in self._backbone.modules()}
        self._probing = True
        self._backbone.eval()
        try:
            both = self._hidden(rows, positions, arguments, masked)
            each = torch.cat([self._hidden(rows[i : i + 1], positions[i : i + 1], arguments, masked) for i in (0, 1)])
        except _NO_SUCH_MASK as error:
            if not masked or isinstance(error, _OF_THE_MACHINE):
                raise
            return {False: math.inf, True: math.inf}
        finally:
            for module, training in modes.items():
                module.training = training
            self._probing = False
        return {False: _difference(each), True: _difference(both)}

    def _hidden(self, rows: Tensor, positions: Tensor, arguments: dict[str, Any], masked: bool) -> Tensor:
        """What the head multiplies, ``[rows, 16, width]``; what the model returns if it has no head for tokens."""
        seen: list[Tensor] = []
        head = self._backbone.get_output_embeddings()
        hook = None if head is None else head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            mask = {"attention_mask": self._mask(positions)} if masked else {}
            output = self._backbone(input_ids=rows, position_ids=positions, **mask, **arguments)
        finally:
            if hook is not None:
                hook.remove()
        hidden: Tensor = seen[0] if seen else output[0]
        return hidden

    def _rows(self, tokens: Tensor) -> Tensor:
        """Two rows with the same example in the middle, of tokens of the batch if it has many: int64 [2, 16]."""
        special: set[Any] = set()
        for name, value in self._backbone.config.to_dict().items():
            if name.endswith("_token_id"):
                special.update(value if isinstance(value, list) else [value])
        usable = [token for token in tokens.unique().tolist() if token not in special]
        if len(usable) < _DISTINCT:
            rows: int = self._backbone.get_input_embeddings().num_embeddings
            usable = [token for token in range(max(0, rows - 64), rows) if token not in special]
        total = _LONG + _WATCHED + _SHORT
        drawn = [usable[(3 * i + i * i // 5) % len(usable)] for i in range(total + _LONG + _SHORT)]
        watched, rest = drawn[:_WATCHED], drawn[_WATCHED:]
        first = [*rest[:_LONG], *watched, *rest[_LONG : _LONG + _SHORT]]
        rest = rest[_LONG + _SHORT :]
        second = [*rest[:_SHORT], *watched, *rest[_SHORT:]]
        return torch.tensor([first, second], device=tokens.device)


def _positions(*before_and_after: int) -> Tensor:
    before, after = before_and_after
    return torch.cat([torch.arange(length) for length in (before, _WATCHED, after)])


def _difference(hidden: Tensor) -> float:
    """Relative difference of the watched example's states in two rows, ``[2, 16, width]``, in the Frobenius norm."""
    one, other = hidden[0, _LONG : _LONG + _WATCHED].float(), hidden[1, _SHORT : _SHORT + _WATCHED].float()
    difference = (torch.linalg.norm(one - other) / torch.linalg.norm(one)).item()
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return difference if difference > max(_ROUNDING * torch.finfo(dtype).eps, 1e-3) else 0.0
