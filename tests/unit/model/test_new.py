"""Heads and poolers that a checkpoint lacks are trained; broken checkpoints are still refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from helpers.models import save_checkpoint, stored
from lowrank_dist.errors import ModelError
from lowrank_dist.model.plan import open_plan
from lowrank_dist.model.skeleton import meta_parameters
from lowrank_dist.storage.reader import CheckpointReader


def opened(base: Path, auto_class, **adapter):
    from transformers import AutoConfig

    with meta_parameters():
        model = auto_class.from_config(AutoConfig.from_pretrained(base, num_labels=3))
    config = LoraConfig(r=4, target_modules=["query"], **adapter)
    reader = CheckpointReader(base)
    plan = open_plan(reader, config, backbone=model).plan
    reader.close()
    return plan, config


def new(plan) -> set[str]:
    return {
        t.names[0].replace(".modules_to_save.default", "") for t in plan.parameters if t.key is None and t.trainable
    }


def test_pooler_and_head_of_a_task(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path, "bert", auto_class=AutoModelForMaskedLM)
    plan, config = opened(base, AutoModelForSequenceClassification, task_type="SEQ_CLS")
    assert set(config.modules_to_save) == {"classifier", "bert.pooler"}
    assert new(plan) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    plan, config = opened(base, AutoModelForTokenClassification)
    assert config.modules_to_save == ["classifier"]


def test_the_head_that_a_checkpoint_holds_is_trained_as_peft_does(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path, "bert", auto_class=AutoModelForSequenceClassification, num_labels=3)
    plan, config = opened(base, AutoModelForSequenceClassification, task_type="SEQ_CLS")
    assert config.modules_to_save == ["classifier"]
    assert new(plan) == set()
    assert {t.key for t in plan.parameters if t.trainable} == {"classifier.weight", "classifier.bias"}
    _, config = opened(base, AutoModelForSequenceClassification)  # no task: PEFT trains the factors only
    assert not config.modules_to_save


@pytest.mark.parametrize("lost", ["bert.encoder.layer.1.output.dense.weight", "classifier.weight"])
def test_a_tensor_that_is_lost_is_no_new_one(tmp_path: Path, lost: str) -> None:
    base = save_checkpoint(tmp_path / "whole", "bert", auto_class=AutoModelForSequenceClassification, num_labels=3)
    tensors = stored(base)
    del tensors[lost]
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=lost):
        opened(tmp_path, AutoModelForSequenceClassification)


def test_sinusoidal_positions_are_computed(tmp_path: Path) -> None:
    """Marian stores none; they are those of transformers, and frozen."""
    from helpers.families import FAMILIES

    family = FAMILIES["marian"]
    family.save(tmp_path)
    stock = family.auto_class.from_pretrained(tmp_path)
    with meta_parameters():
        model = family.auto_class.from_config(family.configuration())
    model.tie_weights()  # creation on meta breaks ties
    reader = CheckpointReader(tmp_path)
    plan = open_plan(reader, LoraConfig(r=4, target_modules=["q_proj"]), backbone=model).plan
    reader.close()
    computed = [t.names[0] for t in plan.parameters if t.key is None]
    assert computed
    assert not any(t.trainable for t in plan.parameters if t.key is None)
    assert all(isinstance(stock.get_parameter(name), torch.nn.Parameter) for name in computed)
