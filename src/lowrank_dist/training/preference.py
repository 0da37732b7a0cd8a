"""The LightningModule for preference pairs: DPO, ORPO and SimPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor

from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError
from lowrank_dist.initialization.step_zero import StepZero
from lowrank_dist.training.base_module import TransformersModule
from lowrank_dist.training.pair_losses import BETAS, PAIR_LOSSES, PairLoss, dpo, odds_ratio, simpo
from lowrank_dist.training.token_losses import router_loss, token_log_probs
from lowrank_dist.training.token_mean import TokenMean, accumulator_dtype


class PreferenceModule(TransformersModule):
    """Causal language model that is trained to prefer one response to another.

    `train_loss`, whose gradient the optimizer gets, is the mean over all pairs of a step on all ranks; beside it,
    `train_reward_accuracy` is the share of pairs whose chosen response has the higher reward, and `train_reward_margin`
    how much higher it is. ``val_...`` and ``test_...`` are means over all pairs of the whole set on all ranks.

    Parameters
    ----------
    pretrained
        Directory or hub id of the model.
    loss
        ``"dpo"``: compared with the model at the start of the run. ``"orpo"``: with the loss of the chosen text, and
        ``"simpo"``; both without a reference.
    beta
        Scale of the rewards; of ORPO, the weight of the odds ratio, which the paper calls lambda. None: 0.1 for DPO and
        ORPO, 2 for SimPO.
    label_smoothing
        Probability that the two responses of a pair are exchanged. Not for ORPO.
    simpo_gamma
        Margin of SimPO's rewards.
    **options
        Learning rate, schedule, optimizer and attention, as of `CausalLMModule`: `lr`, `weight_decay`, `betas`,
        `warmup_ratio`, `scheduler`, `optimizer`, `optimizer_options`, `loraplus_lr_ratio`, `embedding_lr`, `norm_lr`,
        `attn_implementation`, `gradient_checkpointing`.

    Raises
    ------
    ValueError
        If a name is unknown, a number is out of range, or an option has no effect on the loss.

    See Also
    --------
    lowrank_dist.SFTDataModule : Batches for this module, with `task` ``"preference"``.
    lowrank_dist.CausalLMModule : Supervised fine-tuning, which usually comes first.

    Notes
    -----
    DPO's reference is the model with which the run began, under any adapter: under `PiSSAStrategy` the same frozen base
    with the trained parameters of step 0, whose values are kept (`lowrank_dist.initialization.step_zero.StepZero`).
    To switch the adapter off would give another model wherever the base holds a residual. The reference is the same
    after resuming: the values are had again from the checkpoint, and compared with a digest in it. The reference costs
    a forward without gradient a batch and one more copy of what is trained, sharded over all ranks. Under a single
    device or DDP, where all is trained, it is a copy of the whole model. Dropout is off in it.

    A batch has the chosen responses first, then the rejected ones: ``input_ids``, ``labels`` and ``attention_mask``,
    int64 ``[2 * pairs, length]``. One forward takes both. The loss is computed in fp32. ORPO's loss of the chosen text
    is the mean over all its tokens, the prompt's included, in the batches that the ranks compute at the same time, as
    in the authors' program. A mixture of experts adds its load-balancing loss if its configuration asks for it
    (``output_router_logits``).

    Examples
    --------
    >>> from lowrank_dist import PreferenceModule
    >>> module = PreferenceModule("meta-llama/Meta-Llama-3-8B", loss="dpo", beta=0.1, lr=5e-6)
    >>> module.keeps_step_zero
    True
    """

    data_task = "preference"
    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        pretrained: str,
        *,
        loss: PairLoss = "dpo",
        beta: float | None = None,
        label_smoothing: float = 0.0,
        simpo_gamma: float = 1.0,
        **options: Any,
    ) -> None:
        if loss not in PAIR_LOSSES:
            raise ValueError(f"loss={loss!r} is not known; valid names: {', '.join(PAIR_LOSSES)}")
        if beta is not None and beta <= 0:
            raise ValueError(f"beta={beta} must be positive")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 0.5")
        if loss == "orpo" and label_smoothing:
            raise ValueError(f"label_smoothing={label_smoothing} has no effect on loss='orpo'; leave it out")
        super().__init__(pretrained, **options)
        self.loss = loss
        self.beta = BETAS[loss] if beta is None else beta
        self.label_smoothing = label_smoothing
        self.simpo_gamma = simpo_gamma
        #: Tells strategies that load weights to keep the trained parameters of step 0.
        self.keeps_step_zero = loss == "dpo"
        self._pair_mean = TokenMean()
        self._whole_copy: StepZero | None = None
        self._step_sums: Tensor | None = None  # rewards of the step so far: pairs in order, margin, pairs

    def setup(self, stage: str) -> None:
        """Before weights are read, raise InputError if the strategy cannot give the reference."""
        super().setup(stage)
        strategy = self.trainer.strategy
        whole = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        if self.keeps_step_zero and not whole and not hasattr(strategy, "at_step_zero"):
            raise InputError(
                f"loss='dpo' needs the model of step 0 as its reference, which {type(strategy).__name__} cannot give; "
                "use PiSSAStrategy, a single device or DDP, or loss='simpo' or 'orpo'"
            )

    def configure_model(self) -> None:
        """Build the model; under Lightning's own strategies, copy it for the reference before a checkpoint is read."""
        new = self.model is None
        super().configure_model()
        if new and self.keeps_step_zero and not hasattr(self.trainer.strategy, "at_step_zero"):
            self._whole_copy = StepZero(dict(self.named_parameters()))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is that of step 0, without dropout and gradient."""
        assert self.model is not None
        own = self._whole_copy
        at_step_zero = self.trainer.strategy.at_step_zero if own is None else own.in_place  # type: ignore[attr-defined]
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with at_step_zero(), torch.no_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    def forward(self, **batch: Tensor) -> Any:
        """Return the output of the model for a batch without labels."""
        assert self.model is not None
        return self.model(**batch, use_cache=False)

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards of the pairs of a batch.

        DPO runs the model twice, without gradient first; ORPO issues one all-reduce of two numbers.

        Parameters
        ----------
        batch
            This rank's, of ``2 n`` rows.

        Returns
        -------
        losses : Tensor
            fp32 ``[n]``. Pairs without a response, fillers, have 0.
        rewards : Tensor
            Of the chosen and of the rejected responses, fp32 ``[2, n]``, without gradient.
        counts : Tensor
            1 for each pair, 0 for each filler: fp32 ``[n]``.
        """
        labels = batch["labels"]
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        sizes = (labels[:, 1:] != IGNORE_INDEX).sum(1).unflatten(0, (2, -1))
        counts = (sizes > 0).all(0).float()
        reference = None
        if self.loss == "dpo":
            with self.reference():
                reference = token_log_probs(self(**inputs).logits, labels).sum(1).unflatten(0, (2, -1))
        output = self(**inputs)
        if self.loss == "orpo":  # also of prompts
            mask = batch.get("attention_mask")
            everything = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, IGNORE_INDEX)
            every = token_log_probs(output.logits, everything)
            each = every * (labels[:, 1:] != IGNORE_INDEX)
        else:
            every = each = token_log_probs(output.logits, labels)
        sums = each.sum(1).unflatten(0, (2, -1))
        if reference is not None:
            rewards = sums - reference
            losses = dpo(*rewards, beta=self.beta, label_smoothing=self.label_smoothing)
        else:
            rewards = sums / sizes.clamp(min=1)
            if self.loss == "simpo":
                losses = simpo(*rewards, beta=self.beta, gamma=self.simpo_gamma, label_smoothing=self.label_smoothing)
            else:
                losses = self.beta * odds_ratio(*rewards) + self._loss_of_chosen(every, everything, counts)
        losses = losses + router_loss(self.model, output)
        return torch.where(counts > 0, losses, 0.0), self.beta * rewards.detach(), counts

    def _loss_of_chosen(self, every: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        """What the mean token loss of all chosen texts on all ranks adds to the loss of each pair: fp32 ``[n]``."""
        pairs = len(counts)
        losses = -every[:pairs].sum(1) * counts
        tokens = ((labels[:pairs, 1:] != IGNORE_INDEX).sum(1) * counts).sum()
        total = self.trainer.strategy.reduce(torch.stack([counts.sum(), tokens]), reduce_op="sum")
        # summed over the pairs of all ranks and divided by their number, this is the mean over the tokens
        share: Tensor = losses * (total[0] / total[1].clamp(min=1))
        return share

    # ---- training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this rank's loss for backward, scalar, so that the gradient of the step is that of `train_loss`.

        The last batch of a step issues two all-reduces of a few numbers, and logs.
        """
        losses, rewards, counts = self.losses(batch)
        count = counts.sum()
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        sums = self._sums(losses, rewards, counts)[1:]
        self._step_sums = sums if first or self._step_sums is None else self._step_sums + sums
        loss, mean = self._pair_mean.weighted(losses.sum() / count.clamp(min=1), count, self.trainer, first=first)
        if mean is not None:
            size = len(counts)
            right, margin, pairs = self.trainer.strategy.reduce(self._step_sums, reduce_op="sum")
            self.log("train_loss", mean, prog_bar=True, batch_size=size)
            self.log("train_reward_accuracy", (right / pairs.clamp(min=1)).float(), prog_bar=True, batch_size=size)
            self.log("train_reward_margin", (margin / pairs.clamp(min=1)).float(), batch_size=size)
        return loss

    def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of the chosen responses of a batch of a calibration pass; 0 if no token is trained.

        At step 0 the gradient of the pairs' own loss is that of responses against each other, of a model that has
        learned nothing yet; the methods that look at data were published with the loss of responses.
        """
        labels = batch["labels"].chunk(2)[0]
        inputs = {name: values.chunk(2)[0] for name, values in batch.items() if name != "labels"}
        tokens = (labels[:, 1:] != IGNORE_INDEX).sum()
        return -token_log_probs(self(**inputs).logits, labels).sum() / tokens.clamp(min=1)

    def _sums(self, losses: Tensor, rewards: Tensor, counts: Tensor) -> Tensor:
        """Sums over the pairs of a batch, ``[4]``: loss, those in order, margin, number."""
        margins = (rewards[0] - rewards[1]) * counts
        sums = torch.stack([losses.detach(), (margins > 0).float(), margins, counts])
        return sums.to(accumulator_dtype(sums.device)).sum(1)

    # ---- evaluation
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._add(self._sums(*self.losses(batch)))

    def on_validation_epoch_end(self) -> None:
        self._means("val_loss", "val_reward_accuracy", "val_reward_margin")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._add(self._sums(*self.losses(batch)))

    def on_test_epoch_end(self) -> None:
        self._means("test_loss", "test_reward_accuracy", "test_reward_margin")
