"""Resuming from a checkpoint: the curve of an undisturbed run on any number of ranks, or an error that says why."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from helpers.ranks import alone, run_ranks, run_ranks_catching
from helpers.staging import RANDOM
from helpers.training import STEPS, CausalLM, fit, loader, make_strategy, make_trainer
from lowrank_dist import NF4, SVFT, AdapterCheckpoint, LoftQ, LoRA, LoRAXS, PiSSA
from lowrank_dist.callbacks import adapter_checkpoint

CUT = 3
_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val")


class Scheduled(CausalLM):
    """With a schedule and a metric, whose state must travel."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def make_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=2e-3)


class Paged(Scheduled):
    def make_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=2e-3)


class OnlyB(Scheduled):
    """Trains half of what requires gradients, as LoRA-FA does."""

    def make_optimizer(self, parameters: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for name, p in self.named_parameters() if "lora_B" in name], lr=2e-3)


def begin(pretrained: Path, output: Path, options: dict[str, Any], module: type[CausalLM] = Scheduled) -> list[float]:
    """Train to the end with a checkpoint at the cut; the losses of all steps."""
    trainer_options = {key: options[key] for key in _TRAINER if key in options}
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    model = module(pretrained)
    strategy = make_strategy(pretrained, **{k: v for k, v in options.items() if k not in _TRAINER})
    trainer = make_trainer(strategy, callbacks=[callback], enable_checkpointing=True, **trainer_options)
    batches = loader(trainer.global_rank, trainer.world_size, STEPS, trainer.accumulate_grad_batches)
    trainer.fit(model, batches)
    return per_step(model.losses, trainer.accumulate_grad_batches)


def go_on(
    pretrained: Path, checkpoint: Path | str, options: dict[str, Any], module: type[CausalLM] = Scheduled
) -> list[float]:
    """Resume, in a fresh model, with the data behind the cut; the losses of the remaining steps."""
    trainer_options = {key: options[key] for key in _TRAINER if key in options}
    strategy_options = {key: value for key, value in options.items() if key not in trainer_options}
    model = module(pretrained)
    trainer = make_trainer(make_strategy(pretrained, **strategy_options), **trainer_options)
    rest = loader(trainer.global_rank, trainer.world_size, STEPS, trainer.accumulate_grad_batches, first=CUT)
    trainer.fit(model, rest, ckpt_path=checkpoint)
    assert trainer.global_step == STEPS
    return per_step(model.losses, trainer.accumulate_grad_batches)


def per_step(losses: list[float], micro_batches: int) -> list[float]:
    """Mean over the micro-batches of every step."""
    return torch.tensor(losses).view(-1, micro_batches).mean(1).tolist()


Begun = Callable[..., tuple[Path, list[float]]]


@pytest.fixture(scope="module")
def begun(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """Checkpoints and losses of a run with the usual options on 2 ranks, by its module; each is run once."""

    @cache
    def run(module: type[CausalLM] = Scheduled) -> tuple[Path, list[float]]:
        output = tmp_path_factory.mktemp("begun") / "out"
        return output, run_ranks(2, begin, llama, output, {}, module)[0]

    return run


@pytest.fixture(scope="module")
def saved(llama: Path, begun: Begun) -> tuple[Path, Path]:
    """A base model and a checkpoint trained from it."""
    return llama, begun()[0] / f"step={CUT}"


@pytest.mark.parametrize(
    ("before", "after", "first", "then"),
    [
        (2, 2, {}, {}),
        (1, 2, {}, {}),
        (2, 3, {"quantization": NF4(double_quant=True)}, {}),
        (4, 1, {"init": LoRA()}, {}),
        (2, 1, {"accumulate_grad_batches": 3}, {"accumulate_grad_batches": 2}),
        (3, 2, {"quantization": None, "gradient_clip_val": 0.1}, {}),
        (2, 3, {"precision": "bf16-mixed"}, {}),
        (2, 2, {"init": LoRAXS()}, {}),
        (2, 3, {"init": SVFT(pattern="random", off_diagonal=1)}, {}),
        (2, 1, {"init": PiSSA(quantization_iterations=3)}, {}),
        (1, 3, {"init": LoftQ(quantization_iterations=2)}, {}),
    ],
    ids=str,
)
def test_the_curve_goes_on(
    llama: Path, begun: Begun, tmp_path: Path, before: int, after: int, first: dict[str, Any], then: dict[str, Any]
) -> None:
    """To fp32 rounding of sums over other numbers of ranks; bf16 arithmetic rounds its sums to 4e-3."""
    usual = before == 2 and not first
    output, whole = begun() if usual else (tmp_path, run_ranks(before, begin, llama, tmp_path, first)[0])
    rest = run_ranks(after, go_on, llama, output / f"step={CUT}", {**first, **then})[0]
    assert rest == pytest.approx(whole[CUT:], rel=4e-3 if "precision" in first else 1e-5)


def test_bf16_parameters_resume_with_their_masters(llama: Path, tmp_path: Path) -> None:
    """On as many ranks nothing is summed otherwise: the same numbers."""
    options = {"precision": "bf16-true"}
    whole = run_ranks(2, begin, llama, tmp_path, options)[0]
    assert run_ranks(2, go_on, llama, tmp_path / f"step={CUT}", options)[0] == whole[CUT:]


def test_8_bit_moments_resume_to_their_accuracy(llama: Path, begun: Begun) -> None:
    output, whole = begun(Paged)
    assert run_ranks(2, go_on, llama, output / f"step={CUT}", {}, Paged)[0] == pytest.approx(whole[CUT:], rel=1e-3)


def test_moments_go_over_to_another_adam(llama: Path, begun: Begun) -> None:
    """As where a run moves from CUDA, with bitsandbytes' optimizer, to a CPU, with torch's."""
    output, whole = begun(Paged)
    assert run_ranks(1, go_on, llama, output / f"step={CUT}", {})[0] == pytest.approx(whole[CUT:], rel=5e-3)


def test_nothing_in_it_runs_code(begun: Begun) -> None:
    files = [path for path in begun()[0].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    trained = 28 * 4 * 136 * 4  # an upper bound of the bytes of all factors in fp32
    assert sum(path.stat().st_size for path in files) / 2 < 7 * trained + 100_000


# -- the newest -----------------------------------------------------------------------------------------------------


def go_on_with_last(pretrained: Path, output: Path) -> tuple[int, list[float]]:
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=2, save_top_k=1)
    model = Scheduled(pretrained)
    trainer = make_trainer(make_strategy(pretrained), callbacks=[callback], enable_checkpointing=True)
    seen: list[int] = []
    model.on_train_start = lambda: seen.append(trainer.global_step)
    rest = loader(trainer.global_rank, trainer.world_size, STEPS, first=CUT)
    trainer.fit(model, rest, ckpt_path="last")
    return seen[0], model.losses


@pytest.mark.parametrize("damage", ["manifest", "junk", "tensor", "state"])
def test_last_is_the_newest_good_one(llama: Path, begun: Begun, tmp_path: Path, damage: str) -> None:
    """Damaged in the manifest, which the search finds, or in what only the comparison with the hashes finds."""
    output, whole = begun()
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / f"step={STEPS}"
    manifest = newest / "lowrank_dist.json"
    if damage == "manifest":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 999}))
    elif damage == "junk":
        manifest.write_text('{"kind": ["checkpoint"], "format": 3, "step": {"a": "x"}, "hashes": 7}')
    else:
        file = newest / ("optimizer.safetensors" if damage == "tensor" else "state.json")
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    (tmp_path / f".step=9.{RANDOM}.partial").mkdir()
    step, losses = run_ranks(2, go_on_with_last, llama, tmp_path)[0]
    assert step == CUT
    assert losses == pytest.approx(whole[CUT:], rel=1e-5)
    assert not (tmp_path / f".step=9.{RANDOM}.partial").exists()


def fit_some(pretrained: Path, output: Path, steps: int, ckpt_path: str | None) -> tuple[int, list[str]]:
    """The step from which it began, and warnings of this package's callback."""
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=2, save_top_k=1)
    model, said = Scheduled(pretrained), _Lines()
    trainer = make_trainer(make_strategy(pretrained), steps=steps, callbacks=[callback], enable_checkpointing=True)
    seen: list[int] = []
    model.on_train_start = lambda: seen.append(trainer.global_step)
    logger = logging.getLogger("lowrank_dist.callbacks.adapter_checkpoint")
    logger.addHandler(said)
    trainer.fit(model, loader(trainer.global_rank, trainer.world_size, STEPS), ckpt_path=ckpt_path)
    logger.removeHandler(said)
    return seen[0], said.lines


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_last_is_of_the_run_that_wrote_last(llama: Path, begun: Begun, tmp_path: Path) -> None:
    """A second run in the same directory is not as far as the first; it goes on, and the first one's files stay."""
    output, _ = begun()
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    earlier = {f"step={CUT}", f"step={STEPS}"}
    step, said = run_ranks(2, fit_some, llama, tmp_path, 2, None)[0]
    assert step == 0
    assert "has checkpoints of an earlier run (step=" in said[0]
    assert {path.name for path in tmp_path.iterdir()} == {*earlier, "step=2"}
    step, said = run_ranks(1, fit_some, llama, tmp_path, 4, "last")[0]
    assert (step, said) == (2, [])
    assert {path.name for path in tmp_path.iterdir()} == {*earlier, "step=4"}


@alone
def go_on_with_less_to_see(pretrained: Path, output: Path, blind: int) -> None:
    if torch.distributed.get_rank() == blind:
        adapter_checkpoint.checkpoints = lambda _: []
    go_on_with_last(pretrained, output)


@pytest.mark.parametrize("blind", [0, 1])
def test_ranks_that_see_no_checkpoint_do_not_begin_anew(llama: Path, begun: Begun, tmp_path: Path, blind: int) -> None:
    """A file system that shows new files late, on one rank; it may pass, so that a job starts again."""
    output, _ = begun()
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    for _, error in run_ranks_catching(2, go_on_with_less_to_see, llama, tmp_path, blind):
        assert f"not all ranks see {tmp_path}/step={STEPS} (rank {blind} does not)" in str(error)
        assert "OSError: [Errno 116]" in str(error)


def begin_from_a_cache(pretrained: Path, output: Path, options: dict[str, Any]) -> list[float]:
    return begin(pretrained, output, {"init_cache": output.parent / "cache", **options})


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_run_from_a_cache_resumes_without_it(llama: Path, tmp_path: Path, damage: str) -> None:
    """QPiSSA's residual encodes other factors than the initial ones; the checkpoint has both. Tolerance: sum order."""
    options = {"init": PiSSA(quantization_iterations=3)}
    whole = run_ranks(2, begin_from_a_cache, llama, tmp_path / "out", options)[0]
    if damage == "removed":
        shutil.rmtree(tmp_path / "cache")
    else:
        (entry,) = (tmp_path / "cache").iterdir()
        data = bytearray((entry / "model.safetensors").read_bytes())
        data[-700] ^= 1
        (entry / "model.safetensors").write_bytes(data)
    options["init_cache"] = tmp_path / "cache"
    losses = run_ranks(2, go_on, llama, tmp_path / "out" / f"step={CUT}", options)[0]
    assert losses == pytest.approx(whole[CUT:], rel=1e-5)


def test_without_any_the_run_begins_anew(llama: Path, tmp_path: Path) -> None:
    step, _ = run_ranks(2, go_on_with_last, llama, tmp_path / "empty")[0]
    assert step == 0


# -- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(pretrained: Path, checkpoint: Path) -> list[float]:
    trainer = make_trainer(make_strategy(pretrained))
    batches = loader(trainer.global_rank, trainer.world_size, 2)
    first = trainer.validate(CausalLM(pretrained), batches, verbose=False)[0]["val_loss"]
    trainer = make_trainer(make_strategy(pretrained))
    second = trainer.validate(CausalLM(pretrained), batches, ckpt_path=checkpoint, verbose=False)[0]["val_loss"]
    return [first, second]


def fit_and_evaluate(pretrained: Path, output: Path) -> list[float]:
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    trainer = make_trainer(make_strategy(pretrained), callbacks=[callback], enable_checkpointing=True)
    model = CausalLM(pretrained)
    trainer.fit(model, loader(trainer.global_rank, trainer.world_size))
    batches = loader(trainer.global_rank, trainer.world_size, 2)
    paths = [None, output / f"step={CUT}", output / f"step={STEPS}"]
    return [trainer.test(model, batches, ckpt_path=path, verbose=False)[0]["val_loss"] for path in paths]


def test_checkpoints_are_evaluated(llama: Path, tmp_path: Path) -> None:
    trained, earlier, last = run_ranks(2, fit_and_evaluate, llama, tmp_path)[0]
    assert last == trained
    assert earlier != trained
    untrained, loaded = run_ranks(1, evaluate, llama, tmp_path / f"step={CUT}")[0]
    assert loaded == pytest.approx(earlier, rel=1e-5)
    assert untrained != pytest.approx(earlier, rel=1e-3)


# -- refused --------------------------------------------------------------------------------------------------------


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (lambda c: flip(c / "adapter/adapter_model.safetensors", 0.9), ["adapter_model.safetensors is damaged"]),
        (lambda c: flip(c / "optimizer.safetensors", 0.9), ["in optimizer.safetensors is damaged"]),
        (lambda c: flip(c / "adapter_init/adapter_model.safetensors", 0.8), ["adapter_init", "is damaged"]),
        (lambda c: flip(c / "state.safetensors", 0.9), ["state.safetensors is damaged"]),
        (lambda c: flip(c / "state.json", 0.5), ["state.json is damaged"]),
        (lambda c: flip(c / "adapter/adapter_config.json", 0.5), ["adapter_config.json is damaged"]),
        (lambda c: flip(c / "lowrank_dist.json", 0.5), ["lowrank_dist.json: damaged"]),
        (lambda c: cut(c / "optimizer.safetensors"), ["optimizer.safetensors", "truncated"]),
        (lambda c: (c / "state.json").unlink(), ["state.json is damaged"]),
        (lambda c: (c / "lowrank_dist.json").unlink(), ["holds no lowrank_dist.json"]),
        (lambda c: shutil.rmtree(c), ["holds no lowrank_dist.json"]),
    ],
    ids=[
        "adapter", "optimizer", "initial", "generators", "state", "configuration", "manifest", "truncated", "missing",
        "foreign", "nothing",
    ],
)  # fmt: skip
def test_damage_is_named(
    saved: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], object], texts: list[str]
) -> None:
    base, checkpoint = saved
    shutil.copytree(checkpoint, tmp_path / "copy")
    damage(tmp_path / "copy")
    for _, error in run_ranks_catching(2, go_on, base, tmp_path / "copy", {}):
        assert all(text in str(error) for text in texts), error


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            {"adapter": LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")},
            ["r=4 (now 8)", "lora_alpha=4 (now 8)", "resume with the same configuration"],
        ),
        (
            {"adapter": LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", alpha_pattern={"q_proj": 8})},
            ["alpha_pattern={} (now {'q_proj': 8})"],
        ),
        ({"fp32_norms": True}, ["fp32_norms is True", "had False"]),
        (
            {"adapter": LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"])},
            ["trained 28 tensors", "this run trains 4", "down_proj"],
        ),
        ({"quantization": None}, ["quantization is None", "NF4(block_size=64, double_quant=False)"]),
        ({"init": LoRA()}, ["method is 'LoRA'", "'PiSSA'"]),
    ],
    ids=["rank", "scaling", "norms", "targets", "format", "method"],
)
def test_another_setting_is_refused(saved: tuple[Path, Path], options: dict[str, Any], texts: list[str]) -> None:
    for _, error in run_ranks_catching(2, go_on, *saved, options):
        assert all(text in str(error) for text in texts), error


def test_the_same_numbers_at_other_entries_are_refused(llama: Path, tmp_path: Path) -> None:
    """SVFT's parameters have the same names and shapes, whatever the positions that they belong to."""
    run_ranks(2, begin, llama, tmp_path, {"init": SVFT(pattern="random", off_diagonal=1)})
    for other in (SVFT(pattern="random", off_diagonal=1, pattern_seed=1), SVFT(pattern="banded", off_diagonal=1)):
        for _, error in run_ranks_catching(2, go_on, llama, tmp_path / f"step={CUT}", {"init": other}):
            assert "CheckpointError" in str(error)
            assert "core is {" in str(error), error


def test_another_base_is_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, checkpoint = saved
    shutil.copytree(base, tmp_path / "base")
    flip(next((tmp_path / "base").glob("*.safetensors")), 0.7)
    for _, error in run_ranks_catching(2, go_on, tmp_path / "base", checkpoint, {}):
        assert "the pretrained weights have changed" in str(error), error


def save_weights_only(pretrained: Path, output: Path) -> None:
    _, trainer = fit(pretrained, steps=2)
    trainer.save_checkpoint(output / "weights", weights_only=True)
    trainer.strategy.save_adapter(output / "adapter")


def test_weights_only(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = saved
    run_ranks(2, save_weights_only, base, tmp_path)
    for name in ("weights", "adapter"):
        assert not (tmp_path / name / "optimizer.safetensors").exists()
        for _, error in run_ranks_catching(2, go_on, base, tmp_path / name, {}):
            assert "weights_only: there is nothing to resume from" in str(error)
        untrained, loaded = run_ranks(2, evaluate, base, tmp_path / name)[0]
        assert untrained != loaded


class Stubborn(AdapterCheckpoint):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "function": lambda: None}


def save_a_function(pretrained: Path, output: Path) -> None:
    callback = Stubborn(dirpath=output, every_n_train_steps=2)
    fit(pretrained, steps=2, callbacks=[callback], enable_checkpointing=True)


def test_state_that_needs_pickle_is_named(saved: tuple[Path, Path], tmp_path: Path) -> None:
    for _, error in run_ranks_catching(2, save_a_function, saved[0], tmp_path):
        assert "['function']: a builtins.function cannot be stored without pickle" in str(error)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_optimizer_of_some_parameters(llama: Path, tmp_path: Path, precision: str) -> None:
    """What it does not have is saved and resumed as it is."""
    whole = run_ranks(2, begin, llama, tmp_path, {"precision": precision}, OnlyB)[0]
    checkpoint = tmp_path / f"step={CUT}"
    trained, initial = (
        load_file(checkpoint / part / "adapter_model.safetensors") for part in ("adapter", "adapter_init")
    )
    for name, tensor in trained.items():
        assert tensor.any()
        assert torch.equal(tensor, initial[name]) == ("lora_A" in name)
    rest = run_ranks(3, go_on, llama, checkpoint, {"precision": precision}, OnlyB)[0]
    assert rest == pytest.approx(whole[CUT:], rel=1e-5 if precision == "32-true" else 1e-2)
