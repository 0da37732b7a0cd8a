"""Lightning's DeepSpeed strategy at ZeRO stage 3, also on CPUs, with settings for gathering frozen weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError
from lowrank_dist.forecast.job import ShardWithin
from lowrank_dist.tuners.adalora.allocation import RankAllocation
from lowrank_dist.zero3.elementwise import check_elementwise
from lowrank_dist.zero3.gathering import Gathering, take_over
from lowrank_dist.zero3.gradients import clear_gradients, scale_gradients
from lowrank_dist.zero3.muon import is_muon
from lowrank_dist.zero3.optimizer import keep_optimizer
from lowrank_dist.zero3.partition import Partitioner, use_cpu_accelerator, zero_settings
from lowrank_dist.zero3.reduction import LayerReduction


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
        self._partitioner: Partitioner | None = None
        self._allocation: RankAllocation | None = None
        self._ahead = 0
        self._gathering: Gathering | None = None
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

    def setup_environment(self) -> None:
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

    @staticmethod
    def _check_accumulation(trainer: Trainer) -> None:
        """Raise InputError for a GradientAccumulationScheduler.

        Lightning refuses it too, but only when training starts, after the weights were read.
        """
        for callback in trainer.callbacks if trainer.state.fn == TrainerFn.FITTING else []:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                raise InputError(
                    f"GradientAccumulationScheduler(scheduling={callback.scheduling}): all epochs must "
                    "accumulate the same number of batches, because checkpoints count steps by it; leave the callback "
                    "out and pass Trainer(accumulate_grad_batches=N)"
                )

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
        self._gathering.backward_begins()
        if self.lightning_module.automatic_optimization:
            kwargs.setdefault("scale_wrt_gas", False)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients of the accumulated batches of this step by `factor`, a scalar equal on all ranks."""
        scale_gradients(self.deepspeed_engine.optimizer, factor)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        allocation = self._allocation
        if allocation is None:
            output = super().optimizer_step(optimizer, closure, *args, **kwargs)
        else:

            def closure_and_copy() -> Any:
                result = closure()
                allocation.before_step(self.deepspeed_engine)
                return result

            output = super().optimizer_step(optimizer, closure_and_copy, *args, **kwargs)
            allocation.after_step(self.deepspeed_engine)
        clear_gradients(self.deepspeed_engine.optimizer)
        assert self._gathering is not None
        self._gathering.expire()
        return output

    def _gathers_with(self, partitioner: Partitioner, backbone: nn.Module, ahead: int) -> None:
        """Gather the parameters that `partitioner` made in place of DeepSpeed, `ahead` layers ahead of their use.

        Must be called before DeepSpeed's engine exists. Settings that the user has chosen stay.
        """
        self._partitioner, self._ahead = partitioner, ahead
        zero = self._deepspeed_config["zero_optimization"]
        zero |= {key: value for key, value in zero_settings(backbone).items() if key not in self._chosen}

    def _init_optimizers(self) -> tuple[Any, Any]:
        """The optimizer and the schedule of the module; InputError if the optimizer would step shards differently."""
        optimizer, schedule = super()._init_optimizers()
        check_elementwise(optimizer)
        if is_muon(type(optimizer)):  # it needs whole gradients
            self._deepspeed_config["zero_optimization"]["reduce_scatter"] = False
        return optimizer, schedule

    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        assert self._partitioner is not None
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            keep_optimizer(self.deepspeed_engine)
        take_over(self.deepspeed_engine)
        zero, reduction = self.deepspeed_engine.optimizer, None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING and LayerReduction.can_reduce(zero):
            reduction = LayerReduction(zero, self._partitioner.group)
        self._gathering = Gathering(
            self.deepspeed_engine.module, self._partitioner, ahead=self._ahead, reduction=reduction
        )
        self._gathering.install()

    @property
    def gathering(self) -> Gathering | None:
        """What gathers the parameters; None before the engine exists."""
        return self._gathering

    def teardown(self) -> None:
        if self._gathering is not None:
            self._gathering.remove()  # before the parent moves parameters to the CPU
            self._gathering = None
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
