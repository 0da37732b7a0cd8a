"""``lowrank-dist evaluate``: score a model with tasks of lm-evaluation-harness, on the base that it was trained on."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dist.cli.model_options import add_model_options, check_ranks, loaded, on_disk, say, tokenizer_of
from lowrank_dist.cli.output import add_overwrite, check_outputs
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from lowrank_dist.inference.scoring import Scores

STAGES = ("base", "step0", "trained", "converted")


#: Options that say what the prompts of training were.
_PROMPTS = ("columns", "as_chat", "prompt_template")


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist evaluate``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    _check(options)
    from lowrank_dist.cli.ranks import launch, launched, shard_group

    if not launched():
        _check_outputs(options)
        if options.devices > 1:
            return launch(["evaluate", *argv], options.devices)
    with shard_group(options.accelerator, sharded_model=True) as (group, _):
        _evaluate(options, group)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist evaluate``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist evaluate",
        description="Score a model with tasks of lm-evaluation-harness. A checkpoint is scored on the frozen base that "
        "it was trained on, sharded over the ranks, before anything is merged.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--tasks",
        required=True,
        help="names of the harness, separated by commas, or paths of YAML files; responses, gsm8k_pissa and gsm8k_peft "
        "come with this package",
    )
    parser.add_argument("--include_path", help="directory with YAML files of further tasks")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="a local file in place of a task's data, for its test split, or TASK:SPLIT=FILE; may be repeated",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=["trained"],
        help="models of a checkpoint, a column each: the original model, that of step 0, the trained one, and its LoRA "
        "on the original model (default: trained)",
    )
    parser.add_argument("--columns", type=json.loads, metavar="JSON", help="of `responses`: as in `data:` of the run")
    parser.add_argument("--as_chat", action="store_true", help="of `responses`: as in `data:` of the run")
    parser.add_argument("--prompt_template", help="of `responses`: as in `data:` of the run")
    parser.add_argument("--num_fewshot", type=int, help="examples before every question (default: the task's)")
    parser.add_argument("--limit", type=float, help="only so many documents of every task; below 1, this share")
    parser.add_argument("--apply_chat_template", action="store_true", help="put questions into the chat template")
    parser.add_argument("--system_instruction", help="a system message")
    parser.add_argument(
        "--gen_kwargs", type=json.loads, metavar="JSON", help="changes of the options with which tasks generate"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seed of what is drawn (default: %(default)s)")
    parser.add_argument(
        "--confirm_run_unsafe_code", action="store_true", help="run tasks that execute code which the model writes"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="requests that are computed together (default: %(default)s)"
    )
    parser.add_argument("--output", help="write the results there, as JSON")
    parser.add_argument("--samples", help="write every document with its answers there, as JSON lines")
    add_overwrite(parser)
    return parser


def _check(options: Any) -> None:
    """Raise InputError for options that contradict each other, before anything heavy is imported."""
    from lowrank_dist.data.shapes import check_columns

    if options.devices < 1:
        raise InputError(f"--devices {options.devices} must be at least 1")
    if options.batch_size < 1:
        raise InputError(f"--batch_size {options.batch_size} must be at least 1")
    for entry in options.data:
        if "=" not in entry or not all(entry.partition("=")[::2]):
            raise InputError(f"--data {entry}: must be TASK=FILE or TASK:SPLIT=FILE")
    twice = [what for what, count in Counter(entry.partition("=")[0] for entry in options.data).items() if count > 1]
    if twice:
        raise InputError(f"--data {twice[0]}: given more than once; pass one file for it")
    if "responses" not in options.tasks.split(","):
        for name in _PROMPTS:
            if getattr(options, name):
                raise InputError(f"--{name} is for the task responses; other tasks make prompts of their own")
    if options.columns is not None and not isinstance(options.columns, dict):
        raise InputError('--columns must be a JSON object, such as {"prompt": "question_text"}')
    check_columns(options.columns)
    if options.gen_kwargs is not None and not isinstance(options.gen_kwargs, dict):
        raise InputError('--gen_kwargs must be a JSON object, such as {"max_gen_toks": 128}')


def _check_outputs(options: Any) -> None:
    check_outputs({"--output": options.output, "--samples": options.samples}, overwrite=options.overwrite)


def _evaluate(options: Any, group: Any) -> None:
    from lowrank_dist.cli.ranks import first_on_host
    from lowrank_dist.data.prompts import Prompter
    from lowrank_dist.inference.generation import stop_tokens
    from lowrank_dist.inference.scoring import Tasks, as_table, score

    with group.shared_errors():
        check_ranks(options, group)
        tasks = Tasks(
            names=tuple(filter(None, (name.strip() for name in options.tasks.split(",")))),
            include_path=options.include_path,
            data=dict(entry.partition("=")[::2] for entry in options.data),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            chat=options.apply_chat_template,
            system=options.system_instruction,
            options=options.gen_kwargs,
            prompts={name: value for name in _PROMPTS if (value := getattr(options, name))},
            seed=options.seed,
            unsafe=options.confirm_run_unsafe_code,
        )
        if group.rank == 0:
            _check_outputs(options)
    stages = list(dict.fromkeys(options.stages))
    models = {stage: on_disk(options, group, stage=stage) for stage in stages}
    with group.shared_errors():
        first = models[stages[0]]
        tokenizer = tokenizer_of(options, first)
        if tasks.chat and not tokenizer.chat_template:
            raise InputError(
                f"--apply_chat_template: the tokenizer {tokenizer.name_or_path!r} has none; pass --chat_template"
            )
        for model in models.values():
            if model.rows is not None and len(tokenizer) > model.rows:
                largest = max(tokenizer.get_vocab().values())
                say(group, f"the tokenizer has tokens up to {largest}, the model an embedding of {model.rows} rows")
    with group.shared_errors():
        if first_on_host():  # others then find the data of the tasks in the cache
            tasks.load(tokenizer)
    with group.shared_errors():
        stops = stop_tokens(first.generation(), Prompter(tokenizer).stops())
    say(group, tasks.says())
    learned = [f"{tokenizer.convert_ids_to_tokens(i)}" for i, what in stops.items() if what == "end of turn"]
    if tasks.chat and learned and "until" not in (options.gen_kwargs or {}):
        say(group, f"an answer does not end with {learned[0]}, which ends a turn in training, unless the task says so")
    scores: dict[str, Scores] = {}
    for stage, model in models.items():
        say(
            group,
            f"{stage}: {model.kind}; {model.precision_on(group.device)} on {group.size} "
            f"{group.device.type.upper()} rank{'s' if group.size > 1 else ''}",
        )
        with group.shared_errors():
            found = tasks.load(tokenizer)
        with loaded(model, group) as sharded:
            scores[stage] = score(sharded, tokenizer, tasks, found, batch_size=options.batch_size, show_progress=True)
        model.close()
    with group.shared_errors():
        if group.rank == 0:
            print(as_table(scores))
            write_results(options, scores, {stage: model.kind for stage, model in models.items()})


def _is_set(value: object) -> bool:
    """Whether an option says anything; a 0 does."""
    return not (value is None or value is False or value == [])


def write_results(options: Any, scores: Mapping[str, Scores], kinds: Mapping[str, str]) -> None:
    """Write the files of ``--output`` and ``--samples``; scores, and what was scored, by stage."""
    from lowrank_dist._version import __version__
    from lowrank_dist.storage.atomic import atomic_file

    def plain(value: Any) -> str:
        return str(value)

    if options.output is not None:
        report = {
            "lowrank_dist": __version__,
            "model": options.model,
            "options": {name: value for name, value in vars(options).items() if _is_set(value)},
            "stages": {stage: {"model": kinds[stage], **found.results} for stage, found in scores.items()},
        }
        with atomic_file(Path(options.output), overwrite=options.overwrite) as staging:
            staging.write_text(json.dumps(report, indent=2, default=plain, ensure_ascii=False) + "\n", encoding="utf-8")
        print(options.output)
    if options.samples is not None:
        with atomic_file(Path(options.samples), overwrite=options.overwrite) as staging, staging.open("w") as file:
            for stage, found in scores.items():
                for task, samples in found.samples.items():
                    for sample in samples:
                        line = {"stage": stage, "task": task, **sample}
                        file.write(json.dumps(line, default=plain, ensure_ascii=False) + "\n")
        print(options.samples)
