"""The LightningModule for classes of sequences."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional

from lowrank_dist.data.tokenizing import IGNORE_INDEX
from lowrank_dist.errors import InputError
from lowrank_dist.training.base_module import TransformersModule
from lowrank_dist.training.token_mean import TokenMean, accumulator_dtype


class SequenceClassificationModule(TransformersModule):
    """Sequence classification model, an encoder or a decoder with a head for classes, with its cross-entropy.

    `train_loss`, whose gradient the optimizer gets, is the mean over all examples of a step on all ranks. `val_loss`,
    `val_accuracy`, `test_loss` and `test_accuracy` are means over all examples of the whole set on all ranks.

    Parameters
    ----------
    pretrained
        Directory or hub id of the model.
    num_labels
        Number of classes. None: that of the model's configuration.
    **options
        Learning rate, schedule, optimizer and attention, as of `CausalLMModule`: `lr`, `weight_decay`, `betas`,
        `warmup_ratio`, `scheduler`, `optimizer`, `optimizer_options`, `loraplus_lr_ratio`, `embedding_lr`, `norm_lr`,
        `attn_implementation`, `gradient_checkpointing`.

    Raises
    ------
    ValueError
        If a number is out of range.

    See Also
    --------
    lowrank_dist.SFTDataModule : Batches for this module, with `task` ``"classification"``.

    Notes
    -----
    A head that the pretrained weights lack has small random numbers, the same on every rank, and must be trained whole:
    ``modules_to_save`` of the adapter names it (``score`` in decoders, ``classifier`` in BERT), without which
    `PiSSAStrategy` refuses the model.

    A batch has ``input_ids`` and ``attention_mask``, int64 ``[batch, length]``, and ``labels``, int64 ``[batch]``,
    -100 for fillers. A decoder reads the class off the last token that is no padding, so that it must know the padding:
    ``pad_token_id`` of the configuration becomes that of the data. The loss is computed in fp32.

    Examples
    --------
    >>> from lowrank_dist import SequenceClassificationModule
    >>> module = SequenceClassificationModule("answerdotai/ModernBERT-base", num_labels=3, lr=1e-4)
    >>> module.num_labels
    3
    """

    data_task = "classification"
    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, pretrained: str, *, num_labels: int | None = None, **options: Any) -> None:
        if num_labels is not None and num_labels < 2:
            raise ValueError(f"num_labels={num_labels} must be at least 2: it is the number of classes")
        super().__init__(pretrained, **options)
        self.num_labels = num_labels
        self._example_mean = TokenMean()

    def _config_options(self) -> dict[str, Any]:
        given: dict[str, Any] = {} if self.num_labels is None else {"num_labels": self.num_labels}
        return given | {"problem_type": "single_label_classification"}

    def configure_model(self) -> None:
        """Build the model; InputError if the data have a class that it does not know."""
        if self.model is not None:
            return
        super().configure_model()
        assert self.model is not None
        config: Any = self.model.config
        data = getattr(self.trainer, "datamodule", None)
        largest = getattr(data, "largest_class", -1)
        if largest >= config.num_labels:
            raise InputError(
                f"the data have the class {largest}, but the model has {config.num_labels} of them, from 0 on; set "
                f"model.num_labels={largest + 1} or more"
            )
        text, padding = config.get_text_config(), getattr(data, "pad_token_id", None)
        if padding is not None and text.pad_token_id != padding:
            if text.pad_token_id is not None:
                rank_zero_info(
                    f"the data are padded with token {padding}, and the model's pad_token_id is {text.pad_token_id}: "
                    f"it becomes {padding}, because a decoder reads the class before the padding; give the same to the "
                    "model that you load the adapter on"
                )
            text.pad_token_id = config.pad_token_id = padding

    def forward(self, **batch: Tensor) -> Any:
        """Return the output of the model for a batch without labels."""
        assert self.model is not None
        return self.model(**batch)

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of each example, whether its class is the likeliest, and 1 (0 for fillers): fp32 ``[batch]`` each."""
        labels = batch["labels"]
        logits = self(**{name: values for name, values in batch.items() if name != "labels"}).logits.float()
        losses = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        return losses, (logits.argmax(1) == labels).float(), (labels != IGNORE_INDEX).float()

    # ---- training
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return this rank's loss for backward, scalar, so that the gradient of the step is that of `train_loss`.

        The last batch of a step issues an all-reduce of two numbers, and logs.
        """
        losses, _, counts = self.losses(batch)
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        mean = losses.sum() / counts.sum().clamp(min=1)
        loss, of_step = self._example_mean.weighted(mean, counts.sum(), self.trainer, first=first)
        if of_step is not None:
            self.log("train_loss", of_step, prog_bar=True, batch_size=len(counts))
        return loss

    def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch of a calibration pass (`lowrank_dist.Calibration`)."""
        losses, _, counts = self.losses(batch)
        return losses.sum() / counts.sum().clamp(min=1)

    # ---- evaluation
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._means("val_loss", "val_accuracy")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add this rank's batch to the sums."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._means("test_loss", "test_accuracy")

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        sums = torch.stack(self.losses(batch))
        self._add(sums.to(accumulator_dtype(sums.device)).sum(1))
