"""PEFT's tuners: configurations for tiny models, and the same training with stock PEFT in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.training import BATCHES, LR, CausalLM, loader, make_strategy, make_trainer, tokens
from lowrank_dist import NF4, LoRA
from lowrank_dist.distributed.group import ShardGroup
from lowrank_dist.distributed.partition import RowPartition
from lowrank_dist.model.skeleton import linear_layers

QV = ["q_proj", "v_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]
LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
SEED = 11

#: Configurations for the tiny LLaMA (hidden size 64, intermediate size 136, two layers).
CASES: dict[str, Callable[[], PeftConfig]] = {
    "lora_bias": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=QV, lora_bias=True),
    "lora+tokens": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=QV, trainable_token_indices=[3, 7, 50]),
    "lora+replication": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=QV, layer_replication=[[0, 2], [0, 2]]
    ),
    "lora_bias+norms": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=QV, lora_bias=True, modules_to_save=["input_layernorm", "lm_head"]
    ),
    "lora+alora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=QV, alora_invocation_tokens=[5], **LM),
    "lora+bdlora": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=SQUARE,
        use_bdlora=peft.BdLoraConfig(target_modules_bd_b=["q_proj"], target_modules_bd_a=["o_proj"], nblocks=2),
    ),
    "lora+velora": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=QV, velora_config=peft.VeloraConfig(num_groups=4)
    ),
    "vera": lambda: peft.VeraConfig(r=8, target_modules="all-linear"),
    "pvera": lambda: peft.PveraConfig(r=8, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=QV),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=QV),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=QV, use_cayley_neumann=False),
    "oft_neumann": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=QV, use_cayley_neumann=True),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=QV),
    "ln_tuning": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm", "norm"], **LM
    ),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, scaling=50.0, target_modules=QV),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=QV),
    "randlora": lambda: peft.RandLoraConfig(r=8, randlora_alpha=16, target_modules=QV),
    "miss": lambda: peft.MissConfig(r=8, target_modules=QV),
    "miss_bat": lambda: peft.MissConfig(r=8, target_modules=SQUARE, init_weights="bat"),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=QV, random_seed=5),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=8, topk=2, target_modules=QV),
    "c3a": lambda: peft.C3AConfig(block_size=8, target_modules=QV),
    "road": lambda: peft.RoadConfig(target_modules=SQUARE, group_size=16),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=50, target_modules=QV),
    "delora": lambda: peft.DeloraConfig(r=4, target_modules=QV),
    "gralora": lambda: peft.GraloraConfig(r=8, gralora_k=2, target_modules=QV),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=QV),
    "osf": lambda: peft.OSFConfig(effective_rank=8, target_modules=QV),
    "beft": lambda: peft.BeftConfig(target_modules=["q_proj", "v_proj"]),
    "lily": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=QV),
    "glora": lambda: peft.GloraConfig(r=4, target_modules=QV),
    "unilora": lambda: peft.UniLoraConfig(r=4, theta_d_length=64, target_modules=QV),
    "tinylora": lambda: peft.TinyLoraConfig(r=2, u=8, target_modules=QV),
    "psoft": lambda: peft.PsoftConfig(r=8, target_modules=QV),
    "peanut": lambda: peft.PeanutConfig(r=4, target_modules=QV),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=QV),
    "deft": lambda: peft.DeftConfig(r=4, target_modules=QV),
    "poly": lambda: peft.PolyConfig(r=4, n_tasks=1, n_skills=2, n_splits=1, target_modules=["q_proj", "v_proj"], **LM),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 7, 50], target_modules=["embed_tokens"]),
    "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **LM),
    "p_tuning_mlp": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=32, **LM),
    "p_tuning_lstm": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=32, encoder_reparameterization_type="LSTM", **LM
    ),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **LM),
    "prefix_projection": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=32, **LM
    ),
    "multitask_prompt": lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=2, num_ranks=1, **LM),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, target_modules="self_attn", **LM
    ),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=5, **LM),
}
#: Tuners whose virtual tokens are keys and values, or hooks, which a recomputed layer would not see.
NOT_RECOMPUTED = ("prefix_tuning", "prefix_projection", "cartridge", "poly")


def forward_options(name: str, ids: Tensor) -> dict[str, Tensor]:
    """What the model's forward takes beside the ids."""
    return {"task_ids": torch.zeros(len(ids), dtype=torch.long)} if name in ("poly", "multitask_prompt") else {}


def decoded(pretrained: Path, quantization: NF4 | None, name: str) -> PreTrainedModel:
    """The stock model; the weights that are encoded are those that decoding gives."""
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    dense = QV if name == "glora" else []  # PEFT's layer takes no subclass of nn.Linear
    if quantization is not None:
        for layer in linear_layers(model):
            if layer.rpartition(".")[2] in dense:
                continue
            weight = model.get_submodule(layer).weight
            rows, columns = weight.shape
            partition = RowPartition(rows=rows, columns=columns, world_size=1, block=quantization.block)
            with torch.no_grad():
                values = weight.detach().float().clone()
                weight.copy_(quantization.encode(values, partition, ShardGroup.single()).decoded)
    return model


def adapter_of(name: str) -> dict[str, Any]:
    """Options of the strategy for a case."""
    config = CASES[name]()
    return {
        "adapter": config,
        "init": LoRA() if type(config) is peft.LoraConfig else None,
        "gradient_checkpointing": name not in NOT_RECOMPUTED,
    }


class Tuned(CausalLM):
    """Its batch is that of the step, and its forward has what the tuner wants."""

    def __init__(self, pretrained: Path, name: str) -> None:
        super().__init__(pretrained)
        self.name = name

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        trainer = self.trainer
        mine = tokens(BATCHES)[trainer.global_step].unflatten(0, (trainer.world_size, -1))[trainer.global_rank]
        loss = self.model(input_ids=mine, labels=mine, use_cache=False, **forward_options(self.name, mine)).loss
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        self.losses.append(float(mean) / trainer.world_size)
        return loss


def train_tuned(
    pretrained: Path,
    name: str,
    *,
    steps: int,
    precision: str = "32-true",
    save: Path | None = None,
    resume: Path | None = None,
    **options: Any,
) -> list[float]:
    """Losses on the ranks of the test; the adapter of `save` is that after the last step."""
    warnings.filterwarnings("ignore", module="peft")
    torch.manual_seed(SEED if resume is None else SEED + 1)  # a resumed run takes the seed of the first one
    strategy = make_strategy(pretrained, **adapter_of(name), **options)
    module, trainer = Tuned(pretrained, name), make_trainer(strategy, steps=steps, precision=precision)
    data = loader(torch.distributed.get_rank(), torch.distributed.get_world_size(), BATCHES)
    trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    if save is not None:
        trainer.save_checkpoint(save)
    return module.losses


def train_stock(
    pretrained: Path, name: str, quantization: NF4 | None, steps: int, also: str = ""
) -> tuple[list[float], nn.Module]:
    """Losses of AdamW on the global batch at once with stock PEFT, and the model.

    Parameters of the model itself whose names contain `also` are trained as well.
    """
    model = decoded(pretrained, quantization, name).requires_grad_(False).train()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = get_peft_model(model, CASES[name]())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or bool(also and also in parameter_name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for ids in tokens(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False, **forward_options(name, ids)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def logits(model: nn.Module, name: str) -> Tensor:
    """Logits of one batch, in evaluation mode."""
    ids = tokens(BATCHES)[-1]
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False, **forward_options(name, ids)).logits


def reloaded(pretrained: Path, name: str, quantization: NF4 | None, adapter: Path) -> nn.Module:
    """Stock PEFT with an adapter of a checkpoint."""
    return PeftModel.from_pretrained(decoded(pretrained, quantization, name), adapter)
