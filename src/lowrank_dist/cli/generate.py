"""``lowrank-dist generate``: ask a model: one prompt, a file of prompts, or a chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dist.cli.model_options import add_model_options, check_ranks, loaded, on_disk, say, tokenizer_of
from lowrank_dist.cli.output import add_overwrite
from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from lowrank_dist.data.prompts import Prompt
    from lowrank_dist.inference.generation import Answer

_ANSWER = 256  # tokens


def run(argv: Sequence[str]) -> int:
    """Run ``lowrank-dist generate``; `argv` excludes the command's name. Returns the exit status."""
    options = parser().parse_args(argv)
    _check(options)
    from lowrank_dist.cli.ranks import launch, launched, shard_group

    if options.devices > 1 and not launched():
        return launch(["generate", *argv], options.devices)
    try:
        with shard_group(options.accelerator, sharded_model=True) as (group, _):
            _generate(options, group)
    except KeyboardInterrupt:  # Ctrl-C in a chat
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of ``lowrank-dist generate``."""
    parser = argparse.ArgumentParser(
        prog="lowrank-dist generate",
        description="Ask a model: one prompt, a file of prompts, or, without either, a chat in the terminal. A "
        "checkpoint answers on the frozen base that it was trained on, sharded over the ranks.",
    )
    add_model_options(parser)
    parser.add_argument("--prompt", help="one prompt; it is a message of a user if there is a chat template")
    parser.add_argument(
        "--prompts",
        help="a file: records of training data, whose last response is left out, or lines of a .txt file",
    )
    parser.add_argument("--text", action="store_true", help="take --prompt as it is, without the chat template")
    parser.add_argument("--as_chat", action="store_true", help="render the prompts of --prompts as conversations")
    parser.add_argument("--prompt_template", help="what training put around the prompts of records, as in `data:`")
    parser.add_argument("--columns", type=json.loads, metavar="JSON", help="names of the columns of --prompts")
    parser.add_argument("--system", help="a system message before conversations that have none")
    parser.add_argument("--output", help="write the answers to --prompts there, as JSON lines")
    add_overwrite(parser)
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        help=f"the most tokens of an answer (default: {_ANSWER}, or what the model's context leaves)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0: the most likely token is taken; above, tokens are drawn (default: %(default)s)",
    )
    parser.add_argument("--top_p", type=float, help="draw from the most likely tokens of this probability together")
    parser.add_argument("--top_k", type=int, help="draw from so many of the most likely tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=8, help="prompts that are answered together (default: %(default)s)"
    )
    return parser


def _check(options: Any) -> None:
    """Raise InputError for options that contradict each other, before anything heavy is imported."""
    if options.prompt is not None and options.prompts is not None:
        raise InputError("--prompt and --prompts exclude each other; pass one of them, or neither for a chat")
    if options.prompts is None:
        for name in ("output", "columns", "as_chat", "prompt_template"):
            if getattr(options, name):
                raise InputError(f"--{name} is for a file of prompts; pass --prompts")
    if options.text and options.prompt is None:
        raise InputError("--text takes --prompt as it is; pass --prompt")
    if options.text and options.system is not None:
        raise InputError("--system is part of a conversation; leave --text out, or write it into --prompt")
    if options.devices < 1:
        raise InputError(f"--devices {options.devices} must be at least 1")
    if options.batch_size < 1:
        raise InputError(f"--batch_size {options.batch_size} must be at least 1")
    if options.columns is not None and not isinstance(options.columns, dict):
        raise InputError('--columns must be a JSON object, such as {"prompt": "question_text"}')


def _generate(options: Any, group: Any) -> None:
    from lowrank_dist.data.prompt_template import PromptTemplate
    from lowrank_dist.data.prompts import Prompter
    from lowrank_dist.data.shapes import check_columns
    from lowrank_dist.inference.chat import chat, stream
    from lowrank_dist.inference.generation import Sampling, answer, check_prompts, stop_tokens
    from lowrank_dist.progress import count_bar

    with group.shared_errors():
        check_ranks(options, group)
        sampling = Sampling(
            max_new_tokens=_ANSWER if options.max_new_tokens is None else options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
        )
        check_columns(options.columns)
        if group.rank == 0 and options.output is not None:
            _check_output(Path(options.output), overwrite=options.overwrite)
    model = on_disk(options, group)
    with group.shared_errors():
        tokenizer = tokenizer_of(options, model)
        prompter = Prompter(
            tokenizer,
            system=options.system,
            columns=options.columns,
            as_chat=options.as_chat,
            prompt_template=None if options.prompt_template is None else PromptTemplate(options.prompt_template),
        )
        prompts = _prompts(options, prompter)
        stops = stop_tokens(model.generation(), prompter.stops())
        if options.max_new_tokens is None and model.context is not None:
            # of a chat, whose messages are not known yet, half of the context is left for answers
            left = model.context - max((len(one.tokens) for one in prompts), default=model.context // 2)
            sampling = replace(sampling, max_new_tokens=max(1, min(_ANSWER, left)))
        check_prompts(prompts, sampling, rows=model.rows, context=model.context, tokenizer=tokenizer.name_or_path)
        if not prompts and not prompter.has_template:
            raise InputError(
                f"a chat needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none; pass "
                "--chat_template, or a --prompt"
            )
    say(
        group,
        f"{options.model}: {model.kind}; {model.precision_on(group.device)} on {group.size} "
        f"{group.device.type.upper()} rank{'s' if group.size > 1 else ''}",
    )
    names = [f"{tokenizer.convert_ids_to_tokens(token)} ({what})" for token, what in stops.items()]
    say(group, f"{sampling.says(model.generation())}; an answer ends with {', '.join(names)}")
    if options.prompt is not None or not prompts:
        templated = not options.text and prompter.has_template
        say(group, "the prompt is a user's message in the chat template" if templated else "the prompt is plain text")
    with loaded(model, group) as sharded:
        if options.prompts is not None:
            with count_bar(len(prompts), show=group.rank == 0 and sys.stderr.isatty(), doing="Answering") as bar:
                answers = answer(
                    sharded,
                    prompts,
                    tokenizer,
                    sampling,
                    stops=stops,
                    batch_size=options.batch_size,
                    done=lambda count: bar.update(min(count * group.size, len(prompts) - bar.n)),
                )
            with group.shared_errors():
                if group.rank == 0:
                    _write(prompts, answers, options.output, overwrite=options.overwrite)
        elif prompts:
            stream(sharded, prompts[0], tokenizer, sampling, stops=stops)
        else:
            chat(sharded, prompter, tokenizer, sampling, stops=stops)
    model.close()


def _prompts(options: Any, prompter: Any) -> list[Prompt]:
    if options.prompts is not None:
        return list(prompter.file(Path(options.prompts)))
    if options.prompt is None:
        return []
    if options.text:
        return [prompter.text(options.prompt, "--prompt")]
    return [prompter.line(options.prompt, "--prompt")]


def _check_output(path: Path, *, overwrite: bool) -> None:
    from lowrank_dist.storage.replacing import check_file

    check_file(path, overwrite=overwrite)


def _write(prompts: Sequence[Prompt], answers: Sequence[Answer], output: str | None, *, overwrite: bool) -> None:
    lines = [
        json.dumps(
            {"where": p.where, "prompt": p.text, "text": a.text, "tokens": len(a.tokens), "ended": a.ended},
            ensure_ascii=False,
        )
        for p, a in zip(prompts, answers, strict=True)
    ]
    text = "".join(f"{line}\n" for line in lines)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    from lowrank_dist.storage.atomic import atomic_file

    with atomic_file(Path(output), overwrite=overwrite) as staging:
        staging.write_text(text, encoding="utf-8")
    print(output)
