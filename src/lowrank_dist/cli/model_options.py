"""The options of commands that load a model for inference, and what they say of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lowrank_dist.errors import InputError
from lowrank_dist.storage.layout import QUANT_STATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowrank_dist.distributed.group import ShardGroup
    from lowrank_dist.inference.on_disk import ModelOnDisk, Stage
    from lowrank_dist.inference.sharded import ShardedCausalLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model, and how it is loaded."""
    parser.add_argument(
        "model",
        help="a checkpoint of a run, an adapter (lora/ of a checkpoint, or one of PEFT), a residual model, or a "
        "pretrained model; a directory or a hub id",
    )
    parser.add_argument(
        "--base", help="directory or hub id of the weights that the adapter is for (default: as recorded with it)"
    )
    parser.add_argument(
        "--revision",
        help="revision of a hub id: of --base, of the model, or of the base that the adapter names (default: the "
        "recorded commit, or main)",
    )
    parser.add_argument(
        "--quantization",
        choices=[*QUANT_STATES, "none"],
        default="none",
        help="how the linear layers of an original model are held (default: %(default)s); a checkpoint says itself",
    )
    parser.add_argument(
        "--precision",
        help="32-true, bf16-true or bf16-mixed (default: that of the run; else bf16-true on GPUs, 32-true on CPUs)",
    )
    parser.add_argument("--init_cache", help="init_cache of the run, if it had one")
    parser.add_argument("--tokenizer", help="directory or hub id (default: the one beside the pretrained weights)")
    parser.add_argument("--chat_template", help="a Jinja file, or its text (default: the tokenizer's own)")
    parser.add_argument("--devices", type=int, default=1, help="ranks to start on this host (default: %(default)s)")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="where to compute")


def say(group: ShardGroup, text: str) -> None:
    """Write a line on rank 0, to standard error: standard output is for answers."""
    if group.rank == 0:
        from lowrank_dist.storage.parse import printable

        print(printable(text, 2000), file=sys.stderr, flush=True)


def on_disk(options: Any, group: ShardGroup, *, stage: Stage = "trained") -> ModelOnDisk:
    """The model that the options name. Collective: its errors are raised on every rank."""
    from lowrank_dist.cli.ranks import first_on_host
    from lowrank_dist.inference.on_disk import ModelOnDisk
    from lowrank_dist.quantization.registry import FORMATS

    def opened() -> ModelOnDisk:
        return ModelOnDisk(
            options.model,
            base=options.base,
            revision=options.revision,
            quantization=None if options.quantization == "none" else FORMATS[options.quantization](),
            precision=options.precision,
            cache=options.init_cache,
            stage=stage,
        )

    with group.shared_errors():
        if first_on_host():  # it downloads what is missing
            opened().close()
    with group.shared_errors():
        found = opened()
    return found


def tokenizer_of(options: Any, model: ModelOnDisk) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name, or the model's own, with the chat template that they give."""
    from lowrank_dist.inference.tokenizer import load_tokenizer

    return load_tokenizer(options.tokenizer or str(model.directory), options.chat_template)


@contextmanager
def loaded(model: ModelOnDisk, group: ShardGroup) -> Iterator[ShardedCausalLM]:
    """The model on all ranks. Collective."""
    from lowrank_dist.cli.ranks import first_on_host, local_ranks

    with model.loaded(
        group,
        ranks_per_node=local_ranks(),
        first_on_host=first_on_host(),
        announce=lambda text: say(group, str(text)),
        show_progress=sys.stderr.isatty(),
    ) as sharded:
        yield sharded


def check_ranks(options: Any, group: ShardGroup) -> None:
    """Raise InputError if other ranks were started than the options say."""
    if options.devices > 1 and group.size != options.devices:
        raise InputError(f"--devices {options.devices}, but {group.size} ranks were started; leave it out")
