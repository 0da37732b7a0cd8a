"""Losses of pairs and their gradients are those of TRL on the same batch; the reference stays that of step 0."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.sft import save_material, write_jsonl
from lowrank_dist import CausalLMModule, InputError, PreferenceModule, SFTDataModule
from lowrank_dist.training.pair_losses import dpo, odds_ratio, simpo

QUESTIONS = [f"what is {a} and {b}?" for a in (2, 3) for b in (1, 2)]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": "It is four." + " one" * place}],
        "rejected": [{"role": "assistant", "content": "hello world" + " two" * (3 - place)}],
    }
    for place, question in enumerate(QUESTIONS)
]
STEPS = 3
# fp32 of both: log-probabilities of 20 tokens of 6 each are rounded by 1e-5 together
FP32 = 2e-5

log_probs = st.lists(st.floats(-60, -1e-6), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_material(tmp_path_factory.mktemp("pairs"), PAIRS)
    write_jsonl(directory / "test.jsonl", PAIRS[:3])
    return directory


class Recorded(PreferenceModule):
    """Keeps of every step the batch, the weights before it, its loss and its gradients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[SimpleNamespace] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        weights = copy.deepcopy(self.model.state_dict())
        loss = super().training_step(batch, batch_idx)
        self.steps.append(SimpleNamespace(batch=batch, weights=weights, loss=float(loss)))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps[-1].gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}


def trainer_of(directory: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        num_sanity_val_steps=0,
        **{"enable_checkpointing": False, "max_steps": STEPS, **options},
    )


def fitted(material: Path, tmp_path: Path, **options: Any) -> Recorded:
    module = Recorded(str(material / "model"), lr=3e-2, scheduler="constant", warmup_ratio=0.0, **options)
    data = SFTDataModule(str(material / "model"), str(material / "data.jsonl"), batch_size=4)
    trainer_of(tmp_path).fit(module, data)
    return module


def of_trl(kind: str, policy: Any, reference: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """Loss of TRL's trainers, of which only what the loss reads is made."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
    )
    labels = batch["labels"]
    if kind == "dpo":
        from trl import DPOTrainer
        from trl.trainer.dpo_trainer import add_fused_lm_head

        add_fused_lm_head(policy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        add_fused_lm_head(reference)
        made = object.__new__(DPOTrainer)
        made.__dict__ |= {
            "accelerator": accelerator,
            "model": policy,
            "ref_model": reference,
            "beta": options["beta"],
            "label_smoothing": options.get("label_smoothing", 0.0),
            "loss_types": ["sigmoid"],
            "loss_weights": [1.0],
            "f_divergence_type": "reverse_kl",
            "ld_alpha": None,
            "use_weighting": False,
            "aux_loss_enabled": False,
            "precompute_ref_logps": False,
            "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
            "_metrics": {mode: defaultdict(list) for mode in ("train", "eval")},
            "_total_train_tokens": 0,
            "_tp_size": 1,
        }
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "completion_mask": (labels != -100).long(),
        }
        return made._compute_loss(policy, inputs, return_outputs=False)
    if kind == "orpo":
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOTrainer as Trainer
    made = object.__new__(Trainer)
    made.__dict__ |= {
        "accelerator": accelerator,
        "is_encoder_decoder": False,
        "aux_loss_enabled": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "beta": options["beta"],
        "label_smoothing": options.get("label_smoothing", 0.0),
        "loss_type": "simpo",
        "simpo_gamma": options.get("gamma"),
        "cpo_alpha": 0.0,
        "alpha": 0.0,
    }
    pairs = {
        f"{side}_{name}": batch[key].chunk(2)[place]
        for place, side in enumerate(("chosen", "rejected"))
        for name, key in (("input_ids", "input_ids"), ("attention_mask", "attention_mask"), ("labels", "labels"))
    }
    loss, _ = made.get_batch_loss_metrics(policy, pairs)
    return loss


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"loss": "dpo"}, {"beta": 0.1}),
        ({"loss": "dpo", "beta": 0.5}, {"beta": 0.5}),
        ({"loss": "orpo"}, {"beta": 0.1}),
        ({"loss": "simpo"}, {"beta": 2.0, "gamma": 1.0}),
        # of its DPO, TRL smooths another loss (robust DPO) only
        ({"loss": "simpo", "label_smoothing": 0.1}, {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.1}),
    ],
)
# the class of TRL says so of itself
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_losses_and_gradients_are_those_of_trl(
    options: dict[str, Any], theirs: dict[str, Any], material: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    module = fitted(material, tmp_path, **options)
    pretrained = AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32)
    last = module.steps[-1]
    policy = copy.deepcopy(pretrained)
    policy.load_state_dict(last.weights)
    loss = of_trl(options["loss"], policy, pretrained, last.batch, **theirs)
    assert last.loss == pytest.approx(float(loss), rel=FP32)
    loss.backward()
    for name, parameter in policy.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(last.gradients[name], parameter.grad, rtol=1e-3, atol=float(scale) * 1e-4)
    if options["loss"] == "dpo":
        assert module.steps[0].loss == pytest.approx(math.log(2), rel=FP32)  # the model is its own reference
        assert abs(last.loss - math.log(2)) > 1e-2  # and no longer


@given(log_probs, st.floats(0.01, 3.0), st.floats(0.0, 2.0), st.floats(0.0, 0.4))
@settings(max_examples=30, deadline=None)
def test_losses_are_the_formulas_of_the_papers(values: list[float], beta: float, gamma: float, smooth: float) -> None:
    """In fp64, by the definitions: 1e-6 of values near 0 is lost where 1 - p is computed from p."""
    chosen = torch.tensor(values, dtype=torch.float64)
    rejected = chosen.flip(0) - 0.5
    sigma = torch.sigmoid

    def of(margin: Tensor) -> Tensor:
        return -(1 - smooth) * sigma(margin).log() - smooth * sigma(-margin).log()

    margin = beta * (chosen - rejected)
    torch.testing.assert_close(dpo(chosen, rejected, beta=beta, label_smoothing=smooth), of(margin))
    found = simpo(chosen, rejected, beta=beta, gamma=gamma, label_smoothing=smooth)
    torch.testing.assert_close(found, of(margin - gamma))
    odds = (chosen.exp() / (1 - chosen.exp())) / (rejected.exp() / (1 - rejected.exp()))
    torch.testing.assert_close(odds_ratio(chosen, rejected), -sigma(odds.log()).log(), rtol=1e-6, atol=1e-9)


def test_the_odds_ratio_has_a_gradient_at_certainty() -> None:
    for value in (0.0, -1e-9, -100.0):
        chosen = torch.tensor([value], requires_grad=True)
        loss = odds_ratio(chosen, torch.tensor([-1.0])).sum()
        loss.backward()
        assert loss.isfinite()
        assert chosen.grad.isfinite().all()


def test_evaluation_is_over_all_pairs(material: Path, tmp_path: Path) -> None:
    """Three pairs in batches of two: each counts the same."""
    model, test = str(material / "model"), str(material / "test.jsonl")
    one, two = (
        trainer_of(tmp_path).test(
            PreferenceModule(model, loss="simpo"), SFTDataModule(model, test, test=test, batch_size=size), verbose=False
        )[0]
        for size in (1, 2)
    )
    assert set(one) == {"test_loss", "test_reward_accuracy", "test_reward_margin"}
    assert one == pytest.approx(two, rel=1e-4)
    assert one["test_reward_accuracy"] in [pytest.approx(k / 3) for k in range(4)]


def test_the_reference_survives_a_resumed_run_of_the_whole_model(material: Path, tmp_path: Path) -> None:
    """Under Lightning's own strategy, whose checkpoint holds the trained weights alone."""
    whole = fitted(material, tmp_path)
    data = SFTDataModule(str(material / "model"), str(material / "data.jsonl"), batch_size=4)
    options = {"lr": 3e-2, "scheduler": "constant", "warmup_ratio": 0.0}
    first = Recorded(str(material / "model"), **options)
    trainer = trainer_of(tmp_path, max_steps=2)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    second = Recorded(str(material / "model"), **options)
    data = SFTDataModule(str(material / "model"), str(material / "data.jsonl"), batch_size=4)
    trainer_of(tmp_path).fit(second, data, ckpt_path=tmp_path / "two.ckpt", weights_only=False)
    assert [step.loss for step in second.steps] == [whole.steps[2].loss]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ipo"}, "loss='ipo' is not known; valid names: dpo, orpo, simpo"),
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be at least 0 and below 0.5"),
        ({"loss": "orpo", "label_smoothing": 0.1}, "has no effect on loss='orpo'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceModule("x", **options)


def test_module_and_data_must_have_one_task(material: Path, tmp_path: Path) -> None:
    model, pairs = str(material / "model"), str(material / "data.jsonl")
    with pytest.raises(InputError, match="PreferenceModule trains on batches for 'preference', but .* task='sft'"):
        trainer_of(tmp_path).fit(PreferenceModule(model), SFTDataModule(model, pairs, task="sft"))
    with pytest.raises(InputError, match="are a preference pair; train on it with PreferenceModule"):
        trainer_of(tmp_path).fit(CausalLMModule(model), SFTDataModule(model, pairs))
