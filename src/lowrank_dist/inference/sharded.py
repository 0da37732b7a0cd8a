"""A causal language model on its sharded base, as code for inference needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError, is_passing
from lowrank_dist.inference.lockstep import Lockstep
from lowrank_dist.zero3.gathering import Gathering


def context_of(config: PretrainedConfig) -> int | None:
    """The most tokens of a text; None if the configuration does not say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
    return next((int(getattr(text, name)) for name in names if getattr(text, name, None)), None)


def generation_of(directory: Path, config: PretrainedConfig) -> GenerationConfig:
    """The generation settings of a pretrained model, or those of its configuration.

    Raises
    ------
    InputError
        If transformers does not take its ``generation_config.json``.
    """
    if not (directory / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        settings: GenerationConfig = GenerationConfig.from_pretrained(directory)
    except Exception as error:  # whatever its checks raise
        if is_passing(error):
            raise
        raise InputError(f"{directory}/generation_config.json: cannot be used: {error}") from error
    return settings


def check_virtual_tokens(config: object, ranks: int) -> None:
    """Raise InputError for virtual tokens on several ranks.

    They are parameters beside the model, gathered in some passes only, so that ranks could not join each other's.
    """
    if getattr(config, "is_prompt_learning", False) and ranks > 1:
        raise InputError(
            f"{type(config).__name__}: virtual tokens answer on one rank only, not on {ranks}; use one rank, or stock "
            "PEFT with the adapter"
        )


class ShardedCausalLM:
    """A model whose layers are gathered while they compute.

    Parameters
    ----------
    backbone
        The transformers model, its parameters sharded.
    root
        What computes: the backbone, or PEFT's model around it.
    group
        The ranks that share it.
    gathering
        What gathers its layers.
    name
        Directory or hub id of the pretrained model.

    Attributes
    ----------
    in_step : Lockstep
        ``with model.in_step():`` lets ranks run different numbers of passes inside.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        root: nn.Module,
        group: ShardGroup,
        gathering: Gathering,
        *,
        name: str,
    ) -> None:
        self.backbone, self.root, self.group, self.gathering, self.name = backbone, root, group, gathering, name
        self.in_step = Lockstep(backbone, group)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the model."""
        return self.backbone.config

    @property
    def generation(self) -> GenerationConfig:
        """The generation settings of the model."""
        settings: GenerationConfig = self.backbone.generation_config
        return settings

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.group.device

    @property
    def name_or_path(self) -> str:
        """Directory or hub id of the pretrained model."""
        return self.name

    @property
    def rows(self) -> int:
        """Rows of the input embedding: one more than the largest token."""
        return int(self.backbone.get_input_embeddings().num_embeddings)

    @property
    def context(self) -> int | None:
        """The most tokens of a text; None if the configuration does not say."""
        return context_of(self.config)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        """The output of the model for tokens ``[batch, length]``, without a cache. Collective, but in `in_step`."""
        return self.root(input_ids=input_ids, use_cache=False, **options)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """``generate`` of transformers, with its key-value cache: ``[batch, length + new]``; only inside `in_step`."""
        # a PEFT model around the backbone has a `generate` that adds its virtual tokens
        model: Any = self.root if hasattr(self.root, "generate") else self.backbone
        generated: Tensor = model.generate(input_ids=input_ids, synced_gpus=False, **options)
        return generated

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in evaluation mode, and may be called beside the module that it is a part of."""
        modes = {module: module.training for module in self.root.modules()}
        self.root.eval()
        # what a save has emptied since the last step is not gathered any more, although it stayed beyond that step
        self.gathering.forget()
        outside: AbstractContextManager[None] = nullcontext()
        if not self.gathering.is_root(self.backbone):
            outside = self.gathering.entered_by(self.backbone)
        try:
            with outside:
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
