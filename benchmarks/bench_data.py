"""Preparing data: 100 000 question-answer records like MetaMathQA's, by this project and by TRL, in the same run.

    python benchmarks/bench_data.py            # benchmarks/results/data.md
    python benchmarks/bench_data.py --tiny     # a dry run with few records and a tiny tokenizer

Each preparation is a process of its own: from the moment that everything is imported and the tokenizer is loaded until
the first batch of training is there. Memory is how much more of it the process has then, and had at its peak; pages of
mapped files, which the system can drop and processes share, are counted apart. TRL prepares within `SFTTrainer`, whose
model has two tiny layers here; it is not trained. Records have random words: lengths as MetaMathQA's (some 300 tokens
with the prompt), no mathematics.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reporting import RESULTS, ROOT, header, table, verdict, write_report

MAX_LENGTH = 512
TEXT = (
    "the of and number total each has many how if she he they are then we can find by dividing "
    "multiplying adding subtracting apples dollars hours minutes students books per week day remaining "
    "cost price times twice half sum product equation answer equals therefore"
)
#: What is reported of a preparation, with the digits after the point.
COLUMNS = {"seconds": 1, "cpu": 1, "memory": 0, "peak": 0, "mapped": 0}
GOALS = {"first": 60.0, "second": 2.0, "memory": 300.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a dry run")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--tokenizer", help="directory of a tokenizer (default: SmolLM2's, which the demo fetches)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "data.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options.tokenizer, Path.cwd(), options.processes)))
        return
    if options.tiny:
        options.records = min(options.records, 3000)
    tokenizer = options.tokenizer or _tokenizer(options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder, "train.jsonl"), options.records)
        several = f"{options.processes} processes"
        rows, found = [], {}
        for name, worker in (
            (f"this project, first time, {several}", "several"),
            ("this project, second time", "several"),
            (f"TRL, first time, {several}", "trl"),
            ("TRL, second time", "trl"),
            ("this project, first time, 1 process", "one"),
        ):
            load = os.getloadavg()[0]
            found[name] = result = run(worker, tokenizer, Path(folder), options.processes)
            figures = [f"{result[what]:.{digits}f}" for what, digits in COLUMNS.items()]
            rows.append([name, *figures, f"{load:.1f}"])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            write(options, rows, [*found.values()])  # a run takes long, and may be ended


def write(options: argparse.Namespace, rows: list[list[str]], found: list[dict[str, float]]) -> None:
    """The report of the first rows."""
    goals = [("first time, seconds", found[0]["seconds"], GOALS["first"])]
    goals += [("first time, MB more at the peak of the rank that tokenizes", found[0]["peak"], GOALS["memory"])]
    if len(found) > 1:
        goals += [("second time, seconds", found[1]["seconds"], GOALS["second"])]
        goals += [("second time, MB more at the peak of a rank", found[1]["peak"], GOALS["memory"])]
    tokens = found[0]["tokens"] / found[0]["examples"]
    notes = [
        "a dry run; " * options.tiny + f"{options.records} records of {tokens:.0f} tokens, max_length={MAX_LENGTH}",
        "from the loaded tokenizer to the first batch: seconds, and CPU seconds with those of child processes; MB that "
        "the process, without its children, had more then, at its peak, and of mapped files; load average before each",
    ]
    packages = ["torch", "tokenizers", "transformers", "datasets", "trl"]
    parts = [
        header("Preparing data", "bench_data.py", packages, "one preparation at a time", notes),
        table(["", "seconds", "CPU seconds", "MB more", "at its peak", "mapped", "load"], rows),
        "\n".join(f"- {name}: {value:.1f}, goal {goal:g}: {verdict(value < goal)}" for name, value, goal in goals),
    ]
    write_report(options.output, parts, dry=options.tiny)


def write_records(path: Path, count: int) -> None:
    """Questions of 20 to 70 words and answers of 4 to 12 lines."""
    draw, known = random.Random(0), TEXT.split()

    def words(number: int) -> str:
        return " ".join(str(draw.randint(1, 999)) if draw.random() < 0.2 else draw.choice(known) for _ in range(number))

    with open(path, "w") as file:
        for _ in range(count):
            lines = [words(draw.randint(8, 20)) for _ in range(draw.randint(4, 12))]
            answer = ".\n".join([*lines, f"The answer is: {draw.randint(1, 999)}"])
            file.write(json.dumps({"query": f"{words(draw.randint(20, 70))}?", "response": answer}) + "\n")


def run(worker: str, tokenizer: str, folder: Path, processes: int) -> dict[str, Any]:
    """What a worker reports, with the CPU seconds of its process and its children."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets"), "PYTHONPATH": str(ROOT / "src")}
    environment["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--worker",
        worker,
        "--tokenizer",
        tokenizer,
        "--processes",
        str(processes),
    ]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Meter:
    """Seconds and memory since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        self.before, self.cpu, self.began = status(), cpu_seconds(), time.perf_counter()

    def report(self, examples: int, tokens: int) -> dict[str, float]:
        seconds, after = time.perf_counter() - self.began, status()
        return {
            "seconds": seconds,
            "cpu": cpu_seconds() - self.cpu,
            "memory": after["RssAnon"] - self.before["RssAnon"],
            "mapped": after["RssFile"] - self.before["RssFile"],
            "peak": after["VmHWM"] - self.before["VmRSS"],
            "examples": examples,
            "tokens": tokens,
        }


def status() -> dict[str, float]:
    """Memory of this process in MB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {name.rstrip(":"): int(value[0]) * 1024 / 1e6 for name, *value in lines if value[1:] == ["kB"]}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def ours(tokenizer: str, folder: Path, *, cache: str, num_proc: int | None) -> dict[str, float]:
    from transformers import AutoTokenizer

    from lowrank_dist.data.datamodule import SFTDataModule

    AutoTokenizer.from_pretrained(tokenizer)
    meter = Meter()
    data = SFTDataModule(
        tokenizer,
        str(folder / "train.jsonl"),
        max_length=MAX_LENGTH,
        batch_size=4,
        cache_dir=str(folder / cache),
        num_proc=num_proc,
    )
    data.setup("fit")
    next(iter(data.train_dataloader()))
    dataset: Any = data._sets["train"]
    return meter.report(len(dataset), sum(dataset.lengths))


def trls(tokenizer: str, folder: Path, processes: int) -> dict[str, float]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from lowrank_dist.data.shapes import INSTRUCTION_PROMPT

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **shape))
    meter = Meter()

    def columns(record: dict[str, str]) -> dict[str, str]:
        prompt = INSTRUCTION_PROMPT.format(query=record["query"])
        return {"prompt": prompt, "completion": " " + record["response"]}

    records = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    records = records.map(columns, remove_columns=["query", "response"], num_proc=processes)
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        dataset_num_proc=processes,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = SFTTrainer(model=model, args=settings, train_dataset=records, processing_class=loaded)
    next(iter(trainer.get_train_dataloader()))
    return meter.report(len(trainer.train_dataset), 0)


WORKERS: dict[str, Any] = {
    "one": lambda tokenizer, folder, _: ours(tokenizer, folder, cache="one", num_proc=None),
    "several": lambda tokenizer, folder, count: ours(tokenizer, folder, cache="several", num_proc=count),
    "trl": trls,
}


def _tokenizer(tiny: bool) -> str:
    if not tiny:
        from lowrank_dist.demo.assets import fetch_model

        return str(fetch_model(ROOT / "runs" / "demo"))
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.sft import byte_level_tokenizer

    folder = tempfile.mkdtemp()
    byte_level_tokenizer(eos="<|endoftext|>").save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
