"""Which configurations of PEFT go with a frozen, sharded base, and under which conditions."""

from __future__ import annotations

from peft import AdaLoraConfig, LoraConfig, PeftConfig
from peft.utils import PeftType

from lowrank_dist.errors import InputError
from lowrank_dist.methods import LoRA, Method
from lowrank_dist.model.skeleton import UNSUPPORTED_OPTIONS, unsupported
from lowrank_dist.tuners.adalora import schedule

#: Options of a LoraConfig that PEFT's own layers compute.
_LORA_OPTIONS = (
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
    "velora_config",
    "kasa_config",
)

#: Types that are refused, and why.
_REFUSED = {
    "CPT": "it writes its parameter in the forward, where ZeRO-3 holds a gathered copy; use PromptTuningConfig",
    "FROD": "it decomposes all weights jointly and takes its part off the frozen weights; use init=PiSSA()",
    "XLORA": "it mixes adapters that exist already; train them one by one",
    "MIXED": "a mixed model holds several adapters; train them one by one",
    "ADAMSS": "the shapes of its parameters come from clustering whole weights, so that nothing can be planned or "
    "sharded before they are read; use init=PiSSA() with rank_pattern, or AdaLoraConfig",
    "SHADOW": "it trains a copy of the model that is sharded with the base; use LoraConfig",
}

#: Types whose update depends on which samples share a batch, or on random numbers of every forward.
_DEPENDS_ON_RANK = {
    "LILY": "its router",
    "POLY": "its router, which draws in every forward,",
    "PVERA": "its update, which is drawn in every forward,",
}

#: Types whose layers take only what is exactly an ``nn.Linear``.
_PLAIN_LAYERS = ("GLORA",)

#: Types that pass keys and values of virtual tokens, or hooks, which a recomputed layer would not see.
_NOT_RECOMPUTED = ("PREFIX_TUNING", "CARTRIDGE", "POLY")


def name_of(config: PeftConfig) -> str:
    """The type of a configuration as PEFT's files name it, such as ``"VERA"``."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def option_for_peft(config: LoraConfig) -> str | None:
    """The option of a LoraConfig that only PEFT's own layers compute, as text; None if there is none."""
    given = (option for option in _LORA_OPTIONS if getattr(config, option, None))
    return next((f"{option}={getattr(config, option)!r}" for option in given), None)


def said(config: PeftConfig) -> str:
    """A configuration in messages: its type, and the option that makes a LoRA more than two factors per matrix."""
    option = option_for_peft(config) if isinstance(config, LoraConfig) else None
    if option is None and getattr(config, "use_dora", False):
        option = "use_dora=True"
    return f"type {name_of(config)}" if option is None else f"type {name_of(config)} with {option}"


def needs_peft(config: PeftConfig) -> bool:
    """Whether only PEFT's own layers compute an adapter; False for LoRAs of two factors per matrix."""
    is_lora = isinstance(config, LoraConfig) and not isinstance(config, AdaLoraConfig)
    return not is_lora or option_for_peft(config) is not None


def adds_product(config: PeftConfig) -> bool:
    """Whether an adapter adds ``s B A`` to every weight, and nothing else: a LoRA of two factors, without DoRA."""
    return not needs_peft(config) and not getattr(config, "use_dora", False)


def is_for_peft(config: PeftConfig, init: Method | None) -> bool:
    """Whether PEFT makes the adapter, on top of the filled model; False if it is made from the weights by `init`.

    Raises
    ------
    InputError
        If `config` and `init` contradict each other, or if a LoraConfig leaves open which of them is meant.
    """
    if not isinstance(config, LoraConfig) or isinstance(config, AdaLoraConfig):
        if init is not None and isinstance(config, AdaLoraConfig):
            raise InputError(
                f"init={init} makes factors from the weights, but adapter is an AdaLoraConfig, which starts from zero: "
                "a pruned triplet is set to 0, which would cut the weight; leave init out, or pass a LoraConfig"
            )
        if init is not None:
            raise InputError(
                f"init={init} makes the factors of a LoraConfig from the weights, but adapter is a "
                f"{type(config).__name__}, which PEFT initialises; leave init out"
            )
        return True
    option = option_for_peft(config)
    if option is None:
        return False
    if isinstance(init, LoRA):
        return True
    raise InputError(
        f"LoraConfig.{option} is computed by PEFT's own layers, which start as PEFT starts them: pass init=LoRA() for "
        f"that, or leave {option.partition('=')[0]} unset" + ("" if init is None else f" to train with init={init}")
    )


def objection(config: PeftConfig, *, gradient_checkpointing: bool) -> str | None:
    """Why a configuration cannot be trained on a frozen, sharded base, with the remedy; None if it can."""
    name = name_of(config)
    if name in _REFUSED:
        return _REFUSED[name]
    if name not in set(PeftType):
        return f"the installed PEFT has no tuner {name}"
    if isinstance(config, AdaLoraConfig) and (reason := schedule.objection(config)) is not None:
        return reason
    if isinstance(config, LoraConfig):
        start = config.init_lora_weights
        if start not in (True, False, "gaussian", "orthogonal"):
            return (
                f"init_lora_weights={start!r} needs whole weights or takes its part off them; choose the start by "
                "PiSSAStrategy(init=PiSSA(...)) and leave init_lora_weights unset"
            )
        if getattr(config, "kasa_config", None):
            return "KaSA takes its part off the frozen weights; use init=PiSSA()"
        for option, unfit in UNSUPPORTED_OPTIONS.items():
            if getattr(config, option, None):
                return unsupported(config, option, unfit)
    if gradient_checkpointing and name in _NOT_RECOMPUTED:
        return "it does not work with gradient checkpointing; pass gradient_checkpointing=False"
    if gradient_checkpointing and getattr(config, "generator_seed", None) is not None:  # PVeRA's
        return (
            "generator_seed draws from a generator of its own in every forward, so that gradient checkpointing would "
            "compute gradients with other numbers than the loss; leave it unset, or pass gradient_checkpointing=False"
        )
    return None


def wants_plain_layers(config: PeftConfig) -> bool:
    """Whether PEFT adapts only layers that are exactly ``nn.Linear``, no subclass."""
    return name_of(config) in _PLAIN_LAYERS


def remark(config: PeftConfig) -> str | None:
    """What users should know before they train with a configuration on several ranks; None if there is nothing."""
    part = _DEPENDS_ON_RANK.get(name_of(config))
    if isinstance(config, LoraConfig):
        part = "velora_config" if getattr(config, "velora_config", None) else part
    if part is None:
        return None
    return f"{part} depends on the rank's own batch or random numbers, so that losses vary with the number of ranks"
