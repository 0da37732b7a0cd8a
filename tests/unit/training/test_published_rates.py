from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from peft import LoraConfig

from lowrank_dist import NF4, CausalLMModule, LoftQ, LoRA, MiLoRA, PiSSA, published_rates
from lowrank_dist.errors import InputError


def test_every_entry_has_its_source():
    for name in ("pissa", "lora", "loftq", "qera", "svft"):
        for found in published_rates(name, quantized=True, rslora=True):
            assert "arXiv" in found.source or "." in found.source
            assert found.setting
            assert found.rate is None or found.advice == f"{found.rate:g}"


@pytest.mark.parametrize(
    ("init", "quantized", "rates"),
    [
        (PiSSA(), True, [2e-5]),
        ("pissa", False, [2e-5]),
        (LoRA(), False, [None, 2e-4, None]),
        (LoRA(), True, [2e-4, 1e-4, None, 2e-4, None]),
        (LoftQ(), True, [3e-4]),
        ("qera", True, [3e-5]),
        ("svft", False, [5e-2, 5e-3]),
        (MiLoRA(), False, []),
    ],
)
def test_rates_by_method(init, quantized, rates):
    assert [found.rate for found in published_rates(init, quantized=quantized)] == rates


def test_rslora_says_that_rates_do_not_carry_over():
    assert "sqrt(r)" in published_rates("lora", rslora=True)[-1].advice


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match="there is no initialisation 'pisa'; registered are"):
        published_rates("pisa")


def lines(caplog, lr, **strategy):
    module = CausalLMModule("x", **({} if lr is None else {"lr": lr}))
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(**strategy))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        module.on_fit_start()
    assert module.lr == (2e-5 if lr is None else lr)
    return [record.getMessage() for record in caplog.records]


def test_a_fit_with_the_default_rate_says_what_was_published(caplog):
    adapter = LoraConfig(r=4)
    (line,) = lines(caplog, None, init=LoRA(), quantization=NF4(), adapter=adapter)
    assert line.startswith("lr=2e-05 is the default of CausalLMModule; published for LoRA: 0.0002 (LLaMA 7B and 13B")
    assert "arXiv:2305.14314" in line
    assert len(lines(caplog, None, init=PiSSA(), quantization=None, adapter=adapter)) == 1
    assert not lines(caplog, 1e-4, init=LoRA(), quantization=NF4(), adapter=adapter)
    assert not lines(caplog, None, init=MiLoRA(), quantization=None, adapter=adapter)
    assert not lines(caplog, None)
