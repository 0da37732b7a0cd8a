from __future__ import annotations

import logging
import sys

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lowrank_dist.training import optim
from lowrank_dist.training.optim import OPTIMIZERS, build_optimizer


def parameters():
    return [torch.nn.Parameter(torch.ones(3, 2))]


def test_adamw_gets_its_settings():
    optimizer = build_optimizer(parameters(), name="adamw", lr=0.1, weight_decay=0.2, betas=(0.5, 0.6), eps=1e-5)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.1, 0.2, (0.5, 0.6), 1e-5)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_falls_back_off_cuda_and_says_so_once(name, caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer(parameters(), name=name, lr=0.1, device=torch.device("cpu"))
    assert type(optimizer) is torch.optim.AdamW
    (record,) = caplog.records
    assert f"optimizer={name} needs a CUDA device and this run trains on cpu" in record.getMessage()
    assert "torch.optim.AdamW is used instead" in record.getMessage()


def test_other_ranks_say_nothing(caplog, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    build_optimizer(parameters(), name="paged_adamw_8bit", lr=0.1, device=torch.device("cpu"))
    assert not caplog.records


def test_without_a_device_torch_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert type(build_optimizer(parameters(), name="paged_adamw_8bit", lr=0.1)) is torch.optim.AdamW


@pytest.mark.parametrize(("name", "bits"), [("paged_adamw_32bit", 32), ("paged_adamw_8bit", 8)])
def test_paged_on_cuda_is_bitsandbytes(name, bits, caplog):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimizer = build_optimizer(
        parameters(), name=name, lr=0.1, weight_decay=0.2, betas=(0.5, 0.6), eps=1e-5, device=torch.device("cuda")
    )
    assert isinstance(optimizer, bitsandbytes.optim.optimizer.Optimizer2State)
    assert optimizer.is_paged
    assert optimizer.args.optim_bits == bits
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.1, 0.2, (0.5, 0.6), 1e-5)
    assert not [record for record in caplog.records if record.name == optim.__name__]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_on_cuda(name):
    """The first step of AdamW is lr * sign(grad) up to eps, whatever the precision of the moments."""
    parameter = torch.nn.Parameter(torch.zeros(8192, device="cuda"))
    optimizer = build_optimizer([parameter], name=name, lr=0.5)
    parameter.grad = torch.linspace(-1, 1, 8192, device="cuda")
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -0.5 * parameter.grad.sign(), rtol=1e-3, atol=1e-3)


def test_missing_bitsandbytes_has_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        build_optimizer(parameters(), name="paged_adamw_8bit", lr=0.1, device=torch.device("cuda"))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="'adam8bit' is not known; valid names: adamw, paged_adamw_32bit, paged_adamw_8bit"
    ):
        build_optimizer(parameters(), name="adam8bit", lr=0.1)


def test_bitsandbytes_is_imported_only_when_asked_for():
    assert not hasattr(optim, "bitsandbytes")
