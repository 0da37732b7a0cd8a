"""The LightningModule for supervised fine-tuning of a Hugging Face causal language model."""

from __future__ import annotations

import math
import os
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lowrank_dist.errors import InputError
from lowrank_dist.methods import Method
from lowrank_dist.model.skeleton import language_model_class, read_config
from lowrank_dist.training.fused_loss import FusedLoss
from lowrank_dist.training.optim import build_optimizer, check_optimizer, optimizer_class
from lowrank_dist.training.packed_examples import PackedExamples
from lowrank_dist.training.parameter_groups import parameter_groups
from lowrank_dist.training.published_rates import hint
from lowrank_dist.training.token_mean import TokenMean, accumulator_dtype, check_accumulation, trained_tokens
from lowrank_dist.zero3.elementwise import check_class

LossAverage = Literal["tokens", "batches"]
LOSS_AVERAGES: tuple[str, ...] = get_args(LossAverage)
SchedulerName = Literal["cosine", "linear", "constant"]
SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)

DEFAULT_LR = 2e-5

_LOAD_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
# attention implementations for which transformers builds a mask from `position_ids`, one per row of the batch
_MASKED_ATTENTION = {"eager", "sdpa", "flex_attention"}


class CausalLMModule(L.LightningModule):
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
        one of the three options for learning rates is set.
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
        own, where only matrices are trained, or the import path of any optimizer class, such as `torch.optim.Adagrad`
        or `bitsandbytes.optim.Lion`. Paged optimizers need CUDA; on other devices AdamW is used and a warning is
        logged. Under DeepSpeed, other optimizers that look at whole tensors (Adafactor, LAMB, Prodigy, ...) are
        refused, since they would train differently on shards.
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

    #: Tells data modules that batches without trained tokens count for nothing.
    takes_fillers = True

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
    ) -> None:
        super().__init__()
        if scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={scheduler!r} is not known; valid names: {', '.join(SCHEDULERS)}")
        check_optimizer(optimizer, optimizer_options)
        if "." in optimizer and tuple(betas) != (0.9, 0.999):
            raise ValueError(
                f"betas={tuple(betas)} has no effect on optimizer={optimizer!r}; set optimizer_options={{'betas': ...}}"
            )
        if average_loss_over not in LOSS_AVERAGES:
            raise ValueError(
                f"average_loss_over={average_loss_over!r} is not known; valid names: {', '.join(LOSS_AVERAGES)}"
            )
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio={warmup_ratio} must be between 0 and 1: it is a share of all steps")
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr={lr} and weight_decay={weight_decay} must not be negative")
        if loraplus_lr_ratio <= 0:
            raise ValueError(f"loraplus_lr_ratio={loraplus_lr_ratio} must be positive")
        for name, rate in (("embedding_lr", embedding_lr), ("norm_lr", norm_lr)):
            if rate is not None and rate < 0:
                raise ValueError(f"{name}={rate} must not be negative")
        self.save_hyperparameters()
        self.pretrained = pretrained
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_ratio = warmup_ratio
        self.scheduler = scheduler
        self.optimizer = optimizer
        self.optimizer_options = dict(optimizer_options or {})
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.embedding_lr = embedding_lr
        self.norm_lr = norm_lr
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.fused_cross_entropy = fused_cross_entropy
        self.average_loss_over = average_loss_over
        self._fused_loss: FusedLoss | None = None
        self.model: nn.Module | None = None
        self._token_mean = TokenMean()
        self._step_losses: list[Tensor] = []  # losses of the batches of the current step
        self._evaluated = torch.zeros(2)  # sum of token losses, number of tokens

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """Load a file that Lightning's own strategies wrote.

        Raises
        ------
        InputError
            If `checkpoint_path` is a directory, which `PiSSAStrategy` writes: it holds adapters, no module.
        """
        if isinstance(checkpoint_path, str | os.PathLike) and os.path.isdir(checkpoint_path):
            raise InputError(
                f"{os.fspath(checkpoint_path)} is a directory of adapters, from which {cls.__name__}."
                "load_from_checkpoint cannot make a module; resume or evaluate with trainer.fit, validate or test("
                "module, ckpt_path=...), or load its lora/ onto the pretrained model with PEFT"
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **options)

    def setup(self, stage: str) -> None:
        """Before weights are read, raise ValueError for what the strategy cannot do.

        That is to average over tokens while accumulating, or to step the optimizer's class on shards.
        """
        if stage != "fit":
            return
        if self.average_loss_over == "tokens" and self.trainer.accumulate_grad_batches > 1:
            check_accumulation(self.trainer)
        if "." in self.optimizer:
            kind = optimizer_class(self.optimizer)
            if isinstance(self.trainer.strategy, DeepSpeedStrategy):
                check_class(kind)

    def configure_model(self) -> None:
        """Build the model on the first call.

        Under a strategy with a true `materializes_weights`, the model comes from ``AutoModelForCausalLM.from_config``,
        or from ``AutoModelForImageTextToText`` where only that knows the configuration.
        Under other strategies its weights are loaded, in the dtype of a ``"*-true"`` precision and otherwise in fp32,
        because mixed precision needs fp32 master weights.
        """
        if self.model is not None:
            return
        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        if getattr(self.trainer.strategy, "materializes_weights", False):
            if self.gradient_checkpointing:
                raise ValueError(
                    f"gradient_checkpointing=True of the model has no effect under "
                    f"{type(self.trainer.strategy).__name__}, which has its own option; set it to false in the model"
                )
            revision_of = getattr(self.trainer.strategy, "revision_of", lambda _: None)
            config = read_config(self.pretrained, revision=revision_of(self.pretrained))
            model = language_model_class(config).from_config(config, **attention)
        else:
            dtype = _LOAD_DTYPES.get(str(self.trainer.precision), torch.float32)
            kind = language_model_class(read_config(self.pretrained))
            model = kind.from_pretrained(self.pretrained, dtype=dtype, **attention)
            model.train()  # from_pretrained returns evaluation mode, which Lightning would keep
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            PackedExamples(model)
        self._check_tokens(model)
        self.model = model

    def _check_tokens(self, model: Any) -> None:
        """Raise InputError if the data have tokens without an embedding, rather than at the batch that has one."""
        data = getattr(self.trainer, "datamodule", None)
        largest = getattr(data, "largest_token", 0)
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
        if rows is not None and largest >= rows:
            raise InputError(
                f"the data have the token {largest}, but the embedding of {self.pretrained} has {rows} rows; set "
                f"data.tokenizer={getattr(data, 'tokenizer', None)!r} to that of the model"
            )

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
        if "position_ids" in batch and attention not in _MASKED_ATTENTION:
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
    def on_fit_start(self) -> None:
        """If the learning rate is the default, say what was published for the method of the run, on rank 0."""
        strategy = self.trainer.strategy
        init = getattr(strategy, "init", None)
        if self.lr != DEFAULT_LR or not isinstance(init, Method):
            return
        line = hint(
            self.lr,
            init,
            quantized=getattr(strategy, "quantization", None) is not None,
            rslora=bool(getattr(getattr(strategy, "adapter", None), "use_rslora", False)),
        )
        if line is not None:
            rank_zero_info(line)

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
            loss, mean = self._token_mean.weighted(loss, trained_tokens(batch["labels"]), self.trainer, first=first)
            if mean is not None:
                self.log("train_loss", mean, prog_bar=True, batch_size=size)
            return loss
        if first:
            self._step_losses = []
        loss = self._over_batches(loss, trained_tokens(batch["labels"]))
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
        return torch.where(trained_tokens(batch["labels"]) > 0, self.loss(batch), 0.0)

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the parameters that require grad, and a schedule that advances every optimizer step.

        The schedule multiplies the learning rates of all parameter groups by the same factor.

        Raises
        ------
        ValueError
            If no parameter requires grad, the run has no fixed number of steps, or a learning rate is given for
            parameters that are not trained.
        """
        from transformers import get_scheduler

        params = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not params:
            raise ValueError("no parameter requires grad; check `target_modules` of the adapter")
        optimizer = build_optimizer(
            self._groups() or params,
            options=self.optimizer_options,
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

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups; none if all parameters have the same learning rate and weight decay."""
        rates = {
            "lora_B": None if self.loraplus_lr_ratio == 1 else self.lr * self.loraplus_lr_ratio,
            "embedding": self.embedding_lr,
            "norm": self.norm_lr,
        }
        given = {role: rate for role, rate in rates.items() if rate is not None}
        if not given:
            return []
        groups = parameter_groups(self, lr=self.lr, rates=given, weight_decay=self.weight_decay)
        roles = [group["name"] for group in groups]
        options = {"lora_B": "loraplus_lr_ratio", "embedding": "embedding_lr", "norm": "norm_lr"}
        for role in given:
            if role not in roles or (role == "lora_B" and "lora_A" not in roles):
                raise ValueError(
                    f"{options[role]} sets the learning rate of {role}, but the run trains {', '.join(roles)}; leave "
                    "it out, or adapt layers that have it"
                )
        return groups

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
        self._evaluated = torch.zeros(2, dtype=accumulator_dtype(self.device), device=self.device)

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        """Add the sum of this batch's token losses, and their number.

        A batch without trained tokens consists of fillers. It takes part in the step, but its mean (0 / 0) is ignored.
        """
        loss = self.loss(batch)
        count = trained_tokens(batch["labels"])
        self._evaluated += torch.stack([torch.where(count > 0, loss.to(self._evaluated) * count, 0.0), count])

    def _log_evaluated(self, name: str) -> None:
        """Log the mean token loss over all ranks.

        One all-reduce of two numbers, and one of the result by Lightning.
        """
        loss, count = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        # every rank has the same value: a maximum keeps it exactly, a mean would round it
        self.log(name, (loss / count).float(), prog_bar=True, sync_dist=True, reduce_fx="max")
