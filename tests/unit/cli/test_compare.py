"""Runs side by side: what tells them apart, which rate is chosen, what is left out, and what is said of it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lowrank_dist.cli import main
from lowrank_dist.cli.compare.groups import Figure
from lowrank_dist.cli.compare.runs import checkpoint_places
from lowrank_dist.cli.compare.settings import flat, names
from lowrank_dist.errors import InputError

PISSA = {"class_path": "lowrank_dist.PiSSA", "init_args": {"quantization_iterations": 5, "oversampling": None}}
LORA = {"class_path": "lowrank_dist.LoRA", "init_args": {"seed": None}}
NF4 = {"class_path": "lowrank_dist.NF4", "init_args": {"double_quant": True}}


def settings(init: dict[str, Any], *, lr: float = 1e-3, seed: int = 0, **adapter: Any) -> dict[str, Any]:
    arguments = {"init": init, "quantization": NF4, "adapter": {"class_path": "peft.LoraConfig", "init_args": adapter}}
    strategy = {"class_path": "lowrank_dist.PiSSAStrategy", "init_args": arguments}
    trainer = {"max_steps": 8, "strategy": strategy, "default_root_dir": f"runs/{lr}", "callbacks": None}
    return deepcopy({"seed_everything": seed, "trainer": trainer, "model": {"pretrained": "x", "lr": lr}})


def write_run(directory: Path, found: dict[str, Any], losses: dict[int, float | None], seconds: float = 10.0) -> None:
    """What `fit` writes of a run; `losses` of validations, the last one after `seconds`."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(found))
    last = max(losses)
    entries = [{"step": s, "loss": loss, "seconds": seconds * s / last} for s, loss in losses.items()]
    history = {"train": [{"step": last, "loss": 1.0, "seconds": seconds}], "validation": entries}
    (directory / "history.json").write_text(json.dumps(history))


def compared(root: Path, *options: str) -> dict[str, Any]:
    assert main(["compare", str(root), "--json", str(root / "out.json"), "--overwrite", *options]) == 0
    found: dict[str, Any] = json.loads((root / "out.json").read_text())
    return found


def test_methods_at_their_best_rate_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reached = {("pissa", 1e-4): (2.0, 2.2), ("pissa", 1e-3): (1.0, 1.4), ("pissa", 1e-2): (1.9, 1.9)}
    reached |= {("lora", 1e-4): (3.0, 3.0), ("lora", 1e-3): (1.5, 1.7), ("lora", 1e-2): (1.4, 1.6)}
    for (name, lr), losses in reached.items():
        for seed, loss in enumerate(losses):
            init, seconds = (PISSA, 20.0) if name == "pissa" else (LORA, 10.0 - seed)
            points = {0: 4.0, 4: 3.5, 8: loss}
            write_run(tmp_path / f"{name},{lr},{seed}", settings(init, lr=lr, seed=seed), points, seconds)
    found = compared(tmp_path, "--picture", str(tmp_path / "out.png"))
    best, second = found["methods"]
    assert (best["name"], best["best"], best["is_at_an_edge"]) == ("PiSSA", "0.001", False)
    assert best["loss"] == {"mean": pytest.approx(1.2), "deviation": pytest.approx(0.2 * 2**0.5), "runs": 2}
    assert (second["name"], second["best"], second["is_at_an_edge"]) == ("LoRA", "0.01", True)
    assert list(second["by_value"]) == ["0.0001", "0.001", "0.01"]
    assert found["seconds"] == 10.0  # in which both runs of LoRA had ended, and those of PiSSA came to step 4
    assert best["loss_at_equal_time"]["mean"] == 3.5
    assert second["loss_at_equal_time"]["mean"] == pytest.approx(1.5)
    text = capsys.readouterr().out
    assert "0.01*" in text
    assert "a better one may lie beyond" in text
    assert "1.2000 ± 0.2828" in text
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_what_cannot_be_compared_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"lora{seed}", settings(LORA, seed=seed), {0: 4.0, 8: 2.0})
    write_run(tmp_path / "stopped", settings(PISSA), {0: 4.0, 4: 3.0})
    write_run(tmp_path / "diverged", settings(PISSA, seed=1), {0: 4.0, 8: None})
    found = compared(tmp_path)
    assert found["left_out"] == {str(tmp_path / "stopped"): "ended at step 4, the others at step 8"}
    assert [method["loss"]["mean"] for method in found["methods"]] == [2.0, None]
    assert f"Left out: {tmp_path / 'stopped'}: ended at step 4" in (text := capsys.readouterr().out)
    assert "diverged" in text
    assert "Not every rate has the same number of runs." in text


def test_of_as_many_runs_that_ended_at_either_step_the_longer_count(tmp_path: Path) -> None:
    for seed, step in enumerate((4, 8, 4, 8)):
        write_run(tmp_path / str(seed), settings(LORA, seed=seed), {step: 2.0})
    found = compared(tmp_path)
    assert found["step"] == 8
    assert set(found["left_out"]) == {str(tmp_path / "0"), str(tmp_path / "2")}


def test_one_run_done_twice_is_no_second_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, settings(LORA), {8: 2.0})
    assert main(["compare", str(tmp_path)]) == 1
    assert "2 runs of all, learning rate 0.001, have seed 0: they are one run done twice" in capsys.readouterr().err


def test_another_setting_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its key in the configuration or as the table names it; the column and the notes are called after it."""
    for rank, loss in ((4, 2.0), (8, 1.0), (16, 1.5)):
        write_run(tmp_path / str(rank), settings(LORA, r=rank), {8: loss})
    for key in ("trainer.strategy.init_args.adapter.init_args.r", "trainer.strategy.adapter.r"):
        found = compared(tmp_path, "--choose", key, "--picture", str(tmp_path / "out.png"))
        assert found["chosen"] == "trainer.strategy.adapter.r"
        assert [method["best"] for method in found["methods"]] == ["8"]
        head, line, *_, notes = capsys.readouterr().out.replace("out.png", "").split("\n", 4)
        assert head.split()[:3] == ["method", "r", "tried"]
        assert line.split()[:3] == ["all", "8", "3"]
        assert "learning rate" not in notes


def test_values_without_an_order_have_no_edge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("adamw", "lion"):
        run = settings(LORA)
        run["model"]["optimizer"] = name
        write_run(tmp_path / name, run, {8: float(len(name))})
    (method,) = compared(tmp_path, "--choose", "model.optimizer", "--picture", str(tmp_path / "out.png"))["methods"]
    assert (method["best"], method["is_at_an_edge"]) == ("lion", False)


def test_an_unknown_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", settings(LORA, r=4), {8: 2.0})
    for key, meant in (("lr", "model.lr"), ("adapter.r", "trainer.strategy.adapter.r"), ("model.lrr", "model.lr or ")):
        assert main(["compare", str(tmp_path), "--choose", key]) == 1
        assert f"--choose {key}: no run has this setting; do you mean {meant}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "save_dir", "place"),
    [
        ("runs/a", None, "runs/a"),
        ("runs/a", "runs/b", "runs/b"),
        ("runs/a", "runs/b", "runs/b/lightning_logs/version_0"),
        (None, None, "lightning_logs/version_3"),
        (".", None, "."),
    ],
)
def test_a_relative_dirpath_counts_from_where_the_run_was_started(
    root: str | None, save_dir: str | None, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from where `compare` is; another run's checkpoints are there."""
    saves = {"class_path": "lowrank_dist.AdapterCheckpoint", "init_args": {"dirpath": "saved/a"}}
    logger = save_dir and {"class_path": "CSVLogger", "init_args": {"save_dir": save_dir}}
    trainer = {"default_root_dir": root, "logger": logger, "callbacks": [saves]}
    (tmp_path / "elsewhere" / "saved" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = list(checkpoint_places(Path("..") / "work" / place, {"trainer": trainer}))
    assert found == [tmp_path / "work" / "saved" / "a", Path("..") / "work" / place / "checkpoints"]


def test_a_relative_dirpath_of_a_run_that_does_not_tell_is_not_guessed(tmp_path: Path) -> None:
    saves = {"class_path": "lowrank_dist.AdapterCheckpoint", "init_args": {"dirpath": "saved"}}
    trainer = {"default_root_dir": "/far/away", "callbacks": saves}
    assert list(checkpoint_places(tmp_path, {"trainer": trainer})) == [tmp_path / "checkpoints"]
    saves["init_args"] = {"dirpath": "/saved"}
    assert list(checkpoint_places(tmp_path, {"trainer": trainer})) == [Path("/saved"), tmp_path / "checkpoints"]


def test_losses_of_csv_logger_serve_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings(LORA)))
    columns = "step,train_loss,val_loss,throughput/memory_resident_gb,tasks/add/exact_match"
    rows = [columns, "0,3.0,,0.5,0.0", "7,2.0,,0.75,", "7,,2.5,,0.25"]
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(rows) + "\n")
    (method,) = compared(tmp_path)["methods"]
    assert method["loss"]["mean"] == 2.5
    assert method["memory_gb"]["mean"] == 0.75
    assert method["loss_at_equal_time"] is None
    assert method["scores"]["add/exact_match"]["mean"] == 0.25


NO_LOSSES = '{"train": [], "validation": []}'
DAMAGED = {
    "no run": ({}, "no run here: no config.yaml"),
    "not yaml": ({"config.yaml": "a: [", "history.json": "{}"}, "not a configuration of `lowrank-dist fit`"),
    "not ours": ({"config.yaml": "a: 1", "history.json": "{}"}, "it has no `trainer`"),
    "a loop": (
        {"config.yaml": "trainer: &a {x: *a}", "history.json": NO_LOSSES},
        "or within themselves",
    ),
    "laughs": (
        {
            "config.yaml": "trainer: {}\na0: &a0 {x: 1}\n"
            + "\n".join(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 9)),
            "history.json": NO_LOSSES,
        },
        "more than 20000 entries",
    ),
    "history": ({"config.yaml": "trainer: {}", "history.json": '{"train": 3}'}, "train"),
    "no validation": (
        {"config.yaml": "trainer: {}", "history.json": '{"train": [{"step": 1, "loss": 1}], "validation": []}'},
        "set trainer.val_check_interval",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, message = DAMAGED[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["compare", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_names_are_the_shortest_that_tell_runs_apart() -> None:
    runs = [
        settings(PISSA, r=8),
        settings({**PISSA, "init_args": {"quantization_iterations": 1, "oversampling": None}}, r=8),
        settings(LORA, r=8),
        settings(LORA, r=16, use_dora=True),
    ]
    assert names([flat(run) for run in runs], without="model.lr") == [
        "PiSSA, quantization_iterations=5, r=8",
        "PiSSA, quantization_iterations=1, r=8",
        "LoRA, r=8",
        "LoRA, r=16, use_dora=True",
    ]
    # arguments of another class do not tell, nor does where a run writes
    assert names([flat(settings(PISSA)), flat(settings(LORA, lr=5.0))], without="model.lr") == ["PiSSA", "LoRA"]


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=1, max_size=6))
def test_equal_names_are_equal_settings(runs: list[dict[str, str]]) -> None:
    found = names(runs, without="lr")
    for run, name in zip(runs, found, strict=True):
        for other, other_name in zip(runs, found, strict=True):
            assert (name == other_name) == (run == other)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=5))
def test_a_figure_is_a_mean_of_what_is_known(values: list[float]) -> None:
    found = Figure.of([*values, None])
    assert found is not None
    assert found.runs == len(values)
    assert min(values) - 1e-9 <= found.mean <= max(values) + 1e-9
    assert Figure.of([None]) is None


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(InputError, match="more than 20000 entries"):
        flat({str(i): i for i in range(20_001)})
