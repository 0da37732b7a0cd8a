"""Tiny tokenizers and models for the tests of data and module: built here, nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowrank_dist.data.rendering import Renderer
from lowrank_dist.data.tokenizing import IGNORE_INDEX, Encoder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "2 and 2?"},
    {"role": "assistant", "content": "four"},
]
CORPUS = [
    "user assistant system hello world, what is the answer? It is four.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Response: one two three\n\n add 2 and 2",
]


def byte_level_tokenizer(*, template: str | None = CHATML, eos: str = "<|im_end|>", bos: bool = False) -> Any:
    """As GPT-2's, LLaMA-3's and Qwen's: no space is added anywhere."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return _wrap(core, template, eos, bos)


def sentencepiece_tokenizer(*, template: str | None = None) -> Any:
    """As LLaMA-2's: a space before the first word of every text, and <s> before every text."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", *SPECIAL, *bytes_], initial_alphabet=["\n"], show_progress=False
        ),
    )
    return _wrap(core, template, "<|endoftext|>", True)


def _wrap(core: Tokenizer, template: str | None, eos: str, bos: bool) -> PreTrainedTokenizerBase:
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>", bos_token="<s>" if bos else None
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(vocab_size: int = 512, **overrides: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def save_material(directory: Path, records: list[Any]) -> Path:
    """What a fit needs: a tiny model with its tokenizer in ``model``, and `records` in ``data.jsonl``."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    tiny_llama(len(tokenizer)).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_jsonl(directory / "data.jsonl", records)
    return directory


def encode(tokenizer: Any, record: dict[str, Any], template: str | None = None) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of every example that a record gives."""
    encoded = Encoder(tokenizer)(Renderer(tokenizer, template).examples(record, "f.jsonl:1"))
    return [(one.tokens, one.labels) for one in encoded]


def encode_one(tokenizer: Any, record: dict[str, Any], template: str | None = None) -> tuple[list[int], list[int]]:
    """Those of its only example; every label is its token, or none."""
    ((tokens, labels),) = encode(tokenizer, record, template)
    assert len(tokens) == len(labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(tokens, labels, strict=True))
    return tokens, labels


def trained_text(tokenizer: Any, labels: list[int]) -> list[str]:
    """The trained stretches of an example, as text."""
    stretches: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORE_INDEX:
            stretches.append([])
        else:
            stretches[-1].append(label)
    return [tokenizer.decode(ids) for ids in stretches if ids]
