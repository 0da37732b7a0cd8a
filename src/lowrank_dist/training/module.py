"""The LightningModule for supervised fine-tuning of a Hugging Face causal language model."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_dist.data.tokenizing import WEIGHTS
from lowrank_dist.errors import InputError
from lowrank_dist.layers.shifted_attention import PREFIX, ShiftedSparseAttention, check_group
from lowrank_dist.training.base_module import DEFAULT_LR, SchedulerName, TransformersModule
from lowrank_dist.training.fused_loss import FusedLoss
from lowrank_dist.training.token_losses import router_loss, token_log_probs
from lowrank_dist.training.token_mean import TokenMean, accumulator_dtype, token_weight, trained_tokens

LossAverage = Literal["tokens", "batches"]
LOSS_AVERAGES: tuple[str, ...] = get_args(LossAverage)

# attention implementations for which transformers builds a mask from `position_ids`, one per row of the batch
_MASKED_ATTENTION = {"eager", "sdpa", "flex_attention"}


class CausalLMModule(TransformersModule):
    """Causal language model with its loss, optimizer and learning-rate schedule.

    Under a strategy that loads weights itself (`PiSSAStrategy`) the module builds only the architecture, and the
    adapters are trained. Under Lightning's own strategies the module loads the model and trains every parameter.

    `train_loss`, whose gradient the optimizer gets, is the mean over all trained tokens of a step on all ranks, or the
    mean of its batch means (`average_loss_over`). `val_loss` and `test_loss` are the mean over all trained tokens of
    the whole set on all ranks.

    Parameters
    ----------
    pretrained
        Directory or hub id of the model.
    lr
        Peak learning rate. `lowrank_dist.published_rates` lists starting points.
    weight_decay
        Weight decay, decoupled under `adamw` and the paged optimizers. Of every trained parameter; of matrices only if
        one of the three options for learning rates is set, and under `galore` and `apollo`.
    betas
        Decay rates of Adam's running first and second moment. For an optimizer given by its import path they are among
        its `optimizer_options`.
    warmup_ratio
        Share of all steps in which the learning rate rises linearly from 0.
    scheduler
        Learning rate after the warm-up: `cosine` and `linear` decay to 0 (`cosine` along half a period), `constant`
        keeps it.
    optimizer
        `adamw`, or a paged optimizer of bitsandbytes, `paged_adamw_32bit` or `paged_adamw_8bit`, or `muon`, DeepSpeed's
        own, where only matrices are trained, or `galore` or `apollo`, which train every parameter and keep the moments
        of projected gradients (Lightning's own strategies on one device or DDP), or the import path of any optimizer
        class, such as `torch.optim.Adagrad` or `bitsandbytes.optim.Lion`. Paged optimizers need CUDA; on other devices
        AdamW is used and a warning is logged. Under DeepSpeed, other optimizers that look at whole tensors (Adafactor,
        LAMB, Prodigy, ...) are refused, since they would train differently on shards.
    optimizer_options
        Further arguments of the optimizer's class, such as `{momentum: 0.9}`.
    loraplus_lr_ratio
        Learning rate of B divided by that of A, which is `lr` (LoRA+, arXiv:2402.12354).
    embedding_lr
        Peak learning rate of factors of embeddings, and of input embedding and head where they are trained whole
        (`modules_to_save`). None: `lr`.
    norm_lr
        Peak learning rate of trained normalisation layers. None: `lr`.
    attn_implementation
        Attention implementation of transformers: `sdpa`, `flash_attention_2`, `eager`, ... None: its default.
    gradient_checkpointing
        Recompute activations in the backward pass, under Lightning's own strategies. `PiSSAStrategy` has its own
        option.
    fused_cross_entropy
        Compute the loss from the hidden states in chunks of tokens, without materializing the logits of all tokens.
        Saves memory with large vocabularies. Needs CUDA and liger-kernel (the `gpu` extra), and a head without adapter.
    average_loss_over
        What the loss of a step is a mean of. `tokens`: all trained tokens of the step weigh the same, whichever rank
        and accumulated batch they are in, so that a step does not depend on how its examples are split. `batches`: all
        batches weigh the same, so that a token weighs the less, the more trained tokens its batch has.
    shifted_attention
        Number of tokens in a group of LongLoRA's shifted sparse attention (arXiv:2309.12307), in which tokens attend in
        training; half of the heads have their groups shifted by half a group. Evaluation and generation attend
        fully. The paper takes a quarter of the length. Rows must not be packed. None: full attention.

    Raises
    ------
    ValueError
        If a name is unknown or a number is out of range.

    See Also
    --------
    lowrank_dist.SFTDataModule : Batches for this module.
    lowrank_dist.PiSSAStrategy : The strategy that trains adapters.

    Notes
    -----
    The loss is computed in fp32 under every precision: the causal loss of transformers (`ForCausalLMLoss`) casts logits
    to float32 before the cross-entropy, and liger-kernel casts them inside it. The key-value cache is off in every
    forward pass: training does not need it, and transformers does not separate packed examples when it is on.

    Over tokens, a batch without trained tokens does not change the step. A step without any has a gradient and a
    `train_loss` of 0. Terms that a model adds to its loss, such as the load-balancing loss of a mixture of experts, are
    averaged over the batches of the step, weighted by their trained tokens. To add your own, override `loss`.
    Accumulation over tokens works under `PiSSAStrategy`, on a single device and under DDP; other strategies are
    refused, since their accumulated gradients cannot be rescaled.

    Examples
    --------
    >>> from lowrank_dist import CausalLMModule
    >>> module = CausalLMModule("meta-llama/Meta-Llama-3-8B", lr=2e-5, scheduler="cosine", warmup_ratio=0.03)
    >>> module.optimizer
    'adamw'

    The model is built by ``trainer.fit(module, data)``, not by the constructor.
    """

    #: Tells data modules that ``weights`` of a batch count.
    takes_weights = True

    data_task = "sft"
    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        pretrained: str,
        *,
        lr: float = DEFAULT_LR,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_ratio: float = 0.03,
        scheduler: SchedulerName = "cosine",
        optimizer: str = "adamw",
        optimizer_options: dict[str, Any] | None = None,
        loraplus_lr_ratio: float = 1.0,
        embedding_lr: float | None = None,
        norm_lr: float | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        fused_cross_entropy: bool = False,
        average_loss_over: LossAverage = "tokens",
        shifted_attention: int | None = None,
    ) -> None:
        if shifted_attention is not None:
            check_group(shifted_attention)
        if shifted_attention is not None and attn_implementation not in (None, "sdpa"):
            raise InputError(
                f"shifted_attention={shifted_attention} computes in groups by sdpa; leave attn_implementation="
                f"{attn_implementation!r} out"
            )
        if average_loss_over not in LOSS_AVERAGES:
            raise ValueError(
                f"average_loss_over={average_loss_over!r} is not known; valid names: {', '.join(LOSS_AVERAGES)}"
            )
        super().__init__(
            pretrained,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            warmup_ratio=warmup_ratio,
            scheduler=scheduler,
            optimizer=optimizer,
            optimizer_options=optimizer_options,
            loraplus_lr_ratio=loraplus_lr_ratio,
            embedding_lr=embedding_lr,
            norm_lr=norm_lr,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.fused_cross_entropy = fused_cross_entropy
        self.average_loss_over = average_loss_over
        self.shifted_attention = shifted_attention
        self._fused_loss: FusedLoss | None = None
        self._token_mean = TokenMean()
        self._step_losses: list[Tensor] = []  # losses of the batches of the current step

    def configure_model(self) -> None:
        new = self.model is None
        super().configure_model()
        if new and self.shifted_attention is not None:
            assert isinstance(self.model, PreTrainedModel)
            ShiftedSparseAttention(self.model, self.shifted_attention)

    def _weights_batches(self) -> bool:
        return self.average_loss_over == "tokens"

    def forward(self, **batch: Tensor) -> Any:
        """Return the output of the model, with `loss` if the batch has `labels`, int64 of shape [batch, length].

        Raises
        ------
        InputError
            If the batch is packed and packed examples see each other in the model
            (`lowrank_dist.training.packed_examples`).
        """
        assert self.model is not None
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        masked = attention in _MASKED_ATTENTION or str(attention).startswith(PREFIX)
        if "position_ids" in batch and not masked:
            # flash attention finds boundaries only in a batch of one row (`_is_packed_sequence`) and otherwise
            # silently attends across them; every row begins at position 0, so that rows can be joined
            batch = {name: values.reshape(1, -1) for name, values in batch.items()}
        return self.model(**batch, use_cache=False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss over the tokens whose next label is not -100: fp32 scalar.

        It is weighted if the batch has ``weights``, fp32 ``[batch, length]``.
        """
        if WEIGHTS in batch:
            return self._weighted_loss(batch)
        if not self.fused_cross_entropy:
            return self(**batch).loss
        if self._fused_loss is None:
            self._fused_loss = FusedLoss(self.model)
        with self._fused_loss.of(batch["labels"]):
            return self(**batch).loss

    def _weighted_loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.fused_cross_entropy:
            raise InputError(
                "messages have a `weight` other than 0 and 1, and liger-kernel's loss takes none; set "
                "fused_cross_entropy=False"
            )
        labels, weights = batch["labels"], batch[WEIGHTS]
        output = self(**{name: values for name, values in batch.items() if name not in ("labels", WEIGHTS)})
        rows = output.logits.shape[:2]  # several rows may have been joined, each of which begins without a label
        losses = -token_log_probs(output.logits, labels.reshape(rows)) * weights.reshape(rows)[:, 1:]
        return losses.sum() / token_weight(labels, weights) + router_loss(self.model, output)

    def _size(self, batch: dict[str, Tensor]) -> Tensor:
        """What the mean loss of a batch counts: the number of its trained tokens, or the sum of their weights."""
        if WEIGHTS in batch:
            return token_weight(batch["labels"], batch[WEIGHTS])
        return trained_tokens(batch["labels"])

    # ---- training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this rank's loss for backward, scalar, so that the gradient of the step is that of `train_loss`.

        If the loss is averaged over tokens, the returned one is the mean of the batch times its share of the trained
        tokens of the step (`lowrank_dist.training.token_mean.TokenMean`). `train_loss` is logged with the last batch of
        a step, which issues one all-reduce. If it is averaged over batches, the returned one is the mean of the batch,
        and that of the batches of the ranks that have trained tokens counts. `train_loss` is logged with every batch,
        which issues two all-reduces each.
        """
        loss, size = self.loss(batch), len(batch["input_ids"])
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        if self.average_loss_over == "tokens":
            loss, mean = self._token_mean.weighted(loss, self._size(batch), self.trainer, first=first)
            if mean is not None:
                self.log("train_loss", mean, prog_bar=True, batch_size=size)
            return loss
        if first:
            self._step_losses = []
        loss = self._over_batches(loss, self._size(batch))
        self._step_losses.append(loss.detach())
        # the loss whose gradient is the averaged gradient
        self.log("train_loss", torch.stack(self._step_losses).mean(), prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    def _over_batches(self, loss: Tensor, count: Tensor) -> Tensor:
        """The loss whose mean over the ranks is that of the ranks whose `count` of tokens is not 0. One all-reduce."""
        trained = (count > 0).float()
        ranks = self.trainer.strategy.reduce(trained.clone(), reduce_op="sum")
        return torch.where(count > 0, loss, 0.0) * (self.trainer.world_size / ranks.clamp(min=1))

    def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch of a calibration pass (`lowrank_dist.Calibration`); 0 if no token is trained."""
        return torch.where(self._size(batch) > 0, self.loss(batch), 0.0)

    # ---- evaluation
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._means("val_loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._means("test_loss")

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        """Add the sum of this batch's token losses, and their number.

        A batch without trained tokens consists of fillers. It takes part in the step, but its mean (0 / 0) is ignored.
        """
        loss = self.loss(batch)
        count = self._size(batch)
        total = loss.to(accumulator_dtype(loss.device)) * count
        self._add(torch.stack([torch.where(count > 0, total, 0.0), count.to(total)]))
