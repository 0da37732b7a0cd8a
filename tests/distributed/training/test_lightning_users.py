"""What Lightning's users do beside ``trainer.fit``, against stock Lightning in one process on the same weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.loggers import RecordingLogger
from helpers.ranks import run_ranks
from helpers.training import dense_state, loader, make_strategy, make_trainer
from lowrank_dist import AdapterCheckpoint, CausalLMModule, LoRA
from lowrank_dist.errors import CheckpointError, InputError, ModelError
from lowrank_dist.training.stage3 import MAX_SKIPPED

STEPS = 4
CLIP = 0.05


class Plain(L.LightningModule):
    """On any strategy: stock transformers and PEFT where `state` is given."""

    def __init__(self, pretrained: Path, state: dict[str, Tensor] | None = None, lr: float = 0.5) -> None:
        super().__init__()
        self.pretrained, self.state, self.model, self.lr = pretrained, state, None, lr
        self.losses: list[float] = []
        self.seen: list[Any] = []

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if self.state is None:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.pretrained))
            return
        self.model = AutoModelForCausalLM.from_pretrained(self.pretrained, dtype=torch.float32)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"), self.model)
        assert not self.model.load_state_dict(self.state, strict=False).missing_keys
        self.model.train()

    def loss(self, batch: Any) -> Tensor:
        loss = self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss
        mean = loss.detach().clone()
        self.losses.append(float(self.trainer.strategy.reduce(mean, reduce_op="mean")))
        return loss

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Norms(Plain):
    """Logs gradients before they are clipped by the Trainer."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = grad_norm(self, norm_type=2)
        assert len(norms) == 1 + len([p for p in self.parameters() if p.requires_grad])
        self.seen.append(float(norms["grad_2.0_norm_total"]))


class ClipsInHook(Plain):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=CLIP / 20, gradient_clip_algorithm="value")


class Scales(Plain):
    """Changes gradients in place."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.25)


class Manual(Plain):
    """Two batches a step, clipped by torch, then by Lightning."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        if index % 2 == 0:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch) / 2)
        if index % 2 == 1:
            if index == 1:
                norm = torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP)
                self.seen.append(float(norm))
            else:
                self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            optimizer.step()


class Forgets(Manual):
    """Drops the gradients of the first batch of two."""

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        if index % 2 == 1:
            optimizer.step()
        optimizer.zero_grad()


MODULES: dict[str, tuple[type[Plain], dict[str, Any]]] = {
    "grad_norm": (Norms, {"gradient_clip_val": CLIP}),
    "grad_norm of two batches": (Norms, {"accumulate_grad_batches": 2}),
    "clip_gradients by value": (ClipsInHook, {}),
    "gradients changed in a hook": (Scales, {}),
    "clip_grad_norm_ in manual optimization": (Manual, {}),
    "zero_grad in manual optimization": (Forgets, {}),
}


def with_gradients(pretrained: Path) -> dict[str, Any]:
    found = {}
    for name, (kind, options) in MODULES.items():
        module, strategy = kind(pretrained), make_strategy(pretrained, quantization=None)
        trainer = make_trainer(strategy, steps=-1, max_epochs=1, **options)
        trainer.fit(module, loader(trainer.global_rank, trainer.world_size, STEPS))
        assert all(parameter.grad is None for parameter in module.parameters())
        found[name] = module.losses, module.seen, dense_state(strategy)
    return found


def stock_trainer(**options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **{**quiet, **options})


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_there_and_may_be_changed(llama: Path, ranks: int) -> None:
    """In hooks and in manual optimization: fp32, only the order of sums differs."""
    for name, (losses, seen, state) in run_ranks(ranks, with_gradients, llama)[0].items():
        kind, options = MODULES[name]
        stock = kind(llama, state)
        stock_trainer(max_epochs=1, **options).fit(stock, loader(0, 1, STEPS))
        assert losses == pytest.approx(stock.losses, rel=1e-5), name
        assert seen == pytest.approx(stock.seen, rel=1e-4), name
        assert bool(seen) == (kind in (Norms, Manual))


# -- learning rates ---------------------------------------------------------------------------------------------------


class Adam(Plain):
    def configure_optimizers(self) -> Any:
        mine = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(mine, lr=self.lr, betas=(0.8, 0.99), weight_decay=0.125)


def search(pretrained: Path, output: Path, only: str) -> tuple[Any, ...]:
    """Losses and rates of a search; then of the fit that follows it in the same call, and of a fit without a search."""
    module = Adam(pretrained, None, 1e-3)
    strategy = make_strategy(pretrained, quantization=None)
    mine = loader(torch.distributed.get_rank(), torch.distributed.get_world_size(), 8)
    if only == "tuner":
        trainer = make_trainer(strategy, steps=2, default_root_dir=output)
        finder = Tuner(trainer).lr_find(module, mine, min_lr=1e-5, max_lr=0.3, num_training=6, update_attr=False)
        state = dense_state(strategy) if strategy.gathering is not None else None
        with pytest.raises(ModelError, match="make a new module, strategy and Trainer"):
            trainer.fit(module, mine)
        return finder.results["lr"], finder.results["loss"], state
    callbacks = [LearningRateFinder(min_lr=1e-5, max_lr=0.3, num_training_steps=6, update_attr=False)]
    trainer = make_trainer(
        strategy, steps=3, default_root_dir=output, callbacks=callbacks if only == "callback" else []
    )
    trainer.fit(module, mine)
    assert trainer.global_step == 3
    assert not list(output.glob(".lr_find*"))
    return module.losses[-3:], dense_state(strategy)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_search_for_the_learning_rate_leaves_no_trace(llama: Path, tmp_path: Path, ranks: int) -> None:
    rates, losses, _ = run_ranks(ranks, search, llama, tmp_path, "tuner")[0]
    (after, state), (expected, _) = (run_ranks(ranks, search, llama, tmp_path, name)[0] for name in ("callback", ""))
    assert after == expected
    stock = Adam(llama, state, 1e-3)
    tuner = Tuner(stock_trainer(max_steps=2, default_root_dir=tmp_path))
    results = tuner.lr_find(stock, loader(0, 1, 8), min_lr=1e-5, max_lr=0.3, num_training=6, update_attr=False).results
    assert rates == pytest.approx(results["lr"])
    if ranks == 1:  # Lightning looks at rank 0's loss alone
        assert losses == pytest.approx(results["loss"], rel=1e-5)


# -- the rest ---------------------------------------------------------------------------------------------------------


def monitored(pretrained: Path, output: Path) -> None:
    trainer = make_trainer(
        make_strategy(pretrained),
        steps=2,
        callbacks=[LearningRateMonitor(log_momentum=True, log_weight_decay=True)],
        log_every_n_steps=1,
    )
    trainer.loggers = [RecordingLogger()]
    trainer.fit(Adam(pretrained, None, 1e-3), mine(trainer))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = {"lr-AdamW": 1e-3, "lr-AdamW-momentum": 0.8, "lr-AdamW-weight_decay": 0.125}
    assert found == pytest.approx(expected)
    assert expected.keys() <= trainer.loggers[0].metrics


def mine(trainer: L.Trainer, batches: int = STEPS) -> Any:
    return loader(trainer.global_rank, trainer.world_size, batches)


def auto(pretrained: Path, output: Path) -> None:
    """A configuration as it is for transformers' Trainer."""
    config = {
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 0},
        "zero_allow_untested_optimizer": True,
    }
    trainer = make_trainer(make_strategy(pretrained, config=config), steps=1, gradient_clip_val=0.25)
    trainer.fit(Plain(pretrained), mine(trainer))
    assert trainer.strategy.deepspeed_engine.gradient_clipping() == 0.25
    assert config["gradient_clipping"] == "auto"  # the user's own
    optimizer = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    with pytest.raises(InputError, match='has "auto" in its section optimizer'):
        make_strategy(pretrained, config=config | optimizer)


class WithoutOptimizer(Plain):
    def configure_optimizers(self) -> Any:
        return None


class Backward(Plain):
    def backward(self, loss: Tensor, *args: Any) -> None:
        loss.mul(2).backward()


def refusals(pretrained: Path, output: Path) -> None:
    for kind, options, message in (
        (WithoutOptimizer, {}, "configure_optimizers returned None"),
        (Backward, {}, "Backward overrides backward"),
        (Plain, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "DeepSpeed clips by norm alone"),
    ):
        trainer = make_trainer(make_strategy(pretrained), steps=1, **options)
        with pytest.raises(InputError, match=message):
            trainer.fit(kind(pretrained), mine(trainer))


class Plateau(Plain):
    """A metric that only rises, by which the rate is halved at every epoch from the second on."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "rising"}}

    def on_train_epoch_end(self) -> None:
        self.log("rising", float(self.trainer.current_epoch))
        self.seen.append((self.trainer.current_epoch, self.optimizers().param_groups[0]["lr"]))


def plateau(pretrained: Path, output: Path) -> None:
    saving = AdapterCheckpoint(output / "plateau", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    runs = {}
    for resumed in (None, output / "plateau" / "epoch=1"):
        module = Plateau(pretrained)
        options = {} if resumed else {"callbacks": [saving], "enable_checkpointing": True}
        trainer = make_trainer(make_strategy(pretrained), steps=-1, max_epochs=5, **options)
        trainer.fit(module, mine(trainer, 2), ckpt_path=resumed)
        runs[resumed is None] = module
    assert [rate for _, rate in runs[True].seen] == [0.5, 0.5, 0.25, 0.125, 0.0625]
    # as with stock Lightning: the checkpoint comes before the schedule is told of its epoch, but knows the best before
    assert runs[False].seen == [(2, 0.5), (3, 0.25), (4, 0.125)]
    assert runs[False].losses[0] == runs[True].losses[4]


def several_fits(pretrained: Path, output: Path) -> None:
    """With one Trainer, which accumulates and clips otherwise the second time; each as with a new one."""
    reused = make_trainer(make_strategy(pretrained), steps=-1, max_epochs=1)
    found = []
    for trainer in (reused, reused, make_trainer(make_strategy(pretrained), steps=-1, max_epochs=1)):
        if found:
            trainer.accumulate_grad_batches, trainer.gradient_clip_val = 2, CLIP
        if len(found) == 1:
            trainer.fit_loop.max_epochs = 2
        L.seed_everything(1, verbose=False)
        module, before = Adam(pretrained, None, 1e-3), trainer.global_step
        trainer.fit(module, mine(trainer))
        clip = trainer.strategy.deepspeed_engine.gradient_clipping()
        found.append((trainer.global_step - before, module.losses, clip))
    assert (found[0][0], found[0][2]) == (STEPS, 0.0)
    assert found[1] == found[2]
    assert (found[2][0], found[2][2]) == (STEPS // 2, CLIP)
    with pytest.raises(ModelError, match="make a new module, strategy and Trainer"):
        trainer.fit(module, mine(trainer))
    with pytest.raises(MisconfigurationException):  # of Lightning: a strategy belongs to one Trainer
        make_trainer(trainer.strategy)


def loaded(pretrained: Path, output: Path) -> None:
    trainer = make_trainer(make_strategy(str(pretrained)), steps=1)
    trainer.fit(Plain(pretrained), mine(trainer))
    trainer.save_checkpoint(output / "saved")
    for kind in (CausalLMModule, Plain):
        with pytest.raises((InputError, IsADirectoryError)) as error:
            kind.load_from_checkpoint(output / "saved")
        assert kind is Plain or "is a directory of adapters" in str(error.value)


def seeds(pretrained: Path, output: Path) -> None:
    """Of LoRA's A and of the order of data; ranks must agree on it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for seed in ("0", "1"):
            patch.setenv("PL_GLOBAL_SEED", seed)
            trainer = make_trainer(make_strategy(pretrained, init=LoRA()), steps=2)
            module = Plain(pretrained)
            trainer.fit(module, mine(trainer))
            found[seed] = module.losses
        assert found["0"][0] == found["1"][0]  # the original model
        assert found["0"][1] != found["1"][1]
        patch.setenv("PL_GLOBAL_SEED", str(trainer.global_rank))
        with pytest.raises(InputError, match=r"different seeds \(0 on rank 0, 1 on rank 1\)"):
            make_trainer(make_strategy(pretrained, init=LoRA()), steps=1).fit(Plain(pretrained), mine(trainer))


class Counts(Plain):
    """Buffers of its own, one of them no part of its state."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.batches += 1
        return super().training_step(batch, _)


class CountsMore(Counts):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches = torch.zeros(3)


def buffers(pretrained: Path, output: Path) -> None:
    module, saved = Counts(pretrained), output / "counted"
    trainer = make_trainer(make_strategy(pretrained), steps=3)
    trainer.fit(module, mine(trainer))
    trainer.save_checkpoint(saved)
    again = Counts(pretrained)
    trainer = make_trainer(make_strategy(pretrained), steps=5)
    trainer.fit(again, mine(trainer, 5), ckpt_path=saved)
    assert int(again.batches) == 5
    assert again.scratch.tolist() == [0, 0]
    trainer = make_trainer(make_strategy(pretrained), steps=5)
    with pytest.raises(CheckpointError, match="CountsMore cannot take the buffers of its run: .*size mismatch"):
        trainer.fit(CountsMore(pretrained), mine(trainer, 5), ckpt_path=saved)
    trainer = make_trainer(make_strategy(pretrained), steps=5)
    warned = pytest.warns(UserWarning, match="Plain has no batches; left out")
    with warned if trainer.global_rank == 0 else nullcontext():
        trainer.fit(Plain(pretrained), mine(trainer, 5), ckpt_path=saved)


class Asks(Plain):
    """Ranks answer at different lengths."""

    def validation_step(self, batch: Any, _: int) -> None:
        new = 3 + 4 * self.trainer.global_rank
        found = self.model.generate(batch[0][:1, :4], max_new_tokens=new, do_sample=False, eos_token_id=-1)
        self.seen.append(found.shape[1] - 4 - new)


def answers_of_different_lengths(pretrained: Path, output: Path) -> None:
    trainer, module = make_trainer(make_strategy(pretrained), steps=2), Asks(pretrained)
    trainer.fit(module, mine(trainer, 2), mine(trainer, 1))
    assert module.seen
    assert set(module.seen) == {0}


class Breaks(Plain):
    """Its loss is NaN from the second step on, but for the last one."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss, step = super().training_step(batch, _), self.trainer.global_step
        return loss * float("nan") if 1 <= step < self.trainer.max_steps - 1 else loss


def skipped_steps(pretrained: Path, output: Path) -> None:
    """Parameters stay as they are, which a line says; in the end it is an error."""
    trainer, module = make_trainer(make_strategy(pretrained), steps=4), Breaks(pretrained)
    warned = pytest.warns(UserWarning, match="step 2: gradients are infinite or NaN; DeepSpeed leaves the step out")
    with warned if trainer.global_rank == 0 else nullcontext():
        trainer.fit(module, mine(trainer))
    assert trainer.global_step == 4
    trainer = make_trainer(make_strategy(pretrained), steps=MAX_SKIPPED + 5)
    with pytest.raises(InputError, match=f"step {MAX_SKIPPED + 1}: gradients are .*, in {MAX_SKIPPED} steps"):
        trainer.fit(Breaks(pretrained), mine(trainer))


class LooksEarly(Plain):
    def on_after_backward(self) -> None:
        self.seen += [parameter for parameter in self.parameters() if parameter.grad is not None]


def gradients_after_backward(pretrained: Path, output: Path) -> None:
    trainer, module = make_trainer(make_strategy(pretrained), steps=1), LooksEarly(pretrained)
    warned = pytest.warns(UserWarning, match="LooksEarly.on_after_backward sees no gradients")
    with warned if trainer.global_rank == 0 else nullcontext():
        trainer.fit(module, mine(trainer))
    assert not module.seen


CASES = (
    monitored,
    auto,
    refusals,
    plateau,
    several_fits,
    loaded,
    seeds,
    buffers,
    answers_of_different_lengths,
    skipped_steps,
    gradients_after_backward,
)


def every_case(pretrained: Path, output: Path) -> None:
    for case in CASES:
        try:
            case(pretrained, output)
        except Exception as error:
            raise AssertionError(f"{case.__name__}: {type(error).__name__}: {error}") from error


def test_the_rest(llama: Path, tmp_path: Path) -> None:
    run_ranks(2, every_case, llama, tmp_path)
