"""The skeleton: a transformers model on the meta device, its head untied if asked, PEFT's layers injected.

Nothing is read but the configuration, and nothing is communicated.
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lowrank_dist.errors import ModelError, is_passing
from lowrank_dist.model.bypassed import bypassed_layers
from lowrank_dist.model.names import ADAPTER, plain_name
from lowrank_dist.model.targets import Asked, compare, own_warning_of_patterns
from lowrank_dist.storage.find_weights import cached_snapshot
from lowrank_dist.storage.parse import Record, printable, read_record
from lowrank_dist.storage.resolve import gguf_file

log = logging.getLogger(__name__)

_BIASES = ("none", "all", "lora_only")
#: Options of a LoraConfig that go with no sharded base, and why.
UNSUPPORTED_OPTIONS = {
    "ensure_weight_tying": "layers that share an adapter would share one sharded residual",
    "arrow_config": "it routes between adapters that exist already",
    "megatron_config": "tensor-parallel layers are sharded already",
    "use_qalora": "PEFT computes QA-LoRA over GPTQ's own layers, and would train an ordinary LoRA here",
    "monteclora_config": "its layers draw from buffers of their own and write to the model in the forward, so that "
    "ranks and recomputations would differ",
    "lora_ga_config": "its options are those of init=LoRAGA(...)",
}
_NOT_FACTORS = {
    "lora_bias": "converted adapters cannot carry it",
    "layer_replication": "replicated layers would share one sharded residual",
    "trainable_token_indices": "embedding rows are not sharded separately",
}


def meta_parameters() -> AbstractContextManager[None]:
    """Context in which parameters are created on the meta device; buffers (rotary frequencies, ...) are real."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def find_backbone(module: nn.Module) -> tuple[str, PreTrainedModel]:
    """The one outermost transformers model inside `module`, and its name there.

    Raises
    ------
    ModelError
        If there is none or more than one, a parameter of `module` is outside it, or a parameter is not on the meta
        device.
    """
    found: list[tuple[str, PreTrainedModel]] = []
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, child))
    owner = type(module).__name__
    if not found:
        raise ModelError(
            f"{owner} holds no transformers model after configure_model; build it there, e.g. "
            "`self.model = AutoModelForCausalLM.from_config(config)`"
        )
    if len(found) > 1:
        raise ModelError(
            f"{owner} holds {len(found)} transformers models ({', '.join(n for n, _ in found)}); one is supported"
        )
    name, backbone = found[0]
    backbone.tie_weights()  # creation on meta breaks ties
    inside = {id(p) for p in backbone.parameters()}
    for parameter_name, parameter in module.named_parameters():
        if id(parameter) not in inside:
            raise ModelError(
                f"{owner}.{parameter_name} is outside the transformers model {name!r}: no pretrained weights hold it; "
                "use a model class with a head (AutoModelForSequenceClassification, ...) and list it in modules_to_save"
            )
        if parameter.device.type != "meta":
            raise ModelError(
                f"{owner}.{parameter_name} is on {parameter.device}, not on the meta device: build the model in "
                "configure_model with `from_config`, not in __init__ and not with `from_pretrained`"
            )
    return name, backbone


def read_config(directory: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """The ``config.json`` of a pretrained model, in a directory or on the hub.

    Without one beside it, a GGUF file says the configuration itself, as transformers reads it.

    Parameters
    ----------
    directory
        Directory, GGUF file or hub id.
    revision
        Revision of a hub id. Default: its main one.

    Raises
    ------
    CheckpointError
        If the file is not of a model.
    ModelError
        If transformers finds none that it can read.
    """
    file = gguf_file(Path(directory))
    if Path(directory).is_dir():
        directory = cached_snapshot(Path(directory), revision)
    elif Path(directory).suffix in (".gguf", ".safetensors") and Path(directory).is_file():
        directory = Path(directory).parent
    path = Path(directory) / "config.json"
    if path.exists():
        _check_sizes(read_record(path))
    from_file = {} if file is None or path.exists() else {"gguf_file": file.name}
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            directory,
            trust_remote_code=False,  # never code of the model's author
            revision=revision or "main",
            **from_file,
        )
    except Exception as error:  # whatever the checks of a model's class raise
        if is_passing(error):
            raise
        raise ModelError(f"{directory}: no configuration that transformers reads: {printable(error, 1000)}") from error
    return config


def _check_sizes(config: Record) -> None:
    """Raise CheckpointError if a size in ``config.json`` is of no model, which would take for ever to build."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(config.record(name))
        elif isinstance(value, int) and not isinstance(value, bool):
            many = re.search(r"layers?$|blocks?$|depth|experts?$", name) is not None
            config.integer(name, low=-(2**31), high=100_000 if many else 2**40)


def language_model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that builds a language model of `config`: with image or sound towers if it has them."""
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in auto_class._model_mapping:
            return auto_class
    return AutoModelForCausalLM  # whose error lists the configurations


def build_skeleton(directory: Path, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """The transformers model that `config`, or the ``config.json`` of a pretrained model, names; on the meta device.

    Raises
    ------
    ModelError
        If there is no configuration, or if it does not name exactly one model class of transformers.
    """
    config = read_config(directory) if config is None else config
    names = config.architectures or []
    names = names if isinstance(names, list) else [names]
    if not names and gguf_file(directory) is not None:  # a file names no class
        names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    classes = [getattr(transformers, name, None) for name in names if isinstance(name, str) and name.isidentifier()]
    found: list[Any] = [one for one in classes if isinstance(one, type) and issubclass(one, PreTrainedModel)]
    if len(found) != 1:
        raise ModelError(
            f"{directory}/config.json: architectures={printable(names)} must name one model class of transformers"
        )
    try:
        with meta_parameters():
            backbone: PreTrainedModel = found[0]._from_config(config)
        backbone.tie_weights()  # creation on meta breaks ties
    except Exception as error:  # whatever a model's class raises for values that it cannot use
        raise ModelError(
            f"{directory}/config.json: transformers cannot build a {found[0].__name__} of it ({printable(repr(error))})"
        ) from error
    return backbone


def build_buffers_in(backbone: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give floating-point buffers the values that they have in a model built in `dtype`; parameters stay.

    A model is built in the dtype that its configuration names, and stock transformers builds it in the dtype in which
    it is loaded. Buffers depend on it: some take the dtype (sinusoidal positions, decays of linear attention, scales of
    embeddings), and some are fp32 but computed from values that were rounded to it (rotary tables of GPT-J).
    """
    buffers = {name: buffer for name, buffer in backbone.named_buffers() if buffer.is_floating_point()}
    if not buffers or {p.dtype for p in backbone.parameters() if p.is_floating_point()} == {dtype}:
        return
    with meta_parameters():
        built = type(backbone)._from_config(copy.deepcopy(backbone.config), dtype=dtype)
    for name, buffer in built.named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            owner, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(owner), leaf, buffer)


def untie_embeddings(backbone: PreTrainedModel) -> dict[str, str]:
    """Give an output embedding that is tied to the input embedding its own parameter.

    Returns
    -------
    dict
        Name of the parameter, and of the one it was tied to; empty if nothing is tied.

    Raises
    ------
    ModelError
        For encoder-decoders: some of them scale their logits only if embeddings are tied.
    """
    output = backbone.get_output_embeddings()
    tied = backbone.get_expanded_tied_weights_keys(all_submodels=True)
    tied = {
        name: source
        for name, source in tied.items()
        if backbone.get_submodule(name.rpartition(".")[0]) is output
        and backbone.get_parameter(name) is backbone.get_parameter(source)
    }
    if not tied:
        return {}
    if backbone.config.is_encoder_decoder:
        raise ModelError(
            f"untie_embeddings=True: {type(backbone).__name__} is an encoder-decoder, whose arithmetic may depend on "
            "config.tie_word_embeddings; leave it out and drop the embeddings from target_modules"
        )
    for name in tied:
        leaf = name.rpartition(".")[2]
        setattr(output, leaf, nn.Parameter(torch.empty_like(getattr(output, leaf))))
    for model in backbone.modules():
        if isinstance(model, PreTrainedModel):
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}
    return tied


def train_also(backbone: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let the parameters of the model be trained whose names match one of `patterns`, and return these names.

    Parameters
    ----------
    backbone
        The model, with the layers of an adapter or without; changed in place.
    patterns
        Shell patterns (``"*norm*"``, ``"*.bias"``) for names of parameters as they are without an adapter.

    Raises
    ------
    ModelError
        If a pattern matches no parameter, or a weight that is adapted already.
    """
    adapted = {
        f"{plain_name(name)}.weight" for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)
    }
    trained: dict[str, nn.Parameter] = {}
    own = {
        plain_name(name): parameter
        for name, parameter in backbone.named_parameters(remove_duplicate=False)
        if not any(part in name for part in (".original_module.", ".modules_to_save."))
        and (name.endswith((".base_layer.weight", ".base_layer.bias")) or not _inside_a_tuner(backbone, name))
    }
    for pattern in patterns:
        found = fnmatch.filter(own, pattern)
        if not found:
            raise ModelError(f"train_also: {pattern!r} matches no parameter of {type(backbone).__name__}")
        both = sorted(adapted.intersection(found))
        if both:
            raise ModelError(
                f"train_also: {pattern!r} matches {both[0]}, which is adapted; drop the layer from the adapter's "
                "targets, or choose a pattern that leaves it out"
            )
        trained |= {name: own[name] for name in found}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return list(trained)


def _inside_a_tuner(backbone: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the layer of an adapter."""
    owner = name.rpartition(".")[0]
    while owner:
        if isinstance(backbone.get_submodule(owner), BaseTunerLayer):
            return True
        owner = owner.rpartition(".")[0]
    return False


def linear_layers(backbone: PreTrainedModel) -> list[str]:
    """Names of the linear layers that may be encoded without an adapter.

    Left out are the output embedding, layers whose weight is tied to another parameter, and subclasses of ``nn.Linear``
    (some routers of mixtures of experts are), whose forward is their own.
    """
    output = backbone.get_output_embeddings()
    uses = Counter(id(p) for _, p in backbone.named_parameters(remove_duplicate=False))
    return [
        name
        for name, module in backbone.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not output and uses[id(module.weight)] == 1
    ]


def unsupported(adapter: LoraConfig, option: str, reason: str) -> str:
    """What is said of an option that cannot be used."""
    return f"{option}={getattr(adapter, option)!r} is not supported: {reason}; leave it unset"


def inject_adapter(backbone: PreTrainedModel, adapter: LoraConfig) -> None:
    """Inject PEFT's LoRA layers into `backbone`, on meta; only what PEFT makes trainable remains trainable.

    With ``target_modules="all-linear"``, layers that cannot have such an adapter are left out (`_exclude`); one line
    names them.

    Raises
    ------
    ModelError
        If an option of `adapter` is not supported, or PEFT cannot apply its targets.
    """
    for option, reason in (UNSUPPORTED_OPTIONS | _NOT_FACTORS).items():
        if getattr(adapter, option, None):
            raise ModelError(f"LoraConfig.{unsupported(adapter, option, reason)}")
    if adapter.init_lora_weights is not True:
        raise ModelError(
            f"LoraConfig.init_lora_weights={adapter.init_lora_weights!r} would have no effect: A and B start "
            "as PiSSAStrategy(init=PiSSA(...)) says, with LoRA() from B = 0; leave init_lora_weights unset"
        )
    if adapter.bias not in _BIASES:
        raise ModelError(f"LoraConfig.bias={printable(adapter.bias)!r} must be one of {', '.join(_BIASES)}")
    backbone.requires_grad_(False)
    asked = Asked.by(adapter)
    bypassed = bypassed_layers(backbone)
    if isinstance(adapter.target_modules, str) and adapter.target_modules.lower() == "all-linear":
        _exclude(backbone, adapter, bypassed)
    adapter.inference_mode = False  # saved configurations set it, and modules_to_save would silently stay frozen
    try:
        with own_warning_of_patterns():
            inject_adapter_in_model(adapter, backbone, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ModelError(
            f"LoraConfig.target_modules={adapter.target_modules!r} cannot be applied to {type(backbone).__name__}: "
            f"{error} {named_linears(backbone)}"
        ) from error
    compare(backbone, adapter, asked)
    _check_bypassed(backbone, bypassed)


def _check_bypassed(backbone: PreTrainedModel, bypassed: dict[str, bool]) -> None:
    """Raise ModelError for adapted layers that the model multiplies by itself, and warn of those of fused kernels."""
    adapted = {plain_name(name) for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)}
    never = sorted(name for name in adapted if bypassed.get(name))
    if never:
        raise ModelError(
            f"{type(backbone).__name__} multiplies by the weight of {never[0]} without calling the layer, so that an "
            "adapter would have no effect on it; drop it from target_modules"
        )
    sometimes = sorted(adapted.intersection(bypassed))
    if sometimes and (not dist.is_initialized() or dist.get_rank() == 0):
        log.warning(
            "%s passes over %s in its fused kernels, where the adapter would have no effect: do not use them here",
            type(backbone).__name__,
            ", ".join(sorted({name.rpartition(".")[2] for name in sometimes})),
        )


def _exclude(backbone: PreTrainedModel, adapter: LoraConfig, bypassed: Collection[str]) -> None:
    """Add the linear layers that ``all-linear`` cannot mean to ``exclude_modules``, where stock PEFT finds them too.

    These are layers whose short side is below the rank (gates of shared experts), those of a class with a forward of
    its own (routers of Llama 4 and PhiMoE), which PEFT's layer would not call, those whose weights the model uses
    without calling them (`lowrank_dist.model.bypassed`), and those that share their weight with another parameter.
    """
    uses = Counter(id(p) for _, p in backbone.named_parameters(remove_duplicate=False))
    others = {*(adapter.modules_to_save or ()), *(SEQ_CLS_HEAD_NAMES if adapter.task_type == TaskType.SEQ_CLS else ())}
    head = backbone.get_output_embeddings()
    reasons: dict[str, str] = {}
    kept: set[str] = set()
    for name, layer in backbone.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(layer, nn.Linear | Conv1D) or layer is head or last in others:
            continue
        rank = adapter.rank_pattern.get(get_pattern_key(adapter.rank_pattern, name), adapter.r)
        if isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward:
            reasons[name] = f"a {type(layer).__name__}, with a forward of its own"
        elif name in bypassed:
            reasons[name] = "the model uses its weight without calling it, where an adapter has no effect"
        elif uses[id(layer.weight)] > 1:
            reasons[name] = "its weight is tied to another parameter"
        elif min(layer.weight.shape) < rank:
            reasons[name] = f"{' x '.join(map(str, layer.weight.shape))}, of less than rank {rank}"
        else:
            kept.add(last)
    if not reasons or not kept:  # if nothing is left, the plan names the ranks
        return
    short = {last if (last := name.rpartition(".")[2]) not in kept else name for name in reasons}
    given = adapter.exclude_modules
    if isinstance(given, str):
        adapter.exclude_modules = f"(?:{given})|(?:.*\\.)?(?:{'|'.join(map(re.escape, sorted(short)))})"
    else:
        adapter.exclude_modules = sorted({*(given or ()), *short})
    if not dist.is_initialized() or dist.get_rank() == 0:
        first = next(iter(reasons))
        log.warning(
            'target_modules="all-linear" leaves %d layers out (%s), such as %s: %s; name them in target_modules, or '
            "give them a rank in rank_pattern, to adapt them",
            len(reasons),
            ", ".join(sorted(short)[:5]) + (", ..." if len(short) > 5 else ""),
            first,
            reasons[first],
        )


def named_linears(backbone: nn.Module) -> str:
    """The last parts of the names of a model's linear layers, as a sentence for messages."""
    names = {n.rsplit(".", 1)[-1] for n, m in backbone.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return f"Linear layers of this model: {', '.join(sorted(names))}"
