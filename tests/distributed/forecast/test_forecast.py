"""What `lowrank_dist.forecast` says, against what runs on 1 to 4 ranks really hold, send and write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, PeftConfig, PromptTuningConfig, VeraConfig
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.live import LiveMemory, LiveStorages
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks
from helpers.traffic import Traffic
from helpers.training import GLOBAL_BATCH, CausalLM, loader, make_strategy, make_trainer
from lowrank_dist import NF4, LoftQ, LoRA, LoRAXS, PiSSA, PiSSAStrategy
from lowrank_dist.cli.plan.model import with_adapters
from lowrank_dist.forecast import Forecast, ModelShapes, RunSpec, forecast
from lowrank_dist.forecast.activations import measure_activations
from lowrank_dist.quantization.dense import Dense
from lowrank_dist.training.model_strategy import PRECISIONS
from lowrank_dist.zero3.partition import local_shard

LENGTH = 16  # of the sequences of helpers.training

EXPERTS = LoraConfig(
    r=4, lora_alpha=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
)
CASES: dict[str, dict[str, Any]] = {
    "qpissa": {"init": PiSSA(quantization_iterations=2), "quantization": NF4()},
    "double": {"init": LoftQ(), "quantization": NF4(double_quant=True)},
    "dense": {"init": PiSSA(), "quantization": None, "fp32_norms": True},
    "core": {"init": LoRAXS(), "quantization": NF4()},
    "head": {"init": LoRA(), "quantization": NF4(), "modules_to_save": ["lm_head"]},
    "dora": {"init": PiSSA(), "quantization": NF4(), "use_dora": True},
    "norms": {"init": PiSSA(), "quantization": None, "train_also": ["*norm*"]},
    "vera": {
        "init": None,
        "quantization": NF4(),
        "adapter": VeraConfig(r=4, target_modules="all-linear"),
        "train_also": ["*norm*"],
    },
    "experts": {
        "base": "qwen3_moe",
        "init": PiSSA(),
        "quantization": NF4(double_quant=True),
        "adapter": EXPERTS,
        "experts_at_a_time": 2,
    },
    "prompt": {
        "init": None,
        "quantization": NF4(),
        "adapter": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    },
}
# case, precision, ranks, live_layers
RUNS = [
    ("qpissa", "32-true", 1, 2),
    ("double", "bf16-true", 2, 0),
    ("dense", "bf16-mixed", 3, 0),
    ("qpissa", "bf16-true", 4, 2),
    ("core", "bf16-true", 2, 0),
    ("head", "bf16-mixed", 2, 1),
    ("dora", "bf16-true", 2, 0),
    ("norms", "bf16-true", 3, 0),
    ("vera", "bf16-true", 2, 0),
    ("prompt", "32-true", 2, 0),
    ("experts", "bf16-true", 2, 0),
]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=False, num_hidden_layers=3)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six experts in three layers, of which tokens choose two."""
    directory = tmp_path_factory.mktemp("experts")
    return save_checkpoint(directory, "qwen3_moe", tie_word_embeddings=False, num_hidden_layers=3)


def adapter(case: dict[str, Any]) -> PeftConfig | None:
    if "adapter" in case:
        return case["adapter"]
    if case["init"] is None:  # as a residual model says
        return None
    options = {name: case[name] for name in ("modules_to_save", "use_dora") if name in case}
    return LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", **options)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def resident(backbone: Any, zero: Any) -> dict[str, int]:
    """Bytes that a rank holds after a step, tensor by tensor, by the names of the forecast."""
    kinds = {"weight_packed": "codes", "weight_absmax": "maxima", "weight_nested": "maxima", "weight_rows": "dense"}
    found = dict.fromkeys(("codes", "maxima", "dense", "other", "trained"), 0)
    for name, parameter in backbone.named_parameters():
        kind = "trained" if parameter.requires_grad else kinds.get(name.rpartition(".")[2], "other")
        found[kind] += nbytes(local_shard(parameter))
    stock = {name for name, _ in AutoModelForCausalLM.from_config(backbone.config).named_buffers()}
    made = (b for name, b in backbone.named_buffers() if name.removeprefix("base_model.") not in stock)
    state = [v for of_group in zero.optimizer.state.values() for v in of_group.values() if isinstance(v, Tensor)]
    return found | {
        "reference": 0,  # of DPO
        "buffers": sum(map(nbytes, made)),
        "gradients": nbytes(zero.grad_partitions_flat_buffer),
        "masters": sum(map(nbytes, zero.fp32_partitioned_groups_flat)),
        "moments": sum(nbytes(value) for value in state if value.ndim),
        "importance": 0,  # of AdaLoRA (tests/system/test_adalora.py)
    }


class Steps(Callback):
    """Where every step began among the collectives, and the gathered bytes that were alive in steps after the first."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic, self.begun, self.memory = traffic, [], None

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.begun.append(len(self.traffic.calls))
        if self.memory is None and len(self.begun) > 1:  # before, no order of gathers is known
            self.memory = LiveMemory(module).__enter__()

    def a_step(self, name: str) -> dict[int, int]:
        """Bytes of a collective by the size of the group, in the third step: from then on all are alike."""
        return self.traffic.nbytes(name, calls=slice(self.begun[2], self.begun[3]))


def strategy_of(pretrained: Path, case: dict[str, Any], live_layers: int = 0) -> PiSSAStrategy:
    names = ("init", "quantization", "fp32_norms", "init_cache", "train_also", "experts_at_a_time")
    options = {name: case[name] for name in names if name in case}
    return make_strategy(pretrained, adapter=adapter(case), live_layers=live_layers, **options)


@alone
def measure(
    pretrained: Path, case: dict[str, Any], precision: str, live_layers: int, directory: Path
) -> tuple[dict[str, int], dict[int, int], dict[int, int], int]:
    strategy = strategy_of(pretrained, case, live_layers)
    steps, module = Steps(Traffic()), CausalLM(pretrained)
    trainer = make_trainer(strategy, precision=precision, steps=4, callbacks=[steps])
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 4))
    trainer.save_checkpoint(directory)
    gathered, reduced = steps.a_step("all_gather_into_tensor"), steps.a_step("reduce_scatter_tensor")
    return resident(module.model, strategy.deepspeed_engine.optimizer), gathered, reduced, steps.memory.peak_bytes


def job_of(case: dict[str, Any], precision: str, live_layers: int, ranks: int) -> RunSpec:
    compute_dtype, factor_dtype = PRECISIONS[precision]
    return RunSpec(
        nodes=1,
        gpus_per_node=ranks,
        batch_size=GLOBAL_BATCH // ranks,
        length=LENGTH,
        compute_dtype=compute_dtype,
        factor_dtype=factor_dtype,
        init=case["init"],
        residual=case["quantization"] or Dense(dtype=compute_dtype),
        fp32_norms=case.get("fp32_norms", False),
        experts_at_a_time=case.get("experts_at_a_time"),
        live_layers=live_layers,
        on_gpu=False,
    )


def expected(pretrained: Path, case: dict[str, Any], job: RunSpec) -> Forecast:
    """As ``lowrank-dist plan`` makes it."""
    return forecast(*with_adapters(strategy_of(pretrained, case), pretrained, job))


@pytest.mark.parametrize(("name", "precision", "ranks", "live_layers"), RUNS)
def test_bytes_are_those_of_the_run(
    untied: Path, experts: Path, name: str, precision: str, ranks: int, live_layers: int, tmp_path: Path
) -> None:
    """Exact, but for gathered layers, which are bounded, and gathers that live_layers spares."""
    case = CASES[name]
    base = experts if "base" in case else untied
    said = expected(base, case, job_of(case, precision, live_layers, ranks))
    for held, gathered, reduced, peak in run_ranks(
        ranks, measure, base, case, precision, live_layers, tmp_path / "checkpoint"
    ):
        assert held == said.memory.resident
        if ranks == 1:
            assert said.traffic.collectives == ()
            assert said.memory.layers == said.memory.head == 0
            continue
        gather, reduce = said.traffic.collectives
        assert reduced == {ranks: reduce.nbytes}
        assert peak <= said.memory.layers + said.memory.head
        if live_layers:
            assert gather.nbytes / 2 < gathered[ranks] <= gather.nbytes
        else:
            # what virtual tokens' unit keeps until the next step is counted as gathered again
            least = gather.nbytes if name != "prompt" else 0.99 * gather.nbytes
            assert least <= gathered[ranks] <= gather.nbytes
            assert peak >= 0.98 * max(said.memory.layers, said.memory.head)
    # names of a tuner's tensors, in the headers of the files, are not known
    tuned = not isinstance(adapter(case), LoraConfig)
    names = 100 * len(list(tensors(tmp_path / "checkpoint"))) if tuned else 0
    assert written(tmp_path / "checkpoint") == pytest.approx(said.checkpoint, abs=names, rel=0)


def tensors(checkpoint: Path) -> Iterator[str]:
    """Names of the tensors in its files."""
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            yield from file.keys()


def written(checkpoint: Path) -> int:
    """Bytes of its tensor files, without Lightning's state, which is small and not counted."""
    files = (path for path in checkpoint.rglob("*.safetensors") if path.name != "state.safetensors")
    return sum(path.stat().st_size for path in files)


STORED: list[tuple[dict[str, Any], str, int]] = [
    ({"init": PiSSA(quantization_iterations=2), "quantization": NF4(double_quant=True)}, "bf16-true", 2),
    ({"init": LoRA(), "quantization": None}, "32-true", 3),
]


@pytest.mark.parametrize(("case", "precision", "ranks"), STORED, ids=["qpissa", "lora"])
def test_decomposed_models_are_planned_as_they_are_stored(
    untied: Path, case: dict[str, Any], precision: str, ranks: int, tmp_path: Path
) -> None:
    """A run that fills the cache, one that finds it filled, and one from its directory: all hold and write the same."""
    cached = {**case, "init_cache": tmp_path / "cache"}
    job = job_of(case, precision, 0, ranks)
    filling = expected(untied, cached, job)
    assert filling.job.fills_cache
    runs = run_ranks(ranks, measure, untied, cached, precision, 0, tmp_path / "filling")
    found = expected(untied, cached, job)
    (directory,) = (tmp_path / "cache").glob("llama*")
    stored = {"init": None, "quantization": None}
    direct = expected(directory, stored, job)
    runs += run_ranks(ranks, measure, directory, stored, precision, 0, tmp_path / "direct")
    for said, checkpoint in ((filling, "filling"), (found, "direct"), (direct, "direct")):
        assert (said.job.init is None) == (said is not filling)
        for held, gathered, reduced, _ in runs:
            assert held == said.memory.resident
            gather, reduce = said.traffic.collectives
            assert gathered == {ranks: gather.nbytes}
            assert reduced == {ranks: reduce.nbytes}
        assert written(tmp_path / checkpoint) == said.checkpoint
    files = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    assert 0.9 * files < found.disk_reads == direct.disk_reads < files  # headers are not counted
    assert filling.disk_reads > found.disk_reads


class Saving(CausalLM):
    """Adds up what autograd saves in the third step, but for parameters and logits; each storage once."""

    saved = 0

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            of_parameters = {p.untyped_storage().data_ptr() for p in self.parameters()}
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in {*kept, *of_parameters} and tensor.shape[-1:] != (256,):
                kept[storage.data_ptr()] = tensor
                self.saved += storage.nbytes() if index == 2 else 0
            return tensor

        (ids,) = batch
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # a padded batch: attention gets a mask
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return self.model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss


def measure_saved(pretrained: Path, adapter: LoraConfig) -> int:
    module = Saving(pretrained)
    trainer = make_trainer(make_strategy(pretrained, adapter=adapter, gradient_checkpointing=False), steps=3)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size, 3))
    return module.saved


@pytest.mark.parametrize(("name", "within"), [("qpissa", 0.05), ("experts", 0.1)])
def test_activations_are_what_autograd_saves(untied: Path, experts: Path, name: str, within: float) -> None:
    """5 %: masks, and small tensors that kernels save for themselves.

    Without gradient checkpointing DeepSpeed's ``F.linear`` keeps the input of routers too, another 6 %.
    """
    base, injected = experts if name == "experts" else untied, adapter(CASES[name])
    shapes = ModelShapes.of(base, injected)
    said = measure_activations(shapes.backbone, length=LENGTH, dtype=torch.float32).times(GLOBAL_BATCH // 2)
    assert said.measured
    for saved in run_ranks(2, measure_saved, base, injected):
        assert sum(said.layers) + said.outside == pytest.approx(saved, rel=within)


ONLY_EXPERTS = LoraConfig(
    r=4, lora_alpha=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
)


@alone
def measure_decoded(pretrained: Path, case: dict[str, Any], precision: str) -> int:
    """The most bytes of decoded experts, and of encoded ones that were copied for it, that were alive at one time."""
    from lowrank_dist.layers import experts as module

    live, decode_stack = LiveStorages(), module.decode_stack

    def watched(residual: Any, stored: Any, partition: Any, dtype: torch.dtype) -> Tensor:
        for tensor in stored.values():
            live.watch(tensor)
        weights = decode_stack(residual, stored, partition, dtype)
        live.watch(weights)
        live.look()
        return weights

    module.decode_stack = watched
    strategy = strategy_of(pretrained, case)
    trainer = make_trainer(strategy, precision=precision, steps=2)
    trainer.fit(CausalLM(pretrained), loader(trainer.global_rank, trainer.world_size, 2))
    return live.peak_bytes


@pytest.mark.parametrize("residual", [NF4(), NF4(double_quant=True), None], ids=str)
def test_decoded_experts_are_those_that_are_planned(experts: Path, residual: NF4 | None) -> None:
    """At most, and nearly: maxima in fp32 are not looked at."""
    case = {"init": PiSSA(), "quantization": residual, "adapter": ONLY_EXPERTS, "experts_at_a_time": 4}
    every = {**case, "experts_at_a_time": 6}
    said, of_all = (expected(experts, some, job_of(some, "bf16-true", 0, 2)).memory.decoded for some in (case, every))
    assert said == of_all * 4 / 6
    for peak in run_ranks(2, measure_decoded, experts, case, "bf16-true"):
        assert 0.85 * said <= peak <= said
