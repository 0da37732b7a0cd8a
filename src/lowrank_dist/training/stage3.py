"""Lightning's DeepSpeed strategy at ZeRO stage 3, also on CPUs, with settings for gathering frozen weights."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.forecast.job import ShardWithin
from lowrank_dist.training.lightning_features import check_features, without_auto
from lowrank_dist.tuners.adalora.allocation import RankAllocation
from lowrank_dist.zero3.elementwise import check_elementwise
from lowrank_dist.zero3.gathering import Gathering, take_over
from lowrank_dist.zero3.gradients import WholeGradients, clear_gradients, scale_gradients
from lowrank_dist.zero3.muon import is_muon
from lowrank_dist.zero3.optimizer import keep_optimizer
from lowrank_dist.zero3.partition import Partitioner, shaped, use_cpu_accelerator, zero_settings
from lowrank_dist.zero3.reduction import LayerReduction

#: What Lightning, or a strategy, writes into a DeepSpeed configuration for one Trainer.
_OF_THE_TRAINER = {
    "bf16",
    "data_types",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_micro_batch_size_per_gpu",
}

#: Steps in a row without finite gradients after which a fit ends.
MAX_SKIPPED = 20


class Stage3Strategy(DeepSpeedStrategy):
    """DeepSpeed at ZeRO stage 3 on any accelerator; partitions are written in place.

    Parameters
    ----------
    **options
        Options of `DeepSpeedStrategy`, except ``stage``.
    """

    def __init__(self, **options: Any) -> None:
        known = inspect.signature(DeepSpeedStrategy.__init__).parameters
        for option in options:
            if option not in known or option == "stage":
                raise ValueError(
                    f"PiSSAStrategy: unknown option {option}={options[option]!r}; beside its own, it takes the "
                    f"options of DeepSpeedStrategy except stage: {', '.join(sorted(set(known) - {'self', 'stage'}))}"
                )
        super().__init__(stage=3, **options)
        if self.config is not None:
            self.config = without_auto(copy.deepcopy(self._deepspeed_config))  # the user's own stays as it is
        self._partitioner: Partitioner | None = None
        self._allocation: RankAllocation | None = None
        self._ahead = 0
        self._gathering: Gathering | None = None
        self._whole_gradients: WholeGradients | None = None
        self._shows_gradients = False
        self._skipped = 0
        # The user's own ZeRO settings are kept. The command line passes all options, so those at their defaults do not
        # count.
        self._chosen = {key for key, value in options.items() if value != known[key].default}
        if options.get("config") is not None:
            self._chosen |= set(self._deepspeed_config.get("zero_optimization", {}))
        zero = self._deepspeed_config.setdefault("zero_optimization", {})
        if zero.setdefault("stage", 3) != 3:
            raise ValueError(
                f"PiSSAStrategy: the DeepSpeed config sets zero_optimization.stage={zero['stage']}; it must be 3"
            )
        # Adapters are small, so an offloaded optimizer need not be DeepSpeed's fast CPU Adam.
        self._deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)
        if zero.get("offload_param", {}).get("device") == "nvme":
            raise ValueError(
                "PiSSAStrategy: parameters cannot be offloaded to 'nvme', only to 'cpu' (offload_parameters=True): "
                "partitions are written in place"
            )
        self._given = set(self._deepspeed_config)

    @property
    def checkpoint_io(self) -> CheckpointIO:
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, given: CheckpointIO) -> None:
        raise InputError(
            f"Trainer(plugins={type(given).__name__}()): a CheckpointIO writes one file on one rank, but checkpoints "
            "of PiSSAStrategy are directories that all ranks write; leave it out"
        )

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        check_features(self.lightning_module.trainer)
        if isinstance(self.accelerator, CPUAccelerator):
            use_cpu_accelerator()
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's own refuses every accelerator but CUDA

    def set_world_ranks(self) -> None:
        """Set the ranks, and raise InputError if fewer or more processes were started than the Trainer asks for."""
        super().set_world_ranks()
        asked = self.num_nodes * self.num_processes
        if self.world_size != asked:
            remedy = (
                "start this many tasks by srun, or, in a shell inside an allocation, unset SLURM_NTASKS"
                if isinstance(self.cluster_environment, SLURMEnvironment)
                else "start this many processes, or set devices and num_nodes to what was started"
            )
            raise InputError(
                f"devices={self.num_processes} on num_nodes={self.num_nodes} make {asked} ranks, but "
                f"{type(self.cluster_environment).__name__} reports {self.world_size}: {remedy}"
            )

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()  # from here on as the parent, without its check of CUDA device indices
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed wants an index

    def _auto_select_batch_size(self) -> int:
        """Number of examples in a training batch, by which DeepSpeed counts samples; 1 if unknown or not training.

        The parent asks for the training loader in every stage, but a data module needs one only for fitting. The parent
        also assumes that a loader makes its own batches, of a fixed size.
        """
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        source = trainer.fit_loop._data_source
        if trainer.state.fn != TrainerFn.FITTING or not source.is_defined():
            return 1
        sampler = getattr(source.dataloader(), "batch_sampler", None)
        return getattr(sampler, "batch_size", None) or 1

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False, unlike the parent's: Lightning decides which batches end a step.

        `block_backward_sync` passes the decision on to DeepSpeed, whose own counter ignores the ends of epochs.
        """
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context for a batch that does not end a step: its gradients are kept, and the next ones are added to them."""
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(False)
        try:
            yield
            engine.step()  # the engine's counts the batch and stops DeepSpeed's timers; the optimizer's does not
        finally:
            engine.set_gradient_accumulation_boundary(True)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        assert self.lightning_module is not None
        if output is None and self.lightning_module.automatic_optimization:
            raise InputError(
                "training_step returned None: a rank that skips its backward pass would leave the others waiting for "
                "its gradients; return a loss, or loss * 0"
            )
        return output

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run backward through DeepSpeed's engine; the loss is divided once by the number of accumulated batches.

        Under automatic optimization, Lightning has divided it already, and DeepSpeed would divide it again.
        """
        assert self.lightning_module is not None
        assert self._gathering is not None
        assert self._whole_gradients is not None
        self._whole_gradients.take_back()
        self._gathering.backward_begins()
        if self.lightning_module.automatic_optimization:
            kwargs.setdefault("scale_wrt_gas", False)
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        self._whole_gradients.show()
        return loss

    def _hooks_see_gradients(self) -> bool:
        """Whether a hook of the module or a callback may read or change gradients before a step."""
        assert self.lightning_module is not None
        if is_overridden("configure_gradient_clipping", self.lightning_module, LightningModule):
            return True
        return any(getattr(one, "needs_gradients", True) for one in self._overriding("on_before_optimizer_step"))

    def _overriding(self, hook: str) -> Iterator[object]:
        """The module and the callbacks that have a `hook` of their own."""
        assert self.lightning_module is not None
        if is_overridden(hook, self.lightning_module, LightningModule):
            yield self.lightning_module
        for callback in self.lightning_module.trainer.callbacks:  # type: ignore[attr-defined]
            own = getattr(callback, hook)
            if getattr(own, "__func__", own) is not getattr(Callback, hook):
                yield callback

    def _clip_gradients(
        self,
        optimizer: Any,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip, in place of the precision plugin, where the engine does not: ``self.clip_gradients`` of a module."""
        assert self._whole_gradients is not None
        if clip_val <= 0 or self._deepspeed_config.get("gradient_clipping"):
            return
        if not self._whole_gradients.shown:
            raise InputError(
                f"clip_gradients(gradient_clip_val={clip_val}) was called where there are no gradients; call it "
                "between manual_backward and the optimizer's step, or in configure_gradient_clipping"
            )
        parameters = self._whole_gradients.parameters
        if gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            torch.nn.utils.clip_grad_value_(parameters, clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, clip_val)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients of the accumulated batches of this step by `factor`, a scalar equal on all ranks."""
        scale_gradients(self.deepspeed_engine.optimizer, factor)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        whole = self._whole_gradients
        assert whole is not None

        def closure_and_after() -> Any:
            result = closure()
            if self._shows_gradients and not whole.shown:
                whole.show()
            return result

        output = super().optimizer_step(optimizer, closure_and_after, *args, **kwargs)
        if self._allocation is not None:
            self._allocation.after_step(self.deepspeed_engine)
        self._tell_of_skipped_steps()
        clear_gradients(self.deepspeed_engine.optimizer)
        assert self._gathering is not None
        self._gathering.expire()
        return output

    def _tell_of_skipped_steps(self) -> None:
        """Warn of a step that DeepSpeed left out because of its gradients, which it does without a word.

        Raises
        ------
        InputError
            On every rank, after `MAX_SKIPPED` of them in a row.
        """
        if self.deepspeed_engine.was_step_applied():
            self._skipped = 0
            return
        self._skipped += 1
        assert self.lightning_module is not None
        said = f"step {self.lightning_module.trainer.global_step + 1}: gradients are infinite or NaN"
        if self._skipped == MAX_SKIPPED:
            raise InputError(
                f"{said}, in {MAX_SKIPPED} steps in a row: nothing is trained any more; look at the data and the loss "
                "of these steps, lower the learning rate, or resume from an earlier checkpoint"
            )
        rank_zero_warn(
            f"{said}; DeepSpeed leaves the step out, and parameters stay as they are ({self._skipped} in a row)"
        )

    def _gathers_with(self, partitioner: Partitioner, backbone: nn.Module, ahead: int) -> None:
        """Gather the parameters that `partitioner` made in place of DeepSpeed, `ahead` layers ahead of their use.

        Must be called before DeepSpeed's engine exists. Settings that the user has chosen stay.
        """
        self._partitioner, self._ahead = partitioner, ahead
        zero = self._deepspeed_config["zero_optimization"]
        zero |= {key: value for key, value in zero_settings(backbone).items() if key not in self._chosen}

    def _init_optimizers(self) -> tuple[Any, Any]:
        """The optimizer and the schedule of the module; InputError if the optimizer would step shards differently."""
        assert self.lightning_module is not None
        with shaped(self.lightning_module.parameters()):  # groups are often made by the number of dimensions
            optimizer, schedule = super()._init_optimizers()
        own = {id(parameter) for parameter in self.lightning_module.parameters() if parameter.requires_grad}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise InputError(
                "configure_optimizers returned None, or an optimizer without any trained parameter, and ZeRO-3 cannot "
                "fit without one; return an optimizer over the parameters that require grad, with lr=0 if nothing is "
                "to be learned, or evaluate with trainer.validate"
            )
        check_elementwise(optimizer)
        if "reduce_scatter" not in self._chosen:  # Muon needs whole gradients
            self._deepspeed_config["zero_optimization"]["reduce_scatter"] = not is_muon(type(optimizer))
        return optimizer, schedule

    def init_deepspeed(self) -> None:
        with warnings.catch_warnings():
            # of configure_gradient_clipping, which does clip here
            warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping internally")
            super().init_deepspeed()
        assert self._partitioner is not None
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            keep_optimizer(self.deepspeed_engine)
            self._show_optimizer()
        take_over(self.deepspeed_engine)
        zero, reduction = self.deepspeed_engine.optimizer, None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING and LayerReduction.can_reduce(zero):
            reduction = LayerReduction(zero, self._partitioner.group)
        self._gathering = Gathering(
            self.deepspeed_engine.module, self._partitioner, ahead=self._ahead, reduction=reduction
        )
        self._gathering.install()

    def _show_optimizer(self) -> None:
        """Give the Trainer, and with it callbacks and schedules, an optimizer of torch instead of DeepSpeed's object.

        It is the one that the engine steps, with its groups. Its parameters are the engine's, and so are gradients.
        """
        engine = self.deepspeed_engine
        zero, optimizer = engine.optimizer, engine.optimizer.optimizer
        assert self._partitioner is not None
        whole = WholeGradients(zero, self._partitioner.group)

        def zero_grad(_: Any, set_to_none: bool = True) -> None:
            whole.drop()
            zero.zero_grad(set_to_none)

        kind = type(optimizer)
        # a class, since Lightning's wrapper has that of the optimizer but not its attributes
        optimizer.__class__ = type(
            kind.__name__,
            (kind,),
            {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "zero_grad": zero_grad},
        )
        self.optimizers = [optimizer]
        step = engine.step

        def step_with_changes(*args: Any, **kwargs: Any) -> Any:
            whole.take_back()
            if self._allocation is not None and engine.is_gradient_accumulation_boundary():
                self._allocation.before_step(engine)
            return step(*args, **kwargs)

        engine.step, self._whole_gradients = step_with_changes, whole
        self._shows_gradients = self._hooks_see_gradients()
        for one in self._overriding("on_after_backward"):
            rank_zero_warn(
                f"{type(one).__name__}.on_after_backward sees no gradients, and to change them there has no effect: "
                "they are in DeepSpeed's engine, in shards; read or change them in on_before_optimizer_step"
            )
        self.precision_plugin.clip_gradients = self._clip_gradients  # type: ignore[method-assign]

    @property
    def gathering(self) -> Gathering | None:
        """What gathers the parameters; None before the engine exists."""
        return self._gathering

    def teardown(self) -> None:
        if self._gathering is not None:
            self._gathering.remove()  # before the parent moves parameters to the CPU
            self._gathering = None
        self._whole_gradients = None
        # another Trainer may accumulate and clip otherwise
        for key in _OF_THE_TRAINER - self._given:
            self._deepspeed_config.pop(key, None)
        self._config_initialized = False
        super().teardown()

    def _copies(self, shard_within: ShardWithin) -> int:
        """Number of copies of the frozen parameters. Collective if nodes hold one each."""
        if shard_within == "rank":
            return self.world_size
        if shard_within == "world" or self.num_nodes == 1:
            return 1
        everyone = ShardGroup(device=self.root_device)
        with everyone.shared_errors():
            ranks_per_node = everyone.size // self.num_nodes
            if self.global_rank % ranks_per_node != self.local_rank:
                raise InputError(
                    f"shard_within='node': rank {self.global_rank} has local rank {self.local_rank}, but with "
                    f"{ranks_per_node} consecutive ranks per node it would have {self.global_rank % ranks_per_node}; "
                    "start ranks node by node (srun --distribution=block)"
                )
        return self.num_nodes

    @property
    def _deepspeed_config(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config
