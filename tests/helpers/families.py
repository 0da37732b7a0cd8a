"""Families of transformers models, made tiny: their configurations, batches, and what stock libraries make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

BATCH, LENGTH, CLASSES = 4, 12, 3

#: Values of a tiny model, for the entries that its configuration has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("word_embed_proj_dim", "output_hidden_size", "emb_dim", "attention_hidden_size"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 96
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "depth", "encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "v_head_dim"), 16),
    "vocab_size": 256,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx", "max_target_positions"), 64
    ),
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "topk_groups", "first_k_dense_replace"), 1),
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    # state spaces and linear attention
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_ssm"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    # images and sound
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "use_cache": False,
}


def shrunk(config_class: type[PretrainedConfig], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a tiny configuration: those of `SMALL` that the class has, no dropout, and `changes`."""
    default = config_class()
    entries: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if "drop" in name and isinstance(value, float):
            entries[name] = 0.0
        elif name in SMALL and not isinstance(value, dict | list | tuple):
            entries[name] = SMALL[name]
    for name in default.sub_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            entries[name] = {**shrunk(type(inner), {}), "model_type": inner.model_type}
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(entries.get(name), dict):
            entries[name] = {**entries[name], **value}
        elif value is ...:
            entries.pop(name, None)
        else:
            entries[name] = value
    return entries


Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes
    ----------
    model_type
        That of its configuration.
    task
        A name of `TASKS`.
    config
        Changes of the tiny configuration; ``...`` leaves an entry at its default.
    batch
        Further inputs, made of the configuration and a generator; those of the task if None.
    adapter
        Options of the adapter beside its rank.
    """

    model_type: str
    task: str = "causal"
    config: Mapping[str, Any] = field(default_factory=dict)
    batch: Callable[[Any, torch.Generator], Batch] | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, TASKS[self.task][0])

    def configuration(self) -> Any:
        kind = CONFIG_MAPPING[self.model_type]
        labels = {"num_labels": CLASSES} if TASKS[self.task][1] in (classified, tagged, pictured) else {}
        config = kind(**shrunk(kind, self.config), **labels)
        config.architectures = None
        return config

    def save(self, directory: Path) -> Path:
        """A checkpoint with random weights, none of which is a constant."""
        torch.manual_seed(0)
        model: PreTrainedModel = self.auto_class.from_config(self.configuration())
        enliven(model)
        model.save_pretrained(directory, max_shard_size="200KB")
        return directory

    def batches(self, config: Any, count: int) -> list[Batch]:
        """Global batches; the first dimension of every tensor is divided among the ranks."""
        generator = torch.Generator().manual_seed(7)
        make = self.batch or TASKS[self.task][1]
        return [make(config, generator) for _ in range(count)]


def enliven(model: PreTrainedModel) -> None:
    """Make every weight matter: matrices that change what they multiply, biases and scales that are not 0 and 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or name.rpartition(".")[2] in ("A_log", "dt_bias", "D"):
                continue
            if parameter.ndim == 2 and 0 < parameter.std() < 0.08:
                parameter.mul_(0.08 / parameter.std())
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.add_(torch.randn_like(module.running_mean) * 0.05)
                module.running_var.mul_(torch.rand_like(module.running_var) + 0.5)


def tokens(config: Any, generator: torch.Generator, length: int = LENGTH) -> Tensor:
    """Ids above the special ones."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or config.vocab_size
    return torch.randint(5, min(vocabulary, 200), (BATCH, length), generator=generator)


def causal(config: Any, generator: torch.Generator) -> Batch:
    ids = tokens(config, generator)
    return {"input_ids": ids, "labels": ids}


def translated(config: Any, generator: torch.Generator) -> Batch:
    return {"input_ids": tokens(config, generator), "labels": tokens(config, generator, 8)}


def masked(config: Any, generator: torch.Generator) -> Batch:
    return {"input_ids": tokens(config, generator), "labels": tokens(config, generator)}


def classes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(CLASSES, (BATCH, *shape), generator=generator)


def classified(config: Any, generator: torch.Generator) -> Batch:
    return {"input_ids": tokens(config, generator), "labels": classes(generator)}


def tagged(config: Any, generator: torch.Generator) -> Batch:
    return {"input_ids": tokens(config, generator), "labels": classes(generator, LENGTH)}


def images(config: Any, generator: torch.Generator, size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=generator)


def pictured(config: Any, generator: torch.Generator) -> Batch:
    return {"pixel_values": images(config, generator), "labels": classes(generator)}


def heard(config: Any, generator: torch.Generator) -> Batch:
    features = torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    return {"input_features": features, "labels": tokens(config, generator, 8)}


def waves(config: Any, generator: torch.Generator) -> Batch:
    return {"input_values": torch.randn(BATCH, 2000, generator=generator), "labels": tokens(config, generator, 3)}


TASKS: dict[str, tuple[str, Callable[[Any, torch.Generator], Batch]]] = {
    "causal": ("AutoModelForCausalLM", causal),
    "masked": ("AutoModelForMaskedLM", masked),
    "sequence": ("AutoModelForSequenceClassification", classified),
    "token": ("AutoModelForTokenClassification", tagged),
    "seq2seq": ("AutoModelForSeq2SeqLM", translated),
    "image": ("AutoModelForImageClassification", pictured),
    "image-text": ("AutoModelForImageTextToText", causal),
    "speech": ("AutoModelForSpeechSeq2Seq", heard),
    "ctc": ("AutoModelForCTC", waves),
}


# -- batches of models with several towers --

IMAGE = 4  #: Id of the token that stands for a part of an image or a sound.


@dataclass(frozen=True)
class WithImage:
    """Batches whose rows begin with `count` tokens of an image; `types` names their mask, for models that want it."""

    count: int
    types: str | None = None

    def __call__(self, config: Any, generator: torch.Generator) -> Batch:
        ids = torch.cat([torch.full((BATCH, self.count), IMAGE), tokens(config, generator)], dim=1)
        labels = ids.masked_fill(ids == IMAGE, -100)
        batch = {"input_ids": ids, "labels": labels, "pixel_values": images(config, generator)}
        return batch if self.types is None else {**batch, self.types: (ids == IMAGE).long()}


def with_patches(config: Any, generator: torch.Generator) -> Batch:
    """Qwen's images: rows of 16 patches each, of which four make a token."""
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    text = tokens(config, generator)
    ids = torch.cat([torch.full((BATCH, 1), 3), torch.full((BATCH, 4), IMAGE), text], dim=1)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "pixel_values": torch.randn(16 * BATCH, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def labelled_image(config: Any, generator: torch.Generator) -> Batch:
    return {"pixel_values": images(config, generator, 64), "labels": classes(generator)}


# -- the table --

QWEN_VL = {
    "image_token_id": IMAGE,
    "video_token_id": 6,
    "vision_start_token_id": 3,
    "vision_end_token_id": 7,
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
}
LATENT = {"num_key_value_heads": 4, "v_head_dim": 16, "head_dim": 8}  # multi-head latent attention
SMALL_STAGES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}

FAMILIES: dict[str, Family] = {
    # dense
    **{
        name: Family(name)
        for name in (
            "llama",
            "qwen2",
            "qwen3",
            "mistral",
            "ministral3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "gpt2",
            "gpt_neox",
            "opt",
            "bloom",
            "falcon",
            "mpt",
            "olmo",
            "olmo2",
            "olmo3",
            "granite",
            "cohere",
            "cohere2",
            "glm",
            "glm4",
            "smollm3",
            "starcoder2",
            "stablelm",
            "exaone4",
            "ernie4_5",
            "seed_oss",
            "apertus",
            "nemotron",
            "helium",
            "modernbert-decoder",
            "xlnet",
        )
    },
    "ctrl": Family("ctrl", config={"dff": 96}),
    # mixtures of experts
    **{
        name: Family(name)
        for name in (
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "gpt_oss",
            "olmoe",
            "granitemoe",
            "phimoe",
            "minimax_m2",
            "glm4_moe",
            "ernie4_5_moe",
            "llama4_text",
            "jetmoe",
        )
    },
    "deepseek_v3": Family("deepseek_v3", config=LATENT),
    # state spaces, convolutions, linear attention
    **{
        name: Family(name)
        for name in (
            "mamba",
            "falcon_mamba",
            "bamba",
            "jamba",
            "granitemoehybrid",
            "nemotron_h",
            "lfm2",
            "recurrent_gemma",
            "qwen3_next",
            "qwen3_5_text",
            "minimax",
            "olmo_hybrid",
        )
    },
    # encoders
    **{
        f"{name} (masked LM)": Family(name, "masked")
        for name in (
            "bert",
            "roberta",
            "xlm-roberta",
            "deberta-v2",
            "modernbert",
            "electra",
            "distilbert",
            "albert",
            "mobilebert",
            "nomic_bert",
            "gte",
            "eurobert",
            "esm",
        )
    },
    **{
        f"{name} (sequence classification)": Family(name, "sequence", adapter={"task_type": "SEQ_CLS"})
        for name in ("bert", "roberta", "deberta", "modernbert", "albert", "llama")
    },
    **{
        f"{name} (token classification)": Family(name, "token", adapter={"task_type": "TOKEN_CLS"})
        for name in ("bert", "deberta-v2", "modernbert")
    },
    # encoder-decoders
    **{
        name: Family(name, "seq2seq", {"decoder_start_token_id": 0})
        for name in ("t5", "mt5", "umt5", "longt5", "switch_transformers")
    },
    **{
        name: Family(name, "seq2seq")
        for name in ("bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "t5gemma", "prophetnet")
    },
    # speech
    "whisper": Family("whisper", "speech"),
    # vision
    **{
        name: Family(name, "image")
        for name in ("vit", "beit", "dinov2", "siglip", "clip", "data2vec-vision", "segformer")
    },
    "dinov2 (SwiGLU)": Family("dinov2", "image", {"use_swiglu_ffn": True}),
    "swin": Family("swin", "image", SMALL_STAGES),
    "swinv2": Family("swinv2", "image", SMALL_STAGES),
    "convnext": Family(
        "convnext",
        "image",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
        labelled_image,
    ),
    # vision and language
    "llava": Family("llava", "image-text", {"image_token_index": IMAGE, "image_token_id": IMAGE}, WithImage(16)),
    "vipllava": Family(
        "vipllava",
        "image-text",
        {"image_token_index": IMAGE, "image_token_id": IMAGE, "vision_feature_layers": [-2, -1, -1, 0, 1]},
        WithImage(16),
    ),
    "mistral3": Family("mistral3", "image-text", {"image_token_index": IMAGE, "image_token_id": IMAGE}),
    "paligemma": Family(
        "paligemma",
        "image-text",
        {"image_token_id": IMAGE, "projection_dim": 64},
        WithImage(16, types="token_type_ids"),
    ),
    "gemma3": Family(
        "gemma3",
        "image-text",
        {"image_token_id": IMAGE, "mm_tokens_per_image": 4},
        WithImage(4, types="token_type_ids"),
    ),
    "qwen2_vl": Family("qwen2_vl", "image-text", QWEN_VL, with_patches),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        "image-text",
        {**QWEN_VL, "vision_config": {"out_hidden_size": 64, "fullatt_block_indexes": [1]}},
        with_patches,
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        "image-text",
        {
            **QWEN_VL,
            "vision_config": {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        },
        with_patches,
    ),
}
