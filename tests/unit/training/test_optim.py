from __future__ import annotations

import logging
import sys

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from helpers.sft import tiny_llama
from lowrank_dist.errors import InputError
from lowrank_dist.training import optim
from lowrank_dist.training.module import CausalLMModule
from lowrank_dist.training.optim import build_optimizer
from lowrank_dist.zero3.elementwise import check_class, check_elementwise


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
@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
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


# --------------------------------------------------------------------------------------------- by import path
def test_a_class_by_path_gets_its_options():
    optimizer = build_optimizer(
        parameters(),
        name="torch.optim.RMSprop",
        lr=0.1,
        weight_decay=0.2,
        options={"momentum": 0.5, "centered": True},
    )
    assert type(optimizer) is torch.optim.RMSprop
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"], group["centered"]) == (0.1, 0.2, 0.5, True)


def test_options_of_adamw_go_before_its_own():
    (group,) = build_optimizer(parameters(), lr=0.1, options={"amsgrad": True, "eps": 1e-6}).param_groups
    assert (group["amsgrad"], group["eps"], group["betas"]) == (True, 1e-6, (0.9, 0.999))


def test_weight_decay_is_not_dropped_where_a_class_has_none():
    class NoDecay(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

    sys.modules[__name__].NoDecay = NoDecay
    assert "weight_decay" not in build_optimizer(parameters(), name=f"{__name__}.NoDecay", lr=0.1).defaults
    with pytest.raises(ValueError, match="NoDecay does not take lr, weight_decay"):
        build_optimizer(parameters(), name=f"{__name__}.NoDecay", lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torch.optim.Adagard", {}, "'torch.optim.Adagard' is not known"),
        ("no_such.Optimizer", {}, "No module named 'no_such'"),
        ("torch.nn.Linear", {}, "'torch.nn.Linear' is no class derived from torch.optim.Optimizer"),
        ("torch.optim.Adagrad", {"momentum": 0.9}, "torch.optim.adagrad.Adagrad does not take lr, momentum"),
    ],
)
def test_a_wrong_path_or_option_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(parameters(), name=name, lr=0.1, options=options)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "params"])
def test_what_has_an_option_of_its_own_is_not_among_the_options(key):
    with pytest.raises(ValueError, match=f"must not hold '{key}'"):
        CausalLMModule("x", optimizer_options={key: 1})


def test_betas_of_adam_are_not_dropped_by_another_class():
    with pytest.raises(ValueError, match=r"betas=\(0.8, 0.9\) has no effect on optimizer='torch.optim.NAdam'"):
        CausalLMModule("x", optimizer="torch.optim.NAdam", betas=(0.8, 0.9))


# ------------------------------------------------------------------------------------- shards and whole tensors
def optimizers():
    import bitsandbytes.optim as bnb

    return {
        **{name: (getattr(torch.optim, name), {}) for name in ("AdamW", "SGD", "Adagrad", "RMSprop", "RAdam", "NAdam")},
        **{name: (getattr(torch.optim, name), {}) for name in ("Adamax", "Adadelta", "ASGD", "Rprop")},
        "fused": (torch.optim.AdamW, {"fused": True}),
        "Lion": (bnb.Lion, {}),
        "AdEMAMix": (bnb.AdEMAMix, {"t_alpha": 3, "t_beta3": 3}),
        "AdamW8bit": (bnb.AdamW8bit, {}),
    }


@pytest.mark.parametrize("count", [1, 2])
def test_elementwise_optimizers_pass_and_are_left_as_they_were(count):
    for kind, options in optimizers().values():
        # as under ZeRO-3, where parameters are empty between their uses
        groups = [{"params": [torch.nn.Parameter(torch.empty(0))], "lr": 0.1 * (1 + place)} for place in range(count)]
        optimizer = kind(groups, **options)
        before = [(group["params"], dict(group)) for group in optimizer.param_groups]
        state = dict(optimizer.state)
        check_elementwise(optimizer)
        assert dict(optimizer.state) == state
        assert [(group["params"], dict(group)) for group in optimizer.param_groups] == before


class CountsSteps(torch.optim.SGD):
    """Keeps its count in the group, and is stepped once for every flat tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"] / group["count"])


class TransformersAdafactor:
    """Built where it is used: transformers takes a second to import."""

    @staticmethod
    def build(groups):
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=1e-3, relative_step=False, scale_parameter=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Adafactor, "torch.optim.Adafactor would silently .* one second moment per row and column"),
        (TransformersAdafactor.build, "transformers.optimization.Adafactor would silently"),
        (lambda groups: CountsSteps(groups, lr=0.1), "on a trial its steps on shards differ"),
        (torch.optim.SparseAdam, "cannot be tried on flat tensors.*does not support dense gradients"),
    ],
)
def test_optimizers_that_are_not_are_refused_with_a_remedy(make, message):
    groups = [{"params": parameters()}, {"params": parameters()}]
    with pytest.raises(InputError, match=f"{message}.*use an optimizer whose step treats every element alike"):
        check_elementwise(make(groups))


def test_a_count_in_the_group_is_right_with_one_group():
    check_elementwise(CountsSteps(parameters(), lr=0.1))


@pytest.mark.parametrize("name", ["LAMB", "LARS"])
def test_layerwise_ones_of_bitsandbytes_are_refused(name):
    import bitsandbytes.optim

    with pytest.raises(InputError, match="scales the step by the norm of each whole tensor"):
        check_class(getattr(bitsandbytes.optim, name))


def test_those_of_peft_that_pair_a_and_b_are_refused():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_lorafa_optimizer
    from peft.optimizers.riemannian import create_riemannian_optimizer

    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="projects the gradient of B with its own A"):
        check_elementwise(create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-3))
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="preconditions A with its own B"):
        check_elementwise(create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3))
