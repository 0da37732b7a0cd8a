"""Scores on the sharded base are those of lm-evaluation-harness's own ``hf`` model, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.ranks import alone, run_ranks
from helpers.sft import write_jsonl
from helpers.training import CausalLM, fit, loader, make_strategy, make_trainer
from lowrank_dist import EvaluateTasks
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.inference.on_disk import ModelOnDisk
from lowrank_dist.inference.scoring import Scores, Tasks, score

NAMES = ("choice", "exact", "text", "drawn")
COMMON: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "num_fewshot": 1,
    "fewshot_config": {"sampler": "first_n", "samples": [{"q": "one", "a": "two", "gold": 0}]},
    "doc_to_text": "Q: {{q}}\nA:",
}
YAML = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["two", "four", "is it four"],
        "doc_to_target": "gold",
    },
    "exact": {
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["Q:"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "num_fewshot": 0,
        "doc_to_text": "",
        "doc_to_target": "{{q}} {{a}} {{q}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "drawn": {
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "repeats": 3,
        "generation_kwargs": {"until": ["Q:"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    words = ["one", "two two", "add 2 and 2", "what is the answer", "four", "three one", "hello", "it", "a b c"]
    rows = [{"q": word, "a": "four", "gold": index % 3} for index, word in enumerate(words)]
    data = write_jsonl(directory / "data.jsonl", rows)
    for name, own in YAML.items():
        task = COMMON | {"task": name, "dataset_kwargs": {"data_files": {"test": data}}} | own
        (directory / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return directory


def train(pretrained: Path, directory: Path) -> None:
    _, trainer = fit(pretrained, quantization=None)
    trainer.save_checkpoint(directory)


@pytest.fixture(scope="module")
def saved(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(2, train, material / "model", directory)
    return directory


@alone
def scored(saved: Path, model: Path, directory: Path, batch_size: int = 2) -> Scores:
    tasks, found = Tasks(names=NAMES, include_path=str(directory)), ModelOnDisk(saved)
    with found.loaded(ShardGroup()) as sharded:
        scores = score(sharded, AutoTokenizer.from_pretrained(model), tasks, tasks.load(), batch_size=batch_size)
    found.close()
    return scores


def answers(scores: Scores, name: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(scores.samples[name], key=lambda sample: sample["doc_id"])]


def test_scores_equal_those_of_the_harness_on_any_number_of_ranks(saved: Path, material: Path, tasks: Path) -> None:
    from lm_eval.evaluator import simple_evaluate  # not in the ranks that import this file
    from lm_eval.models.huggingface import HFLM

    one = run_ranks(1, scored, saved, material / "model", tasks)[0]
    for ranks in (2, 3):
        for found in run_ranks(ranks, scored, saved, material / "model", tasks):
            assert found.values == one.values
            assert all(answers(found, name) == answers(one, name) for name in NAMES)
    assert len({text for (texts,) in answers(one, "drawn") for text in texts}) > 9  # nothing is drawn twice alike
    model = AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32)
    stock = HFLM(
        PeftModel.from_pretrained(model, saved / "lora"),
        tokenizer=AutoTokenizer.from_pretrained(material / "model"),
        backend="causal",
        batch_size=2,
    )
    same = Tasks(names=NAMES[:3], include_path=str(tasks))
    results = simple_evaluate(stock, tasks=same.load(), bootstrap_iters=0)
    for (task, metric), (value, _) in one.values.items():
        if task in same.names:
            assert value == pytest.approx(results["results"][task][f"{metric},none"], rel=1e-4), (task, metric)
    for name in ("choice", "text"):
        expected = Scores({}, {}, results["samples"])
        for mine, theirs in zip(answers(one, name), answers(expected, name), strict=True):
            flat = [float(x[0][0] if name == "choice" else x[0]) for x in mine]
            assert flat == pytest.approx([float(x[0][0] if name == "choice" else x[0]) for x in theirs], rel=1e-4)
    assert answers(one, "exact") == answers(Scores({}, {}, results["samples"]), "exact")


class Evaluated(CausalLM):
    """Draws random numbers, as dropout does, so that a callback that draws others shows."""

    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step(batch, index) * (1 + torch.rand(()))


@alone
def trained_with(pretrained: Path, directory: Path | None) -> tuple[list[float], dict[int, Any], dict[str, float]]:
    torch.manual_seed(3)
    callbacks: list[Any] = []
    if directory is not None:
        callbacks = [
            EvaluateTasks(
                ["choice", "exact", "text"], every_n_steps=2, include_path=str(directory), batch_size=4, limit=5
            )
        ]
    module: LightningModule = Evaluated(pretrained)
    trainer = make_trainer(make_strategy(pretrained), callbacks=callbacks)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 5, 1))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return module.losses, callbacks[0].scores if callbacks else {}, logged


def test_scores_are_logged_while_training_goes_on_as_it_would(material: Path, tasks: Path) -> None:
    plain, _, _ = run_ranks(2, trained_with, material / "model", None)[0]
    first, second = run_ranks(2, trained_with, material / "model", tasks)
    losses, scores, logged = first
    assert losses == plain
    assert scores == second[1]
    assert list(scores) == [0, 2, 4]
    assert logged["tasks/choice/acc"] == pytest.approx(scores[4]["choice", "acc"][0])
    perplexities = [found["text", "word_perplexity"][0] for found in scores.values()]
    assert len(set(perplexities)) == 3  # of three models
