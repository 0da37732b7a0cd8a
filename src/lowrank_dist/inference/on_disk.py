"""What a user names for inference: a checkpoint, an adapter, a residual model or a pretrained model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from peft import PeftConfig
from transformers import GenerationConfig, PretrainedConfig

from lowrank_dist.adapters.source import copied_blocks, find_adapter
from lowrank_dist.checkpoints.layout import TrainingCheckpoint, newest_checkpoint
from lowrank_dist.checkpoints.recipe import recorded_recipe
from lowrank_dist.checkpoints.resuming import earlier_run, load_parameters
from lowrank_dist.decoding.open import open_reader
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError, InputError
from lowrank_dist.inference.sharded import ShardedCausalLM, check_virtual_tokens, context_of, generation_of
from lowrank_dist.initialization.build import build_model
from lowrank_dist.initialization.open import ModelRecipe
from lowrank_dist.initialization.trainable import Computation
from lowrank_dist.methods.frozen import Frozen
from lowrank_dist.model.skeleton import build_buffers_in, build_skeleton, read_config
from lowrank_dist.quantization.format import AS_STORED, ResidualFormat
from lowrank_dist.residual_model.fingerprint import source_fingerprint
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.dtypes import PRECISIONS
from lowrank_dist.storage.layout import ADAPTER_DIR, CONFIG, LORA_DIR, MANIFEST, manifest_for, read_manifest
from lowrank_dist.storage.original import Original
from lowrank_dist.storage.resolve import resolve_checkpoint
from lowrank_dist.zero3.gathering import Gathering
from lowrank_dist.zero3.partition import Partitioner, to_device, use_cpu_accelerator

Stage = Literal["base", "step0", "trained", "converted"]
"""Which model of a checkpoint: the original one, that of step 0, the trained one, or its LoRA on the original."""
STAGES: tuple[Stage, ...] = get_args(Stage)

_AHEAD = 1  # units that are gathered while another computes


class ModelOnDisk:
    """A model that inference can load; made without reading weights, on every rank by itself.

    Parameters
    ----------
    model
        Directory or hub id: of a checkpoint of this package, of an adapter that PEFT loads (``lora/`` of a checkpoint
        among them), of a residual model, or of a pretrained model.
    base
        Directory or hub id of the weights that the adapter is for. Default: what the checkpoint or the adapter names.
    revision
        Revision of a hub id: of `base`; without a `base`, of a `model` that is one; else of the weights that were
        recorded with the checkpoint or the adapter. Default: the recorded one for recorded weights.
    quantization
        Hold the linear layers in this format, as training with ``encode="all-linear"`` does. A checkpoint and a
        residual model say themselves how they are held.
    precision
        One of ``32-true``, ``bf16-true`` and ``bf16-mixed``. Default: that of the run; for other models ``bf16-true``
        on CUDA devices and ``32-true`` on CPUs.
    cache
        ``init_cache`` of the run that wrote a checkpoint.
    stage
        Which model of a checkpoint.

    Attributes
    ----------
    kind : str
        What `model` is, in words.
    recipe : ModelRecipe
        How it is built.
    directory : Path
        Its pretrained weights, with configuration and, mostly, tokenizer.
    config : PretrainedConfig
        Its configuration.

    Raises
    ------
    CheckpointError, ModelError, InputError
        If `model` is nothing of that or is damaged, or an option contradicts it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        base: str | None = None,
        revision: str | None = None,
        quantization: ResidualFormat | None = None,
        precision: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        stage: Stage = "trained",
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise InputError(f"precision={precision!r} is not known; valid choices: {', '.join(PRECISIONS)}")
        self.model, self.precision, self.stage, self._cache = os.fspath(model), precision, stage, cache
        self.checkpoint: TrainingCheckpoint | None = None
        self._fingerprint: str | None = None
        self._adapter: PeftConfig | None = None
        self._quantization = quantization
        path = Path(model)
        if _is_checkpoint(path):
            self._take_checkpoint(path, base, revision)
        else:
            self._take_other(path, base, revision)
        self.recipe: ModelRecipe
        pretrained, _ = self.recipe.directories()
        assert isinstance(pretrained, Path)
        self.directory = pretrained if pretrained.is_dir() else pretrained.parent
        self.config: PretrainedConfig = read_config(pretrained)
        self._weights = pretrained

    def _take_checkpoint(self, path: Path, base: str | None, revision: str | None) -> None:
        manifest = read_manifest(path)
        if self.precision is None and manifest.get("precision") in PRECISIONS:
            self.precision = manifest["precision"]
        if self.stage in ("base", "converted"):
            # the original model; a run from a residual model knows the one that it was made from
            name, revision = self._chosen(Original.recorded(manifest), base, revision)
            if ResidualModel.is_at(resolve_checkpoint(name, revision=revision)):
                self._refuse(
                    f"the run began from the residual model {name}, and the original one is not recorded; name it "
                    "(--base)"
                )
            if self.stage == "base":
                self._fingerprint = _recorded_fingerprint(path)
                self.kind, self.recipe = "the original model", self._bare(name, revision)
                return
            if not (path / LORA_DIR).is_dir():
                self._refuse(f"it has no {LORA_DIR}/, so that there is no LoRA on the original model to score")
            self._take_adapter(path / LORA_DIR, name, revision)
            return
        if self._quantization:
            self._refuse("a checkpoint says itself how its base is held; leave --quantization out")
        self.checkpoint = TrainingCheckpoint(path)
        self.recipe = recorded_recipe(self.checkpoint, pretrained=base, revision=revision, cache=self._cache)
        self._adapter = self.recipe.adapter if isinstance(self.recipe.adapter, PeftConfig) else None
        residual = manifest.get("quantization")
        held = "dense" if residual is None else residual if residual.startswith(AS_STORED) else f"in {residual}"
        at = "as initialised" if self.stage == "step0" else f"trained for {manifest['step']} steps"
        self.kind = f"checkpoint, {manifest['method']} {at}, its frozen base {held}"

    def _take_other(self, path: Path, base: str | None, revision: str | None) -> None:
        if self.stage != "trained":
            self._refuse(f"only a checkpoint of a run has a {self.stage} model")
        if self._cache is not None:
            self._refuse("only the run of a checkpoint has an init_cache; leave it out")
        if path.is_dir() and not any((path / name).exists() for name in ("config.json", CONFIG)):
            newest = newest_checkpoint(path)
            if newest is not None:
                self._refuse(f"holds checkpoints; pass one of them, such as the newest, {newest}")
        if (path / CONFIG).is_file():
            self._take_adapter(path, base, revision)
            return
        of_model, of_base = (revision, None) if base is None else (None, revision)
        directory = resolve_checkpoint(self.model, revision=of_model, option="model")
        if ResidualModel.is_at(directory):
            if self._quantization:
                self._refuse("a residual model says itself how its base is held; leave --quantization out")
            if base is not None:
                self._refuse("a residual model is its own base; leave --base out")
            self.recipe = ModelRecipe(pretrained=self.model, revision=of_model)
            self.kind = "residual model with its initial adapter"
        elif directory.is_dir() and (directory / CONFIG).is_file():
            self._take_adapter(directory, base, of_base)
        elif base is not None:
            self._refuse(f"holds no adapter for {base}; pass an adapter or a checkpoint, or leave --base out")
        else:
            self.kind, self.recipe = "pretrained model, without an adapter", self._bare(self.model, of_model)

    def _take_adapter(self, directory: Path, base: str | None, revision: str | None) -> None:
        adapter = find_adapter(directory, any_type=True)
        self._adapter = adapter.config
        adapter.close()
        name, revision = self._chosen(adapter.original, base, revision)
        held = "" if self._quantization is None else f", in {self._quantization}"
        self.kind = f"adapter ({_type(self._adapter)}) on {name}{held}"
        self._fingerprint = _recorded_fingerprint(directory)
        self.recipe = ModelRecipe(
            pretrained=name,
            adapter=str(directory),
            quantization=self._quantization,
            encode="all-linear" if self._quantization else None,
            revision=revision,
        )

    def _chosen(self, original: Original | None, base: str | None, revision: str | None) -> tuple[str, str | None]:
        """Name and revision of the weights that an adapter is put on."""
        if base is not None:
            return base, revision
        if original is None:
            self._refuse("does not name its base model; name it (--base)")
        return original.chosen(revision)

    def _bare(self, pretrained: str, revision: str | None) -> ModelRecipe:
        return ModelRecipe(
            pretrained=pretrained,
            init=Frozen(adapter="no adapter"),
            quantization=self._quantization,
            encode="all-linear" if self._quantization else None,
            revision=revision,
        )

    def _refuse(self, why: str) -> NoReturn:
        raise InputError(f"{self.model}: {why}")

    def precision_on(self, device: torch.device) -> str:
        """The precision in which it computes on `device`."""
        return self.precision or ("bf16-true" if device.type == "cuda" else "32-true")

    @property
    def context(self) -> int | None:
        """The most tokens of a text; None if the configuration does not say."""
        return context_of(self.config)

    @property
    def rows(self) -> int | None:
        """Rows of the input embedding; None if the configuration does not say."""
        found: int | None = getattr(self.config.get_text_config(), "vocab_size", None)
        return found

    def generation(self) -> GenerationConfig:
        """The generation settings of the pretrained model."""
        return generation_of(self.directory, self.config)

    @contextmanager
    def loaded(
        self,
        group: ShardGroup,
        *,
        ranks_per_node: int = 1,
        first_on_host: bool = True,
        announce: Callable[[str], object] = lambda _: None,
        show_progress: bool = False,
    ) -> Iterator[ShardedCausalLM]:
        """The model, in evaluation mode, sharded over the ranks of `group`. Collective.

        The default process group must exist, and ``LOCAL_RANK`` with it: DeepSpeed's parameters need them.

        Parameters
        ----------
        group
            All ranks, on the device that they compute on.
        ranks_per_node, first_on_host
            How ranks stand on hosts.
        announce
            Called on rank 0 with lines about the progress.
        show_progress
            Show a progress bar on rank 0.

        Raises
        ------
        CheckpointError, ModelError, InputError
            On every rank: if hashes differ, the adapter is for other weights, or the model cannot be built.
        """
        device = group.device
        if device.type == "cpu":
            use_cpu_accelerator()
        resume = None
        if self.checkpoint is not None:
            self.checkpoint.verify(group)
            resume = earlier_run(self.checkpoint)
        self._check_base(group)
        check_virtual_tokens(self._adapter, group.size)
        name = self.precision_on(device)
        compute_dtype, factor_dtype = PRECISIONS[name]
        with group.shared_errors():
            backbone = build_skeleton(self._weights, self.config)
            build_buffers_in(backbone, factor_dtype)  # as in training
            if not backbone.can_generate():
                self._refuse(f"a {type(backbone).__name__} does not generate text; only causal language models do")
        partitioner = Partitioner({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
        built = build_model(
            self.recipe,
            backbone,
            partitioner,
            compute_dtype=compute_dtype,
            factor_dtype=factor_dtype,
            calibrate=_no_calibration,
            fp32_norms=self.checkpoint is not None and bool(self.checkpoint.manifest.record("recipe")["fp32_norms"]),
            computation=Computation(autocast=compute_dtype if name == "bf16-mixed" else None, backward=False),
            sharding=Sharding(ranks_per_node=ranks_per_node),
            resume=resume,
            first_on_host=first_on_host,
            announce=announce,
            show_progress=show_progress,
        )
        if self.checkpoint is not None and self.stage == "trained":
            trained = {key: value for key, value in built.root.named_parameters() if value.requires_grad}
            load_parameters(self.checkpoint, trained, built.files, group)
        to_device(built.root, device)
        gathering = Gathering(built.root, partitioner, ahead=_AHEAD)
        gathering.install()
        backbone.generation_config = self.generation()
        model = ShardedCausalLM(backbone, built.root, group, gathering, name=str(self.directory))
        try:
            with model.evaluating():
                yield model
        finally:
            gathering.remove()

    def _check_base(self, group: ShardGroup) -> None:
        """Raise CheckpointError, on every rank, if an adapter was trained from other weights. Collective."""
        if self._fingerprint is None:
            return
        with group.shared_errors():
            reader = open_reader(self._weights)
        found = source_fingerprint(reader, group)
        reader.close()
        if found != self._fingerprint:
            raise CheckpointError(
                f"{self.recipe.adapter or self.model}: it was trained from other weights than those of {self._weights} "
                f"(fingerprint {self._fingerprint[:12]}, here {found[:12]}); pass the ones that it is for (--base)"
            )

    def close(self) -> None:
        """Close the files of the checkpoint."""
        if self.checkpoint is not None:
            self.checkpoint.close()


def _is_checkpoint(path: Path) -> bool:
    return (path / ADAPTER_DIR).is_dir() and (path / MANIFEST).is_file() and read_manifest(path)["kind"] == "checkpoint"


def _recorded_fingerprint(directory: Path) -> str | None:
    """Fingerprint of the original weights that an adapter is for, if it was recorded."""
    manifest = manifest_for(directory)
    original = None if manifest is None else Original.recorded(manifest)
    if manifest is None or original is None or manifest.text("pretrained", None) != original.location:
        return None  # unknown, or that of a residual model
    if copied_blocks(manifest) is not None:
        return None  # that of the copied layers too
    return manifest.text("pretrained_fingerprint", None)


def _type(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _no_calibration(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("decompositions of a run are restored, not made again")
