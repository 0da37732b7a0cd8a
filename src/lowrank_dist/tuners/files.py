"""Names that PEFT gives the tensors of an adapter in its files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model_state_dict
from torch import Tensor, nn

from lowrank_dist.model.names import ADAPTER, peft_name


@dataclass(frozen=True, kw_only=True)
class PeftFiles:
    """The adapter file of a tuner (`lowrank_dist.model.adapter_files.AdapterFiles`).

    Attributes
    ----------
    keys
        Name in the file, by the name of the parameter in the model.
    derived
        Names in the file of tensors that are not parameters: buffers, and what PEFT computes from parameters.
    is_lora
        Whether the adapter is a LoRA that servers read.
    """

    keys: Mapping[str, str]
    derived: tuple[str, ...] = ()
    is_lora: bool = False

    def stored_as(self, name: str) -> str | None:
        return self.keys.get(name)

    def adapter(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.keys[name]: tensor for name, tensor in parameters.items() if name in self.keys}


def whole_files(names: Iterable[str]) -> PeftFiles:
    """The file of parameters of the model itself, whole, where nothing else is trained."""
    return PeftFiles(keys={name: peft_name(name) for name in names})


def exported(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT saves of the adapter of `model`, as it is; parameters are the objects themselves.

    Parameters that PEFT computes with (prompt encoders) must be gathered.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=ADAPTER, save_embedding_layers=False
    )
    return found


def peft_files(
    model: nn.Module, names: Mapping[nn.Parameter, str], *, own: Collection[nn.Parameter], is_lora: bool
) -> PeftFiles:
    """The file names of the adapter of a model.

    Parameters
    ----------
    model
        PEFT's model.
    names
        Names of its parameters in what is trained.
    own
        The parameters of the model itself that are trained. PEFT does not save all of them; it loads them
        under the names that they have in its model.
    is_lora
        See `PeftFiles`.
    """
    found = exported(model)
    keys: dict[str, str] = {}
    for key, tensor in found.items():
        if isinstance(tensor, nn.Parameter) and tensor in names:
            keys.setdefault(names[tensor], key)
    for name, parameter in model.named_parameters():
        if parameter in own:
            keys.setdefault(names[parameter], name)
    stored = set(keys.values())
    # an object that PEFT saves under several keys is written once for each of them
    derived = tuple(key for key in found if key not in stored)
    return PeftFiles(keys=keys, derived=derived, is_lora=is_lora)
