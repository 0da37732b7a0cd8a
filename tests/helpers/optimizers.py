"""Every optimizer of torch, transformers, bitsandbytes and PEFT: how it is made here, or why it is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

#: Modules whose optimizers are listed from what is installed: a new one has no entry below and fails the test.
LIBRARIES = ("torch.optim", "transformers.optimization", "bitsandbytes.optim")

Make = Callable[[nn.Module], torch.optim.Optimizer]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """As users' code has it: nothing of one dimension decays."""
    matrices = [parameter for parameter in trained(model) if parameter.ndim > 1]
    vectors = [parameter for parameter in trained(model) if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def of(path: str, **options: Any) -> Make:
    module, _, name = path.rpartition(".")
    return lambda model: getattr(importlib.import_module(module), name)(trained(model), **options)


def listed() -> set[str]:
    """Import paths of all optimizers of `LIBRARIES`, and PEFT's functions that make one."""
    found = set()
    for library in LIBRARIES:
        for name, kind in vars(importlib.import_module(library)).items():
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
                found.add(f"{library}.{name}")
    return found | {f"peft.optimizers.{name}" for name in importlib.import_module("peft.optimizers").__all__}


def lora_plus(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    made: torch.optim.Optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    return made


def lora_fa(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers.lorafa import LoraFAOptimizer

    return LoraFAOptimizer([{"params": trained(model), "names": [n for n, p in model.named_parameters()]}], lr=1e-3)


def riemannian(model: nn.Module) -> torch.optim.Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    made: torch.optim.Optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
    return made


_BITS = ("", "8bit", "32bit")
_8BIT = {"min_8bit_size": 64}  # else the state of so small a model stays in 32 bit

#: Trained and resumed on any number of ranks, with the losses of one process.
TRAINED: dict[str, Make] = {
    "torch.optim.Adadelta": of("torch.optim.Adadelta", lr=1.0),
    "torch.optim.Adagrad": of("torch.optim.Adagrad", lr=0.1, initial_accumulator_value=0.1, lr_decay=0.1),
    "torch.optim.Adam": of("torch.optim.Adam", lr=1e-3, amsgrad=True),
    "torch.optim.Adamax": of("torch.optim.Adamax", lr=1e-3),
    "torch.optim.AdamW": lambda model: torch.optim.AdamW(grouped(model), lr=1e-3),
    "torch.optim.ASGD": of("torch.optim.ASGD", lr=0.05, t0=2),
    "torch.optim.NAdam": of("torch.optim.NAdam", lr=1e-3),
    "torch.optim.RAdam": of("torch.optim.RAdam", lr=0.1),
    "torch.optim.RMSprop": of("torch.optim.RMSprop", lr=5e-4, momentum=0.5, centered=True),
    "torch.optim.Rprop": of("torch.optim.Rprop", lr=1e-3),
    "torch.optim.SGD": of("torch.optim.SGD", lr=0.1, momentum=0.9, nesterov=True),
    "peft.optimizers.create_loraplus_optimizer": lora_plus,
    **{
        f"bitsandbytes.optim.{kind}": of(
            f"bitsandbytes.optim.{kind}",
            lr={"SGD": 0.1, "Lion": 1e-3, "AdEMAMix": 4e-3, "Adagrad": 2e-2}.get(base, 1e-3),
            **({"momentum": 0.9} if base == "SGD" else {}),
            **({} if "32" in kind or base == "Adagrad" else _8BIT),
        )
        for paged, bases in (
            ("", ("Adagrad", "Adam", "AdamW", "AdEMAMix", "Lion", "RMSprop", "SGD")),
            ("Paged", ("Adam", "AdamW", "AdEMAMix", "Lion")),
        )
        for base in bases
        for kind in (f"{paged}{base}{bits}" for bits in _BITS)
        if "AdEMAMix32bit" not in kind
    },
}

#: Refused before training: how it is made, and a part of the message.
REFUSED: dict[str, tuple[Make, str]] = {
    "torch.optim.Adafactor": (of("torch.optim.Adafactor"), "it keeps one second moment per row and column"),
    "torch.optim.LBFGS": (of("torch.optim.LBFGS"), "it needs inner products over all parameters"),
    "torch.optim.Muon": (
        lambda model: torch.optim.Muon([parameter for parameter in trained(model) if parameter.ndim == 2]),
        "it orthogonalizes whole matrices",
    ),
    "torch.optim.SparseAdam": (of("torch.optim.SparseAdam"), "does not support dense gradients"),
    "transformers.optimization.Adafactor": (
        of("transformers.optimization.Adafactor"),
        "it keeps one second moment per row and column",
    ),
    "transformers.optimization.LayerWiseDummyOptimizer": (
        of("transformers.optimization.LayerWiseDummyOptimizer"),
        "an optimizer without any trained parameter",
    ),
    **{
        f"bitsandbytes.optim.{base}{bits}": (
            of(f"bitsandbytes.optim.{base}{bits}", lr=1e-3, momentum=0.9)
            if base == "LARS"
            else of(f"bitsandbytes.optim.{base}{bits}"),
            "it scales the step by the norm of each whole tensor",
        )
        for base in ("LAMB", "LARS")
        for bits in _BITS
    },
    "bitsandbytes.optim.PytorchLARS": (
        of("bitsandbytes.optim.PytorchLARS"),
        "it scales the step by the norm of each whole tensor",
    ),
    # of whole matrices too, in bitsandbytes itself
    **{
        f"bitsandbytes.optim.{paged}AdEMAMix32bit": (
            of(f"bitsandbytes.optim.{paged}AdEMAMix32bit"),
            "cannot be tried on flat tensors, which DeepSpeed will give it: RuntimeError: output with shape",
        )
        for paged in ("", "Paged")
    },
    "peft.optimizers.create_lorafa_optimizer": (lora_fa, "it projects the gradient of B with its own A"),
    "peft.optimizers.create_riemannian_optimizer": (riemannian, "it preconditions A with its own B"),
}
