"""Every kind of weight that PEFT can target, from the checkpoint to a LoRA that stock PEFT loads on the original."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.covering import covering
from helpers.live import LiveMemory
from helpers.models import save_checkpoint
from helpers.ranks import alone, run_ranks
from helpers.training import LR, STEPS, CausalLM, initial_factors, loader, make_strategy, make_trainer, tokens
from lowrank_dist import NF4, AdapterCheckpoint, LoRA, convert_checkpoint, merge_checkpoint
from lowrank_dist.layers.frozen import FrozenWeight
from lowrank_dist.model.names import peft_name


@dataclass(frozen=True)
class Case:
    """A model, what of it is adapted, and how many matrices that makes."""

    architecture: str
    adapter: dict[str, Any]
    matrices: int
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def experts(prefix: str) -> dict[str, Any]:
    return {
        "target_modules": ["q_proj"],
        "target_parameters": [f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"],
        "rank_pattern": {r".*\.down_proj": 3},
        "alpha_pattern": {r".*\.gate_up_proj": 6},
    }


HEAD = {"rank_pattern": {"lm_head": 5}, "alpha_pattern": {"lm_head": 6}}
TABLE = {"rank_pattern": {"embed_tokens": 3}, "alpha_pattern": {"embed_tokens": 6}}
PLAIN_GPT2 = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
UNTIE = {"untie_embeddings": True}
CASES = {
    "phi3": Case("phi3", {"target_modules": "all-linear"}, 8),
    "conv1d": Case(
        "gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "rank_pattern": {"c_attn": 5}}, 8, PLAIN_GPT2
    ),
    "head": Case("llama", {"target_modules": ["q_proj", "lm_head"], **HEAD}, 3),
    "embedding": Case("llama", {"target_modules": ["v_proj", "embed_tokens"], "use_rslora": True, **TABLE}, 3),
    "positions": Case("gpt2", {"target_modules": ["wpe", "c_attn"]}, 3, PLAIN_GPT2),
    "narrow": Case(  # rows of 36 and blocks of 64: most rows begin inside a block
        "llama",
        {"target_modules": ["embed_tokens"]},
        1,
        {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 259},
    ),
    "scaled": Case("gemma", {"target_modules": ["embed_tokens"]}, 1, options=UNTIE),
    "tied head": Case("llama", {"target_modules": ["lm_head"]}, 1, {"tie_word_embeddings": True}, UNTIE),
    "tied embedding": Case("llama", {"target_modules": ["embed_tokens"]}, 1, {"tie_word_embeddings": True}, UNTIE),
    "tied both": Case(
        "llama", {"target_modules": ["embed_tokens", "lm_head"], **HEAD}, 2, {"tie_word_embeddings": True}, UNTIE
    ),
    **{
        f"whole {name} {architecture}": Case(
            architecture, {"target_modules": ["q_proj"], "modules_to_save": saved}, 2, {"tie_word_embeddings": True}
        )
        for architecture in ("llama", "qwen2")
        for name, saved in {"head": ["lm_head"], "table": ["embed_tokens"], "both": ["lm_head", "embed_tokens"]}.items()
    },
    "mixtral": Case("mixtral", experts("mlp"), 2 * (1 + 2 * 4)),
    "mixtral fused": Case("mixtral", experts("mlp"), 2 * (1 + 2 * 4), {"save_original_format": False}),
    "mixtral all-linear": Case("mixtral", {"target_modules": "all-linear"}, 2 * (4 + 2 * 4)),  # not the routers
    "qwen3_moe": Case("qwen3_moe", experts("mlp"), 2 * (1 + 2 * 6)),
    "granitemoe": Case("granitemoe", experts("block_sparse_moe"), 2 * (1 + 2 * 4)),
    "gpt_oss": Case("gpt_oss", experts("mlp"), 2 * (1 + 2 * 4)),  # [in, out]
    "attention only": Case("mixtral", {"target_modules": ["q_proj"]}, 2),
    "parameter": Case("llama", {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]}, 4),
}


class Recorded(CausalLM):
    """Keeps the logits of the last validation batch."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.logits = self.model(input_ids=batch[0], use_cache=False).logits


def adapter_of(case: Case) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **case.adapter})


def train(pretrained: Path, output: Path, case: Case, options: dict[str, Any], precision: str) -> dict[str, Any]:
    """Step 0, all steps and a checkpoint; what the ranks saw."""
    options = {"quantization": None, **case.options, **options}
    before = Recorded(pretrained)
    trainer = make_trainer(make_strategy(pretrained, adapter=adapter_of(case), **options), precision=precision)
    trainer.validate(before, loader(0, 1, 1), verbose=False)

    module = Recorded(pretrained)
    strategy = make_strategy(pretrained, adapter=adapter_of(case), **options)
    callback = AdapterCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=STEPS)
    trainer = make_trainer(strategy, precision=precision, callbacks=[callback], enable_checkpointing=True)
    trainer.fit(module, loader(trainer.global_rank, trainer.world_size), loader(0, 1, 1))
    frozen = [m for m in module.modules() if isinstance(m, FrozenWeight)]
    return {
        "first": before.logits,
        "last": module.logits,
        "losses": module.losses,
        "report": strategy.init_report,
        "live": LiveMemory(module).current_bytes(),
        "dtypes": {p.dtype for m in frozen for p in m.stored()},
    }


@dataclass(frozen=True)
class Trained:
    """An unquantized fp32 run of a case: its base, its checkpoints, what every rank saw."""

    base: Path
    output: Path
    results: list[dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Trained]:
    """Runs by case and number of ranks; each is run once, whoever compares with it."""

    @functools.cache
    def run(name: str, world_size: int) -> Trained:
        case, directory = CASES[name], tmp_path_factory.mktemp("trained")
        base = save_checkpoint(directory / "base", case.architecture, **case.model)
        results = run_ranks(world_size, train, base, directory / "out", case, {}, "32-true")
        return Trained(base, directory / "out", results)

    return run


def original(base: Path, case: Case) -> Any:
    changes = {}
    if "untie_embeddings" in case.options:
        changes["tie_word_embeddings"] = True
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **changes)


@contextmanager
def expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")
        # PEFT 0.21 says so of patterns that match parameters, and applies them
        warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match any targeted module")
        yield


def load_peft(model: Any, directory: Path, **options: Any) -> PeftModel:
    with expected_warnings():
        return PeftModel.from_pretrained(model, directory, **options)


def train_with_stock_peft(base: Path, case: Case, initial: Path) -> list[float]:
    """The same steps in one process, from the saved A and B and the residual W - scaling B A, which is formed here."""
    model = original(base, case)
    if "untie_embeddings" in case.options:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    config = adapter_of(case)
    if config.target_modules == "all-linear":  # of which routers are left out, as the saved configuration says
        config = LoraConfig.from_pretrained(initial)
        config.inference_mode = False
    with expected_warnings():
        model = get_peft_model(model, config)
    factors = load_file(initial / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(factors[name.replace(".default", "")])
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                name = getattr(layer, "parameter_name", "weight")
                getattr(layer.get_base_layer(), name).sub_(layer.get_delta_weight("default"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    losses = []
    for ids in tokens():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@covering(1, {"name": CASES, "world_size": [1, 2, 3]})
def test_unquantized(trained: Callable[[str, int], Trained], tmp_path: Path, name: str, world_size: int) -> None:
    """Step 0 is the original model; losses are those of stock PEFT on the same residual; the converted LoRA makes the
    original model the trained one, as do that of one rank and scaling for all, and merging. fp32: only the order of
    sums differs.
    """
    case, run = CASES[name], trained(name, world_size)
    base, output, results = run.base, run.output, run.results
    (ids,) = loader(0, 1, 1).dataset.tensors
    with torch.no_grad():
        before = original(base, case)(input_ids=ids).logits
    for result in results:
        assert len(result["report"].matrices) == case.matrices
        torch.testing.assert_close(result["first"], before, rtol=1e-5, atol=1e-5)
        assert result["losses"] == results[0]["losses"]
    checkpoint = output / f"step={STEPS}"
    assert results[0]["losses"] == pytest.approx(
        train_with_stock_peft(base, case, checkpoint / "adapter_init"), rel=1e-5
    )
    assert (results[0]["last"] - before).abs().max() > 0.01  # training changed something to be converted
    exact = convert_checkpoint(checkpoint, tmp_path / "converted")
    uniform = convert_checkpoint(checkpoint, tmp_path / "uniform", rank=exact.rank)
    for directory in (checkpoint / "lora", exact.path, uniform.path):
        converted = load_peft(original(base, case), directory)
        stored = load_file(directory / "adapter_model.safetensors")
        assert set(stored) == set(peft_keys(converted))
        with torch.no_grad():
            torch.testing.assert_close(converted(input_ids=ids).logits, results[0]["last"], rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(merge_checkpoint(checkpoint, tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, results[0]["last"], rtol=1e-4, atol=1e-4)


def peft_keys(model: PeftModel) -> list[str]:
    """The names under which PEFT itself would save the adapter."""
    from peft import get_peft_model_state_dict

    return list(get_peft_model_state_dict(model, save_embedding_layers=False))


@pytest.mark.parametrize("name", ["embedding", "narrow", "mixtral", "gpt_oss"])
@pytest.mark.parametrize(("quantization", "precision"), [(NF4(), "32-true"), (NF4(double_quant=True), "bf16-mixed")])
def test_quantized(tmp_path: Path, name: str, quantization: NF4, precision: str) -> None:
    """Stored packed and sharded; step 0 and the converted LoRA differ from the trained model by what quantization left
    over, a few percent of the logits.
    """
    case = CASES[name]
    base = save_checkpoint(tmp_path / "base", case.architecture, **case.model)
    results = run_ranks(3, train, base, tmp_path / "out", case, {"quantization": quantization}, precision)
    for result in results:
        assert result["dtypes"] == {torch.uint8}
        assert result["losses"] == results[0]["losses"]
        for matrix in result["report"].matrices:
            assert 0 < matrix.error < matrix.quantization_error
    (ids,) = loader(0, 1, 1).dataset.tensors
    with torch.no_grad():
        before = original(base, case)(input_ids=ids).logits
        converted = load_peft(original(base, case), tmp_path / "out" / f"step={STEPS}" / "lora")
        after = converted(input_ids=ids).logits
    for result, expected in ((results[0]["first"], before), (results[0]["last"], after)):
        assert 0 < (result - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert (results[0]["last"] - after).abs().mean() < (results[0]["last"] - before).abs().mean()


@pytest.mark.parametrize("name", ["embedding", "mixtral"])
def test_bf16(trained: Callable[[str, int], Trained], tmp_path: Path, name: str) -> None:
    """bf16-true, unit rounding 2^-9: losses follow those of fp32."""
    run = trained(name, 2)
    exact = run.results[0]
    rounded = run_ranks(2, train, run.base, tmp_path / "bf16", CASES[name], {}, "bf16-true")[0]
    assert rounded["losses"] == pytest.approx(exact["losses"], rel=2e-3)


@pytest.mark.parametrize("name", ["embedding", "mixtral"])
@pytest.mark.parametrize("checkpointing", [{"gradient_checkpointing": False}, {"use_reentrant": True}], ids=str)
def test_with_and_without_gradient_checkpointing(
    trained: Callable[[str, int], Trained], tmp_path: Path, name: str, checkpointing: dict[str, Any]
) -> None:
    run = trained(name, 2)
    again = run_ranks(2, train, run.base, tmp_path / "out", CASES[name], checkpointing, "32-true")[0]
    assert again["losses"] == pytest.approx(run.results[0]["losses"], rel=1e-6)


@pytest.mark.parametrize("name", ["embedding", "mixtral"])
def test_lora_starts_as_pefts_does(tmp_path: Path, name: str) -> None:
    """Zero is the A of an embedding and the B of anything else; the adapter is a LoRA already."""
    case = CASES[name]
    base = save_checkpoint(tmp_path / "base", case.architecture, **case.model)
    result = run_ranks(2, train, base, tmp_path / "out", case, {"init": LoRA()}, "32-true")[0]
    (ids,) = loader(0, 1, 1).dataset.tensors
    converted = load_peft(original(base, case), tmp_path / "out" / f"step={STEPS}" / "lora")
    with torch.no_grad():
        torch.testing.assert_close(result["first"], original(base, case)(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(converted(input_ids=ids).logits, result["last"], rtol=1e-4, atol=1e-4)
    start = run_ranks(2, starting_factors, base, case)[0]
    zero = {name for name, tensor in start.items() if not tensor.any()}
    assert zero == {name for name in start if "lora_embedding_A" in name or name.endswith("lora_B.weight")}
    for name, tensor in start.items():
        if "lora_embedding_B" in name:
            assert 0.8 < tensor.std() < 1.2


def starting_factors(pretrained: Path, case: Case) -> dict[str, Tensor]:
    trainer = make_trainer(make_strategy(pretrained, adapter=adapter_of(case), init=LoRA()))
    trainer.validate(CausalLM(pretrained), loader(0, 1, 1), verbose=False)
    return {peft_name(name): tensor for name, tensor in initial_factors(trainer.strategy).items()}


def test_bytes_read(trained: Callable[[str, int], Trained]) -> None:
    """Every byte once, also of experts in parts; the tensor of two untied embeddings twice."""
    report = trained("mixtral", 3).results[0]["report"]
    assert report.bytes_read == report.checkpoint_bytes
    report = trained("tied both", 2).results[0]["report"]
    assert report.bytes_read == report.checkpoint_bytes + 256 * 64 * 4


@alone
def decoded_between_passes(pretrained: Path, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Of every step the most experts decoded together, and how many groups are alive when its forward has ended."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from lowrank_dist.layers import experts as module

    made: list[tuple[int, StorageWeakRef]] = []
    plain = module.decode_stack

    def decode_stack(*args: Any) -> Tensor:
        weights = plain(*args)
        made.append((len(weights), StorageWeakRef(weights.untyped_storage())))
        return weights

    module.decode_stack = decode_stack
    counts = []

    class Counting(CausalLM):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            made.clear()
            loss = super().training_step(batch, index)
            counts.append((max(count for count, _ in made), sum(not storage.expired() for _, storage in made)))
            return loss

    model = Counting(pretrained)
    strategy = make_strategy(pretrained, adapter=adapter_of(CASES["mixtral"]), experts_at_a_time=3, **options)
    trainer = make_trainer(strategy, steps=2)
    trainer.fit(model, loader(trainer.global_rank, trainer.world_size, 2))
    return counts


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"gradient_checkpointing": False}], ids=str)
def test_no_decoded_experts_wait_for_the_backward(tmp_path: Path, options: dict[str, Any]) -> None:
    """With and without gradient checkpointing; three of four are decoded at a time."""
    base = save_checkpoint(tmp_path / "base", "mixtral")
    assert run_ranks(2, decoded_between_passes, base, options) == [[(3, 0)] * 2] * 2


@pytest.mark.parametrize("ranks_per_matrix", [1, 2])
def test_experts_decomposed_by_fewer_ranks_are_the_same(
    trained: Callable[[str, int], Trained], tmp_path: Path, ranks_per_matrix: int
) -> None:
    whole, options = trained("mixtral", 2), {"ranks_per_matrix": ranks_per_matrix}
    parts = run_ranks(2, train, whole.base, tmp_path, CASES["mixtral"], options, "32-true")[0]
    assert parts["losses"] == pytest.approx(whole.results[0]["losses"], rel=1e-5)
    names = [matrix.name for matrix in parts["report"].matrices]
    assert "model.layers.1.mlp.experts.down_proj[3]" in names
    manifest = json.loads((tmp_path / f"step={STEPS}" / "lowrank_dist.json").read_text())
    assert set(manifest["experts"].values()) == {4}
