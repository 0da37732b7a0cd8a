"""Answers to many prompts: batches that do not depend on the number of ranks, each computed by one rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lowrank_dist.data.prompts import Prompt
from lowrank_dist.errors import InputError
from lowrank_dist.inference.sharded import ShardedCausalLM


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Parameters
    ----------
    max_new_tokens
        The most tokens of an answer.
    temperature
        0: always the most likely token. Above: tokens are drawn, from probabilities that it divides the logarithms of.
    top_p, top_k
        Draw from the most likely tokens only: those that have the probability `top_p` together, and at most `top_k`.
        None: from all.
    seed
        Seed of the drawing.

    Raises
    ------
    InputError
        If a number is out of range, or has no effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must not be negative; 0 takes the most likely token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed={self.seed} must be between 0 and 2**63")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise InputError("top_p and top_k have no effect at temperature 0; set a temperature")

    def applied(self, own: GenerationConfig, stops: Sequence[int], pad: int) -> GenerationConfig:
        """`own`, the settings that belong to a model, with these and the tokens that end an answer."""
        settings = copy.deepcopy(own)
        settings.update(
            max_new_tokens=self.max_new_tokens,
            max_length=None,
            do_sample=self.temperature > 0,
            temperature=self.temperature if self.temperature > 0 else None,
            top_p=self.top_p,
            top_k=0 if self.top_k is None and self.temperature > 0 else self.top_k,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(stops),
            pad_token_id=pad,
        )
        return settings

    def says(self, own: GenerationConfig) -> str:
        """How tokens are chosen, in one line, with what the model's own settings add."""
        text = "the most likely token is taken"
        if self.temperature > 0:
            given = {"top_p": self.top_p, "top_k": self.top_k}
            limits = "".join(f", {name} {value}" for name, value in given.items() if value is not None)
            text = f"tokens are drawn at temperature {self.temperature}{limits}, seed {self.seed}"
        added = {
            "repetition_penalty": (own.repetition_penalty, 1.0),
            "no_repeat_ngram_size": (own.no_repeat_ngram_size, 0),
            "min_new_tokens": (own.min_new_tokens, 0),
            "min_length": (own.min_length, 0),
            "bad_words_ids": (own.bad_words_ids, None),
            "suppress_tokens": (own.suppress_tokens, None),
            "forced_eos_token_id": (own.forced_eos_token_id, None),
        }
        kept = [f"{name} {value}" for name, (value, none) in added.items() if value not in (None, none)]
        text += f"; of the model's generation_config.json: {', '.join(kept)}" if kept else ""
        return f"{text}; at most {self.max_new_tokens} tokens"


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes
    ----------
    text
        The answer, without special tokens.
    tokens
        Its tokens, the one that ended it among them.
    ended
        ``"stop"`` if the model ended it, ``"length"`` if it was cut.
    """

    text: str
    tokens: list[int]
    ended: str


def stop_tokens(own: GenerationConfig, learned: Mapping[int, str]) -> dict[int, str]:
    """All tokens that end an answer, by what they are: those of training, and those of the model's own settings."""
    listed = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return dict(learned) | {int(i): "generation_config.json" for i in listed if i is not None and i not in learned}


def pad_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """The token that fills a batch, one of the `rows` of the embedding; it is not attended to."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in tokens if token is not None and token < rows), 0)


def check_prompts(
    prompts: Sequence[Prompt], sampling: Sampling, *, rows: int | None, context: int | None, tokenizer: str
) -> None:
    """Raise InputError for prompts that the model cannot read, or for which its context is too short.

    Parameters
    ----------
    prompts, sampling
        What will be asked, and how.
    rows
        Rows of the input embedding; None: unknown.
    context
        The most tokens of a text; None: unlimited.
    tokenizer
        Its name, for the message.
    """
    for prompt in prompts:
        largest = max(prompt.tokens)
        if rows is not None and largest >= rows:
            raise InputError(
                f"{prompt.where}: has the token {largest}, but the embedding of the model has {rows} rows; pass the "
                f"tokenizer of the model (--tokenizer), not {tokenizer!r}"
            )
        total = len(prompt.tokens) + sampling.max_new_tokens
        if context is not None and total > context:
            raise InputError(
                f"{prompt.where}: {len(prompt.tokens)} tokens and max_new_tokens={sampling.max_new_tokens} are more "
                f"than the {context} tokens that the model was made for; lower max_new_tokens, or shorten the prompt"
            )


def answer(
    model: ShardedCausalLM,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    stops: Mapping[int, str],
    batch_size: int = 8,
    done: Callable[[int], object] = lambda _: None,
) -> list[Answer]:
    """Answer `prompts`. Collective: all ranks pass the same ones and get all answers.

    Prompts of similar length share a batch, padded on the left. Batches, and what is drawn in each, do not depend on
    the number of ranks. A batch is computed by one rank; a rank that has none left joins the passes of the others
    (`lowrank_dist.inference.lockstep.Lockstep`). One object all-gather at the end.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    prompts
        The prompts.
    tokenizer
        Their tokenizer.
    sampling
        How tokens are chosen.
    stops
        The tokens that end an answer.
    batch_size
        Prompts of a batch.
    done
        Called with the number of prompts of every batch that this rank has done.

    Returns
    -------
    list of Answer
        In the order of the prompts.

    Raises
    ------
    InputError
        If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].tokens), index))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    settings = sampling.applied(model.generation, list(stops), pad_token(tokenizer, model.rows))
    mine: dict[int, Answer] = {}
    with model.in_step():
        for number in range(model.group.rank, len(batches), model.group.size):
            batch = batches[number]
            rows = _generated(model, [prompts[index].tokens for index in batch], settings, sampling, number)
            for index, row in zip(batch, rows, strict=True):
                mine[index] = _answer(row, tokenizer, stops)
            done(len(batch))
    every = {index: found for part in model.group.gather_objects(mine) for index, found in part.items()}
    return [every[index] for index in range(len(prompts))]


def generate_one(
    model: ShardedCausalLM,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    stops: Mapping[int, str],
    number: int = 0,
    streamer: Any = None,
) -> Answer:
    """Answer one prompt on this rank, as the batch `number`; to be called in `ShardedCausalLM.in_step`.

    `streamer` is one of transformers, which gets the tokens one by one.
    """
    settings = sampling.applied(model.generation, list(stops), pad_token(tokenizer, model.rows))
    (row,) = _generated(model, [prompt.tokens], settings, sampling, number, streamer=streamer)
    return _answer(row, tokenizer, stops)


def _generated(
    model: ShardedCausalLM,
    prompts: Sequence[list[int]],
    settings: GenerationConfig,
    sampling: Sampling,
    number: int,
    **options: Any,
) -> list[list[int]]:
    """The new tokens of every prompt of the batch `number`, padding included."""
    width, pad = max(map(len, prompts)), settings.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    with seeded((sampling.seed * 2654435761 + number) % 2**63, model.device):
        whole = model.generate(ids, attention_mask=mask, generation_config=settings, **options)
    new: list[list[int]] = whole[:, width:].tolist()
    return new


def _answer(row: list[int], tokenizer: PreTrainedTokenizerBase, stops: Mapping[int, str]) -> Answer:
    end = next((place for place, token in enumerate(row) if token in stops), None)
    tokens = row if end is None else row[: end + 1]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(str(text), tokens, "length" if end is None else "stop")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from generators with this seed; afterwards it goes on as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
