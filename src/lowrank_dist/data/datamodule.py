"""The supervised fine-tuning DataModule: which examples each rank sees in each step.

Every rank tokenizes the whole set once, into two flat int32 tensors (see `sft`), and draws its own share of every step.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lowrank_dist.data.sft import IGNORE_INDEX, Collator, Encoder, Renderer, TokenDataset, read_hub, read_jsonl

log = logging.getLogger(__name__)


class ShardedSampler(DistributedSampler[Any]):
    """A rank's share of every step, with the same number of batches, equally large, on every rank.

    The order of an epoch is global and the same on every rank. A step takes the next ``batch_size * num_replicas``
    items and gives each rank a consecutive part. The last step may be smaller; the items it lacks to divide by the
    number of ranks are filled in: in training (`shuffle`) from the front of the epoch, in evaluation by fillers that
    hold no label (see `TokenDataset`), so that every item counts exactly once.

    It is a `DistributedSampler` because Lightning wraps or replaces any other one.

    Parameters
    ----------
    dataset
        What is sampled.
    batch_size
        Items of a batch on one rank.
    num_replicas, rank
        Number of ranks, and this one's.
    shuffle
        Draw a new order every epoch (training), or keep the order of the set (evaluation).
    seed
        Of the order, together with the epoch.
    group_by_length
        Make steps of items of similar length: up to 50 steps' items are sorted and cut into steps, which are then
        shuffled. The step with the longest item comes first, so that a run short of memory fails at once.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
        shuffle: bool,
        seed: int = 0,
        group_by_length: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.lengths = torch.tensor(dataset.lengths) if group_by_length else None
        self.step_size = self.order_step_size = batch_size * num_replicas
        self.start = self.handed_out = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of `epoch`; a new epoch starts at its beginning, in an order for this number of ranks."""
        if epoch != self.epoch:
            self.start = self.handed_out = 0
            self.order_step_size = self.step_size
        super().set_epoch(epoch)

    def resume(self, *, epoch: int, start: int, order_step_size: int) -> None:
        """Continue an epoch behind its first `start` items, in the order of a run with steps of `order_step_size`."""
        super().set_epoch(epoch)
        self.start = self.handed_out = start % len(self.dataset)  # type: ignore[arg-type]
        self.order_step_size = order_step_size

    def order(self) -> list[int]:
        """Global order of this epoch, before filling; the same on every rank."""
        total = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        if self.lengths is None:
            return order.tolist()
        if not self.shuffle:
            return self.lengths.argsort(descending=True, stable=True).tolist()
        step = self.order_step_size
        whole, rest = order[: total - total % step], order[total - total % step :]
        if len(whole):
            windows = whole.split(step * min(50, max(1, total // (4 * step))))
            grouped = [window[self.lengths[window].argsort(descending=True, stable=True)] for window in windows]
            steps = torch.cat(grouped).view(-1, step)
            steps = steps[torch.randperm(len(steps), generator=generator)]
            first = int(self.lengths[steps].amax(dim=1).argmax())
            steps[[0, first]] = steps[[first, 0]]
            whole = steps.flatten()
        return torch.cat([whole, rest]).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        todo = order[self.start :]
        lacking = -len(todo) % self.num_replicas
        todo += [order[i % len(order)] if self.shuffle else ~order[0] for i in range(lacking)]
        for at in range(0, len(todo), self.step_size):
            step = todo[at : at + self.step_size]
            share = len(step) // self.num_replicas
            yield from step[self.rank * share : (self.rank + 1) * share]


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A `DataLoader` over a `ShardedSampler` that knows how much of the epoch it has handed out.

    Parameters
    ----------
    unused
        Tells how many of the last batches are to be handed out again after resuming.
    **settings
        Of `DataLoader`.

    Notes
    -----
    Its state is three integers, the same on every rank, and can be loaded on another number of ranks: what is left of
    the epoch is then dealt out anew, no item twice and none left out.
    """

    def __init__(self, *args: Any, unused: Callable[[], int] = lambda: 0, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.unused = unused
        self._begun = self._steps = 0  # where this iteration began, in items, and its steps since

    def state_dict(self) -> dict[str, int]:
        """Epoch, items handed out in it over all ranks, and the step size that its order was drawn for."""
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):  # Lightning's overfit_batches puts another one in its place
            return {}
        start = sampler.handed_out
        if unused := self.unused():
            start = self._begun + max(0, self._steps - unused) * sampler.step_size
        return {"epoch": sampler.epoch, "start": start, "order_step_size": sampler.order_step_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        if state and isinstance(self.sampler, ShardedSampler):
            self.sampler.resume(**state)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # A generator: nothing is read from the sampler before the first batch is asked for. Lightning creates the
        # iterator before it has restored a checkpoint and before it has set the epoch.
        sampler = self.sampler
        if not isinstance(sampler, ShardedSampler):
            yield from super().__iter__()
            return
        start, total = sampler.start, len(sampler.dataset)  # type: ignore[arg-type]
        for step, batch in enumerate(super().__iter__(), start=1):
            sampler.start = 0  # has been read: whoever iterates again starts from the beginning
            sampler.handed_out = min(total, start + step * sampler.step_size)
            self._begun, self._steps = start, step
            yield batch


class SFTDataModule(L.LightningDataModule):
    """Supervised fine-tuning data from JSONL files or Hugging Face data sets, with the loss on responses only.

    A record has one of these sets of columns; other columns are ignored:

    - `messages`: a conversation, rendered with the chat template. Every assistant turn is trained on. `tools`, where
      there, are given to the template.
    - `messages` and `completion`: the conversation and its generation prompt are the prompt, `completion` the response.
    - `prompt` and `completion`: both as they are.
    - `query` and `response`: the query in the instruction prompt of Alpaca, MetaMath and PiSSA.

    The end-of-sequence token is trained on. Examples longer than `max_length` are cut from the right; those left
    without a response are dropped, and their number is logged.

    Parameters
    ----------
    tokenizer
        Directory or hub id of the tokenizer, usually that of the model.
    train
        Training data: path of a .jsonl file, or id of a Hugging Face data set.
    validation
        Validation data, as `train`. None: no validation.
    test
        Test data, as `train`. None: no test.
    train_split
        Split that `train` names, where it is a Hugging Face data set.
    validation_split
        Split that `validation` names, where it is a Hugging Face data set.
    test_split
        Split that `test` names, where it is a Hugging Face data set.
    subset
        Subset (configuration) of the Hugging Face data sets.
    chat_template
        Path of a Jinja file with the chat template. None: the tokenizer's own.
    max_length
        Most tokens of an example, and of a packed row.
    batch_size
        Examples (packed rows, with `packing`) of a batch on one device.
    packing
        Put several examples into one row of up to `max_length` tokens, without attention between them. Needs a model
        that finds the borders in `position_ids`: those of transformers with rotary or learned positions do.
    group_by_length
        Make batches, on all devices at once, of examples of similar length. Excludes `packing`.
    limit
        Use only the first so many records of the training data. None: all.
    eval_limit
        Use only the first so many records of the validation and of the test data. None: all.
    num_workers
        Processes that collate batches. The data are tokenized beforehand, so that 0 is mostly right.
    seed
        Seed of the order of the training examples.

    Raises
    ------
    ValueError
        If a number is out of range, if both `packing` and `group_by_length` are asked for, and from `setup` if the data
        cannot be read or used; the message names the file and line.
    """

    def __init__(
        self,
        tokenizer: str,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        *,
        train_split: str = "train",
        validation_split: str = "validation",
        test_split: str = "test",
        subset: str | None = None,
        chat_template: str | None = None,
        max_length: int = 512,
        batch_size: int = 1,
        packing: bool = False,
        group_by_length: bool = False,
        limit: int | None = None,
        eval_limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if packing and group_by_length:
            raise ValueError(
                "packing=True and group_by_length=True exclude each other (packed rows all have about max_length "
                "tokens); set one of them to false"
            )
        for name, value, least in (
            ("max_length", max_length, 2),
            ("batch_size", batch_size, 1),
            ("limit", limit, 1),
            ("eval_limit", eval_limit, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.tokenizer = tokenizer
        self.sources = {
            "train": (train, train_split, limit),
            "validation": (validation, validation_split, eval_limit),
            "test": (test, test_split, eval_limit),
        }
        self.subset = subset
        self.chat_template = chat_template
        self.max_length = max_length
        self.batch_size = batch_size
        self.packing = packing
        self.group_by_length = group_by_length
        self.num_workers = num_workers
        self.seed = seed
        self._sets: dict[str, TokenDataset] = {}
        self._pad_token_id = 0
        self._train_loader: ResumableLoader | None = None
        self._state: dict[str, int] = {}
        self._limit_val_batches: int | float | None = None

    # ---- Lightning's hooks, in order
    def prepare_data(self) -> None:
        """Download the Hugging Face data sets, once a node."""
        for name, split, _ in self.sources.values():
            if name is not None and not _looks_like_file(name):
                # only one rank is here: what is wrong is raised by `setup`, on every rank
                with contextlib.suppress(ImportError, ValueError):
                    next(read_hub(name, self.subset, split), None)

    def setup(self, stage: str) -> None:
        """Read, render and tokenize the sets that `stage` needs and that are not there yet."""
        if stage == "fit":
            self._train_loader, self._state = None, {}
            if self.sources["validation"][0] is None and self.trainer is not None:
                # Lightning warns of a val_dataloader that is empty, and of one that is not there
                self._limit_val_batches = self.trainer.limit_val_batches
                self.trainer.limit_val_batches = 0
        needed = {"fit": ["train", "validation"], "validate": ["validation"], "test": ["test"]}.get(stage, [])
        for role in needed:
            if role in self._sets:
                continue
            name, split, limit = self.sources[role]
            if name is not None:
                self._sets[role] = self._load(role, name, split, limit)
            elif stage != "fit":
                raise ValueError(f"{stage} needs data: set `{role}` to a .jsonl file or the id of a data set")

    def teardown(self, stage: str) -> None:
        if self.trainer is not None and self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Here and not only in the loader: Lightning restores loaders only where it creates them after it has read the
        # checkpoint, and Trainer.estimated_stepping_batches makes it create them before.
        self._state = dict(state_dict)
        if self._train_loader is not None:
            self._train_loader.load_state_dict(self._state)

    def train_dataloader(self) -> ResumableLoader:
        """The training examples, in a new order every epoch."""
        dataset = self._sets["train"]
        sampler = self._sampler(dataset, shuffle=True)
        # In a cycle with its loader, workers would be collected after their queues: 5 seconds of waiting for each.
        module = weakref.proxy(self)
        self._train_loader = ResumableLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            unused=lambda: module._unused_batches(),
            **self._loader_settings(),
        )
        self._train_loader.load_state_dict(self._state)
        return self._train_loader

    def sharded_dataloader(self, *, num_replicas: int, rank: int) -> DataLoader[dict[str, Tensor]]:
        """The batches that training would begin with on one of `num_replicas` ranks, where there is no Trainer."""
        dataset = self._sets["train"]
        sampler = self._sampler(dataset, shuffle=True, ranks={"num_replicas": num_replicas, "rank": rank})
        return DataLoader(dataset, self.batch_size, sampler=sampler, **self._loader_settings())

    def _unused_batches(self) -> int:
        """Batches handed out to a step that is not done: of a checkpoint that is saved on an exception."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        unused = progress.ready - progress.processed
        # the step at the end of an epoch may have fewer batches
        epoch_ended = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and not unused
        if getattr(self.trainer.strategy, "resumes_whole_steps", False) and not epoch_ended:
            unused += progress.processed % self.trainer.accumulate_grad_batches
        return unused

    def state_dict(self) -> dict[str, Any]:
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The validation examples, each exactly once; an empty list where there are none."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The test examples, each exactly once."""
        return self._eval_loader("test")

    # ---- what they use
    def _eval_loader(self, role: str) -> DataLoader[dict[str, Tensor]] | list[Any]:
        if (dataset := self._sets.get(role)) is None:
            return []
        sampler = self._sampler(dataset, shuffle=False)
        return DataLoader(dataset, self.batch_size, sampler=sampler, **self._loader_settings())

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "collate_fn": Collator(self._pad_token_id),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _sampler(self, dataset: TokenDataset, *, shuffle: bool, ranks: dict[str, int] | None = None) -> ShardedSampler:
        if ranks is None:
            ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return ShardedSampler(
            dataset,
            batch_size=self.batch_size,
            num_replicas=ranks.get("num_replicas", 1),
            rank=ranks.get("rank", 0),
            shuffle=shuffle,
            seed=self.seed,
            group_by_length=self.group_by_length,
        )

    def _load(self, role: str, name: str, split: str, limit: int | None) -> TokenDataset:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        self._pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        template = None
        if self.chat_template is not None:
            if not Path(self.chat_template).is_file():
                raise ValueError(f"chat_template={self.chat_template!r} is not a file; give the path of a Jinja file")
            template = Path(self.chat_template).read_text(encoding="utf-8")
        renderer, encoder = Renderer(tokenizer, template), Encoder(tokenizer)
        is_file = _looks_like_file(name)
        if is_file and not Path(name).is_file():
            raise ValueError(
                f"{role}={name!r} does not exist; give the path of a .jsonl file, or the id of a Hugging Face data set"
            )

        records = islice(read_jsonl(Path(name)) if is_file else read_hub(name, self.subset, split), limit)
        kept: list[Tensor] = []
        total = cut = 0
        while chunk := list(islice(records, 1000)):
            for tokens, labels in encoder([e for where, record in chunk for e in renderer.examples(record, where)]):
                total += 1
                cut += len(tokens) > self.max_length
                example = torch.tensor([tokens, labels], dtype=torch.int32)[:, : self.max_length]
                if (example[1] != IGNORE_INDEX).any():
                    kept.append(example)
        if not total:
            raise ValueError(f"{role}={name!r} holds no record; every line must hold one JSON object")
        if not kept:
            raise ValueError(
                f"{role}={name!r}: none of the {total} examples has a response token within max_length="
                f"{self.max_length}; raise max_length"
            )
        if cut:
            self._report(
                "%s=%s: %d of %d examples are longer than max_length=%d and were cut; %d of them had no response left "
                "and were dropped",
                role,
                name,
                cut,
                total,
                self.max_length,
                total - len(kept),
            )
        return TokenDataset(kept, self.max_length if self.packing else None)

    @staticmethod
    @rank_zero_only
    def _report(message: str, *values: object) -> None:
        log.warning(message, *values)


def _looks_like_file(name: str) -> bool:
    """Whether `name` is meant as a file rather than as a hub id."""
    return Path(name).suffix in {".json", ".jsonl"} or Path(name).is_file()
