from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import ARCHITECTURES
from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.training.module import CausalLMModule
from lowrank_dist.training.stage3 import Stage3Strategy
from lowrank_dist.training.token_mean import TokenMean, check_accumulation
from lowrank_dist.zero3.gradients import scale_gradients


def trainer_of(strategy: object, accumulate: int, *, ends: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        world_size=1,
        fit_loop=SimpleNamespace(_should_accumulate=lambda: not ends),
    )


def test_the_host_waits_for_nothing():
    """On meta, where a value cannot be read nor copied to the host: each would raise."""
    gradients = torch.ones(3, device="meta")
    zero = SimpleNamespace(grad_partitions_flat_buffer=gradients)
    strategy = SimpleNamespace(scale_gradients=lambda factor: scale_gradients(zero, factor))
    mean = TokenMean()
    for number in range(3):
        loss = torch.ones((), device="meta", requires_grad=True)
        count = (torch.ones(2, 4, dtype=torch.int64, device="meta") != IGNORE_INDEX).sum()
        trainer = trainer_of(strategy, 3, ends=number == 2)
        weighted, of_step = mean.weighted(loss, count, trainer, first=number == 0)
        weighted.backward()
        assert loss.grad is not None
        assert weighted.dtype == torch.float32
        assert (of_step is None) == (number < 2)
    assert of_step.dtype == torch.float32
    assert gradients._version == 1  # changed once, before the last backward
    with pytest.raises(RuntimeError, match="meta"):
        of_step.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_weight_of_a_token_is_not_rounded_to_the_loss(dtype):
    """A loss of bf16 is weighted in fp32: 1000 tokens of 1001 are 0.999, of which bf16 would make 1."""
    mean, losses = TokenMean(), []
    for number, count in enumerate((1, 1000)):
        loss = torch.ones((), dtype=dtype, requires_grad=True)
        strategy = SimpleNamespace(scale_gradients=lambda factor: losses.append(float(factor)))
        trainer = trainer_of(strategy, 2, ends=number == 1)
        losses.append(mean.weighted(loss, torch.tensor(count), trainer, first=number == 0)[0].item())
    first, factor, last = losses
    # Lightning divides both losses by 2
    assert first * factor / 2 == pytest.approx(1 / 1001, rel=1e-6)
    assert last / 2 == pytest.approx(1000 / 1001, rel=1e-6)


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy(stage=2), FSDPStrategy()], ids=lambda s: type(s).__name__)
def test_gradients_that_cannot_be_rescaled_are_refused(strategy):
    module, trainer = CausalLMModule("unused"), trainer_of(strategy, 4)
    module.trainer = trainer
    with pytest.raises(ValueError, match=f"accumulate_grad_batches=4 .* which {type(strategy).__name__} keeps"):
        module.setup("fit")
    module.setup("validate")
    old = CausalLMModule("unused", average_loss_over="batches")
    old.trainer = trainer
    old.setup("fit")
    module.trainer = trainer = trainer_of(strategy, 1)  # nothing is rescaled
    module.setup("fit")
    loss, count = torch.ones((), requires_grad=True), torch.tensor(7)
    assert TokenMean().weighted(loss, count, trainer, first=True)[0].item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy("cpu"), DDPStrategy(), Stage3Strategy()], ids=lambda s: type(s).__name__
)
def test_gradients_that_can_be_rescaled(strategy):
    check_accumulation(trainer_of(strategy, 4))


# ---------------------------------------------------------------------------------- losses with other terms
BALANCE = 0.5  # weight of the load-balancing loss


class Experts(CausalLMModule):
    """Keeps the gradients of its step."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def on_before_optimizer_step(self, optimizer):
        self.gradients = {name: p.grad.double() for name, p in self.model.named_parameters()}
        self.logged = float(self.trainer.callback_metrics["train_loss"])


def batch_with(answers: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 256, (1, 24), generator=torch.Generator().manual_seed(answers))
    labels = ids.clone()
    labels[:, : 24 - answers] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_the_load_balancing_loss_is_averaged_by_trained_tokens():
    """Gradients and `train_loss` are those of the batches' whole losses, weighted by their answer tokens.

    fp32 against fp64: an entry is rounded some ten times by 6e-8. Weighted equally, the same losses are far off, and
    without the load-balancing loss as well.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", **ARCHITECTURES["mixtral"], output_router_logits=True, router_aux_loss_coef=BALANCE
    )
    model = AutoModelForCausalLM.from_config(config)
    module = Experts("unused")
    module.model = model
    answers = (2, 20, 0)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=1, accumulate_grad_batches=3, **quiet)
    trainer.fit(module, DataLoader([batch_with(count) for count in answers], batch_size=None))

    def gradients(weights, balance=BALANCE):
        exact = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
        exact.load_state_dict(model.state_dict())
        exact.router_aux_loss_coef = balance
        losses = [exact(**batch_with(count)).loss for count in answers[:2]]
        loss = sum(w * one for w, one in zip(weights, losses, strict=True))
        loss.backward()
        return {name: p.grad for name, p in exact.named_parameters()}, loss.item()

    def distance(expected):
        difference = sum((module.gradients[name] - g).square().sum() for name, g in expected.items())
        return (difference / sum(g.square().sum() for g in expected.values())).sqrt().item()

    expected, loss = gradients((2 / 22, 20 / 22))
    assert distance(expected) < 2e-6
    assert module.logged == pytest.approx(loss, rel=1e-6)
    assert distance(gradients((1 / 2, 1 / 2))[0]) > 0.1
    assert distance(gradients((2 / 22, 20 / 22), balance=0.0)[0]) > 0.01
