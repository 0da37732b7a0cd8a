"""Asks llama.cpp for the next token: a program for the environment that ``make test-serving`` makes.

``python llama_cpp_server.py MODEL.gguf LORA.gguf|none TOKENS`` prints the most likely tokens after TOKENS, ids joined
by commas, with their log-probabilities, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(model: str, lora: str, tokens: str) -> int:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel = 256, 1
    if lora != "none":
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    question: dict[str, Any] = {"prompt": [int(token) for token in tokens.split(",")], "n_predict": 1, "n_probs": 20}
    answer = xllamacpp.Server(settings).handle_completions({**question, "temperature": 0.0})
    (told,) = answer["choices"][0]["logprobs"]["content"]
    print(json.dumps({str(one["id"]): one["logprob"] for one in told["top_logprobs"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
