"""Tied parameters that are stored more than once, against what transformers makes of the same files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from helpers.models import save_checkpoint, save_in_two, stored, with_head
from lowrank_dist.errors import ModelError
from lowrank_dist.model import ties
from lowrank_dist.model.plan import PlannedModel, open_plan
from lowrank_dist.storage.reader import CheckpointReader

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": 64}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
#: Class, options, and the parameters that are tied.
MODELS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "llama": (AutoModelForCausalLM, {"tie_word_embeddings": True}, ["model.embed_tokens.weight", "lm_head.weight"]),
    "bert": (
        AutoModelForMaskedLM,
        {},
        [
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.weight",
            "cls.predictions.bias",
            "cls.predictions.decoder.bias",
        ],
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        T5,
        ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
    ),
    "bart": (
        AutoModelForSeq2SeqLM,
        BART,
        [
            "model.shared.weight",
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ],
    ),
}


def assert_as_loaded(stock: Any, opened: PlannedModel, reader: CheckpointReader) -> None:
    """The plan shares and fills every parameter as the stock model does."""
    values, shared = {}, {}
    for name, parameter in stock.named_parameters(remove_duplicate=False):
        values[name] = parameter
        shared.setdefault(id(parameter), set()).add(name)
    assert {frozenset(p.names) for p in opened.plan.parameters} == {frozenset(names) for names in shared.values()}
    for planned in opened.plan.parameters:
        assert planned.key is not None
        whole = reader.flat(planned.key, 0, values[planned.names[0]].numel())
        assert torch.equal(whole, values[planned.names[0]].flatten()), planned.names


@pytest.mark.parametrize(("architecture", "step"), [("llama", 1), ("t5", 1), ("bart", 4), ("bert", 4)])
def test_parameters_are_shared_as_transformers_shares_them(architecture: str, step: int, tmp_path: Path) -> None:
    """Every tied parameter absent, stored with one value or with another: all combinations, or every fourth."""
    auto_class, options, tied = MODELS[architecture]
    base = save_checkpoint(tmp_path, architecture, auto_class=auto_class, max_shard_size="1GB", **options)
    tensors = stored(base)
    (base / "model.safetensors").unlink()
    groups = [group for leaf in ("weight", "bias") if (group := [name for name in tied if name.endswith(leaf)])]
    values = {name: tensors[group[0]] for group in groups for name in group}
    combinations = [
        apart
        for chosen in itertools.product(*((None, values[name], values[name] + 1) for name in tied))
        if (apart := {name: value.clone() for name, value in zip(tied, chosen, strict=True) if value is not None})
        and all(apart.keys() & set(group) for group in groups)
    ]
    for apart in combinations[::step]:
        save_in_two(base, {name: tensor for name, tensor in tensors.items() if name not in tied}, apart)
        stock = auto_class.from_pretrained(base, dtype=torch.float32)
        reader = CheckpointReader(base)
        assert_as_loaded(stock, open_plan(reader, None), reader)
        reader.close()


def test_it_is_said_in_one_line(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = stored(llama)[TABLE]
    open_plan(CheckpointReader(with_head(llama, tmp_path / "equal", table.clone())), None)
    assert caplog.messages == []
    differing = with_head(llama, tmp_path / "differing", table + 1)
    open_plan(CheckpointReader(differing), None)
    text = f"{differing}: {TABLE} and {HEAD} are stored with different values, so they are not tied"
    assert caplog.messages == [text]


@pytest.mark.parametrize(
    ("changed", "compared"), [(None, 64 * 256), (0, 1000), (999, 1000), (1000, 2000), (64 * 256 - 1, 64 * 256)]
)
def test_values_are_read_up_to_the_first_difference(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int | None, compared: int
) -> None:
    """The table has 256 rows of 64 numbers; 1000 of each tensor are read at a time."""
    monkeypatch.setattr(ties, "COMPARED", 1000)
    head = stored(llama)[TABLE]
    if changed is not None:
        head.flatten()[changed] += 1
    reader = CheckpointReader(with_head(llama, tmp_path / "base", head))
    backbone = open_plan(reader, None).backbone
    assert reader.bytes_read == 2 * 4 * compared
    assert (backbone.lm_head.weight is backbone.model.embed_tokens.weight) == (changed is None)


def test_nothing_is_read_where_one_of_them_is_stored(llama: Path) -> None:
    reader = CheckpointReader(llama)
    open_plan(reader, None)
    assert reader.bytes_read == 0


@pytest.mark.parametrize("same", [True, False])
def test_values_are_compared_not_dtypes(llama: Path, tmp_path: Path, same: bool) -> None:
    """fp32 numbers that bf16 holds equal the same numbers in bf16."""
    head = stored(llama)[TABLE].bfloat16()
    base = with_head(llama, tmp_path / "base", head)
    save_in_two(base, stored(llama) | {TABLE: head.float() if same else stored(llama)[TABLE]}, {HEAD: head})
    backbone = open_plan(CheckpointReader(base), None).backbone
    assert (backbone.lm_head.weight is backbone.model.embed_tokens.weight) == same


@pytest.mark.parametrize(
    ("head", "text"),
    [
        (torch.zeros(255, 64), r"lm_head.weight: the model has shape \[256, 64\], the pretrained weights \[255, 64\]"),
        (torch.zeros(256, 64, dtype=torch.float8_e4m3fn), "lm_head.weight: the pretrained weights store F8_E4M3"),
        (torch.zeros(256, 64, dtype=torch.int32), "lm_head.weight: the pretrained weights store I32"),
    ],
    ids=["shape", "float8", "integers"],
)
def test_a_head_that_cannot_be_loaded_is_refused(llama: Path, tmp_path: Path, head: Tensor, text: str) -> None:
    reader = CheckpointReader(with_head(llama, tmp_path / "base", head))
    with pytest.raises(ModelError, match=text):
        open_plan(reader, None)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("untie", [False, True])
def test_a_head_of_its_own_is_a_target(llama: Path, tmp_path: Path, untie: bool) -> None:
    """Without `untie_embeddings`, and with it as before."""
    base = with_head(llama, tmp_path / "base", stored(llama)[TABLE] + 1)
    adapter = LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"])
    opened = open_plan(CheckpointReader(base), adapter, untie=untie)
    assert [planned.key for planned in opened.plan.matrices] == [TABLE, HEAD]
    assert opened.tied == {}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_encoder_decoder_with_a_head_of_its_own_needs_no_untying(tmp_path: Path) -> None:
    """T5 1.1 and Flan-T5: all are tied in transformers 5, whatever their configuration says; the scale stays."""
    base = save_checkpoint(
        tmp_path, "t5", auto_class=AutoModelForSeq2SeqLM, max_shard_size="1GB", tie_word_embeddings=False, **T5
    )
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors["shared.weight"] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = LoraConfig(r=4, target_modules=["lm_head"])
    opened = open_plan(CheckpointReader(base), adapter, untie=True)
    assert [planned.key for planned in opened.plan.matrices] == [HEAD]
    stock = AutoModelForSeq2SeqLM.from_pretrained(base)
    for option in ("tie_word_embeddings", "scale_decoder_outputs"):
        assert getattr(opened.backbone.config, option) == getattr(stock.config, option)
