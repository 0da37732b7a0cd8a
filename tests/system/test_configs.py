"""Every file of configs/ is what its name says, and the parser of ``lowrank-dist fit`` takes it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy

from lowrank_dist import EVA, NF4, QERA, CorDA, LoftQ, LoRA, LoRAGA, PiSSA, PiSSAStrategy
from lowrank_dist.cli.plan import command
from lowrank_dist.cli.plan.command import parser, planned_run
from lowrank_dist.forecast import Forecast, ModelShapes
from lowrank_dist.inference.tasks.gsm8k import PEFT_PROMPT
from lowrank_dist.methods import Method
from lowrank_dist.quantization.stacks import DECODED_BYTES
from lowrank_dist.training.fit_cli import fit_parser, instantiated, parse_fit

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
NAME = re.compile(r"(?P<model>[a-z0-9.-]+)_(?P<method>[a-z]+)_(?P<count>\d+)(?P<kind>cpu|gpu)")
METHODS = {"lora": LoRA, "qlora": LoRA, "pissa": PiSSA, "qpissa": PiSSA, "loftq": LoftQ}
OTHERS = {"apollo", "full", "galore", "llama_pro", "longlora"}
QUANTIZED = {"qlora", "qpissa", "loftq"}

# jsonargparse fills every option of the configuration in, and peft warns of this one
pytestmark = pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@cache
def parsed_once(*paths: Path) -> Any:
    return parse_fit([f"--config={path}" for path in paths])


def parse(*paths: Path) -> Any:
    """Settings that the caller may change."""
    return parsed_once(*paths).clone()


def plan(*paths: Path) -> Forecast:
    """That of ``lowrank-dist plan``, whose settings have been parsed already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "parse_fit", lambda of_fit: parse(*(Path(one.partition("=")[2]) for one in of_fit)))
        return planned_run(*parser().parse_known_args([f"--config={path}" for path in paths]))


def parts_of(path: Path) -> dict[str, str]:
    match = NAME.fullmatch(path.stem)
    assert match is not None, f"{path.name} is not <model>_<method>_<devices>.yaml"
    return match.groupdict()


def test_the_six_runs_of_the_demo_model_are_there() -> None:
    methods = {parts_of(path)["method"] for path in FILES if path.stem.startswith("smollm2-135m_")}
    assert methods == {"full", *METHODS}


@each_file
def test_a_file_is_what_its_name_says(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    parts, settings = parts_of(path), parse(path)
    trainer = settings.trainer
    assert trainer.accelerator == parts["kind"]
    assert trainer.devices * trainer.num_nodes == int(parts["count"])
    assert trainer.default_root_dir == trainer.logger.init_args.save_dir == f"runs/{path.stem}"
    strategy = instantiated(settings, "trainer").strategy
    if parts["method"] == "full":
        assert type(strategy) is DDPStrategy
        return
    assert type(strategy) is PiSSAStrategy
    assert type(strategy.init) is METHODS[parts["method"]]
    assert isinstance(strategy.quantization, NF4 if parts["method"] in QUANTIZED else type(None))
    assert strategy.pretrained == settings.model.pretrained == settings.data.tokenizer
    assert strategy.adapter.r == strategy.adapter.lora_alpha


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith("cpu")], ids=lambda path: path.stem)
def test_cpu_runs_can_be_instantiated(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = parse(path)
    options = instantiated(settings, "trainer")
    trainer = L.Trainer(**vars(options))
    assert trainer.world_size == 2
    assert isinstance(instantiated(settings, "model"), L.LightningModule)
    assert isinstance(instantiated(settings, "data"), L.LightningDataModule)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_file_serves_all_commands(command: str) -> None:
    (path,) = (path for path in FILES if path.stem == "smollm2-135m_qpissa_2cpu")
    settings = fit_parser().parse_args([command, f"--config={path}"])[command]
    assert settings.model == parse(path).model


def test_the_runs_of_one_model_differ_in_the_method_only() -> None:
    """Same model, data, steps, batch: they differ in strategy, callbacks, rate, and where results go."""
    parsed = {path.stem: yaml.safe_load(path.read_text()) for path in FILES if path.stem.startswith("smollm2-135m_")}
    for settings in parsed.values():
        trainer = settings["trainer"]
        for key in ("strategy", "callbacks", "logger", "default_root_dir"):
            del trainer[key]
        assert settings["model"].pop("lr") in (2e-5, 3e-4, 3e-3)
    full = parsed.pop("smollm2-135m_full_2cpu")
    assert full["trainer"].pop("precision") == "bf16-mixed"
    (first, *others) = parsed.values()
    assert all(other == first for other in others)
    assert first["trainer"].pop("precision") == "bf16-true"
    assert full == first


UNKNOWN = {
    "trainer": ("trainer",),
    "model": ("model",),
    "data": ("data",),
    "strategy": ("trainer", "strategy", "init_args"),
    "adapter": ("trainer", "strategy", "init_args", "adapter", "init_args"),
    "init": ("trainer", "strategy", "init_args", "init", "init_args"),
    "quantization": ("trainer", "strategy", "init_args", "quantization", "init_args"),
    "callback": ("trainer", "callbacks", 0, "init_args"),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_unknown_keys_are_refused(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = (path for path in FILES if path.stem == "smollm2-135m_qpissa_2cpu")
    settings = yaml.safe_load(source.read_text())
    target = settings
    for key in UNKNOWN[place]:
        target = target[key]
    target["no_such_key"] = 1
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as stopped:
        parse(changed)
    assert stopped.value.code == 2
    assert "no_such_key" in capsys.readouterr().err


#: Mixtures of experts: how many matrices are adapted, and the bytes of their published files.
EXPERTS = {
    "qwen3-30b-a3b_8gpu": (48 * (4 + 2 * 128), 61.06e9),
    "qwen3-235b-a22b_8gpu": (94 * (4 + 2 * 128), 470.19e9),
    "gpt-oss-20b_1gpu": (24 * (4 + 2 * 32), 13.76e9),  # as published: 13.8 GB
    "gpt-oss-120b_8gpu": (36 * (4 + 2 * 128), 65.25e9),  # 65.3 GB
    "mixtral-8x22b_8gpu": (56 * (4 + 2 * 8), 281.24e9),  # 281 GB
    "deepseek-v3_16gpu": (61 * 5 + 58 * 2 * 256, 673.15e9),  # 688.6 GB with a layer that predicts two tokens
}
COMPARISON = "llama3.2-3b_1gpu"
SMALL = "smollm2-135m_1cpu"  # short runs that compare methods
BASES = sorted({path.stem for path in (CONFIGS / "base").glob("*.yaml")} - EXPERTS.keys() - {COMPARISON, SMALL})
# every base, every method, both ranks
PAIRS = [
    ("llama3-8b_8gpu", "full", None),
    ("llama3-8b_8gpu", "loftq", 64),
    ("mistral-7b_8gpu", "full", None),
    ("mistral-7b_8gpu", "lora", 128),
    ("llama3-70b_8gpu", "pissa", None),
    ("llama3-70b_32gpu", "qpissa", 64),
    ("qwen2-72b_8gpu", "qlora", None),
    ("qwen2-72b_32gpu", "qpissa", None),
]


CALIBRATED = {"corda": CorDA, "eva": EVA, "lora_ga": LoRAGA, "qera": QERA}


def composed(base: str, method: str, rank: int | None = None) -> list[Path]:
    paths = [CONFIGS / "base" / f"{base}.yaml", CONFIGS / "method" / f"{method}.yaml"]
    return paths if rank is None else [*paths, CONFIGS / "rank" / f"{rank}.yaml"]


@pytest.mark.parametrize("method", ["dora", "loraplus"])
def test_methods_that_are_compared_on_a_small_model(method: str) -> None:
    settings = parse(*composed(SMALL, method))
    strategy = instantiated(settings, "trainer").strategy
    assert type(strategy.init) is LoRA
    assert isinstance(strategy.quantization, NF4)
    assert (strategy.adapter.r, strategy.adapter.use_dora) == (16, method == "dora")
    assert settings.model.loraplus_lr_ratio == (16 if method == "loraplus" else 1)


@pytest.mark.parametrize(("method", "kind"), CALIBRATED.items())
def test_methods_that_look_at_data(method: str, kind: type[Method]) -> None:
    strategy = instantiated(parse(*composed(SMALL, method)), "trainer").strategy
    assert type(strategy.init) is kind
    assert isinstance(strategy.quantization, NF4)
    assert strategy.calibration.batches == 8


def test_the_large_models_are_there() -> None:
    assert {base for base, _, _ in PAIRS} == set(BASES)
    models = {base.partition("_")[0] for base in BASES}
    assert models == {"llama3-8b", "llama3-70b", "qwen2-72b", "mistral-7b"}
    assert {path.stem for path in (CONFIGS / "method").glob("*.yaml")} == {
        "apollo",
        "dora",
        "full",
        "galore",
        "llama_pro",
        "longlora",
        "loraplus",
        *CALIBRATED,
        *METHODS,
    }


@pytest.mark.parametrize(("base", "method", "rank"), PAIRS)
def test_a_base_with_a_method_is_the_papers_run(base: str, method: str, rank: int | None) -> None:
    """lr 2e-5, cosine, warm-up .03, 100 000 examples in steps of 128, one epoch, alpha = r, no dropout; it fits."""
    paths = composed(base, method, rank)
    settings = parse(*paths)
    model, data, trainer = settings.model, settings.data, settings.trainer
    assert (model.lr, model.warmup_ratio, model.scheduler, model.weight_decay) == (2e-5, 0.03, "cosine", 0.0)
    assert (data.limit, data.max_length, trainer.max_epochs) == (100_000, 512, 1)
    assert trainer.devices * trainer.num_nodes == int(base.partition("_")[2].removesuffix("gpu"))
    assert trainer.logger.init_args.name == method
    strategy = instantiated(settings, "trainer").strategy
    if method == "full":
        assert strategy.config["zero_optimization"]["stage"] == 2
    else:
        assert type(strategy.init) is METHODS[method]
        assert isinstance(strategy.quantization, NF4 if method in QUANTIZED else type(None))
        assert strategy.adapter.r == strategy.adapter.lora_alpha == (rank or 128)
        assert strategy.adapter.lora_dropout == 0
        assert strategy.pretrained == model.pretrained == data.tokenizer
    found = plan(*paths)
    assert found.job.global_batch == 128
    assert found.job.steps == 782
    assert found.fits
    assert found.activations_measured


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("gpt-oss-20b_1gpu", "qpissa"),
        *(
            pytest.param(base, method, marks=pytest.mark.matrix)
            for base, method in [
                ("qwen3-30b-a3b_8gpu", "pissa"),
                ("qwen3-235b-a22b_8gpu", "qlora"),
                ("gpt-oss-120b_8gpu", "loftq"),
                ("mixtral-8x22b_8gpu", "qpissa"),
                ("deepseek-v3_16gpu", "qpissa"),
            ]
        ),
    ],
)
def test_mixtures_of_experts_fit_their_cluster(
    base: str, method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks differ by rank_pattern, routers are frozen, experts are decoded half a gibibyte at a time."""
    matrices, nbytes = EXPERTS[base]
    seen: list[ModelShapes] = []
    plain = command.forecast
    monkeypatch.setattr(
        command, "forecast", lambda shapes, *args, **kw: (seen.append(shapes), plain(shapes, *args, **kw))[1]
    )
    found = plan(*composed(base, method))
    (shapes,) = seen
    assert found.fits
    assert found.activations_measured
    assert found.job.global_batch == 128
    assert f"_{found.job.ranks}gpu" in base
    assert len(shapes.plan.matrices) == matrices
    assert {m.rank for m in shapes.plan.matrices if m.expert is not None} == {8}
    assert {m.rank for m in shapes.plan.matrices if m.expert is None} == {64}
    assert {m.scaling for m in shapes.plan.matrices} == {1.0}
    routers = [p.names[0] for p in shapes.plan.parameters if re.search(r"mlp\.(gate|router)\.weight$", p.names[0])]
    assert routers
    assert not any(p.trainable for p in shapes.plan.parameters)
    assert shapes.checkpoint_bytes == pytest.approx(nbytes, rel=1e-3)
    assert found.memory.decoded < 2 * DECODED_BYTES + 2e8
    assert not caplog.records


@pytest.mark.parametrize("method", ["pissa", "qpissa"])
def test_the_settings_of_pefts_comparison(method: str) -> None:
    """Those of its `default_training_params.json` and of its LoRA of rank 32, whose trained parameters it publishes."""
    settings = parse(*composed(COMPARISON, method))
    model, data, trainer = settings.model, settings.data, settings.trainer
    assert (model.lr, model.weight_decay, model.warmup_ratio, model.scheduler) == (1e-4, 0.1, 0.1, "cosine")
    assert (data.max_length, data.batch_size, data.train_on, data.limit) == (768, 4, "everything", None)
    assert data.prompt_template == PEFT_PROMPT
    assert (trainer.max_steps, trainer.gradient_clip_val, trainer.devices) == (5000, 1.0, 1)
    strategy = instantiated(settings, "trainer").strategy
    assert (strategy.adapter.r, strategy.adapter.lora_alpha, strategy.adapter.lora_dropout) == (32, 64, 0.0)
    found = plan(*composed(COMPARISON, method))
    assert found.memory.resident["trained"] == 2 * 9_175_040
    assert found.fits
    assert found.job.steps == 5000


def test_copies_of_layers_are_planned() -> None:
    """Eight of the 32 layers of LLaMA-3-8B, whose 218 112 000 parameters each are trained in bf16 on 8 GPUs."""
    found = plan(*composed("llama3-8b_8gpu", "llama_pro"))
    assert found.memory.resident["trained"] == 2 * 218_112_000  # of a GPU: an eighth of eight copies
    assert found.fits


def test_embeddings_and_norms_beside_a_lora_are_planned() -> None:
    """LongLoRA on LLaMA-3-8B: a LoRA of rank 8 on the attention, the embedding, 65 norms; also before weights exist."""
    paths = composed("llama3-8b_8gpu", "longlora")
    lora = 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    found = plan(*paths)
    assert found.memory.resident["trained"] == 2 * (lora + 128256 * 4096 + 65 * 4096) // 8
    assert instantiated(parse(*paths), "model").shifted_attention == parse(*paths).data.max_length // 4


@pytest.mark.parametrize("method", ["galore", "apollo"])
def test_projected_gradients_are_planned(method: str) -> None:
    """LLaMA-3.2-3B in fp32 on one GPU: matrices have the state of few directions, the embedding has two moments."""
    found = plan(*composed(COMPARISON, method))
    rank = found.job.optimizer_rank
    of_layer = sum(
        count * rank * (8 * max(m, n) + 4 * min(m, n))
        for m, n, count in [(3072, 3072, 2), (1024, 3072, 2), (8192, 3072, 3)]
    )
    assert rank == {"galore": 128, "apollo": 256}[method]
    assert found.memory.resident["moments"] == 8 * (128256 * 3072 + 57 * 3072) + 28 * of_layer
    assert found.fits


def test_full_fine_tuning_of_70b_is_said_not_to_fit() -> None:
    paths = composed("llama3-70b_32gpu", "full")
    assert plan(*paths).fits is False


def test_the_reference_run_is_its_base_with_its_method() -> None:
    """`llama3-70b_qpissa_32gpu.yaml` is one file for those who want one; it differs in where results go."""
    whole, parts = (
        parse(CONFIGS / "llama3-70b_qpissa_32gpu.yaml"),
        parse(*composed("llama3-70b_32gpu", "qpissa")),
    )
    for settings in (whole, parts):
        for key in ("logger", "callbacks", "default_root_dir"):
            del settings.trainer[key]
        del settings["config"]
    assert whole == parts


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith("cpu")], ids=lambda path: path.stem)
def test_the_demos_runs_can_be_planned_before_the_model_is_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = plan(path)
    assert found.fits is None
    assert found.job.steps == 40
    assert found.memory.resident["trained"] > 0
