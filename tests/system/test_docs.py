"""Every block and command of the README and of the documentation, run as a user would run it.

Only hardware, model and data are replaced.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.command import ROOT, lowrank_dist, run_main
from helpers.sft import byte_level_tokenizer, tiny_llama, write_jsonl
from lowrank_dist.training.fit_cli import parse_fit

README = ROOT / "README.md"
#: Pages that are written by hand; the log is not for readers to try.
PAGES = [README, *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "generated")]
EXAMPLES = 12  # of two ranks with batches of 4: two steps


def blocks(language: str, *pages: Path) -> list[str]:
    """The blocks of `language` in some pages."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def example() -> str:
    (block,) = blocks("python", README)
    return block


def replace_once(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the README's example"
    return text.replace(old, new)


def test_the_example_trains_and_writes_a_lora(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    # every linear layer has both sides above the example's r=128
    sizes = {"hidden_size": 160, "intermediate_size": 192, "num_key_value_heads": 4}
    tiny_llama(len(tokenizer), **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    records = [{"query": f"add {i} and {i}", "response": f"It is {2 * i}"} for i in range(EXAMPLES)]
    write_jsonl(tmp_path / "train.jsonl", records)

    program = replace_once(example(), "meta-llama/Meta-Llama-3-70B", "model")
    program = replace_once(program, "meta-math/MetaMathQA", "train.jsonl")
    program = replace_once(program, 'accelerator="gpu", devices=8, num_nodes=4', 'accelerator="cpu", devices=2')
    (tmp_path / "train.py").write_text(program)

    launchers = ("SLURM", "TORCHELASTIC", "LOCAL_", "RANK", "WORLD_SIZE", "MASTER", "NODE_RANK", "GROUP_RANK")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    environment["PYTHONWARNINGS"] = "ignore"
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env=environment,
        timeout=480,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (checkpoint,) = (tmp_path / "adapters").iterdir()
    assert checkpoint.name == "step=2"
    assert {path.name for path in checkpoint.iterdir()} == {
        "adapter",
        "adapter_encoded",
        "adapter_init",
        "lora",
        "lowrank_dist.json",
        "optimizer.safetensors",
        "state.json",
        "state.safetensors",
    }

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        tuned = PeftModel.from_pretrained(base, checkpoint / "lora")
        assert tuned.peft_config["default"].r == 256
        after = tuned(ids).logits
    assert 0 < (after - before).abs().max() < 1


def test_the_readme_can_be_read() -> None:
    """It is short, and what it links to is there."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    targets = [
        *re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", text),
        *((found, "") for found in re.findall(r'sr\w+="(.*?)"', text)),
    ]
    for target, heading in targets:
        file = ROOT / target
        assert file.is_file(), f"the README links to {target}"
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        anchors = {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
        assert not heading or heading in anchors, f"{target} has no heading {heading}, but {anchors}"


def run_blocks(argv: list[str]) -> int:
    """Run a program in a directory, in a process of its own, since one registers a method."""
    program, directory = argv
    os.chdir(directory)
    runpy.run_path(program, run_name="page")
    return 0


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands and blocks are run: the configurations, and small stand-ins for what `make demo` fetches.

    The demonstration's run has been trained.
    """
    root = tmp_path_factory.mktemp("project")
    (root / "configs").symlink_to(ROOT / "configs")
    model = root / "runs" / "demo" / "smollm2-135m-instruct"
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    tiny_llama(len(tokenizer), hidden_size=64, intermediate_size=96).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (root / "runs" / "demo" / "bfcl").mkdir()
    records = [{"prompt": f"{i} + {i} = ", "completion": str(2 * i)} for i in range(45)]
    write_jsonl(root / "runs" / "demo" / "bfcl" / "train.jsonl", records[:37])
    write_jsonl(root / "runs" / "demo" / "bfcl" / "test.jsonl", records[37:])
    run(root, next(words for words in commands() if is_the_run(words)))
    return root


def is_the_run(words: list[str]) -> bool:
    """Whether a command trains what the others start from."""
    return words[:2] == ["lowrank-dist", "fit"] and any("2cpu" in word for word in words)


def commands() -> list[list[str]]:
    """Words of every command in shell blocks, each once."""
    text = "\n".join(blocks("sh", *PAGES)).replace("\\\n", " ")
    found = [tuple(words) for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    return [list(words) for words in dict.fromkeys(found)]


#: Begin commands that other tests run, or that only set up a machine.
ELSEWHERE = {
    ("make", "demo"): "tests/system/test_demo.py",
    ("lowrank-dist", "demo"): "tests/system/test_demo.py",
    ("make", "test"): "this is it",
    ("python", "-m", "benchmarks.gpu"): "tests/system/test_benchmarks.py",
    ("pip", "install"): "make setup",
}
#: Short runs; the schedule of the configuration has the interval of its checkpoints.
SHORT = ["--trainer.max_steps=40", "--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false"]


def run(project: Path, words: list[str]) -> None:
    """One command; those for a cluster are parsed by the program that it would start."""
    if words[0] == "srun":
        words = words[1:]
    elif words[0] == "torchrun":
        words = ["lowrank-dist", *words[words.index("lowrank_dist.cli") + 1 :]]
    assert words[0] == "lowrank-dist", f"what runs {shlex.join(words)}?"
    name, arguments = words[1], words[2:]
    two_ranks = any("2cpu" in word for word in arguments) or "--devices" in arguments
    if name == "fit" and not two_ranks:
        os.chdir(project)
        parse_fit(arguments)
        return
    if name == "submit":
        small = "configs/smollm2-135m_qpissa_2cpu.yaml"
        arguments = [small if word == "FILE" else word for word in arguments] + ["--dry-run"]
        if "--cluster" in arguments:  # processes on this machine need no file for sbatch
            arguments = [word for word in arguments if word not in ("--cluster", "local")]
    if "--devices" in arguments:
        at = arguments.index("--devices")
        assert arguments[at + 1] == "2"
        arguments = arguments[:at] + arguments[at + 2 :]
    done = lowrank_dist(
        name,
        *arguments,
        *(SHORT if name == "fit" else ()),
        ranks=2 if two_ranks and name != "submit" else None,
        cwd=project,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"
    if name in ("validate", "test"):
        assert f"{'val' if name == 'validate' else 'test'}_loss" in done.stdout
    if name == "fit":
        trained = project / "runs" / "smollm2-135m_qpissa_2cpu" / "checkpoints"
        shutil.copytree(trained, project / "runs" / "demo" / "checkpoints")


def test_every_command(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the pages, but for the run that others start from: it comes first."""
    monkeypatch.chdir(project)
    for words in commands():
        if not is_the_run(words) and not any(tuple(words[: len(one)]) == one for one in ELSEWHERE):
            run(project, words)


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks("python", page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page(page: Path, project: Path, tmp_path: Path) -> None:
    """One after the other, as one program."""
    (tmp_path / "page.py").write_text("\n".join(blocks("python", page)))
    (done,) = run_main(run_blocks, [str(tmp_path / "page.py"), str(project)], [{}])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("yaml", page)], ids=lambda page: page.stem)
def test_keys_of_configurations(page: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    for block in blocks("yaml", page):
        (tmp_path / "options.yaml").write_text(block)
        parse_fit(["--config=configs/smollm2-135m_qpissa_2cpu.yaml", f"--config={tmp_path / 'options.yaml'}"])


def test_records_are_json() -> None:
    for block in blocks("json", *PAGES):
        for line in block.splitlines():
            assert {"messages", "prompt", "query"} & set(json.loads(line))
