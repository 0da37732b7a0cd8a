from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import LearningRateMonitor
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import DataLoader

from helpers.loggers import RecordingLogger
from helpers.sft import tiny_llama
from lowrank_dist import CausalLMModule
from lowrank_dist.training.parameter_groups import trained_by_role


def adapted(**options):
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=4, **options))


def optimizer_of(model, **options):
    module = CausalLMModule("unused", scheduler="constant", warmup_ratio=0.0, **options)
    module.model = model
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), estimated_stepping_batches=10
    )
    return module.configure_optimizers()["optimizer"]


def losses_of(model, optimizer):
    ids = torch.randint(1, 512, (4, 2, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for batch in ids:
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def rates_of(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_loraplus_is_that_of_peft():
    options = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    ours, theirs = adapted(**options), adapted(**options)
    optimizer = optimizer_of(ours, lr=1e-3, loraplus_lr_ratio=16.0, embedding_lr=5e-4, weight_decay=0.1)
    reference = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_lr_embedding=5e-4,
        loraplus_weight_decay=0.1,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    assert rates_of(ours, optimizer) == rates_of(theirs, reference)
    assert {rate for rate, _ in rates_of(ours, optimizer).values()} == {1e-3, 16e-3, 5e-4}
    assert losses_of(ours, optimizer) == losses_of(theirs, reference)


def test_roles_are_told_by_names_and_modules():
    model = adapted(target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm", "lm_head"], bias="none")
    model.base_model.model.model.layers[0].self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(16))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    roles = {role: sorted(names[id(p)] for p in found) for role, found in trained_by_role(model).items()}
    assert list(roles) == ["lora_A", "lora_B", "embedding", "norm", "vector"]
    assert all("q_proj.lora_A" in name for name in roles["lora_A"])
    assert all("q_proj.lora_B" in name for name in roles["lora_B"])
    assert [name.split(".")[-3:-1] for name in roles["embedding"]] == [
        ["modules_to_save", "default"],  # the head
        ["embed_tokens", "lora_embedding_A"],
        ["embed_tokens", "lora_embedding_B"],
    ]
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in roles["norm"]} == {"norm"} | {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert [name.rpartition(".")[2] for name in roles["vector"]] == ["bias"]


def test_norms_and_biases_are_not_decayed():
    model = adapted(target_modules=["q_proj"], modules_to_save=["norm"])
    model.base_model.model.model.layers[0].self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(16))
    optimizer = optimizer_of(model, lr=1e-3, norm_lr=2e-3, weight_decay=0.1)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "lora_A": (1e-3, 0.1),
        "lora_B": (1e-3, 0.1),
        "norm": (2e-3, 0.0),
        "vector": (1e-3, 0.0),
    }


def test_without_rates_of_their_own_there_is_one_group():
    optimizer = optimizer_of(adapted(target_modules=["q_proj"]), weight_decay=0.1)
    (group,) = optimizer.param_groups
    assert "name" not in group
    assert group["weight_decay"] == 0.1


def test_a_full_model_has_its_tables_and_norms_apart():
    roles = trained_by_role(tiny_llama())
    assert {role: len(found) for role, found in roles.items()} == {"embedding": 2, "norm": 5, "other": 14}


def test_schedules_act_on_all_groups():
    module = CausalLMModule("unused", scheduler="linear", warmup_ratio=0.5, lr=1.0, loraplus_lr_ratio=4.0)
    module.model = adapted(target_modules=["q_proj"])
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), estimated_stepping_batches=4
    )
    made = module.configure_optimizers()
    found = []
    for _ in range(4):
        found.append([group["lr"] for group in made["optimizer"].param_groups])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert found == [[0.0, 0.0], [0.5, 2.0], [1.0, 4.0], [0.5, 2.0]]


def test_a_monitor_shows_the_groups_by_name():
    module = CausalLMModule("unused", loraplus_lr_ratio=4.0)
    module.model = adapted(target_modules=["q_proj"])
    ids = torch.arange(1, 9)[None]
    trainer = L.Trainer(
        accelerator="cpu",
        logger=RecordingLogger(),
        callbacks=[LearningRateMonitor(logging_interval="step")],
        max_steps=2,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader([{"input_ids": ids, "labels": ids}] * 2, batch_size=None)
    trainer.fit(module, data, data)
    assert {name for name in trainer.logger.metrics if name.startswith("lr")} == {"lr/lora_A", "lr/lora_B"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_lr": 1e-3}, "embedding_lr sets the learning rate of embedding, but the run trains lora_A, lora_B"),
        ({"norm_lr": 1e-3}, "norm_lr sets the learning rate of norm, but the run trains lora_A, lora_B"),
    ],
)
def test_a_rate_for_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(adapted(target_modules=["q_proj"]), **options)


def test_a_ratio_needs_both_factors():
    with pytest.raises(
        ValueError, match="loraplus_lr_ratio sets the learning rate of lora_B, but the run trains embed"
    ):
        optimizer_of(tiny_llama(), loraplus_lr_ratio=4.0)


def test_the_command_line_takes_them(tmp_path):
    parser = ArgumentParser()
    parser.add_class_arguments(CausalLMModule, "model")
    parser.add_argument("--config", action="config")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n  pretrained: x\n  loraplus_lr_ratio: 16\n  embedding_lr: 1e-5\n"
        "  optimizer: torch.optim.NAdam\n  optimizer_options: {betas: [0.8, 0.99], eps: 1.0e-6}\n"
    )
    module = CausalLMModule(**vars(parser.parse_args(["--config", str(path)]).model))
    assert (module.loraplus_lr_ratio, module.embedding_lr) == (16.0, 1e-5)
    module.model = adapted(target_modules=["q_proj", "embed_tokens"])
    module.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), estimated_stepping_batches=4
    )
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.NAdam
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.99), 1e-6)}
