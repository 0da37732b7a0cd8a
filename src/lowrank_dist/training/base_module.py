"""What the LightningModules of this package share: the model, its optimizer and schedule, sums over a whole set."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
import transformers
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowrank_dist.errors import InputError
from lowrank_dist.methods import Method
from lowrank_dist.model.skeleton import language_model_class, read_config
from lowrank_dist.training.optim import build_optimizer, check_optimizer, optimizer_class
from lowrank_dist.training.packed_examples import PackedExamples
from lowrank_dist.training.parameter_groups import parameter_groups
from lowrank_dist.training.projected import PROJECTIONS, allow_resuming, check_strategy
from lowrank_dist.training.published_rates import hint
from lowrank_dist.training.token_mean import accumulator_dtype, check_accumulation
from lowrank_dist.zero3.elementwise import check_class

SchedulerName = Literal["cosine", "linear", "constant"]
SCHEDULERS: tuple[str, ...] = get_args(SchedulerName)

DEFAULT_LR = 2e-5

_LOAD_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class TransformersModule(L.LightningModule):
    """A transformers model with its optimizer and its learning-rate schedule; subclasses add what is trained.

    Under a strategy that loads weights itself (`PiSSAStrategy`) the module builds only the architecture, and the
    adapters are trained. Under Lightning's own strategies the module loads the model and trains every parameter.

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
        class, such as `torch.optim.Adagrad` or `bitsandbytes.optim.Lion`.
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

    Raises
    ------
    ValueError
        If a name is unknown or a number is out of range.
    """

    #: Tells data modules that batches without anything to train on count for nothing.
    takes_fillers = True

    #: Tells data modules what the batches are to hold (`lowrank_dist.data.tasks.Task`).
    data_task: ClassVar[str]

    #: Class of transformers that makes the model.
    auto_class: ClassVar[str]

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
    ) -> None:
        super().__init__()
        if scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={scheduler!r} is not known; valid names: {', '.join(SCHEDULERS)}")
        check_optimizer(optimizer, optimizer_options)
        if "." in optimizer and tuple(betas) != (0.9, 0.999):
            raise ValueError(
                f"betas={tuple(betas)} has no effect on optimizer={optimizer!r}; set optimizer_options={{'betas': ...}}"
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
        if optimizer in PROJECTIONS:
            allow_resuming(optimizer)
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
        self.model: nn.Module | None = None
        self._evaluated = torch.zeros(0)  # sums of the set so far; the last one divides the others

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

        That is to weight the batches of a step while accumulating, or to step the optimizer's class on shards.
        """
        if stage != "fit":
            return
        if self._weights_batches() and self.trainer.accumulate_grad_batches > 1:
            check_accumulation(self.trainer)
        if self.optimizer in PROJECTIONS:
            check_strategy(self.optimizer, self.trainer.strategy)
        if "." in self.optimizer:
            kind = optimizer_class(self.optimizer)
            if isinstance(self.trainer.strategy, DeepSpeedStrategy):
                check_class(kind)

    def _weights_batches(self) -> bool:
        """Whether the accumulated batches of a step are weighted by what they hold."""
        return True

    def _config_options(self) -> dict[str, Any]:
        """Entries of the model's configuration that the module sets."""
        return {}

    def configure_model(self) -> None:
        """Build the model on the first call.

        Under a strategy with a true `materializes_weights`, the model comes from the ``from_config`` of its class.
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
            for name, value in self._config_options().items():
                setattr(config, name, value)
            model = self._class_for(config).from_config(config, **attention)
        else:
            dtype = _LOAD_DTYPES.get(str(self.trainer.precision), torch.float32)
            kind = self._class_for(read_config(self.pretrained))
            model = kind.from_pretrained(self.pretrained, dtype=dtype, **attention, **self._config_options())
            model.train()  # from_pretrained returns evaluation mode, which Lightning would keep
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            PackedExamples(model)
        self._check_tokens(model)
        self.model = model

    def _class_for(self, config: PretrainedConfig) -> Any:
        """The class that builds the model: `auto_class`, or one with towers where only that knows the configuration."""
        if self.auto_class == "AutoModelForCausalLM":
            return language_model_class(config)
        return getattr(transformers, self.auto_class)

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
        if not given and self.optimizer not in PROJECTIONS:
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
        self._evaluated = torch.zeros(0)

    def on_test_epoch_start(self) -> None:
        self._evaluated = torch.zeros(0)

    def _add(self, sums: Tensor) -> None:
        """Add this rank's sums of a batch, ``[k]``; the last one is the number of what the others are sums over."""
        sums = sums.detach().to(accumulator_dtype(self.device))
        self._evaluated = sums if not len(self._evaluated) else self._evaluated + sums

    def _means(self, *names: str) -> None:
        """Log the means over all ranks by `names`, the first one in the progress bar.

        One all-reduce of the sums, and one of each mean by Lightning. A rank whose loader has no batch adds zeros.
        """
        sums = self._evaluated
        if not len(sums):
            sums = torch.zeros(len(names) + 1, dtype=accumulator_dtype(self.device), device=self.device)
        *totals, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        for place, (name, total) in enumerate(zip(names, totals, strict=True)):
            # every rank has the same value: a maximum keeps it exactly, a mean would round it
            self.log(name, (total / count).float(), prog_bar=place == 0, sync_dist=True, reduce_fx="max")
