"""`PiSSAStrategy`: a DeepSpeed strategy for Lightning that takes its weights from the walk, not from ``zero.Init``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from peft import PeftConfig

from lowrank_dist.calibration.measure import Calibration, check_options
from lowrank_dist.forecast.job import ShardWithin
from lowrank_dist.initialization.open import Encode
from lowrank_dist.initialization.stored import check_options as check_stored
from lowrank_dist.layers.adapted import FoldAdapters
from lowrank_dist.methods import LoRA, Method
from lowrank_dist.model.expansion import check_blocks
from lowrank_dist.model.skeleton import meta_parameters
from lowrank_dist.quantization.blocks import BlockFormat
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.quantization.format import AS_STORED, AsStoredOption
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.dtypes import PRECISIONS
from lowrank_dist.storage.source import WeightSource
from lowrank_dist.training.model_strategy import ModelStrategy
from lowrank_dist.tuners.support import is_for_peft, objection
from lowrank_dist.zero3.partition import to_device


class PiSSAStrategy(ModelStrategy):
    """Train low-rank adapters over a frozen residual that is sharded with ZeRO-3.

    The LightningModule builds its model in ``configure_model`` with ``from_config``. The strategy turns it into a
    skeleton without memory, injects PEFT's LoRA layers, and fills it with the pretrained weights: every rank reads its
    own rows, decomposes them together with the other ranks and keeps them.

    Parameters
    ----------
    pretrained
        Pretrained model to start from: a directory with safetensors, a hub id, or a weight source
        (`lowrank_dist.storage.source.WeightSource`), whose weights are not stored in files. It may be a residual model
        (from ``lowrank-dist decompose``, or one that the authors of PiSSA publish): then nothing is decomposed, and the
        residual model provides the next three options if they are left out.
    adapter
        PEFT's LoRA configuration (r, lora_alpha, target_modules, rank_pattern, use_rslora, ...). Or an existing adapter
        to start from, a directory or a hub id: a LoRA for `pretrained`, written by PEFT or converted from a checkpoint;
        for a residual model, an adapter that was trained on its residual.
    init
        Method that makes adapters and residual from the weights: ``PiSSA(...)``, ``LoRA()``, ``LoftQ(...)``, ...
    quantization
        Format of the residual: ``NF4(...)``, ``FP4(...)`` or ``MXFP4()`` (4 bits), ``INT8(...)`` or ``FP8(...)``
        (8 bits); None keeps it in the compute dtype. ``"as stored"`` keeps the bytes of a checkpoint in FP8, INT8 or
        MXFP4, and encodes what `init` leaves of a matrix again in the format of the same kind.
    encode
        Linear layers in the format of `quantization`: all but the output embedding (``"all-linear"``), or the adapted
        ones (``"adapted"``). Default: the adapted ones with a LoRA, whose residuals are made with it, else all.
    train_also
        Shell patterns for names of parameters of the model itself that are trained as well, whole, as its checkpoint
        holds them: ``["*norm*", "*.bias", "model.embed_tokens.weight"]``. They are saved with the adapter, and stock
        PEFT loads them with it.
    calibration
        Data for methods that look at data (``CorDA``, ``EVA``, ``LoRAGA``, ``LoRAOne``, ``QERA``); default
        ``Calibration()``: the first 8 batches that each rank would train on.
    init_cache
        Directory, visible to all ranks, for residual models: the first run with the same weights and settings writes
        one there, and this and later runs start from it. If a run was killed, the next one continues where it stopped.
        For methods that look at data, the batches are among the settings: every run reads them, but only the first one
        runs the calibration pass over them.
    ranks_per_matrix
        Number of ranks that decompose each matrix together; it must divide the number of ranks. None: a cost model,
        measured at start, decides for every matrix (`lowrank_dist.decomposition.schedule`).
    revision
        Revision of the hub id `pretrained`: of its weights, and of the configuration and tokenizer that
        `CausalLMModule` and `SFTDataModule` read by the same id. Checkpoints record the commit.
    adapter_revision
        Likewise of the hub id `adapter`.
    untie_embeddings
        Give a head that is tied to the input embedding its own weight, so that either can be a target. Both are read
        from the same pretrained tensor, which then counts twice in ``init_report.bytes_read``.
    expand_blocks
        Train copies of decoder layers, whole, instead of an adapter (LLaMA Pro, arXiv:2401.02415): the number of
        copies, spread evenly, or a list of the layers that a copy follows. Attention and feed-forward outputs of a copy
        start at zero, so that step 0 is the pretrained model. The other layers are frozen, and with `quantization`
        encoded. Needs no `adapter`; ``lowrank-dist merge`` writes the expanded model.
    gradient_checkpointing
        Recompute activations layer by layer in backward. None: where the model offers it, and one line says so where it
        does not.
    use_reentrant
        Use the reentrant variant of gradient checkpointing.
    keep_decoded
        Keep the weights that are decoded in a layer's recomputation until its backward, so that they are decoded twice
        a step instead of three times. This takes the memory of one dense decoder layer. It has no effect without
        gradient checkpointing or on a residual in the compute dtype.
    fp32_norms
        Keep the weights of normalisation layers in fp32 under bf16 precisions.
    live_layers
        Number of decoder layers whose weights are gathered ahead of their use: more overlap communication with
        arithmetic, fewer save memory.
    show_progress
        Show a progress bar while the weights are decomposed.
    shard_within
        Ranks that hold the frozen parameters once between them: all (``"world"``), those of one node (``"node"``), or
        each for itself (``"rank"``). A smaller group takes more memory and communicates less: with ``"node"`` nothing
        frozen crosses nodes, with ``"rank"`` nothing frozen is gathered. ``"auto"`` takes the smallest group within
        which the run fits by the forecast of ``lowrank-dist plan``, with a tenth of the device's memory to spare, and
        says so in one line; it takes the world on CPUs, which share the memory of their host, and for methods that look
        at data. Adapters, their gradients and optimizer state are sharded over all ranks either way. With ``"rank"``,
        gathered adapters stay until the optimizer's step.
    fold_adapters
        Compute residual and adapter of a linear layer as one product, ``x (W + s B A)^T``: ``"always"``, ``"never"``,
        or ``"measured"``: only where it was faster when both were timed (`lowrank_dist.layers.adapted`). On CUDA, a
        Triton kernel decodes and adds in one pass. The results agree up to rounding; PEFT computes layers with dropout.
    compile_layers
        Backend of ``torch.compile`` for the decoder layers: ``"inductor"`` fuses their operators and launches them with
        less work of the host; None compiles nothing. Layers are gathered, checkpointed and reduced outside of what is
        compiled, and layers of one type share it. It is compiled in the first step, which takes up to a minute, and
        once more when the number of tokens changes. The results agree up to rounding; dropout draws other numbers. It
        implies `keep_decoded` and therefore needs gradient checkpointing, without which decoded weights of the whole
        model would be kept. Layers that cannot be traced run as they are (stacked experts).
    experts_at_a_time
        Number of adapted experts of a stack (``target_parameters``) that are decoded together: fewer take less memory,
        more take fewer operators. Only experts that have tokens are decoded. None: as many as take 512 MiB, at least
        one; a line says how many. The results agree up to rounding.
    end_within
        Seconds within which all ranks end once one has ended, whatever ended it and whatever the others wait for: they
        notice at once, and have a third of this to end by themselves. Errors, signals and lost processes are alike.
    **deepspeed_options
        All options of `lightning.pytorch.strategies.DeepSpeedStrategy` (``offload_optimizer``, ``reduce_bucket_size``,
        ``timeout``, ``config``, ...), except ``stage``, which is 3.

    Attributes
    ----------
    init_report : InitializationReport or None
        Measurements of the walk; None until the model is set up.

    Raises
    ------
    ValueError
        If options are unknown, out of range or incompatible. At set-up, if the precision is not supported.

    See Also
    --------
    lowrank_dist.CausalLMModule : A LightningModule for this strategy.
    lowrank_dist.AdapterCheckpoint : Saves adapters while training runs.
    lowrank_dist.convert_checkpoint : Converts a checkpoint to a LoRA for the original model.

    Notes
    -----
    Precision: ``32-true`` computes in fp32. ``bf16-true`` holds everything in bf16, and the optimizer keeps fp32 master
    copies of the factors. ``bf16-mixed`` keeps the factors in fp32 and computes under autocast. fp16 is refused:
    DeepSpeed does not train it on CPU, so it could not be tested here.

    Examples
    --------
    QPiSSA of rank 16 for a model on the hub:

    >>> from peft import LoraConfig
    >>> from lowrank_dist import NF4, PiSSA, PiSSAStrategy
    >>> adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    >>> strategy = PiSSAStrategy(
    ...     "meta-llama/Meta-Llama-3-8B", adapter, PiSSA(quantization_iterations=5), NF4(double_quant=True)
    ... )
    >>> strategy.init_report is None
    True

    Pass it to ``Trainer(strategy=strategy, precision="bf16-true")``; ``trainer.fit`` reads the weights.
    """

    strategy_name = "pissa"

    #: Tells LightningModules to build the model from its configuration alone, without weights.
    materializes_weights = True

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | WeightSource,
        adapter: PeftConfig | str | Path | None = None,  # not os.PathLike, which jsonargparse makes of any dictionary
        init: Method | None = None,
        quantization: BlockFormat | AsStoredOption | None = None,
        *,
        encode: Encode | None = None,
        train_also: Sequence[str] = (),
        calibration: Calibration | None = None,
        init_cache: str | os.PathLike[str] | None = None,
        ranks_per_matrix: int | None = None,
        revision: str | None = None,
        adapter_revision: str | None = None,
        untie_embeddings: bool = False,
        expand_blocks: int | list[int] | None = None,
        gradient_checkpointing: bool | None = None,
        use_reentrant: bool = False,
        keep_decoded: bool = True,
        fp32_norms: bool = False,
        live_layers: int = 2,
        show_progress: bool = True,
        shard_within: ShardWithin | Literal["auto"] = "auto",
        fold_adapters: FoldAdapters = "never",
        compile_layers: str | None = None,
        experts_at_a_time: int | None = None,
        end_within: float = 30.0,
        **deepspeed_options: Any,
    ) -> None:
        if adapter is not None and not isinstance(adapter, PeftConfig | str | os.PathLike):
            raise ValueError(
                "PiSSAStrategy: adapter must be a configuration of PEFT (a LoraConfig, ...), or the directory or hub "
                "id of an adapter, not "
                f"{type(adapter).__name__}"
            )
        if live_layers < 0:
            raise ValueError(f"PiSSAStrategy: live_layers={live_layers} must not be negative")
        if experts_at_a_time is not None and experts_at_a_time < 1:
            raise ValueError(f"PiSSAStrategy: experts_at_a_time={experts_at_a_time} must be at least 1")
        if fold_adapters not in get_args(FoldAdapters):
            raise ValueError(
                f"PiSSAStrategy: fold_adapters={fold_adapters!r} is none of {', '.join(get_args(FoldAdapters))}"
            )
        if compile_layers is not None and gradient_checkpointing is False:
            raise ValueError(
                f"PiSSAStrategy: compile_layers={compile_layers!r} needs gradient_checkpointing=True: compiled layers "
                "would keep decoded weights of the whole model until their backward"
            )
        if compile_layers is not None and fold_adapters == "measured":
            raise ValueError(
                f"PiSSAStrategy: fold_adapters='measured' times layers as they run, which compile_layers="
                f"{compile_layers!r} does not allow; use 'never' or 'always'"
            )
        if shard_within not in ("auto", *get_args(ShardWithin)):
            raise ValueError(
                f"PiSSAStrategy: shard_within={shard_within!r} is none of auto, {', '.join(get_args(ShardWithin))}"
            )
        if shard_within in ("rank", "node") and init is not None and init.statistic is not None:
            raise ValueError(
                f"PiSSAStrategy: shard_within={shard_within!r} cannot be used with init={init}, whose calibration pass "
                "reads weights from the shards of all ranks; use shard_within='world'"
            )
        super().__init__(end_within=end_within, **deepspeed_options)
        self.weights = None if isinstance(pretrained, str | os.PathLike) else pretrained
        self.pretrained = os.fspath(pretrained) if isinstance(pretrained, str | os.PathLike) else pretrained.name
        if self.weights is not None and init_cache is not None:
            raise ValueError(
                f"PiSSAStrategy: init_cache={str(init_cache)!r} stores residual models, which copy the configuration "
                f"and tokenizer, but {self.pretrained} is a source of weights alone; leave init_cache out"
            )
        if isinstance(adapter, PeftConfig) and is_for_peft(adapter, init):
            reason = objection(adapter, gradient_checkpointing=gradient_checkpointing is not False)
            if reason is not None:
                raise ValueError(f"PiSSAStrategy: adapter is a {type(adapter).__name__}: {reason}")
        check_blocks(expand_blocks)
        for option, given in (("adapter", adapter), ("init", init), ("init_cache", init_cache)):
            if expand_blocks is not None and given is not None:
                raise ValueError(
                    f"PiSSAStrategy: expand_blocks={expand_blocks!r} trains copies of layers, whole, instead of an "
                    f"adapter; leave {option} out"
                )
        if encode not in (None, *get_args(Encode)):
            raise ValueError(f"PiSSAStrategy: encode={encode!r} is none of {', '.join(get_args(Encode))}")
        if isinstance(train_also, str):
            raise ValueError(f"PiSSAStrategy: train_also={train_also!r} must be a list of patterns")
        self.adapter, self.encode, self.train_also = adapter, encode, tuple(train_also)
        self.init, self.init_cache, self.ranks_per_matrix = init, init_cache, ranks_per_matrix
        self.quantization = quantization
        self.revision, self.adapter_revision = revision, adapter_revision
        self.untie_embeddings, self.expand_blocks = untie_embeddings, expand_blocks
        self.gradient_checkpointing, self.use_reentrant = gradient_checkpointing, use_reentrant
        self.keep_decoded = keep_decoded
        self.fp32_norms = fp32_norms
        self.live_layers = live_layers
        self.show_progress = show_progress
        self.shard_within = shard_within
        self.fold_adapters = fold_adapters
        self.compile_layers = compile_layers
        self.experts_at_a_time = experts_at_a_time
        if isinstance(quantization, str):
            if quantization != AS_STORED:
                raise ValueError(f"PiSSAStrategy: quantization={quantization!r} is neither a format nor {AS_STORED!r}")
            if compile_layers is not None:
                raise ValueError(
                    f"PiSSAStrategy: compile_layers={compile_layers!r} is not supported with quantization="
                    f"{AS_STORED!r}, whose decoding is no single operator; leave compile_layers out"
                )
            if not isinstance(adapter, PeftConfig) or not is_for_peft(adapter, init):
                check_stored(LoRA() if isinstance(adapter, str | os.PathLike) else init, init_cache)
        elif init is not None and (self.weights is not None or not ResidualModel.is_at(Path(self.pretrained))):
            init.check(quantization or Dense(dtype=torch.float32))
        self.calibration = calibration
        check_options(init, calibration, ranks_per_matrix=ranks_per_matrix)

    def revision_of(self, name: object) -> str | None:
        """The revision at which the hub id `name` is to be read: that of the weights if they have the same id."""
        return self.revision if str(name) == str(self.pretrained) else None

    # -- Lightning's hooks, in the order in which they are called ---------------------------------------------------

    def setup_environment(self) -> None:
        precision = self.precision_plugin.precision
        if precision not in PRECISIONS:
            raise ValueError(
                f"PiSSAStrategy: precision={precision!r} is not supported; use one of {', '.join(PRECISIONS)}"
            )
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Context in which parameters are created on meta; the walk fills them later."""
        self._init_config_if_needed()
        with meta_parameters():
            yield

    def setup(self, trainer: Trainer) -> None:
        self._init_config_if_needed()
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        # Unlike the parent, this does not call precision_plugin.convert_module: parameters are created in their dtypes,
        # and rotary frequencies and other buffers must keep theirs.
        self._set_up_model(self.lightning_module)
        to_device(self.lightning_module, self.root_device)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.init_deepspeed()
        if trainer.state.fn == TrainerFn.FITTING:
            # replaces DeepSpeed's own count: every batch ends a step, except inside `block_backward_sync`
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)
        self.barrier()

    def teardown(self) -> None:
        module = self.lightning_module
        if module is not None and any(parameter.is_meta for parameter in module.parameters()):
            # Set-up failed; moving a skeleton to the CPU would fail too and hide the cause.
            self._lightning_module = None
        super().teardown()

    def _format_config(self) -> None:
        if self.precision_plugin.precision == "bf16-mixed":
            # The factors are fp32 parameters and autocast wraps the model, so for DeepSpeed this is fp32 training.
            self._deepspeed_config.setdefault("bf16", {"enabled": False})
        if is_overridden("configure_gradient_clipping", self.lightning_module, LightningModule):
            self._deepspeed_config.setdefault("gradient_clipping", 0.0)  # the module clips
        if self.precision_plugin.precision == "bf16-true" and self._trainer.accumulate_grad_batches > 1:
            # sums of many batches lose as many bits as their number has
            self._deepspeed_config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        super()._format_config()
