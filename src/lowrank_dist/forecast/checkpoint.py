"""Size of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lowrank_dist.checkpoints.contents import Contents, tensor_files
from lowrank_dist.forecast.job import ModelShapes, RunSpec, parameters
from lowrank_dist.methods import QERA, LoftQ
from lowrank_dist.methods.frozen import Frozen
from lowrank_dist.methods.principal import AlternatingMethod
from lowrank_dist.model.names import peft_name
from lowrank_dist.storage.reader import FileTensor
from lowrank_dist.tuners.adalora.allocation import STATES
from lowrank_dist.tuners.adalora.files import AdaLoraFiles
from lowrank_dist.tuners.files import PeftFiles

_MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_bytes(shapes: ModelShapes, job: RunSpec) -> int:
    """Bytes of the tensor files of one checkpoint, without configurations and manifest (kilobytes per matrix).

    An upper bound: QPiSSA with several rounds writes the factors that the residual was encoded from only for matrices
    that ended on a decomposition, which are nearly all. Without adapters the checkpoint is Lightning's, with fp32
    copies and moments.
    """
    if not job.adapts:
        every = [(math.prod(_shape(shapes, p.name)), p.dtype.itemsize) for p in parameters(shapes, job)]
        return sum(numel * (itemsize + (12 if job.stage else 8)) for numel, itemsize in every)
    scored = () if shapes.tuner is None else shapes.tuner.scored
    files = _contents(shapes, job).files(_MOMENTS, further=[(name, kind) for name in scored for kind in STATES])
    return sum(part.nbytes for part in tensor_files(files, Path()).values())


def _contents(shapes: ModelShapes, job: RunSpec) -> Contents:
    layout = job.layout
    experts: dict[str, int] = {}
    frozen: set[str] = set()
    factors: list[str] = []
    further: dict[str, tuple[int, ...]] = {}
    for planned in shapes.plan.matrices:
        if planned.expert in (None, 0):  # experts share their factors
            factors += planned.factor_names.values()
            if planned.experts > 1:
                experts |= dict.fromkeys(map(peft_name, planned.factor_names.values()), planned.experts)
            frozen |= {name for factor, name in planned.factor_names.items() if factor not in layout.trained}
            further |= layout.parameter_shapes(planned)
            if planned.magnitude is not None:
                further[planned.magnitude] = planned.factor_shapes["lora_B"][:1]
    all_shapes = {name: tuple(_shape(shapes, name)) for name in factors} | further
    trained = [name for name in all_shapes if name not in frozen]
    for tensor in shapes.plan.parameters:
        if tensor.trainable:
            all_shapes[tensor.names[0]] = tuple(_shape(shapes, tensor.names[0]))
            trained.append(tensor.names[0])
    if shapes.tuner is not None:
        all_shapes |= shapes.tuner.trained
        trained += shapes.tuner.trained
        keys = {name: name for name in trained}  # what PEFT's file leaves out is kept beside it, in as many bytes
        whole = PeftFiles(keys=keys, is_lora=isinstance(job.init, Frozen) and job.init.adapter == "LORA")
        return Contents(
            shapes=all_shapes,
            dtypes=dict.fromkeys(all_shapes, job.factor_dtype),
            trained=trained,
            initial=(),
            adapter=AdaLoraFiles(whole=whole) if shapes.tuner.scored else whole,
            derived={
                key: FileTensor(shape=shape, dtype=job.factor_dtype if dtype.is_floating_point else dtype)
                for key, (shape, dtype) in shapes.tuner.saved.items()
            },
            starts_at_zero=True,
        )
    return Contents(
        shapes=all_shapes,
        dtypes=dict.fromkeys(all_shapes, job.factor_dtype),
        trained=trained,
        initial=factors,
        adapter=layout,
        encoded=factors if _encoded_differ(job) else (),
        experts=experts,
        starts_at_zero=job.starts_at_zero if job.init is None else job.init.starts_at_zero,
    )


def _encoded_differ(job: RunSpec) -> bool:
    """Whether residuals are encoded from other factors than A_0 and B_0, which are known."""
    if job.residual is None or job.residual.exact:
        return False
    if job.init is None:
        return job.keeps_encoded
    rounds = job.init.quantization_iterations if isinstance(job.init, AlternatingMethod) else 1
    return isinstance(job.init, LoftQ | QERA) or rounds > 1


def _shape(shapes: ModelShapes, name: str) -> torch.Size:
    parameter: torch.Tensor = shapes.backbone.get_parameter(name)
    return parameter.shape
