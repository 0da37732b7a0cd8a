"""`PiSSAStrategy`: Lightning's DeepSpeed strategy whose weights come from the walk instead of ``zero.Init``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_dist.calibration.measure import Calibration, check_options
from lowrank_dist.calibration.walk import CalibrationPass
from lowrank_dist.checkpoints.resuming import check_settings, check_source, earlier_run
from lowrank_dist.checkpoints.writer import CheckpointWriter
from lowrank_dist.decomposition.report import InitializationReport
from lowrank_dist.decomposition.restore import check_digests
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import InputError, ModelError
from lowrank_dist.initialization.materialize import Materialized, materialize
from lowrank_dist.initialization.open import ModelRecipe, OpenedModel
from lowrank_dist.initialization.trainable import make_trainable
from lowrank_dist.layers.folded import FoldAdapters
from lowrank_dist.methods import Method
from lowrank_dist.model.skeleton import find_backbone, meta_parameters
from lowrank_dist.progress import progress_bar
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.nf4 import NF4, format_as_dict
from lowrank_dist.residual_model.fingerprint import source_fingerprint
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.source import WeightSource
from lowrank_dist.training.calibration_batches import calibration_batches, calibration_step
from lowrank_dist.training.checkpointing import CheckpointedStrategy
from lowrank_dist.zero3.partition import Partitioner, live_budget, to_device, use_cpu_accelerator

# precision: (dtype of frozen parameters and arithmetic, dtype of the trained factors)
PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "bf16-mixed": (torch.bfloat16, torch.float32),
}


class PiSSAStrategy(CheckpointedStrategy):
    """Train low-rank adapters over a frozen residual that is sharded with ZeRO-3.

    The LightningModule builds its model in ``configure_model`` with ``from_config``; the strategy makes that a
    skeleton without memory, puts PEFT's LoRA layers in, and fills it from the checkpoint: every rank reads its own
    rows, decomposes them together with the others and keeps them.

    Parameters
    ----------
    pretrained
        Checkpoint to start from: a directory with safetensors, or a hub id; or a source of weights that are no files
        (`lowrank_dist.storage.source.WeightSource`). It may be a residual model (from
        ``lowrank-dist decompose``, or one that the authors of PiSSA publish): then nothing is decomposed, and the
        three options below are what it says where they are left out.
    adapter
        PEFT's LoRA configuration (r, lora_alpha, target_modules, rank_pattern, use_rslora, ...). Or an adapter to go on
        from, a directory or a hub id: a LoRA for `pretrained`, which PEFT wrote or a checkpoint was converted to; of a
        residual model, an adapter that was trained on its residual.
    init
        How adapters and residual are made from the weights: ``PiSSA(...)``, ``LoRA()``, ``LoftQ(...)``, ...
    quantization
        ``NF4(...)`` for a 4-bit residual; None keeps it in the compute dtype.
    calibration
        How methods that look at data (``CorDA``, ``EVA``, ``LoRAGA``) see it; default ``Calibration()``: the first 8
        batches that each rank would train on.
    init_cache
        Directory, seen by all ranks, for residual models: the first run with the same weights and settings writes
        one there and starts from it, later runs start from it; a run that was killed goes on where it stopped. Of
        methods that look at data the batches are among the settings: each run reads them, the first looks at them.
    ranks_per_matrix
        So many ranks decompose each matrix together; it must divide their number. None: a cost model, measured at
        start, decides for every matrix (`lowrank_dist.decomposition.schedule`).
    revision
        Revision of a hub id.
    untie_embeddings
        Give a head that is tied to the input embedding a weight of its own, so that either can be a target. Both are
        read from the one tensor of the checkpoint, which then counts twice in ``init_report.bytes_read``.
    gradient_checkpointing
        Recompute activations layer by layer in backward.
    use_reentrant
        The reentrant flavour of gradient checkpointing.
    fp32_norms
        Keep the weights of normalisation layers in fp32 under bf16 precisions.
    live_layers
        Gathered weights may fill this many decoder layers ahead of their use: more overlaps communication with
        arithmetic, fewer save memory. Sets DeepSpeed's ``stage3_max_live_parameters`` and
        ``stage3_prefetch_bucket_size``, which count bytes of packed weights as elements.
    show_progress
        Show a progress bar while the weights are decomposed.
    shard_within
        Which ranks share the frozen parameters: all (``"world"``), or those of every node (``"node"``): each node then
        holds them once, takes so much more memory, and gathers them without a byte between nodes. Adapters, their
        gradients and optimizer state are shared by all ranks either way.
    fold_adapters
        Compute residual and adapter of a linear layer as one product, ``x (W + s B A)^T``: ``"always"``, ``"never"``
        or, where it was the faster when both were timed, ``"measured"`` (`lowrank_dist.layers.folded`). On CUDA a
        Triton kernel decodes and adds in one pass. The same to rounding; layers with dropout are left to PEFT.
    **deepspeed_options
        Anything `lightning.pytorch.strategies.DeepSpeedStrategy` takes (``offload_optimizer``, ``reduce_bucket_size``,
        ``timeout``, ``config``, ...), except ``stage``, which is 3.

    Attributes
    ----------
    init_report : InitializationReport or None
        What the walk measured, once the model is set up.

    Notes
    -----
    Precision: ``32-true`` computes in fp32; ``bf16-true`` holds everything in bf16, the optimizer fp32 masters of
    the factors; ``bf16-mixed`` keeps the factors in fp32 and computes under autocast. fp16 is refused: DeepSpeed does
    not train it on CPU, so that nothing here could be tested with it.
    """

    strategy_name = "pissa"

    #: LightningModules may ask: with this strategy, build the model from its configuration alone.
    materializes_weights = True

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | WeightSource,
        adapter: LoraConfig | str | Path | None = None,  # not os.PathLike, which jsonargparse makes of any dictionary
        init: Method | None = None,
        quantization: NF4 | None = None,
        *,
        calibration: Calibration | None = None,
        init_cache: str | os.PathLike[str] | None = None,
        ranks_per_matrix: int | None = None,
        revision: str | None = None,
        untie_embeddings: bool = False,
        gradient_checkpointing: bool = True,
        use_reentrant: bool = False,
        fp32_norms: bool = False,
        live_layers: int = 2,
        show_progress: bool = True,
        shard_within: Literal["world", "node"] = "world",
        fold_adapters: FoldAdapters = "never",
        **deepspeed_options: Any,
    ) -> None:
        known = inspect.signature(DeepSpeedStrategy.__init__).parameters
        for option in deepspeed_options:
            if option not in known or option == "stage":
                raise ValueError(
                    f"PiSSAStrategy: unknown option {option}={deepspeed_options[option]!r}; beside its own it takes "
                    f"those of DeepSpeedStrategy except stage: {', '.join(sorted(set(known) - {'self', 'stage'}))}"
                )
        if adapter is not None and not isinstance(adapter, LoraConfig | str | os.PathLike):
            raise ValueError(
                "PiSSAStrategy: adapter must be a peft.LoraConfig, or the directory or hub id of an adapter, not "
                f"{type(adapter).__name__}"
            )
        if live_layers < 0:
            raise ValueError(f"PiSSAStrategy: live_layers={live_layers} must not be negative")
        if fold_adapters not in get_args(FoldAdapters):
            raise ValueError(
                f"PiSSAStrategy: fold_adapters={fold_adapters!r} is none of {', '.join(get_args(FoldAdapters))}"
            )
        if shard_within not in ("world", "node"):
            raise ValueError(f"PiSSAStrategy: shard_within={shard_within!r} is neither 'world' nor 'node'")
        if shard_within == "node" and init is not None and init.statistic is not None:
            raise ValueError(
                f"PiSSAStrategy: shard_within='node' does not go with init={init}, whose calibration pass takes "
                "weights from the shards of all ranks; use shard_within='world'"
            )
        super().__init__(**deepspeed_options)
        self.weights = None if isinstance(pretrained, str | os.PathLike) else pretrained
        self.pretrained = os.fspath(pretrained) if isinstance(pretrained, str | os.PathLike) else pretrained.name
        if self.weights is not None and init_cache is not None:
            raise ValueError(
                f"PiSSAStrategy: init_cache={str(init_cache)!r} keeps residual models, which copy the configuration "
                f"and tokenizer beside the weights, and {self.pretrained} is a source of weights alone; leave it out"
            )
        self.adapter = adapter
        self.init, self.init_cache, self.ranks_per_matrix = init, init_cache, ranks_per_matrix
        self.quantization = quantization
        self.revision = revision
        self.untie_embeddings = untie_embeddings
        self.gradient_checkpointing, self.use_reentrant = gradient_checkpointing, use_reentrant
        self.fp32_norms = fp32_norms
        self.live_layers = live_layers
        self.show_progress = show_progress
        self.shard_within = shard_within
        self.fold_adapters = fold_adapters
        self.init_report: InitializationReport | None = None
        self._backbone: PreTrainedModel | None = None
        # ZeRO settings that the user has chosen are left alone; the command line passes all, mostly at their defaults.
        self._chosen = {key for key, value in deepspeed_options.items() if value != known[key].default}
        if deepspeed_options.get("config") is not None:
            self._chosen |= set(self._deepspeed_config.get("zero_optimization", {}))
        zero = self._deepspeed_config.setdefault("zero_optimization", {})
        if zero.setdefault("stage", 3) != 3:
            raise ValueError(
                f"PiSSAStrategy: the DeepSpeed config sets zero_optimization.stage={zero['stage']}; it must be 3"
            )
        # Adapters are small: an offloaded optimizer may be any, not only DeepSpeed's own CPU Adam.
        self._deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)
        if zero.get("offload_param", {}).get("device") == "nvme":
            raise ValueError(
                "PiSSAStrategy: parameters cannot be offloaded to 'nvme', only to 'cpu' (offload_parameters=True): "
                "partitions are written in place"
            )
        if init is not None and (self.weights is not None or not ResidualModel.is_at(Path(self.pretrained))):
            init.check(Dense(dtype=torch.float32) if quantization is None else quantization)
        self.calibration = calibration
        check_options(init, calibration, ranks_per_matrix=ranks_per_matrix)

    # -- Lightning's hooks, in the order in which they are called ---------------------------------------------------

    def setup_environment(self) -> None:
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:
            raise ValueError(
                f"PiSSAStrategy: precision={precision!r} is not supported; use one of {', '.join(PRECISIONS)}"
            )
        if isinstance(self.accelerator, CPUAccelerator):
            use_cpu_accelerator()
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's own refuses every accelerator but CUDA

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()  # the parent's, without its check of CUDA device indices
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed wants an index

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Parameters created inside have no memory: the walk brings them."""
        self._init_config_if_needed()
        with meta_parameters():
            yield

    def setup(self, trainer: Trainer) -> None:
        self._init_config_if_needed()
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._check_accumulation(trainer)
        # Unlike the parent, no precision_plugin.convert_module: parameters are made in their dtypes, and rotary
        # frequencies and other buffers must keep theirs.
        self._set_up_model(self.lightning_module)
        to_device(self.lightning_module, self.root_device)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.init_deepspeed()
        if trainer.state.fn == TrainerFn.FITTING:
            # rather than what DeepSpeed counts: every batch ends a step, except inside of `block_backward_sync`
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)
        self.barrier()

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False, unlike the parent's: Lightning decides which batches end a step.

        `block_backward_sync` tells DeepSpeed, whose own counter knows nothing of the ends of epochs.
        """
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around a batch that does not end a step: its gradients are kept, and the next ones added to them."""
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(False)
        try:
            yield
            engine.step()  # not the optimizer's: it counts the batch and stops DeepSpeed's timers
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
        """Backward through DeepSpeed's engine, the loss divided once by the batches that are accumulated.

        Lightning has divided it already where it optimizes by itself; DeepSpeed would do so again.
        """
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            kwargs.setdefault("scale_wrt_gas", False)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            # Set-up failed: moving a skeleton to the CPU would fail too, and hide why.
            self._lightning_module = None
        super().teardown()

    @staticmethod
    def _check_accumulation(trainer: Trainer) -> None:
        """Before weights are read; Lightning refuses it too, but when training starts."""
        for callback in trainer.callbacks if trainer.state.fn == TrainerFn.FITTING else []:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                raise InputError(
                    f"GradientAccumulationScheduler(scheduling={callback.scheduling}): all epochs must "
                    "accumulate as many batches, since checkpoints count steps with their number; leave the callback "
                    "out and pass Trainer(accumulate_grad_batches=N)"
                )

    def _auto_select_batch_size(self) -> int:
        """Examples of a training batch, by which DeepSpeed counts samples; 1 where nothing is trained or none is known.

        The parent asks for the training loader in every stage, but a data module needs one only to be fitted. It also
        takes for granted that a loader makes its own batches, of a fixed size.
        """
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        source = trainer.fit_loop._data_source
        if trainer.state.fn != TrainerFn.FITTING or not source.is_defined():
            return 1
        sampler = getattr(source.dataloader(), "batch_sampler", None)
        return getattr(sampler, "batch_size", None) or 1

    def _format_config(self) -> None:
        if self.precision_plugin.precision == "bf16-mixed":
            # The factors are fp32 parameters and autocast wraps the model: to DeepSpeed this is fp32 training.
            self._deepspeed_config.setdefault("bf16", {"enabled": False})
        super()._format_config()

    # -- the model ----------------------------------------------------------------------------------------------

    def _set_up_model(self, module: LightningModule) -> None:
        if self._is_set_up(module):
            return
        partitioner = Partitioner(self._deepspeed_config, replicas=self._replicas())
        group = partitioner.group
        opened = self._open(module, group)
        pretrained_fingerprint = source_fingerprint(opened.source.reader, group)
        if self._resumed is not None:
            check_source(self._resumed, pretrained_fingerprint)

        with ExitStack() as stack:
            show = self.show_progress and group.rank == 0
            bar = stack.enter_context(progress_bar(opened.source.reader.nbytes, show=show))
            calibrated = self._calibrated(opened, partitioner, bar.update, stack)
            pretrained = opened.source
            opened = opened.through_cache(
                group, self._factor_dtype, device=partitioner.device, advance=bar.update, calibrated=calibrated
            )
            source = opened.source
            bar.reset(source.reader.nbytes)
            result = self._fill(opened, partitioner, bar.update, calibrated)
        fingerprint = pretrained_fingerprint
        if source is not pretrained:
            fingerprint = source_fingerprint(source.reader, group)
        source.close()
        self._backbone, self.init_report = opened.backbone, result.report
        if opened.resume is not None:
            check_digests(result.report.matrices, opened.resume.reports)
        facts = {
            "pretrained": self._pretrained_path(),
            "pretrained_fingerprint": pretrained_fingerprint,
            "started_from": None if opened.start is None else str(self.adapter),
            "source": fingerprint,
            "method": source.method,
            "quantization": opened.quantization,
            "residual": format_as_dict(source.residual),
            "precision": self.precision_plugin.precision,
        }
        self._checkpoints_with(
            CheckpointWriter(
                opened.backbone,
                source.adapter,
                result,
                group,
                base=source.base,
                starts_at_zero=source.starts_at_zero,
                facts=facts,
            )
        )
        module.strict_loading = False  # checkpoints hold the trained parameters only
        self._make_trainable(opened.backbone)
        report = result.report
        rank_zero_info(
            f"{source.method}: {len(report.matrices)} matrices in {report.seconds:.1f} s, "
            f"{report.bytes_read / 2**20:.0f} MiB read by {group.size} ranks "
            f"({report.bytes_read / report.checkpoint_bytes:.2f} x the checkpoint)"
        )

    def _pretrained_path(self) -> str:
        """Directories as absolute paths, hub ids and names of sources as they are."""
        is_directory = self.weights is None and Path(self.pretrained).is_dir()
        return str(Path(self.pretrained).absolute()) if is_directory else self.pretrained

    def _is_set_up(self, module: LightningModule) -> bool:
        if self._backbone is None or not any(child is self._backbone for child in module.modules()):
            return False
        if module.trainer.state.fn == TrainerFn.FITTING:
            # An engine of DeepSpeed leaves hooks in the module that break the backward of the next.
            raise ModelError(
                "fit of a module that was fitted, validated or tested before: DeepSpeed cannot train it again; "
                "make a new module, strategy and Trainer (to validate first: num_sanity_val_steps=-1)"
            )
        self._load_parameters()  # of a checkpoint that the Trainer was given
        return True  # validate or test after something else

    def _open(self, module: LightningModule, group: ShardGroup) -> OpenedModel:
        """Everything that can be checked before weights are read, is. Collective."""
        recipe = ModelRecipe(
            pretrained=self.pretrained if self.weights is None else self.weights,
            adapter=self.adapter,
            init=self.init,
            quantization=self.quantization,
            cache=self.init_cache,
            revision=self.revision,
            untie_embeddings=self.untie_embeddings,
        )
        ranks_per_node = max(1, group.size // self.num_nodes)
        with group.shared_errors():
            earlier = None if self._resumed is None else earlier_run(self._resumed)
            if self.local_rank == 0:  # of a hub id, one rank of each host fetches what is missing
                recipe.directories()
        with group.shared_errors():
            _, backbone = find_backbone(module)
            if self.gradient_checkpointing and not backbone.supports_gradient_checkpointing:
                raise ModelError(
                    f"{type(backbone).__name__} does not support gradient checkpointing; pass "
                    "gradient_checkpointing=False"
                )
            opened = recipe.open(
                backbone,
                compute_dtype=self._compute_dtype,
                sharding=Sharding(ranks_per_matrix=self.ranks_per_matrix, ranks_per_node=ranks_per_node),
                announce=rank_zero_info,
                resume=earlier,
            )
            if self._resumed is not None:
                check_settings(self._resumed, method=opened.source.method, quantization=opened.quantization)
        opened.check_start(group)
        return opened

    def _fill(
        self,
        opened: OpenedModel,
        partitioner: Partitioner,
        advance: Callable[[int], object],
        calibrated: CalibrationPass | None,
    ) -> Materialized:
        """Make the parameters of the model, from its source and the adapter to start from. Collective."""
        backbone, plan, source, group = opened.backbone, opened.plan, opened.source, partitioner.group
        if calibrated is not None and source.init is not None:
            result = calibrated.materialize()
        else:
            matrices = source.matrices(plan, group, self._factor_dtype, device=partitioner.device, advance=advance)
            if calibrated is not None and calibrated.ran:
                result = calibrated.fill(plan, source.reader, matrices)
            else:
                result = materialize(
                    backbone,
                    plan,
                    source.reader,
                    partitioner,
                    matrices,
                    residual=source.residual,
                    compute_dtype=self._compute_dtype,
                    factor_dtype=self._factor_dtype,
                    fp32_norms=self.fp32_norms,
                    layout=opened.layout,
                    advance=advance,
                )
        if opened.start is not None:
            if self._resumed is None:
                opened.start.load(backbone, group, result.initial)
            opened.start.close()
        return result

    def _make_trainable(self, backbone: PreTrainedModel) -> None:
        make_trainable(
            backbone,
            gradient_checkpointing=self.gradient_checkpointing,
            use_reentrant=self.use_reentrant,
            fold=self.fold_adapters,
            autocast=None if self._autocast is None else torch.autocast(self.root_device.type, dtype=self._autocast),
        )
        zero = self._deepspeed_config["zero_optimization"]
        zero |= {k: v for k, v in live_budget(backbone, self.live_layers).items() if k not in self._chosen}

    @property
    def _autocast(self) -> torch.dtype | None:
        return self._compute_dtype if self.precision_plugin.precision == "bf16-mixed" else None

    @property
    def _compute_dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision_plugin.precision][0]

    @property
    def _factor_dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision_plugin.precision][1]

    def _calibrated(
        self, opened: OpenedModel, partitioner: Partitioner, advance: Callable[[int], object], stack: ExitStack
    ) -> CalibrationPass | None:
        """The calibration pass, where one is due; `stack` leaves the training data and random states as they were."""
        source, module, calibration = opened.source, self.lightning_module, self.calibration or Calibration()
        if source.init is None or source.init.statistic is None:
            return None
        assert module is not None
        with partitioner.group.shared_errors():
            return CalibrationPass(
                opened.backbone,
                opened.plan,
                source.reader,
                partitioner,
                stack.enter_context(calibration_batches(module.trainer, calibration)),
                calibration=calibration,
                init=source.init,
                step=calibration_step(module, calibration, self._autocast),
                residual=source.residual,
                compute_dtype=self._compute_dtype,
                factor_dtype=self._factor_dtype,
                fp32_norms=self.fp32_norms,
                advance=advance,
            )

    def _replicas(self) -> int:
        """How many times the frozen parameters are held. Collective where more than once."""
        if self.shard_within == "world" or self.num_nodes == 1:
            return 1
        everyone = ShardGroup(device=self.root_device)
        with everyone.shared_errors():
            ranks_per_node = everyone.size // self.num_nodes
            if self.global_rank % ranks_per_node != self.local_rank:
                raise InputError(
                    f"shard_within='node': rank {self.global_rank} is number {self.local_rank} of its node, but with "
                    f"{ranks_per_node} consecutive ranks a node it would be {self.global_rank % ranks_per_node}; start "
                    "ranks node by node (srun --distribution=block)"
                )
        return self.num_nodes

    @property
    def _deepspeed_config(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config
