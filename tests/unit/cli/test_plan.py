"""``lowrank-dist plan``: where it finds a model, what it says, and whether what it advises is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file

from helpers.models import save_checkpoint
from lowrank_dist import NF4, LoRA, PiSSA, PreferenceModule
from lowrank_dist.cli import main
from lowrank_dist.cli.plan.command import DOES_NOT_FIT, parser, planned_run
from lowrank_dist.errors import InputError
from lowrank_dist.forecast import Forecast, ModelShapes, RunSpec, forecast
from lowrank_dist.forecast.job import parameters
from lowrank_dist.forecast.traffic import traffic
from lowrank_dist.quantization.dense import Dense

CONFIGS = Path(__file__).parents[3] / "configs"
EIGHT = [f"--config={CONFIGS / 'base' / 'llama3-8b_8gpu.yaml'}", f"--config={CONFIGS / 'method' / 'qpissa.yaml'}"]
LINEARS = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")


def plan(*arguments: str) -> Forecast:
    return planned_run(*parser().parse_known_args(list(arguments)))


PUBLISHED = {  # parameters, as the models' pages on the hub say
    "Meta-Llama-3-8B": 8_030_261_248,
    "Meta-Llama-3-70B": 70_553_706_496,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2-72B": 72_706_203_648,
    "smollm2-135m-instruct": 134_515_008,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Mixtral-8x22B-v0.1": 140_620_634_112,
    "DeepSeek-V3": 671_026_404_352,
    "Llama-3.2-3B": 3_212_749_824,
}
QUANTIZED = {"gpt-oss-20b", "gpt-oss-120b", "DeepSeek-V3"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_kept_with_the_configs_have_the_published_size(name: str) -> None:
    shapes = ModelShapes.of(CONFIGS / "models" / f"{name}.json", None)
    assert {path.stem for path in (CONFIGS / "models").iterdir()} == set(PUBLISHED)
    assert sum(p.numel() for p in shapes.backbone.parameters()) == PUBLISHED[name]
    assert (shapes.checkpoint_bytes < 1.1 * PUBLISHED[name]) == (name in QUANTIZED)
    assert shapes.checkpoint_bytes == 2 * PUBLISHED[name] or name in QUANTIZED


def test_a_directory_goes_before_what_is_kept_with_the_configs(tmp_path: Path) -> None:
    """Its own headers count: a checkpoint in fp32 is twice as large as one in bf16."""
    directory = save_checkpoint(tmp_path / "Meta-Llama-3-8B", "llama", tie_word_embeddings=False)
    nbytes = ModelShapes.of(directory, None).checkpoint_bytes
    init_args = "--trainer.strategy.init_args.pretrained"
    world = "--trainer.strategy.init_args.shard_within=world"
    found = plan(*EIGHT, f"{init_args}={directory}", "--trainer.strategy.init_args.adapter.init_args.r=4", world)
    assert (
        found.disk_reads == nbytes == sum(4 * p.numel() for p in ModelShapes.of(directory, None).backbone.parameters())
    )


def test_an_index_without_weights_is_enough(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model", "llama")
    with_weights = ModelShapes.of(directory, LINEARS)
    for path in directory.glob("*.safetensors"):
        path.unlink()
    without = ModelShapes.of(directory, LINEARS)
    assert (directory / "model.safetensors.index.json").is_file()
    assert [(m.name, m.rows, m.columns) for m in without.plan.matrices] == [
        (m.name, m.rows, m.columns) for m in with_weights.plan.matrices
    ]
    assert without.checkpoint_bytes == with_weights.checkpoint_bytes


def test_a_damaged_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model", "llama")
    next(iter(directory.glob("*.safetensors"))).unlink()
    with pytest.raises(ValueError, match="missing, though the index names it"):
        ModelShapes.of(directory, LINEARS)


def test_an_adapter_of_another_type_to_start_from(tmp_path: Path) -> None:
    """What a directory holds is planned as its configuration is, without weights of the model."""
    adapter = {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    empty = {"unused": torch.zeros(1)}
    save_file(empty, tmp_path / "adapter" / "adapter_model.safetensors")
    strategy = "--trainer.strategy.init_args"
    world = f"{strategy}.shard_within=world"
    from_config = (f"{strategy}.adapter=peft.VeraConfig", f"{strategy}.adapter.init_args.r=8")
    targets = f"{strategy}.adapter.init_args.target_modules=[q_proj]"
    init = f"{strategy}.init=null"
    found = plan(*EIGHT, f"{strategy}.adapter={tmp_path / 'adapter'}", init, world)
    expected = plan(*EIGHT, *from_config, targets, init, world)
    assert found.memory.resident == expected.memory.resident
    assert found.memory.resident["trained"] > 0


def test_unknown_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EIGHT, "--trainer.strategy.init_args.pretrained=nobody/nothing"]) == 1
    said = capsys.readouterr().err
    assert "'nobody/nothing'" in said
    assert "--model-config" in said


def test_too_high_a_rank_is_refused_as_by_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    adapter = "--trainer.strategy.init_args.adapter.init_args"
    assert main(["plan", *EIGHT, f"{adapter}.r=2000", f"{adapter}.target_modules=[k_proj]"]) == 1
    assert "rank=2000 exceeds min(out, in)=1024" in capsys.readouterr().err


def test_table_and_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EIGHT]) == 0
    table = capsys.readouterr().out
    assert main(["plan", *EIGHT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["ranks"] == 8
    resident = found["memory"]["resident"]
    for text, nbytes in (("codes of the residual", resident["codes"]), ("optimizer's moments", resident["moments"])):
        (shown,) = re.findall(rf"{text} +([\d.]+) (MB|GB)", table)
        assert float(shown[0]) == pytest.approx(nbytes / {"MB": 1e6, "GB": 1e9}[shown[1]], abs=0.005)
    assert f"{found['memory']['peak'] / 1e9:.2f} GB of 74.00 GB" in table


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A plan for a tiny model."""
    directory = save_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")
    return [*EIGHT, f"--model-config={directory}", "--trainer.strategy.init_args.adapter.init_args.r=4", "--reserve=0"]


def test_the_program_writes_all_before_it_ends(tiny: list[str]) -> None:
    """The process ends without tearing down what it has imported; it writes nothing else."""
    command = [sys.executable, "-m", "lowrank_dist.cli", "plan", *tiny, "--json", "--gpu-memory=1e-6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert json.loads(done.stdout)["fits"] is False
    assert (done.returncode, done.stderr) == (DOES_NOT_FIT, "")


def test_nodes_and_gpus_can_be_given(tiny: list[str]) -> None:
    found = plan(*tiny, "--nodes=2", "--gpus-per-node=4", "--data.batch_size=2")
    assert (found.job.nodes, found.job.gpus_per_node, found.job.batch_size) == (2, 4, 2)
    assert found.traffic.into_node > 0
    assert plan(*tiny).traffic.into_node == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory=-5"], "--gpu-memory -5.0 must be positive"),
        (["--gpu-memory=nan"], "--gpu-memory nan must be positive"),
        (["--tflops=0"], "--tflops 0.0 must be positive"),
        (["--nodes=0"], "--nodes 0 must be positive"),
        (["--reserve=-1"], "--reserve -1.0 must not be negative"),
        (["--gpu-memory=8", "--reserve=8"], "--reserve 8 leaves nothing of --gpu-memory 8; lower it"),
        (["--nodes=2", "--trainer.num_nodes=4"], "--nodes and --trainer.num_nodes are the same; leave one of them out"),
        (["--trainer.accelerator=cpu", "--gpu-memory=0.001"], "--gpu-memory 0.001 has no effect, because trainer.acc"),
        (["--trainer.accelerator=cpu", "--bandwidth-within=1"], "--bandwidth-within 1 has no effect"),
    ],
)
def test_options_that_cannot_be_or_have_no_effect(tiny: list[str], options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        plan(*(argument for argument in tiny if argument != "--reserve=0"), *options)


def test_on_cpus_nothing_is_said_of_a_limit(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for argument in tiny if argument != "--reserve=0"]
    assert main(["plan", *arguments, "--trainer.accelerator=cpu"]) == 0
    assert "The ranks share the memory of their host" in capsys.readouterr().out


def test_what_is_advised_fits(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of batches of 32, where half of it would fit."""
    whole, half = (plan(*tiny, f"--data.batch_size={size}").memory.peak for size in (32, 16))
    arguments = [*tiny, "--data.batch_size=32", f"--gpu-memory={(whole + half) / 2e9}"]
    assert main(["plan", *arguments, "--json"]) == DOES_NOT_FIT
    found = json.loads(capsys.readouterr().out)
    advice = [remedy for remedy in found["remedies"] if remedy.startswith("data.batch_size")]
    assert len(advice) == 1  # the mildest
    changes = re.fullmatch(r"data.batch_size: (\d+) and trainer.accumulate_grad_batches: (\d+)", advice[0])
    assert changes is not None
    size, accumulate = changes.groups()
    assert int(size) == 16
    other = plan(*arguments, f"--data.batch_size={size}", f"--trainer.accumulate_grad_batches={accumulate}")
    assert other.fits
    assert other.job.global_batch == found["global_batch"]


@pytest.mark.parametrize(
    ("options", "advised"),
    [
        (["--model.class_path=lowrank_dist.PreferenceModule", "--data.batch_size=16"], "data.batch_size"),
        (["--data.tokens_per_batch=16384", "--data.max_length=512", "--data.batch_size=1"], "data.tokens_per_batch"),
    ],
)
def test_what_is_advised_of_pairs_and_of_tokens_fits(tiny: list[str], options: list[str], advised: str) -> None:
    """They have 32 rows, where half of them would fit."""
    arguments = [*tiny, *(option.replace("--model.class_path", "--model") for option in options)]
    found = plan(*arguments)
    assert found.job.batch_size == 32
    name, _, number = next(o for o in options if o.startswith(f"--{advised}")).partition("=")
    half = plan(*arguments, f"{name}={int(number) // 2}")
    limit = f"--gpu-memory={(found.memory.peak + half.memory.peak) / 2e9}"
    (advice,) = (remedy for remedy in plan(*arguments, limit).remedies if remedy.startswith("data."))
    assert advice == f"{advised}: {int(number) // 2} and trainer.accumulate_grad_batches: {2 * found.job.accumulate}"
    assert plan(*arguments, limit, f"{name}={int(number) // 2}").fits


def test_a_reference_is_kept_for_dpo_alone(tiny: list[str]) -> None:
    pairs = [*tiny, "--model=lowrank_dist.PreferenceModule"]
    dpo, orpo = plan(*pairs).memory.resident, plan(*pairs, "--model.init_args.loss=orpo").memory.resident
    assert dpo["reference"] == dpo["trained"] > 0
    assert orpo == {**dpo, "reference": 0}


def test_a_users_class_of_pairs_is_planned_as_such(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constructor does not take the loss."""

    class Fixed(PreferenceModule):
        def __init__(self, pretrained: str) -> None:
            super().__init__(pretrained, loss="dpo")

    users = ModuleType("module_of_a_user")
    users.Fixed, Fixed.__module__, Fixed.__qualname__ = Fixed, users.__name__, "Fixed"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, users.__name__, users)
    pretrained = "--model.init_args.pretrained=x"
    found = plan(*tiny, "--model=module_of_a_user.Fixed", pretrained, "--data.batch_size=3")
    assert found.job.batch_size == 6
    assert found.memory.resident["reference"] > 0


def test_a_loss_in_chunks_has_few_logits() -> None:
    whole, chunks = (plan(*EIGHT, f"--model.fused_cross_entropy={value}") for value in ("false", "true"))
    assert chunks.memory.logits < whole.memory.logits / 10
    assert chunks.memory.resident == whole.memory.resident


def test_a_decomposed_model_is_read_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, stored = save_checkpoint(tmp_path / "model", "llama"), tmp_path / "stored"
    argv = ["--pretrained", directory, "--output", stored, "--method", "qpissa", "--rank", 4, "--devices", 1]
    assert main(["decompose", *map(str, argv)]) == 0
    strategy = "--trainer.strategy.init_args"
    argv = [*EIGHT, f"{strategy}.pretrained={stored}", f"{strategy}.init=null", f"{strategy}.quantization=null"]
    found = plan(*argv, f"{strategy}.adapter=null")
    assert (found.job.init, found.job.residual) == (None, NF4())
    seconds = found.initialisation
    assert seconds is not None
    assert 0 < seconds.read == seconds.total
    assert seconds.products == seconds.encode == 0
    capsys.readouterr()
    assert main(["plan", *argv]) == 1
    assert "adapter: r is 128" in capsys.readouterr().err


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ModelShapes:
    return ModelShapes.of(save_checkpoint(tmp_path_factory.mktemp("model"), "llama"), LINEARS)


JOBS: dict[str, Any] = {"init": PiSSA(), "residual": NF4(), "on_gpu": False}


@settings(max_examples=25)
@given(
    nodes=st.integers(1, 4),
    gpus=st.integers(1, 8),
    batch=st.sampled_from([1, 2, 6]),
    residual=st.sampled_from([NF4(), NF4(double_quant=True), NF4(block_size=128), Dense(dtype=torch.bfloat16)]),
    within=st.sampled_from(["world", "node"]),
)
def test_padding_is_all_that_sharding_adds(
    shapes: ModelShapes, nodes: int, gpus: int, batch: int, residual: Any, within: Any
) -> None:
    """Over all ranks no kind of parameter shrinks, and each parameter grows by less than a row or block a rank."""
    options = JOBS | {"residual": residual, "batch_size": batch, "shard_within": within}
    job = RunSpec(nodes=nodes, gpus_per_node=gpus, **options)
    alone = {(p.kind, p.name, p.dtype): p for p in parameters(shapes, replace(job, nodes=1, gpus_per_node=1))}
    for p in parameters(shapes, job):
        least = alone[(p.kind, p.name, p.dtype)].shard_numel if p.kind != "maxima" else 0
        assert p.gathered_bytes >= least * p.dtype.itemsize
        assert p.ranks == (gpus if within == "node" and p.kind != "trained" else nodes * gpus)


@pytest.mark.parametrize(("tied", "untie", "expected"), [(True, False, 1), (True, True, 2), (False, False, 2)])
def test_a_head_that_is_tied_counts_once(tmp_path: Path, tied: bool, untie: bool, expected: int) -> None:
    shapes = ModelShapes.of(save_checkpoint(tmp_path, "llama", tie_word_embeddings=tied), LINEARS, untie=untie)
    names = [p.name for p in parameters(shapes, RunSpec(nodes=1, gpus_per_node=1, **JOBS))]
    assert len([name for name in names if "lm_head" in name or "embed_tokens" in name]) == expected


def test_within_a_node_only_adapters_cross_nodes(shapes: ModelShapes) -> None:
    world = RunSpec(nodes=2, gpus_per_node=2, **JOBS)
    node = replace(world, shard_within="node")
    trained = sum(p.gathered_bytes for p in parameters(shapes, node) if p.kind == "trained")
    crossing = [c for c in traffic(shapes, node).collectives if c.crosses]
    assert {c.what: c.nbytes for c in crossing} == {"gather": 2 * trained, "reduce": trained}
    assert traffic(shapes, node).into_node < traffic(shapes, world).into_node


def test_gradient_checkpointing_trades_memory_for_time(shapes: ModelShapes) -> None:
    job = RunSpec(nodes=1, gpus_per_node=2, batch_size=8, **JOBS | {"on_gpu": True})
    kept, recomputed = (
        forecast(shapes, replace(job, gradient_checkpointing=checkpointing)) for checkpointing in (False, True)
    )
    assert recomputed.memory.kept + recomputed.memory.recomputed < kept.memory.kept
    assert kept.step is not None
    assert recomputed.step is not None
    assert recomputed.step.compute > kept.step.compute


def test_a_mixture_of_experts_is_measured(tmp_path: Path) -> None:
    """With the layers of a run, whose experts look at no values; one parameter holds all experts of a layer."""
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    shapes = ModelShapes.of(save_checkpoint(tmp_path, "mixtral"), adapter)
    found = forecast(shapes, RunSpec(nodes=1, gpus_per_node=2, **JOBS | {"init": LoRA()}))
    assert found.activations_measured
    assert found.memory.recomputed > 0
    experts = [p for p in parameters(shapes, found.job) if p.kind == "codes" and "experts" in p.name]
    assert len(experts) == 2  # layers


@pytest.mark.parametrize("field", ["nodes", "batch_size", "accumulate"])
def test_counts_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        RunSpec(**{"nodes": 1, "gpus_per_node": 1, **JOBS, field: 0})


def test_an_optimizer_by_path_is_taken_to_keep_two_moments() -> None:
    memories = [plan(*EIGHT, f"--model.optimizer={name}").memory for name in ("adamw", "torch.optim.NAdam")]
    assert memories[0] == memories[1]
