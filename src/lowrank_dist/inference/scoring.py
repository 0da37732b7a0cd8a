"""Tasks of lm-evaluation-harness: found, given local data, run on a sharded model, and their scores in a table."""

from __future__ import annotations

import difflib
import io
import logging
import random
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank_dist.errors import InputError, is_passing
from lowrank_dist.inference.scores import measured
from lowrank_dist.inference.sharded import ShardedCausalLM
from lowrank_dist.progress import aligned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Where the tasks of this package are.
OWN_TASKS = Path(__file__).with_name("tasks")

_READERS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".gz": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Which tasks, on which data, and how they are asked.

    Parameters
    ----------
    names
        Names of tasks, groups or tags of the harness or of `include_path`, or paths of YAML files.
    include_path
        Directory with YAML files of tasks.
    data
        Local files in place of a task's data: by ``task``, for its test split, or by ``task:split``.
    num_fewshot
        Examples before every question. None: what the task says.
    limit
        Use only the first so many documents of every task; below 1, this share of them. None: all.
    chat
        Put questions into the chat template.
    system
        A system message.
    options
        Changes of the options with which tasks generate.
    prompts
        Settings of prompts in training (`columns`, `as_chat`, `prompt_template`), for the task ``responses``.
    seed
        Seed of what is drawn: examples before questions, and answers of tasks that sample.
    unsafe
        Run tasks that execute code which the model writes.

    Raises
    ------
    InputError
        If a number is out of range, or there are no names.
    """

    names: tuple[str, ...]
    include_path: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    num_fewshot: int | None = None
    limit: float | None = None
    chat: bool = False
    system: str | None = None
    options: Mapping[str, Any] | None = None
    prompts: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1234
    unsafe: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise InputError("no tasks were given; name at least one")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"num_fewshot={self.num_fewshot} must not be negative")
        if self.limit is not None and self.limit <= 0:
            raise InputError(f"limit={self.limit} must be positive; leave it out for all documents")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be between 0 and 2**32")
        for name in self.data:
            if name.partition(":")[0] not in self.names:
                raise InputError(f"data for {name!r}, which is not among the tasks {', '.join(self.names)}")

    def says(self) -> str:
        """How the tasks are asked, in one line."""
        shots = "the tasks' own few-shot examples" if self.num_fewshot is None else f"{self.num_fewshot}-shot"
        how = "in the chat template" if self.chat else "as plain text"
        every = "all documents" if self.limit is None else f"the first {self.limit:g} documents of each"
        if self.limit is not None and self.limit < 1:
            every = f"the first {self.limit:.0%} of the documents of each"
        return f"{', '.join(self.names)}: {every}, {shots}, {how}, seed {self.seed}"

    def load(self, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Any]:
        """The tasks and groups, with their data.

        Parameters
        ----------
        tokenizer
            That of the model, for tasks that make prompts as training does (``responses``).

        Raises
        ------
        InputError
            If the harness is not installed, a task is not known, or its data cannot be loaded.
        """
        harness()
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"include_path={self.include_path!r} is not a directory")
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            try:  # those of the harness are many, and their files are read only if they are needed
                few = self._manager(tokenizer, everything=False)
                if all(self._knows(few, name) for name in self.names):
                    found = [task for name in self.names for task in self._loaded(name, few, last=False)]
                    self.changed(found)
                    return found
            except (KeyError, ValueError) as error:  # a group of tasks of the harness
                if isinstance(error, InputError):
                    raise
            every = self._manager(tokenizer, everything=True)
            for name in self.names:
                if not self._knows(every, name):
                    near = difflib.get_close_matches(name, every.all_tasks, n=3)
                    hint = f"; similar ones: {', '.join(near)}" if near else ""
                    raise InputError(
                        f"there is no task {name!r}{hint}; give a name of lm-evaluation-harness, one in include_path, "
                        "or the path of a YAML file"
                    )
            found = [task for name in self.names for task in self._loaded(name, every)]
            self.changed(found)
            return found

    def _manager(self, tokenizer: PreTrainedTokenizerBase | None, *, everything: bool) -> Any:
        name = None if tokenizer is None else tokenizer.name_or_path
        template = None if tokenizer is None else tokenizer.chat_template
        return _managed(self.include_path, name, template if isinstance(template, str) else None, everything)

    @staticmethod
    def _knows(manager: Any, name: str) -> bool:
        return name in manager.all_tasks or Path(name).is_file()

    def _loaded(self, name: str, manager: Any, *, last: bool = True) -> list[Any]:
        """One task or group; unless this manager is the `last`, a name that it lacks is a KeyError or a ValueError."""
        try:
            return self._with_data(name, manager)
        except InputError:
            raise
        except Exception as error:  # whatever YAML files, their functions and `datasets` raise
            unknown = not last and isinstance(error, KeyError | ValueError)
            if unknown or (is_passing(error) and not isinstance(error, ConnectionError)):
                raise
            raise InputError(
                f"task {name!r}: its data cannot be loaded ({type(error).__name__}: {_line(error)}); give a local file "
                f"(--data {name}=FILE)"
            ) from error

    def _with_data(self, name: str, manager: Any) -> list[Any]:
        given = {key.partition(":")[2] or "test": file for key, file in self.data.items() if _is_for(key, name)}
        if not given:
            found = manager.load([name])
            return [*found["groups"].values(), *_outside(found)]
        path = Path(name) if Path(name).is_file() else manager.task_index[name].yaml_path
        if path is None:
            raise InputError(f"data for {name!r}: only tasks of a YAML file take local data, not groups and tags")
        if "custom_dataset" in Path(path).read_text(encoding="utf-8"):
            if list(given) != ["test"]:
                raise InputError(f"data for {name!r}: it has one split, test")
            _reader(given["test"])
            settings = {"data": str(Path(given["test"]).absolute()), **self.prompts}
            return self._changed(path, {"dataset_kwargs": settings}, manager)
        kinds = {_reader(file) for file in given.values()}
        if len(kinds) > 1:
            raise InputError(f"data for {name!r}: files of one kind, not of {', '.join(sorted(kinds))}")
        changes = {
            "dataset_path": kinds.pop(),
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(Path(file).absolute()) for split, file in given.items()}},
            "test_split": "test" if "test" in given else None,
            "validation_split": "validation" if "validation" in given else None,
            "training_split": "train" if "train" in given else None,
            "fewshot_split": "train" if "train" in given else None,
        }
        return self._changed(path, changes, manager)

    def changed(self, loaded: Sequence[Any]) -> dict[str, Any]:
        """Tasks and groups from `load` with these options, in the form that ``lm_eval.evaluator.evaluate`` takes."""
        groups = {item.name: item for item in loaded if hasattr(item, "get_all_tasks")}
        for group in list(groups.values()):
            groups |= {inner.name: inner for inner in group.get_all_groups()}
        single = [item for item in loaded if not hasattr(item, "get_all_tasks")]
        found = [*single, *(task for group in groups.values() for task in group.get_all_tasks())]
        named = {task.task_name: task for task in found}
        for task in named.values():
            own = task.get_config("num_fewshot")
            if own == 0 and self.num_fewshot:
                raise InputError(f"num_fewshot={self.num_fewshot}: {task.task_name} is asked without examples")
            task.set_config(key="num_fewshot", value=(own or 0) if self.num_fewshot is None else self.num_fewshot)
            task.set_fewshot_seed(seed=self.seed)
            if self.options is not None and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=dict(self.options), update=True)
        return {"tasks": named, "groups": groups}

    @staticmethod
    def _changed(path: str | Path, changes: dict[str, Any], manager: Any) -> list[Any]:
        """The task of a YAML file with changes."""
        import yaml

        with tempfile.TemporaryDirectory() as directory:
            changed = Path(directory) / f"{Path(path).stem}.yaml"
            changed.write_text(yaml.safe_dump({"include": str(Path(path).absolute()), **changes}), encoding="utf-8")
            return list(manager.load([str(changed)])["tasks"].values())


@cache
def _managed(include_path: str | None, tokenizer: str | None, template: str | None, everything: bool) -> Any:
    """A TaskManager of the harness; to read the files of its own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=[str(OWN_TASKS), *([] if include_path is None else [include_path])],
        include_defaults=everything,
        metadata={"tokenizer": tokenizer, "chat_template": template},
    )


def harness() -> Any:
    """lm-evaluation-harness.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            f"tasks are run by lm-evaluation-harness, which is not installed ({error}): "
            "`pip install lowrank-dist[evaluate]`"
        ) from error
    return lm_eval


@dataclass(frozen=True)
class Scores:
    """What a model scored.

    Attributes
    ----------
    values
        By task (or group) and metric: ``"exact_match"``, or ``"exact_match,strict-match"`` where a task has several
        filters; and the standard error, or None.
    results
        What the harness reports, for files: results, versions, numbers of documents, configurations of the tasks.
    samples
        By task: every document with the model's answers.
    """

    values: dict[tuple[str, str], tuple[float, float | None]]
    results: dict[str, Any]
    samples: dict[str, list[Any]]


def score(
    model: ShardedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    loaded: Sequence[Any],
    *,
    batch_size: int = 8,
    show_progress: bool = False,
) -> Scores:
    """Run tasks on a sharded model. Collective: all ranks pass the same tasks and get the same scores.

    Python's, NumPy's and torch's random numbers are seeded.

    Parameters
    ----------
    model, tokenizer
        The model, in evaluation mode, and its tokenizer.
    tasks, loaded
        The tasks, and what ``tasks.load()`` returned; they can be run once.
    batch_size
        Requests that are computed together.
    show_progress
        Show progress bars on rank 0.

    Raises
    ------
    InputError
        On every rank, if a task cannot be run.
    """
    from lm_eval.evaluator import evaluate

    from lowrank_dist.inference.harness import ShardedHarnessLM

    lm = ShardedHarnessLM(model, tokenizer, batch_size=batch_size, seed=tasks.seed, show_progress=show_progress)
    random.seed(tasks.seed)
    np.random.seed(tasks.seed)
    torch.manual_seed(tasks.seed)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if model.group.rank > 0 or not show_progress:  # the harness takes every rank for the first, and shows bars
            stack.enter_context(redirect_stderr(io.StringIO()))
        try:  # not `simple_evaluate`, which looks at the machine for seconds
            results = evaluate(
                lm,
                tasks.changed(loaded),
                limit=tasks.limit,
                bootstrap_iters=1000,
                system_instruction=tasks.system,
                apply_chat_template=tasks.chat,
                fewshot_as_multiturn=True,
                confirm_run_unsafe_code=tasks.unsafe,
            )
        except (AssertionError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{', '.join(tasks.names)}: {_line(error)}") from error
    return _kept(results)  # every rank has all answers


def _kept(results: Any) -> Scores:
    values: dict[tuple[str, str], tuple[float, float | None]] = {}
    for task, metrics in results["results"].items():
        filters = {name.partition(",")[2] for name in metrics if "," in name}
        for metric, kind, value, error in measured(metrics):
            values[task, metric if len(filters) == 1 else f"{metric},{kind}"] = value, error
    keys = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
    kept = {key: results[key] for key in keys if key in results}
    return Scores(values, kept, results.get("samples", {}))


def as_table(scores: Mapping[str, Scores]) -> str:
    """Scores of several models, a column each."""
    rows = list(dict.fromkeys(row for found in scores.values() for row in found.values))
    table = [["task", "metric", *scores]]
    for task, metric in rows:
        cells = []
        for found in scores.values():
            value, error = found.values.get((task, metric), (None, None))
            cells.append("-" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        table.append([task, metric, *cells])
    return "\n".join(aligned(table, ruled=True))


def _outside(found: Mapping[str, Any]) -> list[Any]:
    """Tasks of no group."""
    inside = {name for group in found["groups"].values() for name in (task.task_name for task in group.get_all_tasks())}
    return [task for name, task in found["tasks"].items() if name not in inside]


def _is_for(key: str, name: str) -> bool:
    return key == name or key.rpartition(":")[0] == name


def _reader(file: str) -> str:
    path = Path(file)
    if not path.is_file():
        raise InputError(f"data: {file} is not a file")
    if path.suffix not in _READERS:
        raise InputError(f"data: {file} is none of {', '.join(_READERS)}")
    return _READERS[path.suffix]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


class _quiet:
    """Inside, the harness and `datasets` show warnings and errors only, and no progress bars of their own."""

    def __enter__(self) -> None:
        import datasets

        self._logger = logging.getLogger("lm_eval")
        self._level, self._bars = self._logger.level, datasets.utils.logging.is_progress_bar_enabled()
        self._logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        self._logger.setLevel(self._level)
        if self._bars:
            datasets.enable_progress_bars()
