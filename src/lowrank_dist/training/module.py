"""A LightningModule for supervised fine-tuning of any Hugging Face causal language model."""

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
# what builds a mask from `position_ids`, one for each row of the batch
_MASKED_ATTENTION = {"eager", "sdpa", "flex_attention"}


class CausalLMModule(L.LightningModule):
    """Causal language model, its loss, and AdamW with warm-up.

    Under a strategy that loads weights itself (`PiSSAStrategy`) only the architecture is built here, and the adapters
    are trained. Under Lightning's own strategies the model is loaded and every parameter is trained.

    `train_loss` is the mean over the tokens of a step's batches; `val_loss` and `test_loss` are the mean over all
    trained tokens of the whole set on all ranks.

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
        What it does afterwards: fall to 0 along half a cosine, or linearly, or stay constant.
    optimizer
        `adamw`, or the paged ones of bitsandbytes, `paged_adamw_32bit` and `paged_adamw_8bit` (CUDA; elsewhere AdamW is
        used and a line says so).
    attn_implementation
        Attention of transformers: `sdpa`, `flash_attention_2`, `eager`, ... None: its choice.
    gradient_checkpointing
        Recompute activations in the backward pass, under Lightning's own strategies. `PiSSAStrategy` has its own
        setting.
    fused_cross_entropy
        Take the loss from the hidden states, in chunks of tokens, so that there never are logits of all tokens: for
        large vocabularies. On CUDA, with liger-kernel (the `gpu` extra); the head must have no adapter.

    Raises
    ------
    ValueError
        If a name is not known or a number is out of range.

    Notes
    -----
    The loss is taken in fp32 whatever the precision: the causal loss of transformers (`ForCausalLMLoss`) casts logits
    to float32 before the cross-entropy, and liger-kernel does so inside it. The key-value cache is off in every forward
    pass: it is of no use without generation, and transformers does not keep packed examples apart when there is one.
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
        self._of_step: list[Tensor] = []  # losses of the batches of a step so far
        self._evaluated = torch.zeros(2)  # sum of token losses, number of tokens

    def configure_model(self) -> None:
        """Build the model, once.

        A strategy with a true `materializes_weights` gets `AutoModelForCausalLM.from_config(...)`; any other the loaded
        weights, in the dtype of a ``"*-true"`` precision and else in fp32, which mixed precision needs as master.
        """
        if self.model is not None:
            return
        from transformers import AutoConfig, AutoModelForCausalLM

        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        if getattr(self.trainer.strategy, "materializes_weights", False):
            if self.gradient_checkpointing:
                raise ValueError(
                    f"gradient_checkpointing=True of the model has no effect under "
                    f"{type(self.trainer.strategy).__name__}, which has a setting of its own; leave it false here"
                )
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.pretrained), **attention)
        else:
            dtype = _LOAD_DTYPES.get(str(self.trainer.precision), torch.float32)
            model = AutoModelForCausalLM.from_pretrained(self.pretrained, dtype=dtype, **attention)
            model.train()  # it comes in evaluation mode, and Lightning keeps the mode it finds
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        """Output of the model, with `loss` where `labels` [batch, length] int64 are given.

        Raises
        ------
        ValueError
            If the batch is packed and the model takes no `position_ids`, from which it could tell examples apart.
        """
        assert self.model is not None
        if "position_ids" in batch:
            if not self._takes_position_ids:
                raise ValueError(
                    f"packing=True, but {type(self.model).__name__} takes no `position_ids` and would attend across "
                    "packed examples; set packing=False (and group_by_length=True)"
                )
            if getattr(getattr(self.model, "config", None), "_attn_implementation", None) not in _MASKED_ATTENTION:
                # flash attention looks for borders only where the batch is one row (`_is_packed_sequence`), and else
                # attends across them without a word; as every row begins at position 0, the rows can be joined
                batch = {name: values.reshape(1, -1) for name, values in batch.items()}
        return self.model(**batch, use_cache=False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch over the tokens whose label, moved by one, is not -100: fp32 scalar."""
        if not self.fused_cross_entropy:
            return self(**batch).loss
        if self._fused_loss is None:
            self._fused_loss = FusedLoss(self.model)
        with self._fused_loss.of(batch["labels"]):
            return self(**batch).loss

    # ---- training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of this rank's batch: fp32 scalar. Logs the mean over ranks and accumulated batches."""
        loss = self.loss(batch)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._of_step = []
        self._of_step.append(loss.detach())
        # what the averaged gradient descends
        mean = torch.stack(self._of_step).mean()
        self.log("train_loss", mean, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))
        return loss

    def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Loss of a batch of a calibration pass (`lowrank_dist.Calibration`)."""
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the parameters that require grad, and a schedule that moves at every optimizer step.

        Raises
        ------
        ValueError
            If nothing is to be trained, or the schedule needs a number of steps and the run has no end.
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
                f"scheduler={self.scheduler} with warmup_ratio={self.warmup_ratio} needs the number of steps, and "
                "max_epochs=-1 without max_steps has none; set max_steps or max_epochs"
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
        # fp64, so that the mean of a long set does not depend on how it was dealt out; MPS has none
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._evaluated = torch.zeros(2, dtype=dtype, device=self.device)

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        """Add the sum of this batch's token losses, and their number.

        A batch without any is nothing but fillers: it takes part in the step, and its mean (0 / 0) is not counted.
        """
        loss = self.loss(batch)
        count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._evaluated += torch.stack([torch.where(count > 0, loss.to(self._evaluated) * count, 0.0), count])

    def _log_evaluated(self, name: str) -> None:
        """Log the mean token loss over all ranks. One all-reduce of two numbers, and Lightning's own of the result."""
        loss, count = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        # every rank has the same value: the maximum leaves it as it is, where a mean would round it
        self.log(name, (loss / count).float(), prog_bar=True, sync_dist=True, reduce_fx="max")
