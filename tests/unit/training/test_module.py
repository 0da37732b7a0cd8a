from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers.ranks import run_ranks
from helpers.sft import byte_level_tokenizer, tiny_llama, write_jsonl
from lowrank_dist import PiSSAStrategy
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.data.packing import Collator, TokenDataset
from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.training.module import CausalLMModule

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
RECORDS = [{"prompt": f"hello {index}", "completion": " world" * (1 + index % 5)} for index in range(11)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaMA and its tokenizer, as a directory."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "train.jsonl", RECORDS)


def random_examples(sizes, vocab_size=512):
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(1, vocab_size, (2, size), generator=generator, dtype=torch.int32) for size in sizes]
    for example in examples:
        example[1] = example[0]
        example[1, 0] = IGNORE_INDEX
    return examples


def module_of(model) -> CausalLMModule:
    module = CausalLMModule("unused")
    module.model = model.eval()
    return module


# --------------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_logits_equal_those_of_the_examples_alone(kind, attention):
    """In fp64, where orders of summation differ by less than 1e-12; LLaMA's eager attention takes its softmax in fp32,
    hence 1e-5 there. A leak between examples is of order 1, as the last lines show."""
    torch.manual_seed(0)
    settings = {"attn_implementation": attention, "initializer_range": 0.3}
    model = (
        tiny_llama(**settings)
        if kind == "llama"
        else GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64, **settings))
    )
    assert model.config.use_cache  # what would switch the separation off, were it used
    module = module_of(model.double())
    examples = random_examples([9, 4, 12, 1, 7, 3, 6])
    packed = TokenDataset(examples, capacity=20)
    batch = Collator(0)([packed[row] for row in range(len(packed))])
    logits = module(**batch).logits
    assert len(packed) == 3
    for row, members in enumerate(packed.rows):
        start = 0
        for member in members:
            alone = Collator(0)([TokenDataset([examples[member]])[0]])
            expected = module(**alone).logits[0, : examples[member].shape[1]]
            found = logits[row, start : start + len(expected)]
            torch.testing.assert_close(
                found, expected, rtol=0, atol=1e-5 if (kind, attention) == ("llama", "eager") else 1e-12
            )
            start += len(expected)
    leaking = module(**batch, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert (leaking - logits).abs().max() > 1


def test_attention_without_masks_gets_one_row(monkeypatch):
    """Flash attention keeps examples apart in a batch of one row only; joining the rows must not change the loss."""
    module = module_of(tiny_llama().double())
    packed = TokenDataset(random_examples([9, 4, 12, 1, 7, 3, 6]), capacity=20)
    batch = Collator(0)([packed[row] for row in range(len(packed))])
    expected = module(**batch).loss
    shapes = []
    forward = module.model.forward

    def spy(**inputs):
        shapes.append({name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        module.model.config._attn_implementation = "sdpa"
        return forward(**inputs)

    monkeypatch.setattr(module.model, "forward", spy)
    module.model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(module(**batch).loss, expected, rtol=1e-12, atol=0)
    assert shapes == [dict.fromkeys(("input_ids", "labels", "position_ids"), (1, 3 * 24))]


# ------------------------------------------------------------------------------------------------ loss
def test_the_loss_is_taken_in_fp32():
    """The loss of bf16 logits is that of their fp32 values: equal bit for bit, where a bf16 loss has 8 bits."""
    module = module_of(tiny_llama().bfloat16())
    batch = Collator(0)([TokenDataset(random_examples([15]))[0]])
    output = module(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    shifted = functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    expected = functional.cross_entropy(output.logits.float().flatten(0, 1), shifted.flatten())
    assert torch.equal(output.loss, expected)


def token_mean(pretrained, path):
    """Mean loss over all trained tokens, one example at a time, without Lightning."""
    data = SFTDataModule(pretrained, path)
    data.setup("fit")
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    total = count = 0
    with torch.no_grad():
        dataset = data.train_dataloader().dataset
        for index in range(len(dataset)):
            item = dataset[index]
            logits = model(input_ids=item["input_ids"][None]).logits[0].double()
            labels = item["labels"]
            total += functional.cross_entropy(
                logits[:-1], labels[1:], reduction="sum", ignore_index=IGNORE_INDEX
            ).item()
            count += int((labels[1:] != IGNORE_INDEX).sum())
    return total / count


@pytest.mark.parametrize(
    "settings", [{}, {"group_by_length": True}, {"packing": True, "max_length": 48}, {"padding_free": True}], ids=str
)
def test_validation_is_the_mean_over_all_tokens(pretrained, train, settings):
    """fp32 model, so 1e-6: padding and packing change the order of fp32 sums; a mean of batch means is off by 1e-3."""
    data = SFTDataModule(pretrained, train, train, train, batch_size=4, **settings)
    trainer = L.Trainer(**QUIET, devices=1)
    (validated,) = trainer.validate(CausalLMModule(pretrained), data, verbose=False)
    (tested,) = trainer.test(CausalLMModule(pretrained), data, verbose=False)
    expected = token_mean(pretrained, train)
    assert validated["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert tested["test_loss"] == pytest.approx(expected, rel=1e-6)


class Witness(CausalLMModule):
    """Writes down what a rank sees."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), *batch["input_ids"][:, :6].tolist()]
        return super().training_step(batch, batch_idx)


def fit_one_epoch(pretrained, train):
    module = Witness(pretrained, lr=0.0)  # so that the epoch ends with the model it began with
    trainer = L.Trainer(**QUIET, devices=2, strategy="ddp", max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, SFTDataModule(pretrained, train, train, batch_size=2))
    return trainer.callback_metrics["val_loss"].item(), module.seen


def test_two_ranks_share_the_data_and_agree_on_the_loss(pretrained, train):
    (loss, seen), (other_loss, other_seen) = run_ranks(2, fit_one_epoch, pretrained, train)
    assert loss == other_loss == pytest.approx(token_mean(pretrained, train), rel=1e-6)
    assert len(seen) == len(other_seen) == 6
    assert len({tuple(row) for row in seen + other_seen}) == len(RECORDS)


# --------------------------------------------------------------------------------------- the whole fit
class Watch(L.Callback):
    def __init__(self):
        self.rates, self.losses, self.parts = [], [], []

    def on_train_batch_start(self, trainer, module, *_):
        assert all(m.training for m in module.model.modules())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(trainer.callback_metrics["train_loss"].item())
        self.parts.append(outputs["loss"].item())  # divided by the batches of a step


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_fit_follows_the_schedule_and_learns(pretrained, train, precision):
    watch = Watch()
    module = CausalLMModule(pretrained, lr=1e-2, warmup_ratio=0.2, gradient_checkpointing=True)
    trainer = L.Trainer(**QUIET, max_epochs=5, precision=precision, callbacks=[watch])
    trainer.fit(module, SFTDataModule(pretrained, train, batch_size=6))
    cosine = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert watch.rates == pytest.approx([1e-2 * factor for factor in [0, 0.5, *cosine]])
    assert watch.losses[-1] < 0.8 * watch.losses[0]
    assert module.model.is_gradient_checkpointing
    assert {p.dtype for p in module.parameters()} == {torch.float32 if precision == "32-true" else torch.bfloat16}


@pytest.mark.parametrize(
    ("scheduler", "factors"),
    [("linear", [0, 1, 0.75, 0.5, 0.25]), ("constant", [0, 1, 1, 1, 1])],
)
def test_accumulation_counts_optimizer_steps(pretrained, train, scheduler, factors):
    watch = Watch()
    module = CausalLMModule(pretrained, lr=1e-3, warmup_ratio=0.2, scheduler=scheduler, average_loss_over="batches")
    trainer = L.Trainer(**QUIET, max_steps=5, max_epochs=10, accumulate_grad_batches=2, callbacks=[watch])
    trainer.fit(module, SFTDataModule(pretrained, train, batch_size=3))
    assert watch.rates[::2] == pytest.approx([1e-3 * factor for factor in factors])
    assert watch.losses[1::2] == pytest.approx(
        [sum(pair) for pair in zip(watch.parts[::2], watch.parts[1::2], strict=True)]
    )


def test_only_what_requires_grad_is_given_to_the_optimizer(pretrained):
    module = CausalLMModule(pretrained, scheduler="constant")
    module.model = tiny_llama()
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SimpleNamespace(root_device=torch.device("cpu")), estimated_stepping_batches=10
    )
    module.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires grad; check `target_modules`"):
        module.configure_optimizers()
    module.model.lm_head.weight.requires_grad_(True)
    optimizer = module.configure_optimizers()["optimizer"]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(module.model.lm_head.weight)]
    module.trainer.estimated_stepping_batches = math.inf
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        module.configure_optimizers()


# ---------------------------------------------------------------------------------- building the model
def attach(module, *, materializes, precision="bf16-true"):
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(materializes_weights=materializes), precision=precision)
    return module


def test_a_strategy_that_loads_weights_gets_the_architecture_only(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)  # no weights there
    module = attach(CausalLMModule(str(tmp_path), attn_implementation="eager"), materializes=True)
    with torch.device("meta"):
        module.configure_model()
    assert {p.device.type for p in module.model.parameters()} == {"meta"}
    assert module.model.config._attn_implementation == "eager"
    model = module.model
    module.configure_model()
    assert module.model is model
    refused = attach(CausalLMModule(str(tmp_path), gradient_checkpointing=True), materializes=True)
    with pytest.raises(
        ValueError, match="gradient_checkpointing=True of the model has no effect under SimpleNamespace"
    ):
        refused.configure_model()


def test_the_configuration_is_that_of_the_revision(tmp_path, monkeypatch):
    """Of the id that the strategy reads weights of; another id has its own revisions."""
    for name in ("models--someone--model", "models--other--model"):
        for digit, vocabulary in (("a", 32), ("b", 64)):
            config = tiny_llama().config
            config.vocab_size = vocabulary
            config.save_pretrained(tmp_path / name / "snapshots" / (40 * digit))
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text(40 * "a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for pretrained, expected in (("someone/model", 64), ("other/model", 32)):
        module = CausalLMModule(pretrained)
        strategy = PiSSAStrategy("someone/model", revision=40 * "b")
        module.trainer = SimpleNamespace(strategy=strategy, precision="bf16-true")
        with torch.device("meta"):
            module.configure_model()
        assert module.model.config.vocab_size == expected


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)],
)
def test_other_strategies_get_the_weights(pretrained, precision, dtype):
    module = attach(CausalLMModule(pretrained), materializes=False, precision=precision)
    module.configure_model()
    weights = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in module.model.state_dict().items())
    assert {p.dtype for p in module.model.parameters()} == {dtype}
    assert module.model.training


# -------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "sine"}, "scheduler='sine' is not known; valid names: cosine, linear, constant"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is not known; valid names: adamw, paged"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5 must be between 0 and 1"),
        (
            {"average_loss_over": "samples"},
            "average_loss_over='samples' is not known; valid names: tokens, batches",
        ),
        ({"lr": -1.0}, "lr=-1.0 and weight_decay=0.0 must not be negative"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLMModule("x", **settings)


def test_the_command_line_documents_every_option():
    parser = ArgumentParser()
    parser.add_class_arguments(CausalLMModule, "model")
    assert [a.dest for a in parser._actions if a.dest.startswith("model.") and not a.help] == []
    parsed = parser.parse_args(["--model.pretrained", "x", "--model.betas", "[0.8, 0.9]"])
    assert CausalLMModule(**vars(parsed.model)).betas == (0.8, 0.9)
