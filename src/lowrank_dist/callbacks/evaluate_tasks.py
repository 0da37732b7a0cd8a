"""Scores of tasks during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.inference.scoring import Scores, Tasks, score
from lowrank_dist.inference.sharded import check_virtual_tokens
from lowrank_dist.inference.tokenizer import load_tokenizer


class EvaluateTasks(Callback):
    """Score the model with tasks of lm-evaluation-harness while it is trained, and log the scores.

    They are logged as ``tasks/<task>/<metric>``, where a ModelCheckpoint can monitor them. Answers come from the
    sharded model as it trains; nothing is merged or loaded twice. The task ``responses`` asks with the prompts of the
    Trainer's data module. Training goes on as it would without the callback:
    random numbers are put back. Collective; needs `lowrank_dist.PiSSAStrategy` and the extra ``evaluate``.

    Parameters
    ----------
    tasks
        Names of tasks of the harness, or paths of YAML files.
    every_n_steps
        Score after every so many optimizer steps.
    at_start
        Score before the first step, too: the model as initialised. Not when a run is resumed.
    limit
        Use only the first so many documents of every task; below 1, this share of them. None: all.
    num_fewshot
        Examples before every question. None: what the task says.
    batch_size
        Requests that are computed together.
    include_path
        Directory with YAML files of tasks.
    data
        Local files in place of a task's data: by ``task``, for its test split, or by ``task:split``.
    apply_chat_template
        Put questions into the chat template.
    system_instruction
        A system message.
    gen_kwargs
        Changes of the options with which tasks generate.
    tokenizer
        Directory or hub id. None: that of the data module, else the one beside the pretrained weights.
    chat_template
        A Jinja file, or its text. None: the tokenizer's own.
    seed
        Seed of what is drawn.

    Attributes
    ----------
    scores : dict
        By optimizer step: the scores, by task and metric.

    Raises
    ------
    InputError
        If a number is out of range. From `setup`, on every rank, before weights are read: if the strategy is another,
        the harness is missing, or a task or its data cannot be loaded.

    See Also
    --------
    lowrank_dist.LossHistory : Records losses.

    Examples
    --------
    >>> from lowrank_dist import EvaluateTasks
    >>> callback = EvaluateTasks(["gsm8k_pissa"], every_n_steps=500, limit=200, data={"gsm8k_pissa": "test.jsonl"})
    >>> callback.every_n_steps
    500

    ``lowrank-dist evaluate`` scores checkpoints afterwards.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        every_n_steps: int,
        at_start: bool = True,
        limit: float | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        include_path: str | None = None,
        data: Mapping[str, str] | None = None,
        apply_chat_template: bool = False,
        system_instruction: str | None = None,
        gen_kwargs: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        if every_n_steps < 1 or batch_size < 1:
            raise InputError(f"every_n_steps={every_n_steps} and batch_size={batch_size} must be at least 1")
        if isinstance(tasks, str):
            raise InputError(f"tasks={tasks!r} must be a list of names")
        self.every_n_steps, self.at_start, self.batch_size = every_n_steps, at_start, batch_size
        self.tasks = Tasks(
            names=tuple(tasks),
            include_path=include_path,
            data=dict(data or {}),
            num_fewshot=num_fewshot,
            limit=limit,
            chat=apply_chat_template,
            system=system_instruction,
            options=gen_kwargs,
            seed=seed,
        )
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.scores: dict[int, dict[tuple[str, str], tuple[float, float | None]]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._last = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self._tokenizer is not None:
            return
        strategy: Any = trainer.strategy
        if not hasattr(strategy, "inference_model"):
            raise InputError(
                f"EvaluateTasks needs PiSSAStrategy, not {type(strategy).__name__}; leave it out, or score checkpoints"
            )
        datamodule = getattr(trainer, "datamodule", None)
        self.tasks = replace(self.tasks, prompts=getattr(datamodule, "prompt_settings", {}))
        group = ShardGroup(device=strategy.root_device)
        check_virtual_tokens(strategy.adapter, group.size)
        with group.shared_errors():
            tokenizer = self._own_tokenizer(trainer)
        with group.shared_errors():
            if strategy.local_rank == 0:  # others then find the data of the tasks in the cache
                self.tasks.load(tokenizer)
        self._tokenizer = tokenizer
        rank_zero_info(f"EvaluateTasks every {self.every_n_steps} steps: {self.tasks.says()}")

    def _own_tokenizer(self, trainer: Trainer) -> PreTrainedTokenizerBase:
        datamodule = getattr(trainer, "datamodule", None)
        named = (
            self.tokenizer or getattr(datamodule, "tokenizer", None) or getattr(trainer.strategy, "pretrained", None)
        )
        if not isinstance(named, str):
            raise InputError(
                "EvaluateTasks: neither the data module nor the strategy names a tokenizer; pass tokenizer"
            )
        template = self.chat_template or getattr(datamodule, "chat_template", None)
        tokenizer = load_tokenizer(named, template)
        if self.tasks.chat and not tokenizer.chat_template:
            raise InputError(f"EvaluateTasks(apply_chat_template=True): the tokenizer {named!r} has no chat template")
        return tokenizer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = trainer.global_step
        if self.at_start and trainer.global_step == 0:
            self._log(trainer, self._score(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last or step % self.every_n_steps:
            return
        self._last = step
        pl_module.log_dict(self._score(trainer), on_step=True, on_epoch=False, rank_zero_only=False)

    def _score(self, trainer: Trainer) -> dict[str, float]:
        assert self._tokenizer is not None
        strategy: Any = trainer.strategy
        model = strategy.inference_model()
        with isolate_rng(), model.evaluating():
            with model.group.shared_errors():
                loaded = self.tasks.load(self._tokenizer)
            found: Scores = score(model, self._tokenizer, self.tasks, loaded, batch_size=self.batch_size)
        self.scores[trainer.global_step] = found.values
        named = {f"tasks/{task}/{metric}": value for (task, metric), (value, _) in found.values.items()}
        shown = ", ".join(f"{name.removeprefix('tasks/')} {value:.4f}" for name, value in named.items())
        rank_zero_info(f"step {trainer.global_step}: {shown}")
        return named

    @staticmethod
    def _log(trainer: Trainer, named: Mapping[str, float]) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(dict(named), step=0)
