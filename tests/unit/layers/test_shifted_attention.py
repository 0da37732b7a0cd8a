"""Shifted sparse attention equals the pattern of the paper, written out as a mask over all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import save_checkpoint
from helpers.shifted import plain
from lowrank_dist import CausalLMModule
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.layers.shifted_attention import ShiftedSparseAttention, shifted_attention


@pytest.mark.parametrize("length", [3, 8, 16, 21, 64])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_it_is_the_pattern_of_the_paper(length: int, heads: int) -> None:
    """Values and gradients in fp64, whatever the length: sums of other order differ by rounding alone."""
    torch.manual_seed(length)
    inputs = [torch.randn(2, heads, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found, expected = shifted_attention(*inputs, 8), plain(*inputs, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_paper_rolls_to_the_same_groups() -> None:
    """Algorithm 1 as printed, but for the group that joins the end of a row with its beginning."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 32, 4, dtype=torch.float64) for _ in range(3))
    rolled = [torch.cat([x[:, :1], x[:, 1:].roll(-4, 2)], 1).unflatten(2, (4, 8)) for x in (query, key, value)]
    scores = rolled[0] @ rolled[1].mT * 0.5
    scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
    out = (scores.softmax(-1) @ rolled[2]).flatten(2, 3)
    out = torch.cat([out[:, :1], out[:, 1:].roll(4, 2)], 1)
    found = shifted_attention(query, key, value, 8)
    torch.testing.assert_close(found[:, :, 4:], out[:, :, 4:], rtol=0, atol=1e-12)
    assert not torch.allclose(found[:, 1, :4], out[:, 1, :4])  # there, tokens would see the end of the row


def tiny(directory: Path, name: str, **changes: Any) -> Any:
    config = AutoConfig.from_pretrained(save_checkpoint(directory, name, **changes))
    return AutoModelForCausalLM.from_config(config)


def test_what_groups_cannot_honour_is_refused(tmp_path: Path) -> None:
    for group in (7, 0):
        with pytest.raises(InputError, match=f"shifted_attention={group} must be an even number of tokens"):
            CausalLMModule("somewhere", shifted_attention=group)
    with pytest.raises(InputError, match="leave attn_implementation='eager' out"):
        CausalLMModule("somewhere", shifted_attention=8, attn_implementation="eager")
    with pytest.raises(ModelError, match="MistralForCausalLM has .*sliding.*limit attention already"):
        ShiftedSparseAttention(tiny(tmp_path / "mistral", "mistral", sliding_window=16), 8)
    model = tiny(tmp_path / "llama", "llama")
    ShiftedSparseAttention(model, 8)
    ids = torch.randint(3, 256, (2, 16))
    model.train()
    with pytest.raises(InputError, match="examples are packed in a row"):
        model(input_ids=ids, position_ids=torch.arange(16).remainder(8).expand(2, -1), use_cache=False)
    left = torch.ones_like(ids)
    left[0, :3] = 0
    with pytest.raises(InputError, match="must be of padding on the right alone"):
        model(input_ids=ids, attention_mask=left, use_cache=False)
    seen = model(input_ids=ids, attention_mask=left.flip(1), use_cache=False).logits
    torch.testing.assert_close(seen, model(input_ids=ids, use_cache=False).logits)  # nobody sees padding on the right


def test_a_model_with_an_attention_of_its_own_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mpt", d_model=16, n_heads=2, n_layers=1, vocab_size=32, max_seq_len=32, expansion_ratio=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="MptForCausalLM computes its attention itself.* would stay full"):
        ShiftedSparseAttention(model, 4)
