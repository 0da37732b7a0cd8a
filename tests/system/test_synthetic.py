"""Synthetic weights: their spectrum, and that they do not depend on how they are asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SyntheticWeights
from transformers import AutoConfig, LlamaConfig, MixtralConfig

from helpers.models import ARCHITECTURES
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.storage.source import WeightSource

CONFIG = LlamaConfig(
    hidden_size=48,
    intermediate_size=150,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=2311,  # three tiles, the last one short
)
GATE, KEY, HEAD = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.2])
@pytest.mark.parametrize("name", [GATE, KEY, HEAD, "model.layers.0.mlp.down_proj.weight"])
def test_singular_values_are_those_stated(name: str, decay: float) -> None:
    """fp32 rounding: two transforms of unit norm and as many roundings of every entry, 1e-6 of the largest."""
    source = SyntheticWeights(config=CONFIG, decay=decay, dtype=torch.float32)
    rows, columns = source.tensors[name].shape
    weight = source.rows(name, 0, rows).double()
    values, stated = torch.linalg.svdvals(weight), source.spectrum(rows, columns).double()
    assert values.tolist() == pytest.approx(stated.tolist(), abs=1e-6 * float(stated[0]))
    ranks = torch.arange(1, len(stated) + 1, dtype=torch.float64)
    assert (stated / stated[0]).tolist() == pytest.approx((ranks**-decay).tolist(), rel=1e-6)
    assert float(weight.square().sum()) == pytest.approx(rows, rel=1e-6)


@given(st.sampled_from([GATE, KEY, HEAD]), st.data())
def test_rows_do_not_depend_on_the_cut(name: str, data: st.DataObject) -> None:
    """Bit for bit, through the reader as the walk uses it, by rows and by elements."""
    reader = open_reader(SyntheticWeights(config=CONFIG))
    rows, columns = reader.info(name).shape
    whole = reader.rows(name, 0, rows)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(reader.rows(name, start, stop), whole[start:stop])
    first = data.draw(st.integers(0, rows * columns - 1))
    last = data.draw(st.integers(first + 1, min(first + 2000, rows * columns)))
    assert torch.equal(reader.flat(name, first, last), whole.flatten()[first:last])


def test_weights_differ_by_name_and_seed_and_fingerprints_with_them() -> None:
    sources = [
        SyntheticWeights(config=CONFIG),
        SyntheticWeights(config=CONFIG, seed=1),
        SyntheticWeights(config=CONFIG, decay=0.6),
    ]
    up = GATE.replace("gate", "up")
    found = [source.rows(name, 0, 8) for source in sources for name in (GATE, up)]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert len({source.fingerprint for source in sources}) == 3
    assert sources[0].fingerprint == SyntheticWeights(config=CONFIG).fingerprint


def test_norms_are_ones_biases_zeros_and_experts_matrices_of_their_own() -> None:
    source: WeightSource = SyntheticWeights(
        config=AutoConfig.for_model("qwen2", **ARCHITECTURES["qwen2"]), dtype=torch.float32
    )
    assert torch.equal(source.rows("model.norm.weight", 2, 7), torch.ones(5))
    assert torch.equal(source.rows("model.layers.0.self_attn.q_proj.bias", 0, 3), torch.zeros(3))
    mixture = SyntheticWeights(config=MixtralConfig(**ARCHITECTURES["mixtral"]), dtype=torch.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts = mixture.rows(name, 0, 4)
    assert experts.shape == mixture.tensors[name].shape
    assert torch.equal(mixture.rows(name, 2, 3), experts[2:3])
    assert not torch.equal(experts[0], experts[1])
    reader = open_reader(mixture)
    assert torch.equal(reader.rows(reader.entry(name, 3), 5, 9), experts[3, 5:9])
