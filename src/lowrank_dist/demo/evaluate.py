"""Evaluate a causal language model, with or without a PEFT adapter, with only stock transformers and peft.

This file imports nothing from lowrank_dist and runs as a program in a new process:

    python -I evaluate.py --model DIR [--adapter DIR] --data test.jsonl --output result.json

Its result for a converted adapter is therefore what any PEFT user gets. The loss is the mean negative log-likelihood
per completion token over all rows, computed in fp32; each token has the same weight, whatever the length of its row.
Rows have ``messages`` and ``completion``. Prompt and completion are tokenized separately, without special tokens except
those of the chat template and the end-of-sequence token after the completion.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IGNORED = -100


def encode(row: dict[str, Any], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Tokenize one row.

    Returns
    -------
    tuple of list of int
        Token ids and labels of equal length, at most `max_length`; labels are -100 on the prompt.
    """
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return (before + after)[:max_length], ([IGNORED] * len(before) + after)[:max_length]


def evaluate(
    model_dir: str,
    rows: Sequence[dict[str, Any]],
    *,
    adapter_dir: str | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[str, Any]:
    """Compute the loss on the completions of `rows`.

    Parameters
    ----------
    model_dir
        Directory of the model and its tokenizer.
    rows
        Dictionaries with ``messages`` and ``completion``.
    adapter_dir
        PEFT adapter for that model.
    dtype
        Dtype in which the model is loaded and evaluated; the loss is computed in fp32.
    batch_size
        Rows of one forward pass. Rows are sorted by length, so that rows of one batch have similar lengths.
    max_length
        Longer rows are truncated.

    Returns
    -------
    dict
        ``loss``, ``perplexity``, ``completion_tokens``, ``rows``, ``truncated_rows``, ``seconds``, and the arguments.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    if adapter_dir is not None:
        from peft import PeftModel

        with warnings.catch_warnings():
            # peft only warns if the file lacks weights of the adapter, which then keep their random values
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = PeftModel.from_pretrained(model, adapter_dir)
    model = model.to(device).eval()

    encoded = sorted((encode(row, tokenizer, max_length) for row in rows), key=lambda pair: -len(pair[0]))
    truncated = sum(len(ids) == max_length and ids[-1] != tokenizer.eos_token_id for ids, _ in encoded)
    total, tokens = 0.0, 0
    for first in range(0, len(encoded), batch_size):
        batch = encoded[first : first + batch_size]
        width = max(len(ids) for ids, _ in batch)
        # right padding: real positions of a causal model do not attend to it, so that any token id will do
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch], device=device)
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in batch], device=device)[:, 1:]
        counted = labels != IGNORED
        # logits are large: compute none for the columns that are prompt in every row
        skip = int(counted.any(dim=0).int().argmax())
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width - skip).logits[:, :-1]
        labels, counted = labels[:, skip:], counted[:, skip:]
        losses = torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
        total += losses.double().sum().item()
        tokens += losses.numel()
    if tokens == 0:
        raise ValueError(f"no completion token within max_length={max_length} in {len(rows)} rows; raise --max-length")
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "completion_tokens": tokens,
        "rows": len(rows),
        "truncated_rows": truncated,
        "model": model_dir,
        "adapter": adapter_dir,
        "dtype": dtype,
        "max_length": max_length,
        "seconds": round(time.monotonic() - start, 2),
    }


def read_rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Read the first `limit` rows of a JSONL file and check their columns."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(rows) == limit:
                break
            if not line.strip():
                continue
            row = json.loads(line)
            missing = {"messages", "completion"} - row.keys()
            if missing:
                raise ValueError(f"{path}, line {number}: no column {sorted(missing)}; it has {sorted(row)}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows; give a JSONL file with `messages` and `completion`")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program. The result is written to ``--output`` and printed as the last line of standard output."""
    parser = argparse.ArgumentParser(
        description="Mean loss on the completions of a JSONL file, stock transformers + peft."
    )
    parser.add_argument("--model", required=True, help="directory of the model and its tokenizer")
    parser.add_argument("--adapter", help="directory of a PEFT adapter for that model")
    parser.add_argument("--data", required=True, type=Path, help="JSONL file with `messages` and `completion`")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT rows")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the model (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows of one forward pass (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=512, help="truncate rows to so many tokens (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write the result there as JSON")
    options = parser.parse_args(arguments)
    for name in ("limit", "batch_size", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for directory, file in ((options.model, "config.json"), (options.adapter, "adapter_config.json")):
        if directory is not None and not (Path(directory) / file).is_file():
            parser.error(f"{directory} has no {file}; give the directory that holds it (hub ids are not accepted)")
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file; give a JSONL file with `messages` and `completion`")

    # transformers reads these when it is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    rows = read_rows(options.data, options.limit)
    result = evaluate(
        options.model,
        rows,
        adapter_dir=options.adapter,
        dtype=options.dtype,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
    text = json.dumps(result)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.output.with_name(options.output.name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(options.output)
    print(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
