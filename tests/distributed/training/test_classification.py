"""Classes of sequences over the sharded base: as stock transformers computes them, on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.ranks import run_ranks
from helpers.sft import save_material, write_jsonl
from helpers.training import make_strategy
from lowrank_dist import InputError, SequenceClassificationModule, SFTDataModule

RECORDS = [
    {"text": f"{word} " * (1 + place % 4), "label": place % 3} for place, word in enumerate(["one", "two", "four"] * 3)
]
LONGEST = {"text": "hello world " * 3, "label": 2}
ADAPTER = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_material(tmp_path_factory.mktemp("classes"), RECORDS)
    write_jsonl(directory / "test.jsonl", [*RECORDS[:4], LONGEST])
    return directory


def fit(material: Path, tmp: Path, *, steps: int = 4, num_labels: int | None = 3, **options: Any) -> dict[str, float]:
    """Nine examples in steps of four, so that the third one of an epoch has one; then the evaluation of five."""
    size, model = torch.distributed.get_world_size(), str(material / "model")
    adapter = LoraConfig(**{**ADAPTER, "modules_to_save": ["score"], **options})
    strategy = make_strategy(material / "model", adapter=adapter, quantization=None)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=size,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    module = SequenceClassificationModule(model, num_labels=num_labels, lr=1e-2, scheduler="constant", warmup_ratio=0.0)
    train, test = (str(material / name) for name in ("data.jsonl", "test.jsonl"))
    data = SFTDataModule(model, train, validation=test, batch_size=4 // size)
    trainer.fit(module, data)
    found = {"train_loss": float(trainer.callback_metrics["train_loss"])}
    if trainer.is_global_zero:
        (tmp / f"of-{size}").mkdir()
    trainer.save_checkpoint(tmp / f"of-{size}" / "saved")
    (evaluated,) = trainer.validate(module, data, verbose=False)
    return found | evaluated


def refused(material: Path, tmp: Path) -> None:
    with pytest.raises(InputError, match="the data have the class 2, but the model has 2 of them.*num_labels=3"):
        fit(material, tmp, num_labels=2)


def test_it_is_the_same_on_two_ranks_and_in_stock_peft(material: Path, tmp_path: Path) -> None:
    """1e-4: fp32 sums in another order, through four steps of AdamW."""
    (one,) = run_ranks(1, fit, material, tmp_path)
    two, other = run_ranks(2, fit, material, tmp_path)
    assert two == other == pytest.approx(one, rel=1e-4)
    assert set(one) == {"train_loss", "val_loss", "val_accuracy"}
    base = AutoModelForSequenceClassification.from_pretrained(material / "model", num_labels=3, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(material / "model")
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, tmp_path / "of-2" / "saved" / "lora").eval()
    records = [*RECORDS[:4], LONGEST]
    batch = tokenizer([record["text"] for record in records], padding=True, return_tensors="pt")
    labels = torch.tensor([record["label"] for record in records])
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    assert two["val_loss"] == pytest.approx(float(output.loss), rel=1e-4)
    assert two["val_accuracy"] == pytest.approx(float((output.logits.argmax(1) == labels).float().mean()))


def test_the_class_is_read_before_the_padding_of_the_data(material: Path, tmp_path: Path) -> None:
    """Whatever the configuration of the model takes for padding."""
    odd = shutil.copytree(material, tmp_path / "odd")
    config = json.loads((odd / "model" / "config.json").read_text())
    (odd / "model" / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))
    (expected,), (found,) = (
        run_ranks(1, fit, one, made(tmp_path / name)) for one, name in ((material, "a"), (odd, "b"))
    )
    assert found == expected


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_what_cannot_be_trained_is_refused(material: Path, tmp_path: Path) -> None:
    run_ranks(1, refused, material, tmp_path)
