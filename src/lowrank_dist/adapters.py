"""Adapters on their way out of a sharded model: gathered a few at a time, written by rank 0 under PEFT's names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_dist import __version__
from lowrank_dist.adapter_files import ADAPTER_DIR, INITIAL_DIR, LORA_DIR, MANIFEST, write_adapter
from lowrank_dist.checkpoint_io import atomic_directory, write_json
from lowrank_dist.checkpoint_keys import peft_name
from lowrank_dist.comm import ShardGroup
from lowrank_dist.exact_lora import lora_config, to_lora
from lowrank_dist.materialize import Materialized
from lowrank_dist.zero3 import gather_to_cpu, whole_shape

GATHER_BYTES = 2**28
CORE = ".core"


def fold_cores(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA that stands for factors with a core between them: ``B R`` in the place of B and R."""
    folded = {name: tensor for name, tensor in adapter.items() if not name.endswith(CORE)}
    for name in adapter.keys() - folded.keys():
        b, core = name.removesuffix(CORE) + ".weight", adapter[name]
        folded[b] = (adapter[b].float() @ core.float()).to(core.dtype)
    return folded


class AdapterWriter:
    """Writes the adapters of a sharded model.

    Parameters
    ----------
    backbone
        The sharded model.
    config
        PEFT configuration of the adapter.
    materialized
        What the walk left: the initial factors and the measurements.
    group
        The ranks that share the model.
    base
        Checkpoint that the model was made from; becomes ``base_model_name_or_path``.
    method, quantization
        For the manifest.
    starts_at_zero
        The adapter is a LoRA for `base` as it is.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        config: LoraConfig,
        materialized: Materialized,
        group: ShardGroup,
        *,
        base: str,
        method: str,
        quantization: str | None,
        starts_at_zero: bool,
    ) -> None:
        parameters = dict(backbone.named_parameters())
        trained = [name for name, p in parameters.items() if p.requires_grad]
        # the frozen factors around a trained core belong to the adapter too
        names = dict.fromkeys([*trained, *materialized.initial])
        self._saved = [(name, parameters[name]) for name in names]
        self._config = copy.deepcopy(config)
        self._config.base_model_name_or_path = base
        self._config.inference_mode = True
        self._initial, self._group = materialized.initial, group
        self._starts_at_zero = starts_at_zero
        self._manifest: dict[str, Any] = {
            "format": 1,
            "lowrank_dist": __version__,
            "base": base,
            "method": method,
            "quantization": quantization,
            "starts_at_zero": starts_at_zero,
            "adapter_is_for": "the residual" if not starts_at_zero else "the base",
            "experts": {peft_name(name): count for name, count in materialized.experts.items()},
            # under target_parameters PEFT nests layers, whose names in the file do not say what they adapt
            "parameters": {peft_name(name): weight for name, weight in materialized.parameters.items()},
            "matrices": [m.as_dict() for m in materialized.report.matrices],
        }

    def write(self, directory: Path) -> None:
        """Write adapter, initial adapter, converted LoRA and manifest to `directory`. Collective.

        All-gathers of at most 256 MiB of parameters at a time; rank 0 writes. An error of rank 0 is raised on all.
        """
        writes = self._group.rank == 0
        adapter = {peft_name(n): t for n, t in gather_to_cpu(self._saved, max_bytes=GATHER_BYTES, keep=writes)}
        adapter = fold_cores(adapter)
        initial = {} if self._starts_at_zero else dict(self._gather_initial(keep=writes))
        with self._group.shared_errors():
            if writes:
                with atomic_directory(directory) as staging:
                    write_adapter(staging / ADAPTER_DIR, adapter, self._config)
                    if self._starts_at_zero:
                        write_adapter(staging / LORA_DIR, adapter, self._config)
                    else:
                        write_adapter(staging / INITIAL_DIR, initial, self._config)
                        write_adapter(
                            staging / LORA_DIR,
                            to_lora(adapter, initial, self._manifest["experts"]),
                            lora_config(self._config),
                        )
                    write_json(staging / MANIFEST, self._manifest)

    def _gather_initial(self, keep: bool) -> Iterator[tuple[str, Tensor]]:
        shapes = {name: whole_shape(parameter) for name, parameter in self._saved}
        for name, shard in self._initial.items():
            whole = self._group.gather_equal(shard.to(self._group.device))
            if keep:
                yield peft_name(name), whole[: shapes[name].numel()].view(shapes[name]).cpu()
