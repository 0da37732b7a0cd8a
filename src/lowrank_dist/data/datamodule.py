"""The LightningDataModule for supervised fine-tuning.

Every rank has the whole set as flat int32 tensors (`lowrank_dist.data.packing.Tokens`), its own or mapped from a cache,
and takes its own share of every step.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from lowrank_dist.data.batching import Batching, check_numbers, full_rows
from lowrank_dist.data.chunks import OnBadRecord, OnLongExample, Transform
from lowrank_dist.data.examples import ExampleSettings
from lowrank_dist.data.loaded import Loaded
from lowrank_dist.data.mixture import Mixing, Names, Part, StoppingStrategy, parts_of
from lowrank_dist.data.packing import Items, JoinedItems, TokenDataset
from lowrank_dist.data.prompt_template import PromptTemplate
from lowrank_dist.data.records import read_hub
from lowrank_dist.data.rendering import Thinking, TrainOn
from lowrank_dist.data.sampler import ResumableLoader, ShardedSampler, check_alone, unused_batches
from lowrank_dist.data.sources import Source
from lowrank_dist.data.streaming import (
    Position,
    Stream,
    StreamLoader,
    StreamSettings,
    check_streaming_trainer,
    of_all_ranks,
    stream_position,
    stream_state,
    streamed_parts,
)
from lowrank_dist.data.tasks import PER_ITEM, Task
from lowrank_dist.data.tokenizing import WEIGHTS
from lowrank_dist.errors import InputError
from lowrank_dist.seeds import global_seed

log = logging.getLogger(__name__)

_ENDLESS = 2**31  # batches

_LOADERS = {"validation": "val_dataloader", "test": "test_dataloader"}


class SFTDataModule(L.LightningDataModule):
    """Data for fine-tuning from files or Hugging Face data sets: responses, preference pairs or labelled texts.

    For supervised fine-tuning, with the loss on responses only, a record has one of these sets of columns, the first
    that is there; other columns are ignored:

    - `messages`: a conversation in OpenAI's form, rendered with the chat template. Every assistant turn is trained on,
      but for those with ``"weight": 0``. The template also receives the column `tools` (or the older `functions`).
      Content may be a list of parts, arguments of calls an object or JSON text.
    - `messages` and `completion`: the conversation is the prompt, `completion` the last assistant turn.
    - `conversations`: the same in ShareGPT's form, with `from` and `value`.
    - `prompt` and `completion`: both are used unchanged; if they are lists of messages, as a conversation.
    - `instruction` and `output`, with or without `input`: put into the Alpaca prompt.
    - `query` and `response`, or `question` and `answer`: put into the instruction prompt of Alpaca, MetaMath and PiSSA.
    - `text`: trained as a whole. Longer than `max_length`, it is split.

    A preference pair is `chosen` and `rejected`, text or messages, beside a `prompt` (or `question`, `query`,
    `instruction`; text or messages), or as two conversations that begin alike. A labelled text is `text`, with or
    without `text_pair`, and `label`.

    What a record gives must be found in the rendered text: a template that drops a call, a function, a message or its
    thinking makes the record a bad one. The end-of-sequence token is trained on. Examples longer than `max_length` are
    cut on the right, unless `on_long_example` says otherwise. Examples left without a response are dropped, and their
    number is logged.

    Parameters
    ----------
    tokenizer
        Directory or hub id of the tokenizer, usually that of the model.
    train
        Training data: a path (.jsonl, .json, both also .gz or .zst, .csv, .tsv, .parquet, .arrow), a pattern such as
        ``data/*.jsonl``, a directory with such files or written by ``save_to_disk``, the id of a Hugging Face data set,
        or a list of these, which are read one after the other. An entry of the list may have options of its own:
        ``{"path": "math.jsonl", "weight": 2.0}``, `split`, `subset` and `limit`. With weights, the shares of the
        entries in an epoch are as the weights: of its examples, of its packed rows with `packing`, of its batches with
        `tokens_per_batch`, each of which then has examples of one entry.
    validation
        Validation data, as `train` without weights. None: no validation.
    test
        Test data, as `train` without weights. None: no test.
    train_split
        Split for `train`; a slice is possible: ``train[:10%]``. A directory has the splits in the names of its files.
        Other files are the split ``train``; as `validation` and `test`, ``validation`` and ``test`` too.
    validation_split
        Split for `validation`, as `train_split`.
    test_split
        Split for `test`, as `train_split`.
    task
        What the batches are for: ``"sft"``, ``"preference"`` (each item is a pair, and a batch has the chosen
        responses, then the rejected ones) or ``"classification"`` (labels are classes). None: what the module of the
        Trainer trains on (`PreferenceModule`, ...); any other one, ``"sft"``.
    classes
        Names of the classes, in order, if labels are names.
    subset
        Subset (configuration) of the Hugging Face data sets; of a directory, the directory of this name in it.
    stopping_strategy
        With weights, when an epoch ends, as of ``datasets.interleave_datasets``. ``"first_exhausted"``: when one entry
        was used once; what is left of the others comes in the next epochs. ``"all_exhausted"``: when all were, some
        several times.
    chat_template
        Path of a Jinja file with the chat template, or its text. None: the tokenizer's own.
    train_on
        ``"all_assistant"``: every turn of the assistant. ``"last_assistant"``: the last one of a conversation.
        ``"everything"``: prompts, too.
    thinking
        ``"keep"``: thinking (``<think>`` in the text, `reasoning_content`, `reasoning` or `thinking` beside it) is part
        of the turn, in the template's own form. ``"drop"``: it is left out.
    columns
        Names of the columns in the data, by the names above: ``{"prompt": "question_text", "completion": "gold"}``.
        Columns that are not listed keep their names.
    as_chat
        Render prompts and responses as a conversation, with the chat template, instead of the instruction prompt.
    prompt_template
        What is put around prompts that are text, in place of the instruction prompt, with the names of columns in
        braces: ``"Question: {query} Answer: "``. The response follows; spaces at the end become part of it.
    transform
        A function that makes a record with such columns from a record of any kind, or returns None to leave it out; on
        the command line its import path, ``my_module.my_function``.
    on_bad_record
        ``"error"``: a record that cannot be used is an error. ``"skip"``: it is skipped; the log has their number and
        the first reason.
    cache_dir
        Directory in which tokenized data are kept. One process tokenizes while the others wait; all map the result into
        memory, in later runs at once. An entry belongs to the content of the files, the tokenizer, the template and the
        settings; old ones are not removed. None: every rank tokenizes, in its own memory.
    num_proc
        Number of processes that render and tokenize for `cache_dir`, with the results of one. They are started afresh,
        which takes seconds. None: the rank itself.
    on_long_example
        What is done with an example of more than `max_length` tokens; a line of the log has the number. ``"cut"``: it
        is cut on the right, but ``text`` is split. ``"split"``: it is split, so that later parts have no prompt.
        ``"drop"``: it is dropped, also ``text``, and of a pair both.
    max_length
        Largest number of tokens in an example and in a packed row.
    batch_size
        Examples (with `packing`: packed rows) in a batch on one device.
    tokens_per_batch
        Largest number of tokens in a batch on one device, padding included, in place of `batch_size`: batches of short
        examples have more of them. Which examples make a batch is decided once, their order anew in every epoch.
    packing
        Put several examples into one row of up to `max_length` tokens, without attention between them. The model must
        find the borders from `position_ids`. Many models of transformers do; convolutions, state spaces, linear
        attention and some others do not, and are refused with the first batch.
    padding_free
        Join the examples (with `packing`: packed rows) of a batch in one row, without attention between them and
        without padding. As `packing`, it needs a model that finds the borders from `position_ids`.
    group_by_length
        Form steps, over all devices, from examples of similar length. Cannot be combined with `packing`.
    limit
        Use only the first `limit` records of the training data. None: all. Entries have a `limit` of their own.
    eval_limit
        Use only the first `eval_limit` records of the validation and of the test data. None: all.
    num_workers
        Processes that collate batches. The data are already tokenized, so that 0 is usually best; with `streaming` 1
        is, which tokenizes beside the training.
    streaming
        Read the training data while training, and keep nothing, for sets that fit neither memory nor disk. Every rank
        reads all records and renders its share; the passes over the data never end, so that the Trainer needs
        `max_steps`. A run resumes on the same number of ranks. Validation data are tokenized beforehand as ever.
    shuffle_buffer
        With `streaming`, the number of records of a rank that are rendered, packed and shuffled together.
    seed
        Seed of the order of the training examples. None: that of ``lightning.seed_everything``, or 0.

    Raises
    ------
    InputError
        If a number is out of range, or both `packing` and `group_by_length` are set. From `setup`, if the data cannot
        be read or used; the message names the file and line.

    See Also
    --------
    lowrank_dist.CausalLMModule : The module that trains on these batches.

    Examples
    --------
    >>> from lowrank_dist import SFTDataModule
    >>> data = SFTDataModule(
    ...     "meta-llama/Meta-Llama-3-8B", "meta-math/MetaMathQA", limit=100_000, batch_size=4, group_by_length=True
    ... )
    >>> data.max_length
    512

    Files are read by ``trainer.fit(module, data)``, not by the constructor.
    """

    def __init__(
        self,
        tokenizer: str,
        train: Names,
        validation: Names | None = None,
        test: Names | None = None,
        *,
        task: Task | None = None,
        classes: list[str] | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        subset: str | None = None,
        stopping_strategy: StoppingStrategy = "first_exhausted",
        chat_template: str | None = None,
        train_on: TrainOn = "all_assistant",
        thinking: Thinking = "keep",
        columns: dict[str, str] | None = None,
        as_chat: bool = False,
        prompt_template: str | None = None,
        transform: Transform | None = None,
        on_bad_record: OnBadRecord = "error",
        on_long_example: OnLongExample = "cut",
        cache_dir: str | None = None,
        num_proc: int | None = None,
        max_length: int = 512,
        batch_size: int = 1,
        tokens_per_batch: int | None = None,
        packing: bool = False,
        padding_free: bool = False,
        group_by_length: bool = False,
        limit: int | None = None,
        eval_limit: int | None = None,
        num_workers: int = 0,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.sources = {
            role: () if names is None else parts_of(role, names, split=split, subset=subset, limit=count)
            for role, names, split, count in (
                ("train", train, train_split, limit),
                ("validation", validation, validation_split, eval_limit),
                ("test", test, test_split, eval_limit),
            )
        }
        self.stopping_strategy = stopping_strategy
        self.mixing = Mixing.of(self.sources["train"], stopping_strategy)
        if streaming:
            self.sources["train"] = streamed_parts(self.sources["train"])
        self.task = task
        self.classes = classes
        self.chat_template = chat_template
        self.train_on = train_on
        self.thinking = thinking
        self.columns = columns
        self.as_chat = as_chat
        self.prompt_template = None if prompt_template is None else PromptTemplate(prompt_template)
        self.transform = transform
        self.on_bad_record = on_bad_record
        self.on_long_example = on_long_example
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.num_proc = num_proc
        self.max_length = max_length
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self.packing = packing
        self.padding_free = padding_free
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.seed = global_seed() if seed is None else seed
        #: Largest token id of the data that were read.
        self.largest_token = 0
        #: Largest class of the data that were read.
        self.largest_class = -1
        #: Token of the padding, once data were read.
        self.pad_token_id = 0
        #: What is streamed, once set up; None without `streaming`.
        self.stream_settings: StreamSettings | None = None
        self._sets: dict[str, TokenDataset | JoinedItems] = {}
        #: What decided the sets when they were read.
        self._read_with: dict[str, Any] = {}
        self._train_loader: ResumableLoader | StreamLoader | None = None
        self._state: dict[str, Any] = {}
        self._limit_val_batches: int | float | None = None
        self._batching.check()
        check_numbers(limit=(limit, 1), eval_limit=(eval_limit, 1), num_proc=(num_proc, 1))
        if num_proc is not None and cache_dir is None:
            raise InputError(
                f"num_proc={num_proc} without cache_dir: every rank tokenizes by itself, and would start {num_proc} "
                "processes; set cache_dir, so that one rank tokenizes for all of a host"
            )
        self._example_settings.check(packing=packing, padding_free=padding_free)

    @property
    def _example_settings(self) -> ExampleSettings:
        return ExampleSettings(**{field.name: getattr(self, field.name) for field in fields(ExampleSettings)})

    @property
    def _batching(self) -> Batching:
        return Batching(**{field.name: getattr(self, field.name) for field in fields(Batching)})

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """The settings that decide what a prompt is, without the chat template and those left at their defaults."""
        return self._example_settings.of_prompts

    def _task(self) -> Task:
        """The task of this module, which is that of the Trainer's if none was given."""
        module = None if self.trainer is None else self.trainer.lightning_module
        wanted = getattr(module, "data_task", None)
        if wanted is not None and self.task not in (None, wanted):
            raise InputError(
                f"{type(module).__name__} trains on batches for {wanted!r}, but the data have task={self.task!r}; "
                "leave it out"
            )
        task: Task = self.task or wanted or "sft"
        self._example_settings.check_task(task, packing=self.packing, padding_free=self.padding_free)
        return task

    @property
    def full_rows(self) -> int:
        """Rows of `max_length` tokens that a batch of one device has at most."""
        return full_rows(
            batch_size=self.batch_size,
            tokens_per_batch=self.tokens_per_batch,
            max_length=self.max_length,
            per_item=PER_ITEM[self._task()],
        )

    # ---- Lightning's hooks, in order
    def prepare_data(self) -> None:
        """Download the Hugging Face data sets, once per node."""
        for source in (part.source for parts in self.sources.values() for part in parts):
            for name in () if source.streaming else source.hub_ids:
                # this runs on one rank; `setup` raises the same error on every rank
                with contextlib.suppress(ImportError, ValueError):
                    next(read_hub(name, source.subset, source.split), None)

    def setup(self, stage: str) -> None:
        """Read, render and tokenize the sets that `stage` needs, unless they were read with the same settings."""
        if stage == "fit":
            self._train_loader, self._state = None, {}
            if not (self.sources["validation"] or self._has_own_loader("validation")) and self.trainer is not None:
                # Lightning warns about an empty val_dataloader and about a missing one
                self._limit_val_batches = self.trainer.limit_val_batches
                self.trainer.limit_val_batches = 0
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}.get(stage, [])
        for role in needed:
            if role == "train" and self.streaming:
                self._open_stream()
            elif self.sources[role]:
                self._read(role)
                self._check_weights(role)
            elif stage != "fit" and not self._has_own_loader(role):
                raise InputError(f"{stage} needs data: set `{role}` to a .jsonl file or the id of a data set")

    def teardown(self, stage: str) -> None:
        if self.trainer is not None and self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning restores the state of a loader only if it creates the loader after reading the checkpoint, and
        # Trainer.estimated_stepping_batches creates it before.
        self._state = dict(state_dict)
        if self._train_loader is not None:
            self._go_on()

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Return the training examples, in a new order every epoch."""
        if self.stream_settings is not None:
            steps = 0 if self.trainer is None else self.trainer.max_steps * self.trainer.accumulate_grad_batches
            before = self._train_loader
            self._train_loader = self._stream_loader(self.stream_settings, steps or _ENDLESS)
            self._go_on()
            if isinstance(before, StreamLoader):  # Trainer(reload_dataloaders_every_n_epochs=...)
                self._train_loader.go_on_from(before.end())
            return self._train_loader
        loaded = self._sets["train"]
        sampler = self._sampler(loaded, shuffle=True)
        # With a reference cycle between module and loader, the garbage collector frees the workers after their queues,
        # which takes 5 seconds per worker.
        module = weakref.proxy(self)
        self._train_loader = ResumableLoader(
            sampler=sampler,
            unused=lambda: unused_batches(module.trainer),
            **self._batching.loader_arguments(loaded, self.pad_token_id),
        )
        self._go_on()
        return self._train_loader

    def _go_on(self) -> None:
        """Let the loader go on from the state that was loaded."""
        num_replicas, rank = self._ranks()
        position = stream_position(self._state, self.stream_settings, num_replicas=num_replicas, rank=rank)
        if isinstance(self._train_loader, StreamLoader):
            if position is not None:
                self._train_loader.go_on_from(position)
        elif self._train_loader is not None:
            self._train_loader.load_state_dict(self._state)

    def _stream_loader(
        self, settings: StreamSettings, length: int, ranks: tuple[int, int] | None = None
    ) -> StreamLoader:
        num_replicas, rank = ranks or self._ranks()
        module, alone = weakref.proxy(self), ranks is None and self._is_alone

        def stream(start: Position) -> Stream:
            if alone:
                check_alone()
            return Stream(settings, num_replicas=num_replicas, rank=rank, start=start)

        return StreamLoader(
            stream,
            length=length,
            num_workers=self.num_workers,
            unused=lambda: unused_batches(module.trainer),
        )

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks, and this rank."""
        if self.trainer is None and dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return ranks.get("num_replicas", 1), ranks.get("rank", 0)

    @property
    def _is_alone(self) -> bool:
        """Whether neither a Trainer nor a process group tells how many ranks there are."""
        return self.trainer is None and not (dist.is_available() and dist.is_initialized())

    def sharded_dataloader(self, *, num_replicas: int, rank: int) -> DataLoader[dict[str, Tensor]] | StreamLoader:
        """Return the first training batches of one of `num_replicas` ranks, for use without a Trainer."""
        if self.stream_settings is not None:
            return self._stream_loader(self.stream_settings, _ENDLESS, (num_replicas, rank))
        dataset = self._sets["train"]
        sampler = self._sampler(dataset, shuffle=True, ranks=(num_replicas, rank))
        return DataLoader(sampler=sampler, **self._batching.loader_arguments(dataset, self.pad_token_id))

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self._train_loader, StreamLoader):
            assert self.stream_settings is not None
            return stream_state(self.stream_settings, of_all_ranks(self._train_loader.position(), self.trainer))
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Return the validation examples, each exactly once; an empty list without validation data."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Return the test examples, each exactly once; an empty list without test data."""
        return self._eval_loader("test")

    # ---- helpers
    def _has_own_loader(self, role: str) -> bool:
        """Whether a subclass makes the loader of a set itself."""
        return is_overridden(_LOADERS[role], self, SFTDataModule)

    def _eval_loader(self, role: str) -> DataLoader[dict[str, Tensor]] | list[Any]:
        if (dataset := self._sets.get(role)) is None:
            return []
        sampler = self._sampler(dataset, shuffle=False)
        return DataLoader(sampler=sampler, **self._batching.loader_arguments(dataset, self.pad_token_id))

    def _sampler(self, dataset: Items, *, shuffle: bool, ranks: tuple[int, int] | None = None) -> ShardedSampler:
        num_replicas, rank = ranks or self._ranks()
        return self._batching.sampler(
            dataset,
            num_replicas=num_replicas,
            rank=rank,
            alone=ranks is None and self._is_alone,
            shuffle=shuffle,
            repeats=not self._module_takes_fillers(),
            mixing=self.mixing if shuffle else None,
        )

    def _module_takes_fillers(self) -> bool:
        module = None if self.trainer is None else self.trainer.lightning_module
        return bool(getattr(module, "takes_fillers", False))

    def _open_stream(self) -> None:
        """Look at the first records, the same on every rank."""
        task, parts = self._task(), self.sources["train"]
        if task == "classification":
            raise InputError(
                "task='classification' needs all labels before training, and streaming=True does not know "
                "them; leave it out"
            )
        check_streaming_trainer(self.trainer)
        preparer = self._example_settings.preparer(self._load_tokenizer(), task)
        settings = StreamSettings(
            parts=parts,
            preparer=preparer,
            shuffle_buffer=self.shuffle_buffer,
            batch_size=self.batch_size,
            capacity=self.max_length if self.packing else None,
            per_item=PER_ITEM[task],
            collate=self._batching.collator(self.pad_token_id),
            seed=self.seed,
        )
        largest, self.stream_settings, lines = settings.first()
        self.largest_token = max(largest, self.largest_token)
        for line in lines:
            self._report("%s: %s", parts[0].source, line)

    def _revision(self) -> str:
        """The revision of the tokenizer."""
        revision_of = getattr(getattr(self.trainer, "strategy", None), "revision_of", lambda _: None)
        return revision_of(self.tokenizer) or "main"

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, revision=self._revision())
        self.pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        return tokenizer

    def _read(self, role: str) -> None:
        """Read a set, unless it was read with the same settings and for the same task."""
        parts = self.sources[role]
        settings = (self._task(), self._example_settings, parts, self.tokenizer, self._revision(), self.packing)
        if self._read_with.get(role) == settings:
            return
        loaded = self._sets[role] = self._loaded(parts)
        self._read_with[role] = settings
        if role == "train" and self.mixing is not None:
            mixture = self._sampler(loaded, shuffle=True).mixture
            assert mixture is not None
            self._report("train: %s", mixture.line())

    def _check_weights(self, role: str) -> None:
        """InputError if a set has weights, and the module of the Trainer takes none."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is None or getattr(module, "takes_weights", False):
            return
        items = self._sets[role]
        for part, one in zip(
            self.sources[role], items.parts if isinstance(items, JoinedItems) else [items], strict=True
        ):
            if WEIGHTS in one.examples.along:
                raise InputError(
                    f"{part.source}: messages have a `weight` other than 0 and 1, and {type(module).__name__} takes no "
                    "weights, so that they would count for nothing; use CausalLMModule, or, if the module multiplies "
                    "the losses of tokens by `weights` of the batch, give it the attribute takes_weights = True"
                )

    def _loaded(self, parts: Sequence[Part]) -> TokenDataset | JoinedItems:
        task = self._task()
        tokenizer = self._load_tokenizer()
        sets = [self._load(tokenizer, part.source, part.limit, task) for part in parts]
        items = sets[0] if len(sets) == 1 else JoinedItems(sets)
        self._batching.check_items(items)
        return items

    def _load(self, tokenizer: Any, source: Source, limit: int | None, task: Task) -> TokenDataset:
        tokens, lines = self._example_settings.tokens(
            tokenizer,
            source,
            limit,
            task=task,
            cache_dir=self.cache_dir,
            num_proc=self.num_proc,
            progress=getattr(rank_zero_only, "rank", 0) == 0,
            report=self._report,
        )
        for line in lines:
            self._report("%s: %s", source, line)
        self.largest_token = max(tokens.largest, self.largest_token)
        if tokens.targets is not None:
            self.largest_class = max(int(tokens.targets.max()), self.largest_class)
        return TokenDataset(tokens, self.max_length if self.packing else None, per_item=PER_ITEM[task])

    def read(self, tokenizer: Any, source: Source, limit: int | None = None, *, task: Task | None = None) -> Loaded:
        """Read and tokenize a source with the settings of this module.

        Raises
        ------
        InputError
            If it cannot be read, a record cannot be used, or nothing is left.
        """
        return self._example_settings.read(
            tokenizer,
            source,
            limit,
            task=task or self.task or "sft",
            progress=getattr(rank_zero_only, "rank", 0) == 0,
        )

    @staticmethod
    @rank_zero_only
    def _report(message: str, *values: object) -> None:
        log.warning(message, *values)
