"""Seeded damage to files of every kind: the readers name it in one line, without a traceback, a hang or much memory.

``make fuzz`` runs many more cases than the tests do; ``FUZZ_CASES`` and ``FUZZ_SEED`` say how many and which.
"""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from helpers.fuzz import copied, damage, fault, seal_again
from helpers.models import save_checkpoint
from helpers.ranks import run_ranks
from helpers.sft import byte_level_tokenizer, write_jsonl
from helpers.training import CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import NF4, AdapterCheckpoint, PiSSA, convert_checkpoint, inspect, merge_checkpoint
from lowrank_dist.checkpoints.layout import TrainingCheckpoint, newest_checkpoint
from lowrank_dist.checkpoints.resuming import earlier_run
from lowrank_dist.checkpoints.state import decode_training_state
from lowrank_dist.cli.inspect import as_table
from lowrank_dist.cli.report import read_manifest_of, report_of
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.decomposition.report import as_table as report_table
from lowrank_dist.decomposition.walk import Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.errors import CheckpointError
from lowrank_dist.initialization.starting_adapter import StartingAdapter
from lowrank_dist.model.plan import open_plan
from lowrank_dist.model.skeleton import build_skeleton
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.residual_model.create import decompose
from lowrank_dist.residual_model.reader import ResidualModel
from lowrank_dist.storage.reader import CheckpointReader

CASES, SEED = int(os.environ.get("FUZZ_CASES", "200")), int(os.environ.get("FUZZ_SEED", "0"))
SINGLE = ShardGroup.single()
MESSAGES = [
    {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "world"}]}
    for i in range(4)
]


def train(pretrained: Path, output: Path) -> None:
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=2)
    options: dict[str, Any] = {"init": PiSSA(quantization_iterations=2)}
    trainer = make_trainer(
        make_strategy(pretrained, **options), callbacks=[callback], enable_checkpointing=True, steps=2
    )
    trainer.fit(CausalLM(pretrained), loader(trainer.global_rank, trainer.world_size, 2))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory of every kind."""
    root = tmp_path_factory.mktemp("files")
    base = save_checkpoint(root / "model", "llama", num_hidden_layers=1)
    run_ranks(1, train, base, root / "checkpoints")
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    reader = CheckpointReader(base)
    walk = Walk(reader, SINGLE, init=PiSSA(), residual=NF4(double_quant=True), factor_dtype=torch.float32)
    residual = decompose(open_plan(reader, adapter).plan, walk, root / "residual", adapter=adapter, base=str(base))
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}),
    ).save_pretrained(str(root / "adapter"))
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(root / "tokenizer")
    (root / "data").mkdir()
    plain = [{"prompt": "a", "completion": "b"}, {"query": "a", "response": "b"}]
    write_jsonl(root / "data" / "data.jsonl", [*MESSAGES, *plain])
    checkpoint = root / "checkpoints" / "step=2"
    found = {"model": base, "checkpoint": checkpoint, "residual": residual}
    return found | {"adapter": root / "adapter", "data": root / "data"}


def readers(files: dict[str, Path]) -> dict[str, dict[str, Callable[[Path], object]]]:
    """The real readers, by the kind of directory."""
    base = files["model"]
    output = base.parent / "output"
    options: dict[str, Any] = {"base": str(base), "overwrite": True, "show_progress": False}

    def described(path: Path) -> None:
        text = as_table(inspect(path, verify=True))
        assert not set(text) & {chr(code) for code in range(32) if code != 10}

    def resumed(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            newest_checkpoint(path.parent)
        checkpoint = TrainingCheckpoint(path)
        checkpoint.verify(SINGLE)
        decode_training_state(checkpoint, accumulate_grad_batches=3)
        earlier_run(checkpoint)
        checkpoint.close()

    def weights(path: Path) -> None:
        reader = CheckpointReader(path)
        for name in reader:
            shape = torch.Size(reader.info(name).shape)
            reader.flat(name, 0, min(shape.numel(), 10))
        open_plan(reader, LoraConfig(r=2, target_modules="all-linear"), backbone=build_skeleton(path))
        reader.close()

    def residual(path: Path) -> None:
        model = ResidualModel(path, Dense(dtype=torch.float32))
        plan = open_plan(model.reader, model.adapter, backbone=build_skeleton(path)).plan
        model.check(plan)
        for matrix in model.matrices(plan, SINGLE, torch.float32):
            model.residual.decode(matrix.residual, matrix.partition, torch.float32)
        model.close()

    def start(path: Path) -> None:
        adapter = StartingAdapter(path, for_residual=False)
        adapter.verify(SINGLE)
        backbone = build_skeleton(base)
        reader = CheckpointReader(base)
        plan = open_plan(reader, adapter.config, backbone=backbone, new_adapter=False).plan
        adapter.check(backbone, plan, reader, SINGLE)

    def data(path: Path) -> None:
        SFTDataModule(str(base.parent / "tokenizer"), str(path / "data.jsonl")).setup("fit")

    def reported(path: Path) -> None:
        report_table(report_of(read_manifest_of(path))[0])

    return {
        "model": {"inspect": described, "weights": weights},
        "checkpoint": {
            "inspect": described,
            "resume": resumed,
            "report": reported,
            "convert": lambda path: convert_checkpoint(path, output, overwrite=True),
            "convert to rank 2": lambda path: convert_checkpoint(path, output, rank=2, overwrite=True),
            "merge": lambda path: merge_checkpoint(path, base.parent / "merged", **options),
            "start": lambda path: start(path / "lora"),
        },
        "residual": {"inspect": described, "report": reported, "residual": residual},
        "adapter": {
            "inspect": described,
            "merge": lambda path: merge_checkpoint(path, base.parent / "merged", **options),
            "start": start,
        },
        "data": {"data": data},
    }


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore")
def test_damage_is_an_error_of_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    found, chance, faults = readers(files), random.Random(SEED), Counter[str]()
    for kind, by_name in found.items():  # undamaged, each reads
        for read in by_name.values():
            read(copied(files[kind], tmp_path / kind / "whole" / files[kind].name))
    for case in tqdm(range(CASES), desc="damaged", disable=CASES <= 1000):
        kind = chance.choices(list(found), [2, 6, 4, 3, 2])[0]
        name = chance.choice(list(found[kind]))
        path = copied(files[kind], tmp_path / kind / "case" / files[kind].name)
        every = [file for file in sorted(path.rglob("*")) if file.suffix in (".json", ".jsonl", ".safetensors")]
        some = chance.sample(every, min(len(every), chance.choice([1, 1, 1, 2])))
        done = [damage(file, chance) for file in some]
        if kind == "checkpoint" and chance.random() < 0.7:
            seal_again(path)
        wrong = fault(found[kind][name], path, (ValueError,) if kind == "data" else ())
        if wrong is not None:
            faults[f"{name}: {wrong}"] += 1
            print(f"case {case}: {kind}, {name}: {ascii(done)[:300]}: {wrong}")
    assert not faults, "\n".join(f"{count} x {wrong}" for wrong, count in faults.most_common())


def transposed(file: Path) -> None:
    """Exchange the sizes of the first matrix that is not square in the header; not a byte of a tensor changes."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = next(e for name, e in header.items() if name != "__metadata__" and len(set(e["shape"])) == 2)
    entry["shape"].reverse()
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def flipped(file: Path) -> None:
    """Change the lowest bit of the last number."""
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("change", [flipped, transposed])
@pytest.mark.parametrize("part", ["adapter", "adapter_init", "lora"])
def test_changed_tensors_do_not_become_weights(
    files: dict[str, Path], tmp_path: Path, part: str, change: Callable[[Path], None]
) -> None:
    """Finite numbers and headers that fit: only the hashes, which cover dtype and shape, tell the difference."""
    path, base = copied(files["checkpoint"], tmp_path / "step=2"), files["model"]
    assert inspect(path, verify=True).problems == []
    change(path / part / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"in {part}/adapter_model.safetensors is damaged"):
        convert_checkpoint(path, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="is damaged"):
        merge_checkpoint(path, tmp_path / "merged", base=str(base), show_progress=False)
    assert any("is damaged" in problem for problem in inspect(path, verify=True).problems)
    assert inspect(path).problems == []
    if part == "lora":
        with pytest.raises(CheckpointError, match="is damaged"):
            StartingAdapter(path / "lora", for_residual=False).verify(SINGLE)
    assert not (tmp_path / "lora").exists()
    assert not (tmp_path / "merged").exists()


def test_a_changed_lora_does_not_become_weights(files: dict[str, Path], tmp_path: Path) -> None:
    """A converted LoRA has hashes too; and a residual model is compared."""
    convert_checkpoint(files["checkpoint"], tmp_path / "lora")
    assert inspect(tmp_path / "lora", verify=True).facts["hashes compared"]
    flipped(tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        merge_checkpoint(tmp_path / "lora", tmp_path / "merged", base=str(files["model"]), show_progress=False)
    assert inspect(tmp_path / "lora", verify=True).problems
    residual = copied(files["residual"], tmp_path / "residual")
    assert inspect(residual, verify=True).problems == []
    flipped(residual / "pissa_init" / "adapter_model.safetensors")
    assert "differs from what was written" in inspect(residual, verify=True).problems[0]
