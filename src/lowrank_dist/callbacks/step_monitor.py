"""What a training step achieves and where its time goes, for loggers and the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.profiler import ProfilerActivity

from lowrank_dist.callbacks.flops import FlopCount, matmul_rate
from lowrank_dist.callbacks.run_directory import run_directory
from lowrank_dist.callbacks.timeline import ObservedProfiler, Timeline
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.training.batch_tokens import BatchTokens
from lowrank_dist.training.token_mean import accumulator_dtype

_PARTS = ("data", "gather", "compute", "optimizer", "save", Timeline.OTHER)
_VALIDATION = "validation"
_BATCH = "run_training_batch"  # the Trainer's name of forward, backward and optimizer
_ACTIONS = {"[_TrainingEpochLoop].train_dataloader_next": "data", _BATCH: "compute", "save_checkpoint": "save"}
_UNTRACED = 2  # steps before a trace: the first compiles kernels, in the second the profiler warms up
_SAVING_HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
_COMPUTE_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}  # by the beginning of a precision


class StepMonitor(Callback):
    """Log tokens per second, padding, memory, share of the device's peak, and where the time of a step goes.

    Every `every_n_steps` optimizer steps, and at the end of the fit, all loggers get these, as means over the steps
    since the last time. Times are means over the ranks, memory is the most of a rank, all else is of all ranks:

    - ``throughput/tokens_per_s``, ``throughput/tokens_per_s_per_rank``: real tokens, those that `attention_mask`
      marks. A rank is a GPU. The progress bar shows the former as ``tokens/s``.
    - ``throughput/trained_tokens_per_s``: trained tokens, those whose next label is not -100.
    - ``throughput/tokens_per_step``, ``throughput/trained_tokens_per_step``.
    - ``throughput/padding_share``: share of the positions of the batches that are not real tokens.
    - ``throughput/gemm_share``: flops of a rank per second over those of a product of large matrices in the compute
      dtype, which is timed once when the fit begins. Work on padding counts.
    - ``throughput/seconds_per_step`` and its parts, which add up to it: ``throughput/seconds_data`` (waiting for the
      loader), ``_gather`` (waiting for parameters, and putting them together; `PiSSAStrategy` only), ``_compute``
      (forward and backward), ``_optimizer``, ``_save`` (of the steps before: a step is saved after it was logged) and
      ``_other`` (other callbacks, logging). Validation is in none of them.
    - ``throughput/memory_allocated_gb``, ``throughput/memory_reserved_gb``: on CUDA, the peaks since training began.
      On CPUs ``throughput/memory_resident_gb``, what the process has in memory now.

    The first step warms up and is not measured.

    Parameters
    ----------
    every_n_steps
        Interval in optimizer steps. None: the Trainer's ``log_every_n_steps``, with 0 of which nothing is measured.
    profile_steps
        Record a trace of so many steps with ``torch.profiler``, from the third step of the fit on. It is written to
        ``trace-rank0.json.gz`` in the directory of the first logger (without one in the trainer's
        ``default_root_dir``), for https://ui.perfetto.dev. 0: no trace.
    profile_all_ranks
        Every rank writes a trace, ``trace-rank{N}.json.gz``.

    Attributes
    ----------
    metrics : dict
        The figures last logged, on every rank.
    flops_per_position : float
        Flops of this rank per position of a batch; 0 before the first one.

    Raises
    ------
    InputError
        If a number is out of range. At the first batch, on every rank, if it is none of the batches below.

    See Also
    --------
    LossHistory : Writes the losses of a run.
    lightning.pytorch.callbacks.ThroughputMonitor : Samples per second; waits for the device after every batch.

    Notes
    -----
    A batch is a mapping with `input_ids`, int64 of shape [batch, length], and, where present, `labels` and
    `attention_mask` of the same shape; or `input_ids` alone, as a tensor or the first item of a tuple or list. Without
    labels every real token counts as trained. Without a mask every position is real, except, in packed batches with
    `position_ids`, a last stretch without labels: that is how `SFTDataModule` pads.

    Flops are counted, not estimated from parameters: the first batch runs under the formulas of
    ``torch.utils.flop_counter``, forward and backward, recomputed activations included, and its flops per position
    count for all batches. Operators without a formula (attention of CPUs and of the package flash-attn, Triton kernels)
    count 0.

    Nothing waits for the device between two logs: tokens are counted on it, and on CUDA the parts of a step are the
    times between events on the stream that computes, so that they are waits of the device, not of the host. A log
    waits for the device once and issues one all-gather of some 15 numbers. Under manual optimization ``_compute``
    includes the optimizer.

    Examples
    --------
    >>> from lightning import Trainer
    >>> from lowrank_dist import StepMonitor
    >>> monitor = StepMonitor(every_n_steps=10)
    >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[monitor])
    >>> monitor.metrics
    {}
    """

    #: Tells `PiSSAStrategy` not to gather gradients for `on_before_optimizer_step`, which takes the time only.
    needs_gradients = False

    def __init__(
        self, *, every_n_steps: int | None = None, profile_steps: int = 0, profile_all_ranks: bool = False
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"StepMonitor: every_n_steps={every_n_steps} must be at least 1, or None")
        if profile_steps < 0:
            raise InputError(f"StepMonitor: profile_steps={profile_steps} must not be negative; 0 records no trace")
        self.every_n_steps, self.profile_steps = every_n_steps, profile_steps
        self.profile_all_ranks = profile_all_ranks
        self.metrics: dict[str, float] = {}
        self.flops_per_position = 0.0
        self._gemm_rate = 0.0
        self._timeline: Timeline | None = None
        self._part_of_action: dict[str, str] = {}
        self._gathering: Any = None
        self._group = ShardGroup.single()
        self._flops: FlopCount | None = None
        self._trace: Any = None
        self._passed = 0  # steps since the profiler began
        self._warm = False  # the first step is over
        self._reset()

    def _reset(self) -> None:
        self._steps = self._positions = 0
        self._tokens: Tensor | None = None  # real, trained

    # -- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before there is a model, so that there is memory for the matrices
            precision = str(trainer.precision)
            dtypes = (dtype for start, dtype in _COMPUTE_DTYPES.items() if precision.startswith(start))
            self._gemm_rate = matmul_rate(trainer.strategy.root_device, next(dtypes, torch.float32))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        if self._interval(trainer):
            self._start_measuring(trainer)
        directory = run_directory(trainer) if self.profile_steps else None
        if directory is not None and (self.profile_all_ranks or trainer.is_global_zero):
            self._start_trace(trainer, directory)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ends_step = not trainer.fit_loop._should_accumulate()
        if self._timeline is not None:
            self._count(BatchTokens.of(batch))
            if ends_step and not self._warm:
                self._warm = True
                self._timeline.read()
            elif ends_step:
                self._steps += 1
                if trainer.global_step % self._interval(trainer) == 0:
                    self._log(trainer)
                    rate = self.metrics["throughput/tokens_per_s"]
                    pl_module.log("tokens/s", rate, prog_bar=True, logger=False, batch_size=1)
        if ends_step and self._trace is not None:
            self._passed += 1
            self._trace.step()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._timeline is not None and pl_module.automatic_optimization:
            self._timeline.enter("optimizer")  # it ends with the batch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timeline is not None:
            self._timeline.enter(_VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timeline is not None:
            self._timeline.leave(_VALIDATION)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps:
            self._log(trainer)
        self._end_trace()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(trainer)

    def _let_go(self, trainer: Any) -> None:
        self._end_trace()
        if isinstance(trainer.profiler, ObservedProfiler):
            trainer.profiler = trainer.profiler.profiler
        if self._gathering is not None:
            self._gathering.on_wait = None
        self._timeline = self._gathering = None

    def _interval(self, trainer: Any) -> int:
        return int(trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps)

    # -- time -----------------------------------------------------------------------------------------------------

    def _begins(self, action: str) -> None:
        if self._timeline is not None and action in self._part_of_action:
            self._timeline.enter(self._part_of_action[action])
        if action == _BATCH and self._flops is not None:
            self._flops.__enter__()

    def _ends(self, action: str) -> None:
        if action == _BATCH and self._flops is not None:
            self._flops.__exit__(None, None, None)
        if self._timeline is not None and action in self._part_of_action:
            self._timeline.leave(self._part_of_action[action])

    def _waits(self, begins: bool) -> None:
        if self._timeline is None:
            return
        if not begins:
            self._timeline.leave("gather")
        elif self._timeline.part == "compute":  # not in validation
            self._timeline.enter("gather")

    def _start_measuring(self, trainer: Any) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._group = ShardGroup(device=device)
        self._warm, self._flops, self._timeline = False, FlopCount(), Timeline(device)
        self._part_of_action = dict(_ACTIONS) | {
            f"[Callback]{callback.state_key}.{hook}": "save"
            for callback in trainer.checkpoint_callbacks
            for hook in _SAVING_HOOKS
        }
        trainer.profiler = ObservedProfiler(trainer.profiler, self._begins, self._ends)
        self._gathering = getattr(trainer.strategy, "gathering", None)
        if self._gathering is not None:
            self._gathering.on_wait = self._waits

    # -- figures --------------------------------------------------------------------------------------------------

    def _count(self, batch: BatchTokens) -> None:
        if self._flops is not None:  # the first batch of the fit
            self.flops_per_position = self._flops.total / batch.positions
            self._flops = None
        if self._warm:
            self._positions += batch.positions
            tokens = torch.stack([batch.real(), batch.trained()])
            self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def _log(self, trainer: Trainer) -> None:
        """Log what was measured since the last time. One all-gather."""
        mine = self._measured(trainer.strategy.root_device)
        tokens, self._tokens = self._tokens, None
        assert tokens is not None
        dtype = accumulator_dtype(self._group.device)
        figures = torch.cat([tokens.to(dtype), torch.tensor(list(mine.values()), dtype=dtype).to(tokens.device)])
        names = ["tokens", "trained_tokens", *mine]
        ranks = [dict(zip(names, row, strict=True)) for row in self._group.gather_equal(figures[None]).tolist()]
        total = {name: sum(rank[name] for rank in ranks) for name in names}
        seconds, count = total["seconds"] / len(ranks), self._steps
        metrics = {
            "tokens_per_s": total["tokens"] / seconds,
            "tokens_per_s_per_rank": total["tokens"] / seconds / len(ranks),
            "trained_tokens_per_s": total["trained_tokens"] / seconds,
            "tokens_per_step": total["tokens"] / count,
            "trained_tokens_per_step": total["trained_tokens"] / count,
            "padding_share": 1 - total["tokens"] / total["positions"],
            "gemm_share": total["gemm_share"] / len(ranks),
            "seconds_per_step": seconds / count,
        }
        metrics |= {f"seconds_{part}": total[part] / len(ranks) / count for part in _PARTS}
        metrics |= {name: max(rank[name] for rank in ranks) for name in names if name.startswith("memory_")}
        self.metrics = {f"throughput/{name}": value for name, value in metrics.items()}
        self._steps = self._positions = 0
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self.metrics, step=trainer.global_step - 1)  # as Lightning counts `train_loss`

    def _measured(self, device: torch.device) -> dict[str, float]:
        """Figures of this rank since the last time. The host waits for the device."""
        assert self._timeline is not None
        parts = self._timeline.read()
        parts.pop(_VALIDATION, None)
        seconds = sum(parts.values())
        found = {
            "positions": self._positions,
            "seconds": seconds,
            "gemm_share": self.flops_per_position * self._positions / seconds / self._gemm_rate,
            **{part: parts.get(part, 0.0) for part in _PARTS},
        }
        if device.type == "cuda":
            found["memory_allocated_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            found["memory_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
        else:
            found["memory_resident_gb"] = psutil.Process().memory_info().rss / 1e9
        return found

    # -- trace ----------------------------------------------------------------------------------------------------

    def _start_trace(self, trainer: Trainer, directory: Path) -> None:
        self._name_parts(True)
        activities = [ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        path = (directory / f"trace-rank{trainer.global_rank}.json.gz").resolve()

        def write(profiler: Any) -> None:
            self._name_parts(False)
            steps = self._passed - _UNTRACED
            if steps < 1:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            all_ranks = f", and those of the other ranks in {path.parent}" if self.profile_all_ranks else ""
            rank_zero_info(
                f"Trace of {steps} step{'s' * (steps > 1)}: {path}{all_ranks}; open it in https://ui.perfetto.dev"
            )

        self._passed = 0
        self._trace = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=_UNTRACED - 1, warmup=1, active=self.profile_steps, repeat=1),
            on_trace_ready=write,
        )
        self._trace.start()

    def _name_parts(self, named: bool) -> None:
        if self._timeline is not None:
            self._timeline.named = named

    def _end_trace(self) -> None:
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        if self._passed <= _UNTRACED:
            rank_zero_warn(f"profile_steps={self.profile_steps}: no trace, the fit ended before its third step")
