"""Shifted sparse attention (S2-Attn) while training, full attention otherwise: LongLoRA.

A row is divided into groups of G tokens, and a token attends within its group. For half of the heads the groups begin
G / 2 tokens later, so that information passes from group to group. Scores cost ``N G`` instead of ``N^2``. Algorithm 1
of the paper rolls keys, queries and values of these heads by G / 2, so that the last group joins the end of the row
with its beginning; section 3.2 says that a mask must keep the two apart. Here they are groups of G / 2 tokens each, so
that nothing needs a mask, and fused kernels take the causal flag.

Source: Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", arXiv:2309.12307, section
3.2 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as transformers_logging

from lowrank_dist.errors import InputError, ModelError

#: Name, among transformers' implementations of attention, up to the size of a group.
PREFIX = "shifted_sparse_"

#: Arguments of an attention that its groups cannot honour.
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias")


def shifted_attention(
    query: Tensor, key: Tensor, value: Tensor, group: int, *, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention within groups of tokens, which are shifted by half a group for the second half of the heads.

    Parameters
    ----------
    query, key, value
        ``[batch, heads, length, width]``, as many heads of each. The last group may be shorter.
    group
        Tokens in a group; even.
    scaling, dropout
        Factor of the scores, by default ``width^-1/2``, and probability of dropout.

    Returns
    -------
    Tensor
        ``[batch, heads, length, width]``.

    Examples
    --------
    >>> import torch
    >>> from lowrank_dist.layers.shifted_attention import shifted_attention
    >>> x = torch.randn(1, 2, 12, 4)
    >>> shifted_attention(x, x, x, 8).shape
    torch.Size([1, 2, 12, 4])
    """
    length, heads = query.shape[2], query.shape[1]
    missing, shift = -length % group, group // 2
    # tokens after the end are seen by none before it
    padded = [F.pad(x, (0, 0, 0, missing)) for x in (query, key, value)]

    def within(parts: list[Tensor], size: int) -> Tensor:
        """Causal attention within `size` tokens, ``[batch, heads, n * size, width]``."""
        batch, some, tokens, _ = parts[0].shape
        cut = [x.unflatten(2, (tokens // size, size)).transpose(1, 2).flatten(0, 1) for x in parts]
        of_query, of_key, of_value = cut
        found = F.scaled_dot_product_attention(
            of_query, of_key, of_value, is_causal=True, scale=scaling, dropout_p=dropout
        )
        return found.unflatten(0, (batch, tokens // size)).transpose(1, 2).reshape(batch, some, tokens, -1)

    straight = within([x[:, : heads // 2] for x in padded], group) if heads > 1 else padded[0][:, :0]
    shifted = [x[:, heads // 2 :] for x in padded]
    ends = within([torch.cat([x[:, :, :shift], x[:, :, -shift:]], dim=2) for x in shifted], shift)
    middle = [x[:, :, shift:-shift] for x in shifted]
    parts = [ends[:, :, :shift], *([within(middle, group)] if middle[0].shape[2] else []), ends[:, :, shift:]]
    return torch.cat([straight, torch.cat(parts, dim=2)], dim=1)[:, :, :length]


class ShiftedSparseAttention:
    """Makes a decoder of transformers attend within shifted groups in training mode, and fully in evaluation mode.

    Parameters
    ----------
    model
        The model; its implementation of attention is set.
    group
        Tokens in a group, even; the paper takes a quarter of the length of a row.

    Raises
    ------
    InputError
        If `group` is no even number of tokens. In the training forward, for rows that are packed or padded on the left,
        and for attention that is not causal or has a mask of its own.
    ModelError
        If the model does not take its attention from transformers' interface, or limits it to a window already.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from lowrank_dist.layers.shifted_attention import ShiftedSparseAttention
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=16))
    >>> attention = ShiftedSparseAttention(model, group=4)
    >>> model.config._attn_implementation
    'shifted_sparse_4'
    """

    def __init__(self, model: PreTrainedModel, group: int) -> None:
        check_group(group)
        config, kind = model.config, type(model).__name__
        if config.is_encoder_decoder or config.get_text_config() is not config:
            raise ModelError(f"shifted_attention: {kind} is no decoder of text alone; leave it out")
        other = [layer for layer in getattr(config, "layer_types", None) or () if layer != "full_attention"]
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        if other or window is not None:
            what = f"layers of {other[0]}" if other else f"sliding_window={window}"
            raise ModelError(f"shifted_attention: {kind} has {what}, which limit attention already; leave it out")
        self.name = f"{PREFIX}{group}"
        AttentionInterface.register(self.name, partial(_attention, group))
        AttentionMaskInterface.register(self.name, sdpa_mask)
        with _quiet():
            model.set_attn_implementation(self.name)
        if config._attn_implementation != self.name:
            raise ModelError(
                f"shifted_attention: {kind} computes its attention itself, not by transformers' AttentionInterface, so "
                "that it would stay full; leave it out"
            )
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Refuse rows that groups would mix; padding on the right needs no mask, since no token looks ahead."""
        if not model.training:
            return None
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            raise InputError(
                "shifted_attention: examples are packed in a row (position_ids begin again), and a group would mix "
                "them; set packing=False and padding_free=False"
            )
        if mask is None:
            return None
        if mask.ndim != 2 or bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise InputError(
                f"shifted_attention: attention_mask {list(mask.shape)} must be of padding on the right alone, which "
                "tokens before it do not see; pad on the right"
            )
        return args, {**kwargs, "attention_mask": None}


def _attention(
    group: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface: ``[batch, length, heads, width]`` of its layout."""
    if not module.training:
        full: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return full
    given = [name for name in _REFUSED if options.get(name) is not None]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or given or not causal or key.shape[2] != query.shape[2]:
        what = given[0] if given else "a mask of its own" if attention_mask is not None else "no causal attention"
        raise InputError(
            f"shifted_attention: {type(module).__name__} has {what}, which groups of tokens do not honour; leave "
            "shifted_attention out"
        )
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    found = shifted_attention(query, key, value, group, scaling=scaling, dropout=dropout)
    return found.transpose(1, 2).contiguous(), None


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers does not warn that it leaves an attention as it is."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def check_group(group: int) -> None:
    """Raise InputError if `group` is no even number of tokens."""
    if group < 2 or group % 2:
        raise InputError(f"shifted_attention={group} must be an even number of tokens, at least 2")
