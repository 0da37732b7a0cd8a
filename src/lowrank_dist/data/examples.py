"""The settings that decide what the examples of a source are, and the examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lowrank_dist.data.cache import Made, cached, key_of
from lowrank_dist.data.chat_template import read_template
from lowrank_dist.data.chunks import OnBadRecord, OnLongExample, Preparer, Transform
from lowrank_dist.data.classes import CLASS_NAMES, LabelledEncoder, LabelledRenderer
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.data.loading import Prepare, prepared
from lowrank_dist.data.packing import Tokens
from lowrank_dist.data.preference import PREFERENCE_NAMES
from lowrank_dist.data.processes import in_processes
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.rendering import PairRenderer, Renderer, Thinking, TrainOn
from lowrank_dist.data.shapes import NAMES, check_columns
from lowrank_dist.data.sources import Source
from lowrank_dist.data.spool import Spool
from lowrank_dist.data.tasks import Task
from lowrank_dist.data.tokenizing import Encoder
from lowrank_dist.errors import InputError

COLUMN_NAMES = {"sft": NAMES, "preference": PREFERENCE_NAMES, "classification": CLASS_NAMES}
"""Columns that are known, by the task."""

_SETTINGS = ("train_on", "thinking", "on_bad_record", "on_long_example", "max_length", "classes")


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """The options of `lowrank_dist.SFTDataModule` that decide what examples are; see there."""

    task: Task | None
    classes: list[str] | None
    chat_template: str | None
    train_on: TrainOn
    thinking: Thinking
    columns: dict[str, str] | None
    as_chat: bool
    prompt_template: PromptTemplate | None
    transform: Transform | None
    on_bad_record: OnBadRecord
    on_long_example: OnLongExample
    max_length: int

    def check(self, *, packing: bool, padding_free: bool) -> None:
        """Raise InputError if a choice is not valid, or choices exclude each other."""
        if self.task is not None:
            if self.task not in get_args(Task):
                raise InputError(f"task={self.task!r}; valid choices: {', '.join(get_args(Task))}")
            self.check_task(self.task, packing=packing, padding_free=padding_free)
        check_columns(self.columns, list(dict.fromkeys(name for names in COLUMN_NAMES.values() for name in names)))
        for name, chosen, choices in (
            ("train_on", self.train_on, get_args(TrainOn)),
            ("thinking", self.thinking, get_args(Thinking)),
            ("on_bad_record", self.on_bad_record, get_args(OnBadRecord)),
            ("on_long_example", self.on_long_example, get_args(OnLongExample)),
        ):
            if chosen not in choices:
                raise InputError(f"{name}={chosen!r}; valid choices: {', '.join(choices)}")

    def check_task(self, task: Task, *, packing: bool, padding_free: bool) -> None:
        """Raise InputError if these settings do not go with a task."""
        check_columns(self.columns, COLUMN_NAMES[task])
        if task != "sft" and (packing or padding_free):
            name = "packing" if packing else "padding_free"
            raise InputError(f"{name}=True puts several examples into a row, which task={task!r} cannot keep apart")
        if task != "sft" and self.on_long_example == "split":
            raise InputError(
                f"on_long_example='split' would make several items of one, which task={task!r} cannot use; choose "
                "'cut' or 'drop'"
            )
        if task == "preference" and self.train_on == "everything":
            raise InputError(
                "train_on='everything' would compare prompts, which both responses of a pair share; use "
                "'all_assistant' or 'last_assistant'"
            )

    @property
    def of_prompts(self) -> dict[str, Any]:
        """The settings that decide what a prompt is, without the chat template and those left at their defaults."""
        template = None if self.prompt_template is None else self.prompt_template.text
        settings = {"columns": self.columns, "as_chat": self.as_chat, "prompt_template": template}
        return {name: value for name, value in settings.items() if value}

    def cache_key(
        self, tokenizer: Any, source: Source, limit: int | None, task: Task, report: Callable[..., None]
    ) -> str | None:
        """The name of the cached examples of a source; None, with a line to `report`, if they are not cached."""
        if self.transform is not None:
            report("%s: not cached, because what the function of `transform` does cannot be known", source)
            return None
        settings = {
            "chat_template": read_template(self.chat_template),
            "limit": limit,
            "task": task,
            **{name: getattr(self, name) for name in _SETTINGS},
            **self.of_prompts,
        }
        if (key := key_of(source, tokenizer, settings)) is None:
            report("%s: not cached, because %s is no fast tokenizer", source, type(tokenizer).__name__)
        return key

    def preparer(self, tokenizer: Any, task: Task) -> Preparer:
        """What makes examples of records."""
        renderer: Renderer | LabelledRenderer
        encoder: Encoder | LabelledEncoder
        if task == "classification":
            if self.prompt_template is not None:
                raise InputError("prompt_template is for a prompt and a response, and a labelled text has neither")
            renderer = LabelledRenderer(columns=self.columns, classes=self.classes)
            encoder = LabelledEncoder(tokenizer, self.max_length)
        else:
            renderer = (PairRenderer if task == "preference" else Renderer)(
                tokenizer,
                read_template(self.chat_template),
                train_on=self.train_on,
                thinking=self.thinking,
                columns=self.columns,
                as_chat=self.as_chat,
                prompt_template=self.prompt_template,
            )
            encoder = Encoder(tokenizer)
        return Preparer(
            renderer=renderer,
            encoder=encoder,
            max_length=self.max_length,
            names=(*COLUMN_NAMES[task], *(self.prompt_template.names if self.prompt_template else ())),
            transform=self.transform,
            on_bad_record=self.on_bad_record,
            on_long_example=self.on_long_example,
        )

    def tokens(
        self,
        tokenizer: Any,
        source: Source,
        limit: int | None,
        *,
        task: Task,
        cache_dir: Path | None,
        num_proc: int | None,
        progress: bool,
        report: Callable[..., None],
    ) -> Made:
        """The tokens of a source, from the cache if there is one, and lines that say what became of its records.

        Raises
        ------
        InputError
            As `read`.
        """
        key = None
        if cache_dir is not None:
            key = self.cache_key(tokenizer, source, limit, task, report)
        if cache_dir is None or key is None:
            if num_proc is not None:
                report("%s: num_proc=%d is not used, because without a cache every rank tokenizes", source, num_proc)
            loaded = self.read(tokenizer, source, limit, task=task, progress=progress)
            return Tokens.of(loaded.examples, loaded.along, loaded.targets), loaded.lines(self.max_length)

        def spooled(scratch: Path) -> Made:
            with Spool(scratch) as spool:
                loaded = self.read(tokenizer, source, limit, task=task, progress=True, num_proc=num_proc, sink=spool)
                return spool.tokens(), loaded.lines(self.max_length)

        return cached(cache_dir / key, spooled)

    def read(
        self,
        tokenizer: Any,
        source: Source,
        limit: int | None,
        *,
        task: Task,
        progress: bool,
        num_proc: int | None = None,
        sink: Callable[[Loaded], None] | None = None,
    ) -> Loaded:
        """Read and tokenize a source, in `num_proc` processes or in this one; for `sink`, see `prepared`.

        Raises
        ------
        InputError
            If it cannot be read, a record cannot be used, or nothing is left.
        """
        preparer = self.preparer(tokenizer, task)
        prepare: Prepare = partial(map, preparer)
        if num_proc is not None:
            prepare = partial(in_processes, partial(self.preparer, tokenizer, task), count=num_proc)
        loaded = prepared(source, prepare, limit=limit, on_bad_record=self.on_bad_record, progress=progress, sink=sink)
        if not loaded.records:
            raise InputError(f"{source} holds no record; every line must hold one JSON object")
        if not loaded.kept and (loaded.empty or not loaded.lengths):
            raise InputError(
                f"{source}: none of its {loaded.records} records is left: {'; '.join(loaded.lines(self.max_length))}"
            )
        if not loaded.kept:
            raise InputError(
                f"{source}: none of the {len(loaded.lengths)} examples has a response token within max_length="
                f"{self.max_length}; raise max_length"
            )
        return loaded
