"""Prefer one response to another: DPO with PiSSA, whose reference is the model of step 0.

    python examples/tiny.py && python examples/preference.py

The rejected responses are made here: right ones with one thing changed. For real ones, name data that have the columns
`prompt`, `chosen` and `rejected`, and leave `transform` out. On the function calls of the demonstration (`make demo`):

    BASE, TRAIN = "runs/demo/smollm2-135m-instruct", "runs/demo/bfcl/train.jsonl"
"""

from __future__ import annotations

import json
import re
from typing import Any

import lightning as L
from peft import LoraConfig

from lowrank_dist import AdapterCheckpoint, PiSSA, PiSSAStrategy, PreferenceModule, SFTDataModule

BASE, TRAIN, OUTPUT = "runs/examples/llama", "runs/examples/chat.jsonl", "runs/examples/preference"


def pair(record: dict[str, Any]) -> dict[str, Any] | None:
    """A conversation with its right last turn, and with a wrong one; None if there is nothing to change."""
    messages = record["messages"]
    if "completion" not in record:
        messages, record = messages[:-1], {"completion": messages[-1]["content"]}
    right = record["completion"]
    wrong = spoilt(right)
    return None if wrong == right else {"prompt": messages, "chosen": right, "rejected": wrong}


def spoilt(text: str) -> str:
    """A list of function calls without the last argument of the first one; any other text with another number."""
    try:
        calls = json.loads(text)
        calls[0]["arguments"].popitem()
    except (ValueError, TypeError, KeyError, IndexError):
        return re.sub(r"\d+", lambda number: str(int(number[0]) + 1), text, count=1)
    return json.dumps(calls, ensure_ascii=False)


if __name__ == "__main__":
    adapter = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = L.Trainer(
        strategy=PiSSAStrategy(BASE, adapter, PiSSA()),
        accelerator="cpu",
        devices=2,
        max_steps=4,
        logger=False,
        callbacks=AdapterCheckpoint(OUTPUT, filename="{step}", every_n_train_steps=4),
    )
    data = SFTDataModule(BASE, TRAIN, transform=pair, max_length=256, batch_size=2)
    trainer.fit(PreferenceModule(BASE, loss="dpo", beta=0.1, lr=1e-3), data)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
