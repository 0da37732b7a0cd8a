"""Residual models: written by 1 to 4 ranks, killed and resumed, read by stock peft and by the strategy."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.covering import covering
from helpers.faults import kill_after_commits
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.staging import staging_of
from helpers.training import CausalLM, dense_state, fit, loader, make_trainer, tokens
from lowrank_dist import NF4, LoftQ, LoRA, PiSSA, PiSSAStrategy
from lowrank_dist.decomposition.schedule import Sharding
from lowrank_dist.decomposition.walk import Walk
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.model.plan import open_plan
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.residual_model.create import decompose
from lowrank_dist.storage.layout import CONFIG, MANIFEST
from lowrank_dist.storage.lock import Lock, Owner, lock_of
from lowrank_dist.storage.reader import CheckpointReader
from lowrank_dist.storage.verify import damage

FP32 = torch.float32


def adapter(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def write(
    pretrained: Path, output: Path, init: Any = None, residual: Any = None, options: dict[str, Any] | None = None
) -> int:
    """Decompose `pretrained` into `output` on the ranks of the test; returns the bytes that this rank has read."""
    options = options or {}
    reader, config = CheckpointReader(pretrained), adapter(**options.get("adapter", {}))
    plan = open_plan(reader, config).plan
    walk = Walk(reader, ShardGroup(), init=init or PiSSA(), residual=residual or NF4(), factor_dtype=FP32)
    decompose(
        plan, walk, output, adapter=config, base=str(pretrained), sharding=options.get("sharding"),
        overwrite=options.get("overwrite", False), announce=options.get("announce", lambda _: None),
    )  # fmt: skip
    return reader.bytes_read


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()[0]).logits


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, with biases, bf16, one file."""
    directory = tmp_path_factory.mktemp("qwen")
    return save_checkpoint(directory, "qwen2", dtype=torch.bfloat16, max_shard_size="1GB")


# -- written ------------------------------------------------------------------------------------------------------


@covering(1, {"double_quant": [False, True], "world_size": [1, 2, 3, 4]})
def test_the_serialization_is_that_of_bitsandbytes(
    qwen: Path, tmp_path: Path, world_size: int, double_quant: bool
) -> None:
    """QLoRA keeps W: every tensor of the file equals what ``Linear4bit`` saves for it, given the offset of the maxima.

    The offset (a mean) may differ by a unit of rounding, which is why the 8-bit maxima are compared with it put in.
    """
    run_ranks(world_size, write, qwen, tmp_path / "out", LoRA(), NF4(double_quant=double_quant))
    found, weights = load_file(tmp_path / "out" / "model.safetensors"), load_file(qwen / "model.safetensors")
    for name, weight in weights.items():
        if (".self_attn." not in name and ".mlp." not in name) or not name.endswith("weight"):
            assert torch.equal(found.pop(name), weight)
            continue
        packed, state = bnb.functional.quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=double_quant)
        expected = {"": packed} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}
        ours = {suffix: found.pop(name + suffix) for suffix in expected}
        said, meant = (json.loads(bytes(t.pop(".quant_state.bitsandbytes__nf4")).decode()) for t in (ours, expected))
        assert said | {"dtype": "float32"} == meant | (
            {"nested_offset": pytest.approx(said["nested_offset"], rel=1e-6)} if double_quant else {}
        )
        absmax = expected.pop(".absmax"), ours.pop(".absmax")
        nested = expected.pop(".nested_absmax", None), ours.pop(".nested_absmax", None)
        assert all(torch.equal(ours[suffix], expected[suffix]) for suffix in expected)
        if double_quant:
            torch.testing.assert_close(nested[1], nested[0], rtol=1e-5, atol=0)
            assert (absmax[0].int() - absmax[1].int()).abs().max() <= 1
        else:
            assert torch.equal(*absmax)
    assert not found


@pytest.mark.parametrize("residual", [NF4(double_quant=True), NF4(block_size=128), Dense(dtype=FP32)], ids=str)
def test_stock_transformers_and_peft_load_it(tmp_path: Path, residual: Any) -> None:
    """Logits of the stock model equal those of the strategy that starts from the same directory."""
    # columns by 32 must be by `block_size` too, else bitsandbytes decodes them wrongly on a CPU with AVX-512
    base = save_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True, hidden_size=128)
    run_ranks(2, write, base, tmp_path / "out", PiSSA(), residual)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=FP32)
    linear = stock.model.layers[0].self_attn.q_proj
    assert isinstance(linear, bnb.nn.Linear4bit) == (not residual.exact)
    assert type(stock.lm_head) is torch.nn.Linear
    expected = logits(PeftModel.from_pretrained(stock, tmp_path / "out" / "pissa_init"))
    torch.testing.assert_close(started(2, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_bytes_do_not_depend_on_who_wrote_them(llama: Path, tmp_path: Path, world_size: int) -> None:
    """Over all ranks or a part of them each: equal files where nothing is summed over ranks (LoRA keeps W)."""
    run_ranks(1, write, llama, tmp_path / "one", LoRA(), NF4())
    for ranks in {1, world_size, 2 if world_size == 4 else 1}:
        options = {"sharding": Sharding(ranks_per_matrix=ranks)}
        run_ranks(world_size, write, llama, tmp_path / f"{ranks}", LoRA(), NF4(), options)
        for file in ("model.safetensors", "lora_init/adapter_model.safetensors"):
            assert (tmp_path / f"{ranks}" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


@pytest.mark.parametrize("init", [PiSSA(quantization_iterations=2), LoftQ()], ids=str)
def test_every_byte_is_read_once_and_the_rest_is_copied(llama: Path, tmp_path: Path, init: Any) -> None:
    for ranks in (1, 2):
        options = {"sharding": Sharding(ranks_per_matrix=ranks)}
        read = run_ranks(2, write, llama, tmp_path / str(ranks), init, NF4(), options)
        assert sum(read) == CheckpointReader(llama).nbytes
        assert min(read) > 0
    manifest = json.loads((tmp_path / "2" / "lowrank_dist.json").read_text())
    assert (manifest["method"], manifest["base"]) == (str(init), str(llama))
    assert len(manifest["matrices"]) == 14
    assert {m["group_size"] for m in manifest["matrices"]} == {2}
    assert sum(m["nbytes"] for m in manifest["matrices"]) < CheckpointReader(llama).nbytes


# -- read ---------------------------------------------------------------------------------------------------------


def start_here(directory: Path, options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
    strategy = PiSSAStrategy(directory, show_progress=False, **options)
    module = CausalLM(Path(options.get("config", directory)))
    trainer = make_trainer(strategy)
    seen = []

    class Seeing(CausalLM):
        def validation_step(self, batch: list[Tensor], _: int) -> None:
            seen.append(self.model(input_ids=tokens()[0], use_cache=False).logits)

    module = Seeing(directory)
    trainer.validate(module, loader(trainer.global_rank, trainer.world_size, 1), verbose=False)
    return seen[0], dense_state(strategy), strategy.init_report


def started(world_size: int, directory: Path, **options: Any) -> Tensor:
    """Logits at step 0 of a strategy that starts from `directory`."""
    return run_ranks(world_size, start_here, directory, options)[0][0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_strategy_starts_where_the_walk_would_have(llama: Path, tmp_path: Path, world_size: int) -> None:
    """Written by 2 ranks and read by others: every weight and factor is the one that 2 ranks' own walk gives."""
    options = {"adapter": adapter(), "init": PiSSA(), "quantization": NF4(double_quant=True)}
    run_ranks(2, write, llama, tmp_path / "out", PiSSA(), NF4(double_quant=True))
    _, walked, walk_report = run_ranks(2, start_here, llama, options)[0]
    _, stored, report = run_ranks(world_size, start_here, tmp_path / "out", {})[0]
    assert stored.keys() == walked.keys()
    for name, tensor in walked.items():
        assert torch.equal(stored[name], tensor), name
    assert [m.error for m in report.matrices] == [m.error for m in walk_report.matrices]
    assert report.bytes_read <= report.checkpoint_bytes


def cached(pretrained: Path, cache: Path, quantization: Any = None) -> tuple[list[float], dict[str, Tensor], int]:
    options = {"init_cache": cache, "quantization": quantization or NF4()}
    module, trainer = fit(pretrained, **options)
    return module.losses, {}, trainer.strategy.init_report.bytes_read


def test_the_cache_is_written_once_and_keyed_by_source_and_settings(llama: Path, tmp_path: Path) -> None:
    first = run_ranks(2, cached, llama, tmp_path / "cache")[0]
    (entry,) = (tmp_path / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in entry.rglob("*")}
    again = run_ranks(2, cached, llama, tmp_path / "cache")[0]
    assert again[0] == first[0]
    assert again[2] == first[2] < CheckpointReader(llama).nbytes  # packed
    assert {path: path.stat().st_mtime_ns for path in entry.rglob("*")} == before
    run_ranks(2, cached, llama, tmp_path / "cache", NF4(block_size=128))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    changed = shutil.copytree(llama, tmp_path / "changed")
    flip_a_byte(next(iter(sorted(changed.glob("*.safetensors")))))
    run_ranks(2, cached, changed, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # lowest bit of an fp32 number
    path.write_bytes(data)


@pytest.mark.parametrize("bits", [16, 4])
def test_models_that_others_publish_load(qwen: Path, tmp_path: Path, bits: int) -> None:
    """PEFT's own PiSSA, the residual saved by transformers (dense, or in 4 bits with double quantization)."""
    model = AutoModelForCausalLM.from_pretrained(qwen, dtype=FP32)
    model = get_peft_model(model, adapter(init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "out" / "pissa_init")
    model.unload().save_pretrained(tmp_path / "dense")
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=FP32
        )
        residual = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=quantization, dtype=FP32
        )
    else:
        residual = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=FP32)
    residual.save_pretrained(tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(residual, tmp_path / "out" / "pissa_init"))
    torch.testing.assert_close(started(2, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"adapter": adapter(r=8)}, ["adapter: r is 8", "decomposed with 4", "leave `adapter` out"]),
        ({"init": PiSSA(seed=1)}, ["init is", "PiSSA", "leave `init` out"]),
        ({"quantization": NF4(block_size=128)}, ["quantization is", "leave `quantization` out"]),
        (
            {"adapter": adapter(target_modules=["q_proj"])},
            ["k_proj.weight is stored quantized, and the adapter does not target it"],
        ),
    ],
    ids=["rank", "method", "format", "targets"],
)
def test_what_is_not_stored_is_refused(llama: Path, tmp_path: Path, options: Any, texts: list[str]) -> None:
    run_ranks(1, write, llama, tmp_path / "out", PiSSA(), NF4())
    for _, error in run_ranks_catching(2, start_here, tmp_path / "out", options):
        assert all(text in str(error) for text in texts)


# -- killed -------------------------------------------------------------------------------------------------------


# the cost model is measured anew in every run, and one rank alone rounds otherwise than two together
TOGETHER = {"sharding": Sharding(ranks_per_matrix=2)}


def write_until(pretrained: Path, output: Path, commits: int) -> None:
    """Write, and die of `kill_after_commits`."""
    kill_after_commits(commits)
    write(pretrained, output, PiSSA(quantization_iterations=5), None, TOGETHER)


def test_a_rerun_reads_only_what_the_journal_lacks(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_ranks_catching(2, write_until, llama, output, 3)
    entries = [json.loads(line) for line in (staging_of(output) / "journal.jsonl").read_text().splitlines()]
    done = sum(entry["nbytes"] for entry in entries[1:])
    assert len(entries) > 3
    read = run_ranks(2, write, llama, output, PiSSA(quantization_iterations=5), None, TOGETHER)
    assert sum(read) == CheckpointReader(llama).nbytes - done


def write_and_die(pretrained: Path, output: Path, after: float, victim: int) -> None:
    """Write; rank `victim` is killed (as by kill -9) `after` seconds, or at the moment it would have finished."""
    import lowrank_dist.residual_model.writer as module

    module.FLUSH_BYTES = 20_000
    if ShardGroup().rank == victim:
        threading.Thread(target=lambda: (time.sleep(after), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
    write(pretrained, output, PiSSA(quantization_iterations=5), None, TOGETHER)
    if ShardGroup().rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_any_moment_a_rerun_goes_on(llama: Path, tmp_path: Path, victim: int) -> None:
    """10 kills at moments spread over a run: never a partial directory, and the last run gives the undisturbed bytes.

    Every rerun keeps what the journal holds, so that the journal never shrinks.
    """
    run_ranks(2, write, llama, tmp_path / "whole", PiSSA(quantization_iterations=5), None, TOGETHER)
    output, kept = tmp_path / "out", 0
    for attempt in range(10):
        run_ranks_catching(2, write_and_die, llama, output, 0.005 * attempt * (attempt + 1), victim)
        if output.exists():
            break
        journals = list(tmp_path.glob(".out.*.partial/journal.jsonl"))
        lines = len(journals[0].read_text().splitlines()) if journals else 0
        assert lines >= kept
        kept = lines
    run_ranks(2, write, llama, output, PiSSA(quantization_iterations=5), None, TOGETHER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    for file in ("model.safetensors", "pissa_init/adapter_model.safetensors"):
        assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_model_of_links(llama: Path, tmp_path: Path) -> None:
    """It has a configuration in the end, or nothing is decomposed."""
    links = tmp_path / "links"
    links.mkdir()
    for path in llama.iterdir():
        (links / path.name).symlink_to(path)
    run_ranks(2, write, links, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    shutil.copy(llama / "config.json", tmp_path)
    (links / "config.json").unlink()
    (links / "config.json").symlink_to(tmp_path / "config.json")
    for _, error in run_ranks_catching(2, write, links, tmp_path / "other"):
        assert "where no weights of the model are" in str(error)
    assert not (tmp_path / "other").exists()


def test_what_is_in_the_way_is_not_touched(llama: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter-1").touch()
    for _, error in run_ranks_catching(2, write, llama, thesis, LoRA(), NF4(), {"overwrite": True}):
        assert "was not written by lowrank_dist" in str(error)
    assert [path.name for path in thesis.iterdir()] == ["chapter-1"]
    run_ranks(1, write, llama, tmp_path / "out", PiSSA(), NF4())
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    for _, error in run_ranks_catching(2, write, llama, tmp_path / "out", LoRA(), NF4()):
        assert "exists, and is not this model" in str(error)
    run_ranks(1, write, llama, tmp_path / "out", PiSSA(), NF4())  # the same again: nothing to do
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    run_ranks(2, write, llama, tmp_path / "out", LoRA(), NF4(), {"overwrite": True})
    assert json.loads((tmp_path / "out" / "lowrank_dist.json").read_text())["method"] == "LoRA"


def write_to_full_disk(pretrained: Path, output: Path) -> None:
    import lowrank_dist.storage.writer as module

    if ShardGroup().rank == 1:
        full = os.open("/dev/full", os.O_WRONLY)
        real = os.pwrite
        module.os.pwrite = lambda _, data, offset: real(full, data, 0)
    write(pretrained, output)


def test_a_full_disk_is_an_error_on_every_rank(llama: Path, tmp_path: Path) -> None:
    outcomes = run_ranks_catching(2, write_to_full_disk, llama, tmp_path / "out")
    assert all("No space left" in str(error) for _, error in outcomes)
    assert not (tmp_path / "out").exists()


def test_many_jobs_on_one_cache_wait_for_the_first(llama: Path, tmp_path: Path) -> None:
    """Four processes at once and no ``flock``; the first that gets the lock is killed in the middle, by ``kill -9``.

    By then the others wait and have said for whom. One takes over, and the rest start from its result.
    """
    program = f"""
        import fcntl, json, os
        from pathlib import Path
        from distributed.residual_model.test_create import write_one_of_many

        def refused(*_):
            raise OSError(38, "no locks on this file system")

        fcntl.flock = fcntl.lockf = refused
        directory, jobs = Path({str(tmp_path)!r}), []
        for job in range(4):  # they import only once
            jobs.append(os.fork())
            if jobs[-1] == 0:
                write_one_of_many(Path({str(llama)!r}), directory, job)
                os._exit(0)
        print("ended:", json.dumps([os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) for job in jobs]))
    """
    command, tests = [sys.executable, "-c", textwrap.dedent(program)], str(Path(__file__).parents[2])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": tests}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.partition("ended:")[2])
    assert sorted(codes) == [-signal.SIGKILL, 0, 0, 0], done
    said = [json.loads((tmp_path / f"job{job}.json").read_text()) for job, code in enumerate(codes) if code == 0]
    assert sum(any("another run is writing it (process " in line for line in lines) for lines, _ in said) == 3, said
    assert sorted(bytes_read > 0 for _, bytes_read in said) == [False, False, True], said
    run_ranks(1, write, llama, tmp_path / "whole")
    for file in ("model.safetensors", "pissa_init/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def write_one_of_many(pretrained: Path, directory: Path, job: int) -> None:
    """Write, and record what was said and the bytes that were read. The first dies midway, once the others wait."""
    import lowrank_dist.residual_model.writer as module

    module.FLUSH_BYTES, commit, left = 1, module.ResidualModelWriter.commit, iter(range(3))

    def counted(writer: module.ResidualModelWriter) -> None:
        commit(writer)
        if next(left, None) is None:
            with suppress(FileExistsError):
                (directory / "killed").mkdir()
                while len(list(directory.glob("waits*"))) < 3:
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)

    module.ResidualModelWriter.commit = counted  # type: ignore[method-assign]
    said: list[str] = []

    def announce(line: str) -> None:
        said.append(line)
        if "another run is writing it" in line:
            (directory / f"waits{job}").touch()

    bytes_read = write(pretrained, directory / "out", options={"announce": announce})
    (directory / f"job{job}.json").write_text(json.dumps([said, bytes_read]))


def test_a_dead_holder_on_another_host_is_waited_for_and_then_replaced(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Owner(host="node7", pid=1234, started="1", machine="0" * 16, since=1_700_000_000)
    path, said = lock_of(tmp_path / "out"), list[str]()
    path.mkdir()
    (path / elsewhere.token()).touch()  # its last sign of life; it is dead after `stale_after`
    monkeypatch.setattr("lowrank_dist.residual_model.writer.Lock", functools.partial(Lock, beat=0.3, stale_after=2))
    write(llama, tmp_path / "out", options={"announce": said.append})
    assert len([line for line in said if "process 1234 on node7" in line]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def damage_and_write_again(pretrained: Path, output: Path) -> list[tuple[str | None, list[str], bool]]:
    """For one file after the other, change a byte: what is found, what the next run says, and whether it mends it."""
    group, outcomes = ShardGroup(), []
    write(pretrained, output, LoRA(), NF4())
    initial = ("lora_init/adapter_model.safetensors", "lora_init/adapter_config.json")
    whole = {file: (output / file).read_bytes() for file in ("model.safetensors", *initial)}
    group.gather_objects(None)  # before the first file is changed
    for file in (*whole, MANIFEST):
        if group.rank == 0:
            data = bytearray((output / file).read_bytes())
            data[-5 if file.endswith("safetensors") else data.index(b"base") + 1] ^= 1
            (output / file).write_bytes(data)
        group.gather_objects(None)
        found, said = damage(output, group), list[str]()
        write(pretrained, output, LoRA(), NF4(), {"announce": said.append})
        outcomes.append((found, said, all((output / name).read_bytes() == data for name, data in whole.items())))
        group.gather_objects(None)  # before the next file is changed
    return outcomes


def test_a_changed_byte_is_found_and_the_model_written_again(llama: Path, tmp_path: Path) -> None:
    """In the residual, the initial adapter, its configuration, and the manifest."""
    for outcomes in run_ranks(2, damage_and_write_again, llama, tmp_path / "out"):
        assert len(outcomes) == 4
        for (found, said, mended), file in zip(outcomes, ("model", "adapter_model", CONFIG, MANIFEST), strict=True):
            assert found is not None
            assert file in found
            assert "differs from what was written" in found
            assert any("it is decomposed again" in line for line in said)
            assert mended


def test_a_damaged_model_is_not_trained_on(llama: Path, tmp_path: Path) -> None:
    run_ranks(1, write, llama, tmp_path / "out", PiSSA(), NF4())
    flip_a_byte(tmp_path / "out" / "pissa_init" / "adapter_model.safetensors")
    for _, error in run_ranks_catching(2, start_here, tmp_path / "out", {}):
        assert "differs from what was written" in str(error)


@alone
def lossy(pretrained: Path, output: Path) -> None:
    """Write, while one write of rank 1 is lost, as another program or a disk may lose it."""
    import lowrank_dist.storage.writer as module

    if ShardGroup().rank == 1:
        real, lost = os.pwrite, iter([True])
        module.os.pwrite = lambda fd, data, offset: len(data) if next(lost, False) else real(fd, data, offset)
    write(pretrained, output, LoRA(), NF4())


def test_what_did_not_reach_the_disk_is_not_published(llama: Path, tmp_path: Path) -> None:
    for _, error in run_ranks_catching(2, lossy, llama, tmp_path / "out"):
        assert "differs from what was written" in str(error)
    assert not (tmp_path / "out").exists()
    run_ranks(2, write, llama, tmp_path / "out", LoRA(), NF4())
    run_ranks(1, write, llama, tmp_path / "whole", LoRA(), NF4())
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
