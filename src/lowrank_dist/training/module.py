"""The LightningModule for supervised fine-tuning of a Hugging Face causal language model."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.training.fused_loss import FusedLoss
from lowrank_dist.training.optim import OPTIMIZERS, OptimizerName, build_optimizer

SchedulerName = Literal["cosine", "linear", "constant"]
SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)

_LOAD_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
# attention implementations for which transformers builds a mask from `position_ids`, one per row of the batch
_MASKED_ATTENTION = {"eager", "sdpa", "flex_attention"}


class CausalLMModule(L.LightningModule):
    """Causal language model with its loss, optimizer and learning-rate schedule.

    Under a strategy that loads weights itself (`PiSSAStrategy`) the module builds only the architecture, and the
    adapters are trained. Under Lightning's own strategies the module loads the model and trains every parameter.

    `train_loss` averages, over the batches of a step on all ranks, the mean loss of each batch's trained tokens.
    `val_loss` and `test_loss` are the mean over all trained tokens of the whole set on all ranks.

    Parameters
    ----------
    pretrained
        Directory or hub id of the model.
    lr
        Peak learning rate.
    weight_decay
        Decoupled weight decay, of every trained parameter.
    betas
        Decay rates of Adam's running first and second moment.
    warmup_ratio
        Share of all steps in which the learning rate rises linearly from 0.
    scheduler
        Learning rate after the warm-up: `cosine` and `linear` decay to 0 (`cosine` along half a period), `constant`
        keeps it.
    optimizer
        `adamw`, or a paged optimizer of bitsandbytes, `paged_adamw_32bit` or `paged_adamw_8bit`. Paged optimizers need
        CUDA; on other devices AdamW is used and a warning is logged.
    attn_implementation
        Attention implementation of transformers: `sdpa`, `flash_attention_2`, `eager`, ... None: its default.
    gradient_checkpointing
        Recompute activations in the backward pass, under Lightning's own strategies. `PiSSAStrategy` has its own
        option.
    fused_cross_entropy
        Compute the loss from the hidden states in chunks of tokens, without materializing the logits of all tokens.
        Saves memory with large vocabularies. Needs CUDA and liger-kernel (the `gpu` extra), and a head without adapter.

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

    Examples
    --------
    >>> from lowrank_dist import CausalLMModule
    >>> module = CausalLMModule("meta-llama/Meta-Llama-3-8B", lr=2e-5, scheduler="cosine", warmup_ratio=0.03)
    >>> module.optimizer
    'adamw'

    The model is built by ``trainer.fit(module, data)``, not by the constructor.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_ratio: float = 0.03,
        scheduler: SchedulerName = "cosine",
        optimizer: OptimizerName = "adamw",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        fused_cross_entropy: bool = False,
    ) -> None:
        super().__init__()
        if scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={scheduler!r} is not known; valid names: {', '.join(SCHEDULERS)}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r} is not known; valid names: {', '.join(OPTIMIZERS)}")
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio={warmup_ratio} must be between 0 and 1: it is a share of all steps")
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr={lr} and weight_decay={weight_decay} must not be negative")
        self.save_hyperparameters()
        self.pretrained = pretrained
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_ratio = warmup_ratio
        self.scheduler = scheduler
        self.optimizer = optimizer
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.fused_cross_entropy = fused_cross_entropy
        self._fused_loss: FusedLoss | None = None
        self.model: nn.Module | None = None
        self._takes_position_ids = True
        self._step_losses: list[Tensor] = []  # losses of the batches of the current step
        self._evaluated = torch.zeros(2)  # sum of token losses, number of tokens

    def configure_model(self) -> None:
        """Build the model on the first call.

        Under a strategy with a true `materializes_weights`, the model comes from ``AutoModelForCausalLM.from_config``.
        Under other strategies its weights are loaded, in the dtype of a ``"*-true"`` precision and otherwise in fp32,
        because mixed precision needs fp32 master weights.
        """
        if self.model is not None:
            return
        from transformers import AutoConfig, AutoModelForCausalLM

        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        if getattr(self.trainer.strategy, "materializes_weights", False):
            if self.gradient_checkpointing:
                raise ValueError(
                    f"gradient_checkpointing=True of the model has no effect under "
                    f"{type(self.trainer.strategy).__name__}, which has its own option; set it to false in the model"
                )
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.pretrained), **attention)
        else:
            dtype = _LOAD_DTYPES.get(str(self.trainer.precision), torch.float32)
            model = AutoModelForCausalLM.from_pretrained(self.pretrained, dtype=dtype, **attention)
            model.train()  # from_pretrained returns evaluation mode, which Lightning would keep
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        """Return the output of the model, with `loss` if the batch has `labels`, int64 of shape [batch, length].

        Raises
        ------
        ValueError
            If the batch is packed and the model takes no `position_ids`, which separate the examples.
        """
        assert self.model is not None
        if "position_ids" in batch:
            if not self._takes_position_ids:
                raise ValueError(
                    f"packing=True, but {type(self.model).__name__} takes no `position_ids` and would attend across "
                    "packed examples; set packing=False (and group_by_length=True)"
                )
            if getattr(getattr(self.model, "config", None), "_attn_implementation", None) not in _MASKED_ATTENTION:
                # flash attention finds boundaries only in a batch of one row (`_is_packed_sequence`) and otherwise
                # silently attends across them; every row begins at position 0, so that rows can be joined
                batch = {name: values.reshape(1, -1) for name, values in batch.items()}
        return self.model(**batch, use_cache=False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss over the tokens whose next label is not -100: fp32 scalar."""
        if not self.fused_cross_entropy:
            return self(**batch).loss
        if self._fused_loss is None:
            self._fused_loss = FusedLoss(self.model)
        with self._fused_loss.of(batch["labels"]):
            return self(**batch).loss

    # ---- training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of this rank's batch, fp32 scalar; log its mean over ranks and accumulated batches.

        Logging issues one all-reduce (``sync_dist``).
        """
        loss = self.loss(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_losses = []
        self._step_losses.append(loss.detach())
        # the loss whose gradient is the averaged gradient
        mean = torch.stack(self._step_losses).mean()
        self.log("train_loss", mean, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))
        return loss

    def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch of a calibration pass (`lowrank_dist.Calibration`)."""
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the parameters that require grad, and a schedule that advances every optimizer step.

        Raises
        ------
        ValueError
            If no parameter requires grad, or the run has no fixed number of steps.
        """
        from transformers import get_scheduler

        params = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not params:
            raise ValueError("no parameter requires grad; check `target_modules` of the adapter")
        optimizer = build_optimizer(
            params,
            name=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(self.betas[0], self.betas[1]),
            device=self.trainer.strategy.root_device,
        )
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError(
                f"scheduler={self.scheduler} with warmup_ratio={self.warmup_ratio} needs the number of steps, which is "
                "unlimited with max_epochs=-1 and no max_steps; set max_steps or max_epochs"
            )
        schedule = get_scheduler(
            "constant_with_warmup" if self.scheduler == "constant" else self.scheduler,
            optimizer,
            num_warmup_steps=math.ceil(self.warmup_ratio * total),
            num_training_steps=int(total),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    # ---- evaluation
    def on_validation_epoch_start(self) -> None:
        self._reset_evaluated()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluated("val_loss")

    def on_test_epoch_start(self) -> None:
        self._reset_evaluated()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._log_evaluated("test_loss")

    def _reset_evaluated(self) -> None:
        # fp64, so that the mean of a long set does not depend on how it was split over ranks; MPS has no fp64
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._evaluated = torch.zeros(2, dtype=dtype, device=self.device)

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        """Add the sum of this batch's token losses, and their number.

        A batch without trained tokens consists of fillers. It takes part in the step, but its mean (0 / 0) is ignored.
        """
        loss = self.loss(batch)
        count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._evaluated += torch.stack([torch.where(count > 0, loss.to(self._evaluated) * count, 0.0), count])

    def _log_evaluated(self, name: str) -> None:
        """Log the mean token loss over all ranks.

        One all-reduce of two numbers, and one of the result by Lightning.
        """
        loss, count = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        # every rank has the same value: a maximum keeps it exactly, a mean would round it
        self.log(name, (loss / count).float(), prog_bar=True, sync_dist=True, reduce_fx="max")
