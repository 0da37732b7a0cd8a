"""Packed examples that see each other are refused, whichever model and module computes them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.models import ARCHITECTURES
from lowrank_dist.errors import InputError
from lowrank_dist.training.packed_examples import PackedExamples

APART = ["llama", "qwen2", "mistral", "gemma", "phi", "gpt2", "mixtral"]
MASKED = {
    "gpt_oss": {"sliding_window": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64, "dropout": 0.0},
    "falcon": {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
}
SEEING = {
    "bloom": {"n_layer": 1, "n_head": 2},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "block_multiple_of": 8},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "head_dim": 16,
        "moe_intermediate_size": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def model_of(kind: str, **settings):
    torch.manual_seed(0)
    shape = ARCHITECTURES.get(kind, ARCHITECTURES["llama"]) | (MASKED | SEEING).get(kind, {}) | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, initializer_range=0.2))
    return model.train()


def packed(rows: int = 2) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 256, (rows, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "position_ids": torch.cat([torch.arange(9), torch.arange(15)]).repeat(rows, 1)}


def difference_alone(model, batch) -> float:
    """What the definition says: the second example's logits within the first row, and alone."""
    model.eval()
    with torch.no_grad():
        within = model(**batch, use_cache=False).logits[0, 9:]
        alone = model(input_ids=batch["input_ids"][:1, 9:], use_cache=False).logits[0]
    return (within - alone).abs().max().item()


@pytest.mark.parametrize("kind", APART)
def test_models_that_keep_examples_apart_pass_and_are_asked_once(kind):
    model, batch = model_of(kind), packed()
    assert difference_alone(model, batch) < 1e-4
    model.train()
    calls = []
    model.base_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    PackedExamples(model)
    loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
    loss.backward()
    model(**batch, use_cache=False)
    assert calls == [False] * 3 + [True] * 2
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", MASKED)
def test_models_that_take_a_mask_are_given_one(kind, caplog):
    """Losses and gradients of packed rows are those of the examples alone, and the line is said once."""
    model, batch = model_of(kind), packed()
    assert difference_alone(model, batch) > 1e-2
    PackedExamples(model.train())
    ids, positions = batch.values()
    loss = 0
    for row in ids:
        for example in (row[:9], row[9:]):
            logits = model(input_ids=example[None], use_cache=False).logits[0, :-1]
            loss += F.cross_entropy(logits, example[1:], reduction="sum")
    expected = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        model(ids, None, position_ids=positions, use_cache=False)
    assert sum("it is given masks" in record.message for record in caplog.records) == 1
    loss = sum(
        F.cross_entropy(row[part][:-1], tokens[part][1:], reduction="sum")
        for row, tokens in zip(logits, ids, strict=True)
        for part in (slice(9), slice(9, None))
    )
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_device_without_memory_is_no_model_without_masks():
    model, batch = model_of("opt"), packed()
    PackedExamples(model)

    def full(_, __, kwargs):
        if kwargs.get("attention_mask") is not None:
            raise torch.OutOfMemoryError("no memory for a mask")

    model.register_forward_pre_hook(full, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for a mask"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("kind", SEEING)
def test_models_whose_examples_see_each_other_are_refused_by_name(kind):
    model, batch = model_of(kind), packed()
    if kind not in ("bloom", "mamba"):
        assert difference_alone(model, batch) > 1e-2
    model.train()
    PackedExamples(model)
    arguments = {"labels": batch["input_ids"], "use_cache": False}
    with pytest.raises(InputError, match=f"see each other in {type(model).__name__}.*packing=False"):
        model(**batch, **arguments)
    one_each = batch | {"position_ids": torch.arange(24).repeat(2, 1)}
    assert model(**one_each, **arguments).loss.isfinite()
    with pytest.raises(InputError, match="see each other"):
        model(**batch, **arguments)


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_a_batch_of_one_token_and_several_ends(kind):
    """Of what is in the batch alone, neighbours would be equal; LLaMA-3's configuration lists three ends."""
    model = model_of(kind, eos_token_id=[2, 250, 251])
    PackedExamples(model)
    batch = packed() | {"input_ids": torch.full((2, 24), 7)}
    if kind == "llama":
        assert model(**batch, use_cache=False).logits.isfinite().all()
    else:
        with pytest.raises(InputError, match="see each other"):
            model(**batch, use_cache=False)


def test_padded_batches_are_not_asked():
    model, batch = model_of("lfm2"), packed()
    PackedExamples(model)
    assert model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).logits.isfinite().all()


def test_a_cache_mixes_examples_and_is_named():
    """transformers looks for borders only without a cache, which models make unless they are asked not to."""
    model = model_of("llama")
    PackedExamples(model)
    with pytest.raises(InputError, match="pass use_cache=False"):
        model(**packed())


def test_attention_that_separates_single_rows_only():
    """As flash attention does (`_is_packed_sequence` in transformers); here by sdpa with and without a mask."""

    def one_row(module, query, key, value, attention_mask, **kwargs):
        mask = attention_mask if len(query) == 1 else None
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("one_row", one_row)
    AttentionMaskInterface.register("one_row", sdpa_mask)
    model = model_of("llama", attn_implementation="one_row")
    PackedExamples(model)
    model(**packed(rows=1), use_cache=False)
    with pytest.raises(InputError, match="one_row attention tells them apart only in batches of one row"):
        model(**packed(rows=2), use_cache=False)


def test_bf16_rounding_is_no_difference_and_a_leak_still_is():
    model = model_of("llama").bfloat16()
    PackedExamples(model)
    model(**packed(), use_cache=False)
    leaking = model_of("lfm2").bfloat16()
    PackedExamples(leaking)
    with pytest.raises(InputError, match="Lfm2ForCausalLM"):
        leaking(**packed(), use_cache=False)


def test_other_tensors_are_not_invented_and_that_is_said():
    model = model_of("llama")
    PackedExamples(model)
    with pytest.warns(UserWarning, match="with cu_seq_lens_q: it was not checked that LlamaForCausalLM"):
        model(**packed(), use_cache=False, cu_seq_lens_q=F.pad(torch.tensor([9, 24], dtype=torch.int32), (1, 0)))
