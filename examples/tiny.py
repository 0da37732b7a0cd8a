"""What the examples start from: tiny models with random weights, a tokenizer and data, in ``runs/examples``.

    python examples/tiny.py

Replace them by your own: every example names what it reads at its beginning.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def main(root: Path = Path("runs/examples")) -> None:
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT
    causal = {**SIZES, "vocab_size": len(tokenizer), "num_key_value_heads": 2}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**causal)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**causal, num_local_experts=4, num_experts_per_tok=2)),
        "bert": BertForSequenceClassification(BertConfig(**SIZES, vocab_size=len(tokenizer), num_labels=2)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    sums = [(f"What is {a} + {b}?", str(a + b)) for a in range(8) for b in range(8)]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in sums
    ]
    (root / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (root / "text.txt").write_text("\n".join(f"{question} {answer}." for question, answer in sums))


if __name__ == "__main__":
    main()
