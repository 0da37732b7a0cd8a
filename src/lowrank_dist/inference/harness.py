"""A model on its sharded base as lm-evaluation-harness knows models.

What is asked of the model, and how answers are read, is the harness's own code for transformers models. Here its
batches are shared out over the ranks: they are made as for one rank, each is computed by one rank, and all ranks get
all results. Scores therefore do not depend on the number of ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowrank_dist.errors import InputError
from lowrank_dist.inference.generation import pad_token, seeded
from lowrank_dist.inference.sharded import ShardedCausalLM
from lowrank_dist.progress import count_bar

Request = TypeVar("Request")

#: Larger than any number of windows: the harness then hands them over at once.
_ALL = 2**62

_LOGGERS = ("lm_eval.models.huggingface", "lm_eval.evaluator", "lm_eval.api.task", "lm_eval.tasks")


class ShardedHarnessLM(HFLM):
    """`lm_eval.api.model.LM` over a `ShardedCausalLM`: likelihoods, rolling likelihoods, generation.

    The harness sees one process (``rank`` 0 of 1) on every rank, so that all make the same requests. Collective: all
    ranks call its methods with the same requests, and get the same results.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    tokenizer
        Its tokenizer, with the chat template to use.
    batch_size
        Requests that are computed together.
    seed
        Seed of what tasks draw.
    show_progress
        Show a progress bar on rank 0.

    Raises
    ------
    InputError
        If `batch_size` is below 1.
    """

    batch_size_per_gpu: int

    def __init__(
        self,
        model: ShardedCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        seed: int = 1234,
        show_progress: bool = False,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1")
        self._sharded, self._seed, self._own_size = model, seed, batch_size
        self._show = show_progress and model.group.rank == 0
        tokenizer.pad_token_id = pad_token(tokenizer, model.rows)
        with quiet():
            super().__init__(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self._chunk = 0  # of those of this call, that is computed

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        size = self.batch_size_per_gpu
        self.batch_size_per_gpu = _ALL
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = size
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        requests = list(requests)
        self._check(max((max(*context, *continuation) for _, context, continuation in requests), default=0))
        groups: dict[tuple[int, ...], list[int]] = {}  # those of one context: the harness computes the longest
        for index, (_, context, continuation) in enumerate(requests):
            groups.setdefault((*context, *continuation[:-1]), []).append(index)
        order = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        size, self.batch_size_per_gpu = self.batch_size_per_gpu, self._own_size
        chunks = [
            [index for tokens in order[first : first + self._own_size] for index in groups[tokens]]
            for first in range(0, len(order), self._own_size)
        ]
        compute = super()._loglikelihood_tokens
        try:
            return self._shared_out(requests, chunks, lambda part: compute(part, disable_tqdm=True), "Scoring")
        finally:
            self.batch_size_per_gpu = size

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        chunks = []
        for indices in kinds.values():
            tokens = {index: self.tok_encode(requests[index].args[0]) for index in indices}
            self._check(max((max(part, default=0) for part in tokens.values()), default=0))
            order = sorted(indices, key=lambda index: (-len(tokens[index]), requests[index].args[0]))
            chunks += [order[first : first + self._own_size] for first in range(0, len(order), self._own_size)]
        compute = super().generate_until
        return self._shared_out(requests, chunks, lambda part: compute(part, disable_tqdm=True), "Generating")

    def _check(self, largest: int) -> None:
        """Raise InputError for a token that the model does not have; on every rank, since all have all requests."""
        if largest >= self._sharded.rows:
            raise InputError(
                f"a question has the token {largest}, but the embedding of the model has {self._sharded.rows} rows; "
                f"pass the tokenizer of the model (--tokenizer), not {self.tokenizer.name_or_path!r}"
            )

    def _shared_out(
        self,
        requests: Sequence[Request],
        chunks: Sequence[Sequence[int]],
        compute: Callable[[list[Request]], list[Any]],
        doing: str,
    ) -> list[Any]:
        """The results of all requests, of which every rank computes its share of `chunks`; in order."""
        group = self._sharded.group
        mine: dict[int, Any] = {}
        with count_bar(len(requests), show=self._show, doing=doing) as bar, self._sharded.in_step():
            for number in range(group.rank, len(chunks), group.size):
                self._chunk = number
                indices = chunks[number]
                mine |= zip(indices, compute([requests[index] for index in indices]), strict=True)
                bar.update(min(len(indices) * group.size, len(requests) - bar.n))
        every = {index: found for part in group.gather_objects(mine) for index, found in part.items()}
        return [every[index] for index in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        logits: Tensor = self._sharded(inps).logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with seeded((self._seed * 2654435761 + self._chunk) % 2**63, self._sharded.device):
            generated: Tensor = super()._model_generate(context, max_length, stop, **options)
        return generated

    def get_model_info(self) -> dict[str, Any]:
        """What results record of the model."""
        return {"model_dtype": str(self._sharded.backbone.dtype), "ranks": self._sharded.group.size}


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness logs errors only: its warnings are about models that it loads itself."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
