"""The model of a strategy: built from pretrained weights, sharded, gathered for its steps, and saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from peft import AdaLoraConfig, PeftConfig
from torch import nn
from transformers import PreTrainedModel

from lowrank_dist.calibration.measure import Calibration
from lowrank_dist.checkpoints.resuming import earlier_run
from lowrank_dist.checkpoints.writer import CheckpointWriter
from lowrank_dist.cluster.watch import PeerWatch, end_with_launcher, mark_launcher
from lowrank_dist.decomposition.report import InitializationReport
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.distributed.group import ShardGroup, groups_with_timeout, ignore_renamed
from lowrank_dist.errors import CheckpointError, InputError, ModelError
from lowrank_dist.forecast.job import ShardWithin
from lowrank_dist.inference.sharded import ShardedCausalLM, generation_of
from lowrank_dist.initialization.build import build_model
from lowrank_dist.initialization.open import Encode, ModelRecipe, OpenedModel
from lowrank_dist.initialization.step_zero import StepZero
from lowrank_dist.initialization.trainable import Computation
from lowrank_dist.layers.adapted import FoldAdapters
from lowrank_dist.methods import Method
from lowrank_dist.model.skeleton import build_buffers_in, find_backbone
from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.quantization.format import AsStoredOption
from lowrank_dist.storage.dtypes import PRECISIONS
from lowrank_dist.storage.layout import LORA_DIR
from lowrank_dist.storage.source import WeightSource
from lowrank_dist.training.calibration_batches import calibration_pass
from lowrank_dist.training.checkpointing import CheckpointedStrategy
from lowrank_dist.training.packed_examples import PackedExamples
from lowrank_dist.training.same_inputs import SameInputs
from lowrank_dist.training.sharding import run_spec, smallest_group
from lowrank_dist.training.stopping import add_to
from lowrank_dist.tuners.adalora.schedule import objection_to_steps
from lowrank_dist.zero3.partition import Partitioner


class ModelStrategy(CheckpointedStrategy):
    """DeepSpeed at ZeRO stage 3 over a model that `build_model` fills.

    A subclass sets the options, which `lowrank_dist.PiSSAStrategy` describes, and calls `_set_up_model` before
    DeepSpeed's engine exists.

    Parameters
    ----------
    end_within
        Seconds within which all ranks end once one has failed or ended.
    **options
        Options of `CheckpointedStrategy`.

    Attributes
    ----------
    init_report : InitializationReport or None
        Measurements of the walk; None until the model is set up.
    """

    weights: WeightSource | None
    pretrained: str
    adapter: PeftConfig | str | Path | None
    init: Method | None
    quantization: BlockFormat | AsStoredOption | None
    encode: Encode | None
    train_also: tuple[str, ...]
    calibration: Calibration | None
    init_cache: str | os.PathLike[str] | None
    ranks_per_matrix: int | None
    revision: str | None
    adapter_revision: str | None
    untie_embeddings: bool
    expand_blocks: int | list[int] | None
    gradient_checkpointing: bool | None
    use_reentrant: bool
    keep_decoded: bool
    fp32_norms: bool
    live_layers: int
    show_progress: bool
    shard_within: ShardWithin | Literal["auto"]
    fold_adapters: FoldAdapters
    compile_layers: str | None
    experts_at_a_time: int | None

    def __init__(self, *, end_within: float = 30.0, **options: Any) -> None:
        super().__init__(**options)
        if end_within <= 0:
            raise ValueError(f"PiSSAStrategy: end_within={end_within} must be positive: it is a number of seconds")
        self.end_within = end_within
        self._watch: PeerWatch | None = None
        self.init_report: InitializationReport | None = None
        self._backbone: PreTrainedModel | None = None
        self._step_zero: StepZero | None = None
        self._root: nn.Module | None = None  # what computes: the backbone, or PEFT's model around it

    # -- all ranks end together -------------------------------------------------------------------------------------

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self._lightning_launches and self.local_rank == 0:
            mark_launcher()

    @property
    def _lightning_launches(self) -> bool:
        return isinstance(self.cluster_environment, LightningEnvironment)

    def setup_environment(self) -> None:
        """Meet the other ranks; from here until `teardown` each notices when another has ended."""
        ignore_renamed()
        if self._lightning_launches and self.local_rank > 0:
            end_with_launcher(armed=True)
        super().setup_environment()
        group = ShardGroup(device=self.root_device)
        # some of the time is for noticing, some for the rank that failed, whose error the others may have to end first
        self._watch = PeerWatch(group, within=self.end_within / 3)
        if self._lightning_launches and self.local_rank > 0:
            end_with_launcher(armed=False)
        assert self.lightning_module is not None
        add_to(self.lightning_module.trainer, failed=self._watch.failed)

    def init_deepspeed(self) -> None:
        with groups_with_timeout(self._timeout):
            super().init_deepspeed()

    def teardown(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        super().teardown()

    # -- the model ----------------------------------------------------------------------------------------------------

    def _set_up_model(self, module: LightningModule) -> None:
        if self._is_set_up(module):
            return
        precision = self.precision_plugin.precision
        compute_dtype, factor_dtype = PRECISIONS[precision]
        autocast = compute_dtype if precision == "bf16-mixed" else None
        with groups_with_timeout(self._timeout):
            partitioner = Partitioner(self._deepspeed_config)
        group = partitioner.group
        steps = self._steps_of_schedule(module)
        with group.shared_errors():
            self._check_schedule(steps)
            resume = None if self._resumed is None else earlier_run(self._resumed)
            name, backbone = find_backbone(module)
            checkpointing = self._recomputes(backbone)
            build_buffers_in(backbone, factor_dtype)  # stock's dtype too: under autocast its model is in fp32
        keeps_step_zero = bool(getattr(module, "keeps_step_zero", False))
        built = build_model(
            self.recipe,
            backbone,
            partitioner,
            compute_dtype=compute_dtype,
            factor_dtype=factor_dtype,
            fp32_norms=self.fp32_norms,
            computation=Computation(
                gradient_checkpointing=checkpointing,
                use_reentrant=self.use_reentrant,
                keep_decoded=self.keep_decoded,
                fold_adapters=self.fold_adapters,
                compile_layers=self.compile_layers,
                experts_at_a_time=self.experts_at_a_time,
                autocast=autocast,
            ),
            copies=partial(self._copies_of_frozen, gradient_checkpointing=checkpointing),
            sharding=Sharding(
                ranks_per_matrix=self.ranks_per_matrix, ranks_per_node=max(1, group.size // self.num_nodes)
            ),
            calibrate=partial(
                calibration_pass, module=module, calibration=self.calibration or Calibration(), autocast=autocast
            ),
            resume=resume,
            restart=keeps_step_zero,
            first_on_host=self.local_rank == 0,
            announce=rank_zero_info,
            show_progress=self.show_progress,
        )
        self._backbone, self._root, self.init_report = backbone, built.root, built.report
        if built.root is not backbone:
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, built.root)
        facts = built.facts | {"precision": precision}
        if keeps_step_zero:  # before the parameters of a resumed run are loaded
            self._step_zero = StepZero(dict(built.root.named_parameters()))
            facts["step_zero"] = self._step_zero.digest(group)
            with group.shared_errors():
                self._check_step_zero(facts["step_zero"], module)
        self._checkpoints_with(
            CheckpointWriter(
                built.root,
                built.source.adapter,
                built.materialized,
                group,
                original=built.original,
                starts_at_zero=built.source.starts_at_zero,
                facts=facts,
                files=built.files,
                derived=built.derived,
                allocation=built.allocation,
            )
        )
        if any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for m in backbone.modules()):
            rank_zero_warn(
                f"{type(backbone).__name__} has batch normalisation, whose running statistics move in training, "
                "differently on every rank, and are in no adapter file; put these layers into evaluation mode in "
                "on_train_epoch_start"
            )
        PackedExamples(backbone, group)
        SameInputs(backbone, group)
        if group.size > 1 and hasattr(backbone, "generate"):
            # ranks that have answered go on until all have, as under the ZeRO-3 that transformers itself sets up
            backbone.generate = partial(backbone.generate, synced_gpus=True)
        module.strict_loading = False  # checkpoints hold the trained parameters only
        self._gathers_with(partitioner, built.root, self.live_layers)

    def _check_step_zero(self, digest: str, module: LightningModule) -> None:
        """Raise CheckpointError if the resumed run did not begin with these values, or kept none."""
        if self._resumed is None:
            return
        before = self._resumed.manifest.get("step_zero")
        if before is None:
            raise CheckpointError(
                f"{self._resumed.directory} is of a run without a reference, but {type(module).__name__} compares the "
                "model with itself at step 0 of its own run; to go on from what that run has learned, begin a new run: "
                f"adapter={str(self._resumed.directory / LORA_DIR)!r} on the original model, or merge it first "
                "(lowrank-dist merge)"
            )
        if before != digest:
            raise CheckpointError(
                f"{self._resumed.directory}: the values from which this run began (digest {before}) cannot be had "
                f"again (now {digest}); resume with the adapter, the model and the options of the run that wrote it"
            )

    @contextmanager
    def at_step_zero(self) -> Iterator[None]:
        """Inside, the model computes with the trained parameters from which the run began, also in a resumed run.

        For forwards without gradient, before the forward of the step that is trained on. Layers are gathered anew
        inside and afterwards.

        Raises
        ------
        InputError
            If the module has no true attribute ``keeps_step_zero``, without which they are not kept.
        """
        if self._step_zero is None or self.gathering is None:
            raise InputError(
                "at_step_zero: the initial values of the trained parameters are not kept; set keeps_step_zero = True "
                "in the LightningModule, before fit"
            )
        try:
            with self._step_zero.in_place():
                self.gathering.forget()
                yield
        finally:  # also what is being gathered ahead: it has the values of the reference
            self.gathering.forget()

    def inference_model(self) -> ShardedCausalLM:
        """The model for inference, as it is trained; to be used within its `evaluating`, while the engine exists.

        It answers with the generation settings of the pretrained model.

        Raises
        ------
        InputError
            Before the engine exists, or if the model does not generate text.
        """
        backbone = self._backbone
        if backbone is None or self._root is None or self.gathering is None:
            raise InputError("PiSSAStrategy.inference_model: the model is set up by fit, validate or test, and not yet")
        if not backbone.can_generate():
            raise InputError(f"a {type(backbone).__name__} does not generate text; only causal language models do")
        directory, _ = self.recipe.directories()
        if isinstance(directory, Path):
            directory = directory if directory.is_dir() else directory.parent
            backbone.generation_config = generation_of(directory, backbone.config)
        return ShardedCausalLM(backbone, self._root, self._group, self.gathering, name=self.recipe.name)

    def _steps_of_schedule(self, module: LightningModule) -> float | None:
        """Number of optimizer steps of the run if the adapter has a schedule; None otherwise. Lightning's collectives.

        Lightning sets up the training data for it, unless only `max_steps` bounds the run.
        """
        if not isinstance(self.adapter, AdaLoraConfig) or module.trainer.state.fn != TrainerFn.FITTING:
            return None
        return module.trainer.estimated_stepping_batches

    def _check_schedule(self, steps: float | None) -> None:
        if steps is None:
            return
        assert isinstance(self.adapter, AdaLoraConfig)
        reason = objection_to_steps(self.adapter, steps)
        if reason is not None:
            raise InputError(reason)

    def _recomputes(self, backbone: PreTrainedModel) -> bool:
        """Whether activations are recomputed: as asked for, or else if `backbone` can."""
        if self.gradient_checkpointing is not None or backbone.supports_gradient_checkpointing:
            return self.gradient_checkpointing is not False
        if self.compile_layers is not None:
            raise ModelError(
                f"{type(backbone).__name__} does not support gradient checkpointing, which compile_layers="
                f"{self.compile_layers!r} needs; leave compile_layers out"
            )
        rank_zero_info(f"{type(backbone).__name__} does not support gradient checkpointing: all activations are kept")
        return False

    def _copies_of_frozen(self, opened: OpenedModel, gradient_checkpointing: bool) -> int:
        """Number of copies of the frozen parameters. Collective, unless ``"rank"`` or ``"world"`` was chosen."""
        within = self.shard_within
        if within == "auto":
            compute_dtype, factor_dtype = PRECISIONS[self.precision_plugin.precision]
            run = partial(
                run_spec,
                self,
                compute_dtype=compute_dtype,
                factor_dtype=factor_dtype,
                gradient_checkpointing=gradient_checkpointing,
                keep_decoded=self.keep_decoded or self.compile_layers is not None,
                live_layers=self.live_layers,
                fp32_norms=self.fp32_norms,
                experts_at_a_time=self.experts_at_a_time,
            )
            within = smallest_group(opened, run, self.root_device, announce=rank_zero_info)
        return self._copies(within)

    def _is_set_up(self, module: LightningModule) -> bool:
        if self._backbone is None or not any(child is self._backbone for child in module.modules()):
            return False
        if module.trainer.state.fn == TrainerFn.FITTING:
            # A DeepSpeed engine leaves hooks in the module that break the backward of the next engine.
            raise ModelError(
                "fit was called on a module that was fitted, validated or tested before; DeepSpeed cannot train it "
                "again; make a new module, strategy and Trainer (to validate first: num_sanity_val_steps=-1)"
            )
        self._load_parameters()  # from the checkpoint passed to the Trainer
        return True

    @property
    def recipe(self) -> ModelRecipe:
        """The options of this strategy that determine the model."""
        return ModelRecipe(
            pretrained=self.pretrained if self.weights is None else self.weights,
            adapter=self.adapter,
            init=self.init,
            quantization=self.quantization,
            encode=self.encode,
            train_also=self.train_also,
            cache=self.init_cache,
            revision=self.revision,
            adapter_revision=self.adapter_revision,
            untie_embeddings=self.untie_embeddings,
            expand_blocks=self.expand_blocks,
        )
