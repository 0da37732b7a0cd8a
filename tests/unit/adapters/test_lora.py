"""The exact LoRA of factors in a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.experts import peft_delta
from lowrank_dist.adapters.lora import to_lora

EXPERTS, OUT, IN, RANK = 3, 7, 5, 2


def test_conversion_keeps_experts_apart() -> None:
    def random() -> tuple[Tensor, Tensor]:
        return torch.randn(EXPERTS * RANK, IN), torch.randn(OUT, RANK * EXPERTS)

    (a, b), (a0, b0) = random(), random()
    names = ("m.experts.lora_A.weight", "m.experts.lora_B.weight")
    adapter, initial = dict(zip(names, (a, b), strict=True)), dict(zip(names, (a0, b0), strict=True))
    converted = to_lora(adapter, initial, dict.fromkeys(names, EXPERTS))
    actual = peft_delta(*(converted[name] for name in names), EXPERTS)
    torch.testing.assert_close(actual, peft_delta(a, b, EXPERTS) - peft_delta(a0, b0, EXPERTS))
    naive = to_lora(adapter, initial)
    assert (peft_delta(*(naive[name] for name in names), EXPERTS) - actual).abs().max() > 0.1


def test_conversion_of_embeddings() -> None:
    shapes = {"e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (4, 2)}
    adapter, initial = ({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2))
    a, b = to_lora(adapter, initial).values()
    products = [x["e.lora_embedding_B"] @ x["e.lora_embedding_A"] for x in (adapter, initial)]
    torch.testing.assert_close(b @ a, products[0] - products[1])
