"""Private names of other libraries: each stands in ``docs/private-names.md``, and a canary says when one is gone.

A canary fails with the name and with what the table says to use instead. Where a name is of a class it is looked for
there; where it is of an object, one is made: a Trainer, a layer of PEFT, an engine of DeepSpeed on one rank.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import lowrank_dist
from helpers.ranks import run_ranks
from lowrank_dist.zero3.partition import use_cpu_accelerator

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "private-names.md"
LIBRARIES = ("bitsandbytes", "deepspeed", "lightning", "lm_eval", "peft", "submitit", "transformers")


class Row(NamedTuple):
    """One of the table."""

    library: str
    name: str
    used_in: tuple[str, ...]
    purpose: str
    instead: str


def rows() -> dict[tuple[str, str], Row]:
    """The table, by library and name."""
    found = {}
    library = ""
    for line in TABLE.read_text().splitlines():
        if line.startswith("## "):
            library = line.removeprefix("## ").lower()
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0].startswith("`"):
            name, used_in, purpose, instead = cells
            name = name.strip("`")
            assert (library, name) not in found, f"{TABLE.name} has {library}'s {name} twice"
            found[library, name] = Row(library, name, tuple(re.findall(r"`([^`]+)`", used_in)), purpose, instead)
    return found


# -- what the canaries look at ----------------------------------------------------------------------------------------


def at(path: str) -> Any:
    """The object at ``module:Class.attribute``; raises ImportError or AttributeError where it is gone."""
    module, _, inside = path.partition(":")
    return functools.reduce(getattr, filter(None, inside.split(".")), importlib.import_module(module))


def there(*paths: str) -> Callable[[], object]:
    """Looks for the objects at `paths`."""
    return lambda: [at(path) for path in paths]


def takes(path: str, *parameters: str) -> Callable[[], object]:
    """Looks for a function and for `parameters` in its signature."""

    def check() -> None:
        known = inspect.signature(at(path)).parameters
        missing = set(parameters) - set(known)
        if missing:
            raise AttributeError(f"{path} takes {', '.join(known)}, no {', '.join(sorted(missing))}")

    return check


def held_by(make: Callable[[], object], *attributes: str) -> Callable[[], object]:
    """Looks for (dotted) attributes of what `make` makes."""
    return lambda: [functools.reduce(getattr, attribute.split("."), make()) for attribute in attributes]


def exports_parameters_themselves() -> bool:
    """Whether PEFT's state of an adapter holds the objects that it was given."""
    model = at("peft:get_peft_model")(nn.Sequential(nn.Linear(4, 4)), at("peft:LoraConfig")(r=2, target_modules=["0"]))
    state = model.state_dict(keep_vars=True)
    found = at("peft:get_peft_model_state_dict")(model, state_dict=state, save_embedding_layers=False)
    held = {id(parameter) for parameter in model.parameters()}
    return len(found) == 2 and all(id(tensor) in held for tensor in found.values())


def check_that(condition: Callable[[], bool], otherwise: str) -> Callable[[], None]:
    """Looks whether a behaviour is what it was."""

    def check() -> None:
        if not condition():
            raise AttributeError(otherwise)

    return check


@functools.cache
def trainer() -> Any:
    from lightning.pytorch import Trainer

    return Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)


@functools.cache
def model_checkpoint() -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint()


@functools.cache
def deepspeed_strategy() -> Any:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return DeepSpeedStrategy(stage=3, exclude_frozen_parameters=True)


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Linear(4, 4), nn.Embedding(4, 4)
        self.stack = nn.Module()
        self.stack.weight = nn.Parameter(torch.zeros(2, 4, 4))


@functools.cache
def lora() -> Any:
    """A model with PEFT's layers, on meta."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["linear", "embedding"], target_parameters=["stack.weight"])
    return inject_adapter_in_model(config, Adapted(), low_cpu_mem_usage=True)


@functools.cache
def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, tie_word_embeddings=True, **sizes))


@functools.cache
def eight_bit() -> tuple[Any, dict[str, Any]]:
    """An 8-bit AdamW of bitsandbytes and the state that it makes of a parameter."""
    from bitsandbytes.optim import AdamW8bit

    parameter = nn.Parameter(torch.zeros(8192))
    optimizer = AdamW8bit([parameter])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    return optimizer, optimizer.state[parameter]


def local_executor(tmp_path: Path = Path("canary")) -> Any:
    import submitit

    return submitit.AutoExecutor(folder=tmp_path, cluster="local")


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return self.linear(x).sum()


def describe_engine() -> dict[str, set[str]]:
    """Names of attributes of DeepSpeed's objects, from ``zero.Init`` to an engine that has stepped."""
    import deepspeed

    use_cpu_accelerator()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    init = deepspeed.zero.Init(config_dict_or_path=config)
    with init:
        module = Held()
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(module.parameters()), config=config, dist_init_required=False
    )
    gradients, sums, micro_steps = engine.optimizer.grad_partitions_flat_buffer, [], []
    for last in (False, True):
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(engine(torch.ones(1, 8)))
        sums.append(gradients.clone())
        micro_steps.append(engine.optimizer.micro_step_id)
        engine.step()
    parameter = next(module.parameters())
    flat = engine.optimizer.fp32_partitioned_groups_flat
    behaves = set()
    if sum(p.ds_tensor.numel() for p in engine.optimizer.fp16_groups[0]) == flat[0].numel():
        behaves.add("flat tensors hold their groups end to end")
    if set(engine.optimizer.state) == set(flat):
        behaves.add("state is by flat tensor")
    if sums[0].any() and torch.equal(sums[1], 2 * sums[0]):
        behaves.add("gradients are summed in one flat tensor")
    if micro_steps == [0, 1]:
        behaves.add("the first gradients of a step overwrite")
    if len(engine.optimizer._grad_acc_hooks) == len(list(module.parameters())):
        behaves.add("parameters outside of leaf modules have hooks")
    (bucket,) = engine.optimizer.ipg_buckets.values()
    if len(bucket.buffer) == engine.optimizer.reduce_bucket_size:
        behaves.add("gradients are reduced in a bucket")
    return {
        "init": set(dir(init)),
        "parameter": set(dir(parameter)),
        "shard": set(dir(parameter.ds_tensor)),
        "engine": set(dir(engine)),
        "optimizer": set(dir(engine.optimizer)),
        "offload": set(dir(engine.optimizer.parameter_offload)),
        "module": set(dir(module)),
        "behaves": behaves,
    }


@pytest.fixture(scope="session")
def engine() -> dict[str, set[str]]:
    return run_ranks(1, describe_engine)[0]


def of_engine(what: str, *names: str) -> Callable[[dict[str, set[str]]], None]:
    """Looks for attributes of DeepSpeed's objects in `describe_engine`."""

    def check(found: dict[str, set[str]]) -> None:
        missing = set(names) - found[what]
        if missing:
            raise AttributeError(f"DeepSpeed's {what} has no {', '.join(sorted(missing))}")

    check.needs_engine = True  # type: ignore[attr-defined]
    return check


# -- the canaries -----------------------------------------------------------------------------------------------------

PARTITION = "deepspeed.runtime.zero.partition_parameters"
CHECKPOINT = "lightning.pytorch.callbacks.model_checkpoint:ModelCheckpoint"
STRATEGY = "lightning.pytorch.strategies.deepspeed:DeepSpeedStrategy"
LOADING = "transformers.core_model_loading"
TRANSFORMER = "transformers.modeling_utils:PreTrainedModel"
GEMMA = "transformers.models.gemma3.modeling_gemma3"
HFLM = "lm_eval.models.huggingface:HFLM"
SLURM = "submitit.slurm.slurm:SlurmExecutor"

#: By library and name in the table.
CANARIES: dict[tuple[str, str], Callable[..., object]] = {
    # zero.Init and parameters
    ("deepspeed", "Init._convert_to_deepspeed_param"): takes(f"{PARTITION}:Init._convert_to_deepspeed_param", "param"),
    ("deepspeed", "Init._enable_mem_efficient_linear"): there(f"{PARTITION}:Init._enable_mem_efficient_linear"),
    ("deepspeed", "Init._zero_init_param"): there(f"{PARTITION}:Init._zero_init_param"),
    ("deepspeed", "Init.mem_efficient_linear"): of_engine("init", "mem_efficient_linear"),
    ("deepspeed", "Init.local_device"): of_engine("init", "local_device"),
    ("deepspeed", "Init.remote_device"): of_engine("init", "remote_device"),
    ("deepspeed", "Init.pin_memory"): of_engine("init", "pin_memory"),
    ("deepspeed", "Init.get_dp_process_group"): of_engine("init", "get_dp_process_group"),
    ("deepspeed", "ds_id"): of_engine("parameter", "ds_id"),
    ("deepspeed", "ds_shape"): of_engine("parameter", "ds_shape"),
    ("deepspeed", "ds_numel"): of_engine("parameter", "ds_numel"),
    ("deepspeed", "ds_numel_aligned"): of_engine("parameter", "ds_numel_aligned"),
    ("deepspeed", "ds_status"): of_engine("parameter", "ds_status"),
    ("deepspeed", "ds_tensor"): of_engine("parameter", "ds_tensor"),
    ("deepspeed", "ds_tensor.status"): of_engine("shard", "status"),
    ("deepspeed", "ds_tensor.final_location"): of_engine("shard", "final_location"),
    ("deepspeed", "ds_zero_partition_process_group"): check_that(
        lambda: "ds_zero_partition_process_group" in inspect.getsource(at(PARTITION)),
        "zero.Init does not look for ds_zero_partition_process_group any more",
    ),
    ("deepspeed", "PartitionedParamStatus.AVAILABLE"): there(f"{PARTITION}:PartitionedParamStatus.AVAILABLE"),
    ("deepspeed", "ZeroParamStatus.NOT_AVAILABLE"): there(
        f"{PARTITION}:ZeroParamStatus.NOT_AVAILABLE", f"{PARTITION}:ZeroParamStatus.AVAILABLE"
    ),
    ("deepspeed", "CPU_Accelerator"): there("deepspeed.accelerator.cpu_accelerator:CPU_Accelerator"),
    ("deepspeed", "ops.__compatible_ops__"): check_that(
        lambda: "deepspeed_shm_comm" in at("deepspeed.ops:__compatible_ops__"),
        "deepspeed.ops.__compatible_ops__ does not list deepspeed_shm_comm",
    ),
    # the engine
    ("deepspeed", "optimizer.fp32_partitioned_groups_flat"): of_engine("behaves", "state is by flat tensor"),
    ("deepspeed", "optimizer.fp16_groups"): of_engine("behaves", "flat tensors hold their groups end to end"),
    ("deepspeed", "optimizer.sub_group_to_group_id"): of_engine("optimizer", "sub_group_to_group_id"),
    ("deepspeed", "optimizer.communication_data_type"): of_engine("optimizer", "communication_data_type"),
    ("deepspeed", "MuonWithAuxAdam"): check_that(
        lambda: (
            'getattr(param, "use_muon", False)' in inspect.getsource(at("deepspeed.runtime.zero.stage3"))
            and at("deepspeed.runtime.zero.muon.muon_optimizer:MuonWithAuxAdam")
        ),
        "DeepSpeed's engine does not know Muon's parameters by use_muon",
    ),
    ("deepspeed", "optimizer.swap_optimizer"): of_engine("optimizer", "swap_optimizer"),
    ("deepspeed", "optimizer.grad_partitions_flat_buffer"): of_engine(
        "behaves", "gradients are summed in one flat tensor"
    ),
    ("deepspeed", "optimizer._leaf_module_hooks"): of_engine("optimizer", "_leaf_module_hooks"),
    ("deepspeed", "optimizer._grad_acc_hooks"): of_engine("behaves", "parameters outside of leaf modules have hooks"),
    ("deepspeed", "optimizer.overlapping_partition_gradients_reduce_epilogue"): check_that(
        lambda: (
            "self.optimizer.overlapping_partition_gradients_reduce_epilogue()"
            in inspect.getsource(at("deepspeed.runtime.engine"))
        ),
        "DeepSpeed's engine does not call overlapping_partition_gradients_reduce_epilogue",
    ),
    ("deepspeed", "optimizer.averaged_gradients"): check_that(
        lambda: (
            "self.flatten(self.averaged_gradients[sub_group_id])"
            in inspect.getsource(at("deepspeed.runtime.zero.stage3"))
        ),
        "DeepSpeed's optimizer does not copy averaged_gradients",
    ),
    ("deepspeed", "optimizer.micro_step_id"): of_engine("behaves", "the first gradients of a step overwrite"),
    ("deepspeed", "optimizer.ipg_buckets"): of_engine("behaves", "gradients are reduced in a bucket"),
    ("deepspeed", "optimizer.reduce_bucket_size"): of_engine("optimizer", "reduce_bucket_size"),
    ("deepspeed", "optimizer.get_param_comm_dtype"): of_engine("optimizer", "get_param_comm_dtype"),
    ("deepspeed", "optimizer.reduce_scatter"): of_engine("optimizer", "reduce_scatter"),
    ("deepspeed", "optimizer.all2all_process_group"): of_engine("optimizer", "all2all_process_group"),
    ("deepspeed", "optimizer.offload_optimizer"): of_engine("optimizer", "offload_optimizer"),
    ("deepspeed", "optimizer.zenflow"): of_engine("optimizer", "zenflow"),
    ("deepspeed", "optimizer.optimizer"): of_engine("optimizer", "optimizer", "state", "param_groups"),
    ("deepspeed", "optimizer.parameter_offload"): of_engine("optimizer", "parameter_offload"),
    ("deepspeed", "parameter_offload._remove_module_hooks"): of_engine("offload", "_remove_module_hooks"),
    ("deepspeed", "parameter_offload.partition_all_parameters"): check_that(
        lambda: (
            "self.parameter_offload.partition_all_parameters()"
            in inspect.getsource(at("deepspeed.runtime.zero.stage3"))
        ),
        "DeepSpeed's optimizer does not call parameter_offload.partition_all_parameters",
    ),
    ("deepspeed", "engine.module_forward_pre_hook"): of_engine("engine", "module_forward_pre_hook"),
    ("deepspeed", "engine.module_forward_post_hook"): of_engine("engine", "module_forward_post_hook"),
    ("deepspeed", "engine._start_timers"): of_engine("engine", "_start_timers"),
    ("deepspeed", "engine._stop_timers"): of_engine("engine", "_stop_timers"),
    ("deepspeed", "engine.engine_timers"): of_engine("engine", "engine_timers"),
    # set where DeepSpeed replaces F.linear
    ("deepspeed", "InsertPostInitMethodToModuleSubClasses.linear_bk"): check_that(
        lambda: (
            "InsertPostInitMethodToModuleSubClasses.linear_bk = torch.nn.functional.linear"
            in inspect.getsource(at("deepspeed.runtime.zero.partition_parameters"))
        ),
        "DeepSpeed does not keep the F.linear that it replaces",
    ),
    ("deepspeed", "module._original_parameters"): of_engine("module", "_original_parameters"),
    ("deepspeed", "engine.basic_optimizer"): of_engine("engine", "basic_optimizer"),
    ("deepspeed", "engine.global_steps"): of_engine("engine", "global_steps"),
    ("deepspeed", "engine.global_samples"): of_engine("engine", "global_samples"),
    ("deepspeed", "engine.skipped_steps"): of_engine("engine", "skipped_steps"),
    # a decorator hides the signature
    ("deepspeed", "backward(scale_wrt_gas)"): check_that(
        lambda: "scale_wrt_gas=True" in inspect.getsource(at("deepspeed.runtime.engine")),
        "DeepSpeedEngine.backward takes no scale_wrt_gas",
    ),
    # Lightning: loops and data
    ("lightning", "fit_loop._should_accumulate"): held_by(trainer, "fit_loop._should_accumulate"),
    ("lightning", "[_TrainingEpochLoop].train_dataloader_next"): check_that(
        lambda: (
            '.train_dataloader_next")' in inspect.getsource(at("lightning.pytorch.loops.training_epoch_loop"))
            and 'profile("run_training_batch")' in inspect.getsource(at("lightning.pytorch.loops.training_epoch_loop"))
            and 'profile("save_checkpoint")' in inspect.getsource(at("lightning.pytorch.trainer.trainer"))
            and '"[Callback]{callback.state_key}.{hook_name}"'
            in inspect.getsource(at("lightning.pytorch.trainer.call"))
        ),
        "the Trainer's profiler knows these actions by other names",
    ),
    ("lightning", "fit_loop._data_source"): held_by(
        trainer, "fit_loop._data_source.is_defined", "fit_loop._data_source.dataloader"
    ),
    ("lightning", "fit_loop._combined_loader"): held_by(trainer, "fit_loop._combined_loader"),
    ("lightning", "fit_loop.epoch_loop.batch_progress"): held_by(
        trainer, "fit_loop.epoch_loop.batch_progress.current.processed"
    ),
    ("lightning", "DDPStrategy._configure_launcher"): there(
        "lightning.pytorch.strategies.ddp:DDPStrategy._configure_launcher"
    ),
    ("lightning", "_accelerator_connector"): held_by(trainer, "_accelerator_connector.cluster_environment"),
    ("lightning", "_process_dataloader"): takes(
        "lightning.pytorch.trainer.connectors.data_connector:_process_dataloader",
        *("trainer", "trainer_fn", "stage", "dataloader"),
    ),
    ("lightning", "CombinedLoader._mode"): held_by(
        lambda: at("lightning.pytorch.utilities:CombinedLoader")([], "max_size_cycle"), "_mode"
    ),
    ("lightning", "reset_seed"): there("lightning.fabric.utilities.seed:reset_seed"),
    # Lightning: the strategy
    ("lightning", "DeepSpeedStrategy.config"): check_that(
        lambda: isinstance(deepspeed_strategy().config, dict), "DeepSpeedStrategy.config is no dictionary"
    ),
    ("lightning", "DeepSpeedStrategy._timeout"): held_by(deepspeed_strategy, "_timeout"),
    ("lightning", "DeepSpeedStrategy._lightning_module"): held_by(deepspeed_strategy, "_lightning_module"),
    ("lightning", "DeepSpeedStrategy._auto_select_batch_size"): there(f"{STRATEGY}._auto_select_batch_size"),
    ("lightning", "DeepSpeedStrategy._format_config"): there(f"{STRATEGY}._format_config"),
    ("lightning", "DeepSpeedStrategy._init_optimizers"): there(f"{STRATEGY}._init_optimizers"),
    ("lightning", "DeepSpeedStrategy._init_config_if_needed"): there(f"{STRATEGY}._init_config_if_needed"),
    ("lightning", "DeepSpeedStrategy._config_initialized"): held_by(deepspeed_strategy, "_config_initialized"),
    ("lightning", "DeepSpeedStrategy._init_deepspeed_distributed"): there(f"{STRATEGY}._init_deepspeed_distributed"),
    # Lightning: ModelCheckpoint
    ("lightning", "ModelCheckpoint._last_checkpoint_saved"): held_by(model_checkpoint, "_last_checkpoint_saved"),
    ("lightning", "ModelCheckpoint._last_global_step_saved"): held_by(model_checkpoint, "_last_global_step_saved"),
    ("lightning", "ModelCheckpoint._monitor_candidates"): takes(f"{CHECKPOINT}._monitor_candidates", "trainer"),
    ("lightning", "ModelCheckpoint._should_skip_saving_checkpoint"): takes(
        f"{CHECKPOINT}._should_skip_saving_checkpoint", "trainer"
    ),
    ("lightning", "ModelCheckpoint._should_save_on_exception"): takes(
        f"{CHECKPOINT}._should_save_on_exception", "trainer"
    ),
    ("lightning", "ModelCheckpoint._save_checkpoint"): takes(f"{CHECKPOINT}._save_checkpoint", "trainer", "filepath"),
    ("lightning", "ModelCheckpoint._save_topk_checkpoint"): takes(
        f"{CHECKPOINT}._save_topk_checkpoint", "trainer", "monitor_candidates"
    ),
    ("lightning", "ModelCheckpoint._save_last_checkpoint"): takes(
        f"{CHECKPOINT}._save_last_checkpoint", "trainer", "monitor_candidates"
    ),
    ("lightning", "ModelCheckpoint._link_checkpoint"): takes(
        f"{CHECKPOINT}._link_checkpoint", "trainer", "filepath", "linkpath"
    ),
    ("lightning", "ModelCheckpoint._should_remove_checkpoint"): takes(
        f"{CHECKPOINT}._should_remove_checkpoint", "trainer", "previous", "current"
    ),
    ("lightning", "ModelCheckpoint._remove_checkpoint"): takes(
        f"{CHECKPOINT}._remove_checkpoint", "trainer", "filepath"
    ),
    ("lightning", "ModelCheckpoint._find_last_checkpoints"): takes(f"{CHECKPOINT}._find_last_checkpoints", "trainer"),
    ("lightning", "ModelCheckpoint.__resolve_ckpt_dir"): there(f"{CHECKPOINT}._ModelCheckpoint__resolve_ckpt_dir"),
    # PEFT
    ("peft", "BaseTunerLayer"): there(
        *(f"peft.tuners.tuners_utils:BaseTunerLayer.{name}" for name in ("get_base_layer", "enable_adapters")),
        *(f"peft.tuners.tuners_utils:BaseTunerLayer.{name}" for name in ("active_adapters", "disable_adapters")),
        "peft.tuners.tuners_utils:BaseTunerLayer.merged",
    ),
    ("peft", "LoraLayer.r"): held_by(lambda: lora().linear, "r"),
    ("peft", "LoraLayer.scaling"): held_by(lambda: lora().linear, "scaling"),
    ("peft", "LoraLayer.lora_A"): held_by(
        lora, "linear.lora_A", "linear.lora_B", "embedding.lora_embedding_A", "embedding.lora_embedding_B"
    ),
    ("peft", "LoraLayer.lora_dropout"): held_by(lambda: lora().linear, "lora_dropout"),
    ("peft", "LoraLayer.lora_variant"): held_by(lambda: lora().linear, "lora_variant"),
    ("peft", "ParamWrapper"): held_by(lambda: lora().stack, "parameter_name", "get_param", "base_layer"),
    ("peft", "ModulesToSaveWrapper"): there("peft.utils:ModulesToSaveWrapper"),
    ("peft", "get_pattern_key"): check_that(
        lambda: at("peft.utils.other:get_pattern_key")(["q_proj"], "layers.0.q_proj") == "q_proj",
        "peft.utils.other.get_pattern_key finds no suffix",
    ),
    ("peft", "inject_adapter_in_model(low_cpu_mem_usage)"): check_that(
        lambda: lora().linear.lora_A["default"].weight.is_meta, "low_cpu_mem_usage=True does not leave factors on meta"
    ),
    ("peft", "get_peft_model(low_cpu_mem_usage)"): check_that(
        lambda: all(
            parameter.is_meta
            for parameter in at("peft:get_peft_model")(
                nn.Sequential(nn.Linear(4, 4)), at("peft:VeraConfig")(target_modules=["0"]), low_cpu_mem_usage=True
            ).parameters()
            if parameter.requires_grad
        ),
        "low_cpu_mem_usage=True does not leave what a tuner trains on meta",
    ),
    ("peft", "get_peft_model_state_dict"): check_that(exports_parameters_themselves, "PEFT exports copies"),
    ("peft", "AuxiliaryTrainingWrapper"): there(
        "peft.utils.other:AuxiliaryTrainingWrapper", "peft.utils.other:ModulesToSaveWrapper.init_modules"
    ),
    ("peft", "BaseTuner._enable_peft_forward_hooks"): check_that(
        lambda: (
            "_enable_peft_forward_hooks" in inspect.getsource(at("peft:PeftModel"))
            and not hasattr(at("peft.tuners.tuners_utils:BaseTuner"), "_enable_peft_forward_hooks")
        ),
        "PeftModel asks tuners in another way for the hooks around a forward, or all tuners have them",
    ),
    ("peft", "TrainableTokensLayer.tied_adapter"): there(
        "peft.tuners.trainable_tokens:TrainableTokensLayer.tied_adapter"
    ),
    # only tests use it; releases without LoRA-GA need not have it
    ("peft", "_peft_loraga_grad"): check_that(
        lambda: (
            not hasattr(at("peft"), "LoraGAConfig")
            or "_peft_loraga_grad" in inspect.getsource(at("peft.tuners.lora.layer"))
        ),
        "PEFT does not look for _peft_loraga_grad any more",
    ),
    # transformers
    ("transformers", "PreTrainedModel._from_config"): there(f"{TRANSFORMER}._from_config"),
    ("transformers", "get_expanded_tied_weights_keys"): check_that(
        lambda: "lm_head.weight" in tiny_llama().get_expanded_tied_weights_keys(all_submodels=True),
        "get_expanded_tied_weights_keys does not name a tied head",
    ),
    ("transformers", "all_tied_weights_keys"): held_by(tiny_llama, "all_tied_weights_keys"),
    ("transformers", "_BaseAutoModelClass._model_mapping"): there("transformers:AutoModelForCausalLM._model_mapping"),
    ("transformers", "_keys_to_ignore_on_load_missing"): there(f"{TRANSFORMER}._keys_to_ignore_on_load_missing"),
    ("transformers", "PreTrainedModel._init_weights"): there(f"{TRANSFORMER}._init_weights"),
    ("transformers", "supports_gradient_checkpointing"): there(f"{TRANSFORMER}.supports_gradient_checkpointing"),
    ("transformers", "loss_function"): held_by(tiny_llama, "loss_function"),
    ("transformers", "config._name_or_path"): held_by(lambda: tiny_llama().config, "_name_or_path"),
    ("transformers", "config._attn_implementation"): held_by(lambda: tiny_llama().config, "_attn_implementation"),
    ("transformers", "get_model_conversion_mapping"): there(
        "transformers.conversion_mapping:get_model_conversion_mapping"
    ),
    ("transformers", "WeightConverter"): held_by(
        lambda: at(f"{LOADING}:WeightConverter")("a", "b", operations=[at(f"{LOADING}:Chunk")(dim=0)]),
        *("source_patterns", "target_patterns", "operations"),
    ),
    ("transformers", "rename_source_key"): takes(f"{LOADING}:rename_source_key", "source_key"),
    ("transformers", "dot_natural_key"): there(f"{LOADING}:dot_natural_key"),
    ("transformers", "Conv1D"): there("transformers.pytorch_utils:Conv1D"),
    ("transformers", "MODEL_FOR_..._MAPPING"): there("transformers:MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("transformers", "embed_scale"): check_that(
        lambda: hasattr(at(f"{GEMMA}:Gemma3TextScaledWordEmbedding")(4, 4, 0), "embed_scale"),
        "scaled embeddings do not keep their factor in embed_scale",
    ),
    # submitit
    ("submitit", "AutoExecutor._executor"): held_by(local_executor, "_executor"),
    ("submitit", "Executor.parameters"): held_by(local_executor, "_executor.parameters"),
    ("submitit", "SlurmExecutor._make_submission_file_text"): takes(
        f"{SLURM}._make_submission_file_text", "command", "uid"
    ),
    ("submitit", "SlurmExecutor._submitit_command_str"): there(f"{SLURM}._submitit_command_str"),
    ("submitit", "map_count"): takes("submitit.slurm.slurm:_make_sbatch_string", "map_count"),
    ("submitit", "LocalJob._process"): check_that(
        lambda: "self._process" in inspect.getsource(at("submitit.local.local:LocalJob")), "LocalJob keeps no _process"
    ),
    ("submitit", "submitit.core._submit"): check_that(
        lambda: "submitit.core._submit" in inspect.getsource(at("submitit.local.local:LocalExecutor")),
        "tasks are not started as python -m submitit.core._submit",
    ),
    # lm_eval
    ("lm_eval", "HFLM._loglikelihood_tokens"): takes(f"{HFLM}._loglikelihood_tokens", "requests", "disable_tqdm"),
    ("lm_eval", "HFLM._model_call"): takes(f"{HFLM}._model_call", "inps", "attn_mask", "labels"),
    ("lm_eval", "HFLM._model_generate"): takes(f"{HFLM}._model_generate", "context", "max_length", "stop"),
    ("lm_eval", "HFLM.batch_size_per_gpu"): check_that(
        lambda: "return self.batch_size_per_gpu" in inspect.getsource(at(f"{HFLM}.batch_size").fget),
        "HFLM keeps its batch size elsewhere",
    ),
    # bitsandbytes
    ("bitsandbytes", "Optimizer8bit.init_state"): takes(
        "bitsandbytes.optim.optimizer:Optimizer8bit.init_state", "group", "p", "gindex", "pindex"
    ),
    ("bitsandbytes", "state1"): check_that(
        lambda: {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"} <= set(eight_bit()[1]),
        "8-bit state has other names than state1, qmap1, absmax1",
    ),
    ("bitsandbytes", "torch.ops.bitsandbytes"): lambda: [
        getattr(at("bitsandbytes.functional") and torch.ops.bitsandbytes, name).default
        for name in ("quantize_4bit", "dequantize_4bit", "quantize_blockwise")
    ],
    # conftest.py has replaced it; releases that do not pack weights for AVX512 need not have it
    ("bitsandbytes", "has_avx512bf16"): check_that(
        lambda: (
            "has_avx512bf16()" in inspect.getsource(at("bitsandbytes.nn.modules"))
            or "packed_for_cpu" not in inspect.getsource(at("bitsandbytes.nn.modules"))
        ),
        "Linear4bit does not ask has_avx512bf16 whether it packs its weight for the CPU",
    ),
}


@pytest.mark.parametrize(("library", "name"), CANARIES, ids=lambda part: part)
def test_canary(library: str, name: str, request: pytest.FixtureRequest) -> None:
    check = CANARIES[library, name]
    if library == "lm_eval":
        pytest.importorskip("lm_eval")  # an extra
    arguments = [request.getfixturevalue("engine")] if hasattr(check, "needs_engine") else []
    try:
        check(*arguments)
    except (AttributeError, ImportError, TypeError, KeyError) as error:
        instead = rows()[library, name].instead
        pytest.fail(f"{library}: {name} is gone or has changed ({error}). Instead: {instead}")


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_the_names_of_the_canaries() -> None:
    assert set(rows()) == set(CANARIES)


def test_the_table_says_where_names_are_used() -> None:
    wrong = []
    for row in rows().values():
        leaf = re.split(r"[.(]+", row.name.rstrip(")"))[-1]
        if "..." in row.name:
            leaf = row.name.partition("...")[0].rstrip(".")
        for path in row.used_in:
            if not (ROOT / path).is_file() or leaf.lstrip("_") not in (ROOT / path).read_text():
                wrong.append(f"{row.library}'s {row.name} is not in {path}")
        if not (row.used_in and row.purpose and row.instead):
            wrong.append(f"{row.library}'s {row.name}: a cell is empty")
    assert not wrong, "\n".join(wrong)


# -- names that are not in the table ----------------------------------------------------------------------------------

#: Attributes of other objects with a leading underscore that are not of the six libraries.
OTHERS = {
    "_parser": "re's; the parsed expression, which no public function returns",
    "_Hash": "typeshed's name for what hashlib makes; in annotations only",
    "_replace": "of named tuples; documented",
    "_parameters": "torch.nn.Module's; documented in its notes on parametrization",
    "_modules": "torch.nn.Module's; `getattr` comes to them last, by a function",
    "_chunk_cat": "torch's; cuts and joins tensors for a reduce-scatter, as in torch's FSDP",
    "_forward_hooks": "torch.nn.Module's; whether there are any",
    "_forward_pre_hooks": "the same",
    "_C": "torch's; see the next",
    "_world": "torch.distributed's; the groups that there are",
    "_new_process_group_helper": "torch.distributed's; every group is made by it, whose threads the tests look for",
    "_set_pg_timeout": "torch.distributed's; no public function changes the timeout of a group",
    "_exit": "os._exit; documented",
    "_current_graph_task_id": "torch's; whether a backward runs, as torch.utils.checkpoint asks",
    "_execution_engine": "torch.autograd's; calls back at the end of a backward, as torch's FSDP does",
    "_cdata": "torch's address of a storage; `StorageWeakRef` of torch.multiprocessing uses it",
    "_is_mkldnn_bf16_supported": "torch has no public question",
    "_subcommands_action": "jsonargparse's; it has no public way to the parser of a subcommand",
    "_disabled_torch_function_impl": "torch's; its documentation of __torch_function__ names it",
    "_make_wrapper_subclass": "torch's; tensors that hold none are made by it",
    "_schema": "torch's; what an operator writes to",
    "_to_copy": "torch's operator of Tensor.to",
    "_pytree": "torch's; torch.utils has no public tree_map",
    "_python_dispatch": "torch's; it has no other place for TorchDispatchMode",
}


def sources() -> list[Path]:
    """The package and what is run beside it; tests may look inside other libraries, their helpers may not."""
    folders = ("src", "benchmarks", "launch", "tests/helpers")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def is_private(name: str) -> bool:
    return (name.startswith("_") and not name.startswith("__") and len(name) > 1) or name.startswith("ds_")


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives to something: variables, functions, classes, attributes, parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            # what is set on others (`parameter.ds_shape = ...`) is theirs
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private names that a module asks other objects for, with the lines; in strings too, for `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, part) for part in parts if is_private(part))
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            for argument in node.args[1:2] if called in ("getattr", "hasattr", "setattr", "delattr", "object") else ():
                if isinstance(argument, ast.Constant) and is_private(str(argument.value)):
                    yield node.lineno, str(argument.value)


def known() -> set[str]:
    """Every part of a name in the table, without class and brackets."""
    found = {part for _, name in CANARIES for part in re.split(r"[.()]+", name)}
    return found | {name.replace("__", "_ModelCheckpoint__") for name in found if name.startswith("__")} | set(OTHERS)


def test_no_other_private_name_is_used() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    own = {name for tree in trees.values() for name in defined(tree)} | {path.stem for path in trees}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in asked(tree)
        if name not in own | known()
    ]
    assert not found, f"put them into {TABLE.name}, with a canary:\n" + "\n".join(found)


def test_no_test_uses_a_private_name_of_the_package() -> None:
    """A test states a behaviour, and a name of the package that it needs is public."""
    package = {name for path in (ROOT / "src").rglob("*.py") for name in defined(ast.parse(path.read_text()))}
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        others = known() | set(defined(tree))
        found += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in asked(tree) if name in package - others]
    assert not found, "\n".join(found)


def own_classes() -> Iterator[type]:
    """Classes of the package."""
    for module in pkgutil.walk_packages(lowrank_dist.__path__, "lowrank_dist."):
        if module.name.endswith(("__main__", "nf4_triton")):  # a program; and a module that needs Triton
            continue
        if module.name.endswith("inference.harness") and importlib.util.find_spec("lm_eval") is None:  # an extra
            continue
        for found in vars(importlib.import_module(module.name)).values():
            if isinstance(found, type) and found.__module__ == module.name:
                yield found


@functools.cache
def private_attributes(cls: type) -> set[str]:
    """Private names that the body of a class defines or asks ``self`` for."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    of_self = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    return {name for name in of_self | set(vars(cls)) if is_private(name) and not name.startswith("_abc_")}


def test_no_other_private_name_is_inherited() -> None:
    """Neither used nor, by chance, defined anew: names that a class shares with a base class of another library."""
    found = set()
    for cls in own_classes():
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] in LIBRARIES:
                shared = private_attributes(cls) & private_attributes(base)
                found |= {f"{cls.__qualname__}.{name} (of {base.__qualname__})" for name in shared - known()}
    assert not found, f"put them into {TABLE.name}, with a canary, or rename them:\n" + "\n".join(sorted(found))
