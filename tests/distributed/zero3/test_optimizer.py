"""The optimizer of a ZeRO-3 engine, parameter by parameter, against `torch.optim` over whole parameters."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from helpers.ranks import run_ranks
from lowrank_dist.checkpoints.codec import decode_state, encode_state
from lowrank_dist.distributed.partition import FlatPartition
from lowrank_dist.errors import InputError
from lowrank_dist.zero3.elementwise import check_elementwise
from lowrank_dist.zero3.optimizer import MASTER, ShardedOptimizer, keep_optimizer
from lowrank_dist.zero3.partition import Partitioner, use_cpu_accelerator

SHAPES = [(6, 5), (7,), (9, 4), (2,)]  # the last one is smaller than three ranks
SECOND_GROUP = 2  # parameters from here on are in a group of their own
SETTINGS = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3, "betas": (0.8, 0.99)}]
STEPS = 3
MOMENTS = ("exp_avg", "exp_avg_sq")


def config(**zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        "gradient_clipping": 0.0,  # else 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


CONFIGS = {
    "one sub-group a group": config(),
    "several sub-groups": config(sub_group_size=20),
    "offloaded": config(offload_optimizer={"device": "cpu"}),
}


def values(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(step: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Whole numbers: their mean over ranks is exact."""
    generator = torch.Generator().manual_seed(100 + step)
    return [3.0 * torch.randint(-4, 5, shape, generator=generator) for shape in shapes]


class Weighted(nn.Module):
    """Its gradients are the weights that it is called with."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, weights: list[Tensor]) -> Tensor:
        return torch.stack([(p * w).sum() for p, w in zip(self.held, weights, strict=True)]).sum()


class Sharded:
    """An engine over partitioned parameters."""

    def __init__(
        self, settings: dict[str, Any], shapes: list[tuple[int, ...]] = SHAPES, optimizer: Any = torch.optim.AdamW
    ) -> None:
        use_cpu_accelerator()
        partitioner = Partitioner(settings)
        self.group, self.shapes = partitioner.group, shapes
        parameters = [
            partitioner.parameter(shape, torch.float32, self.own(whole), requires_grad=True)
            for shape, whole in zip(shapes, values(shapes), strict=True)
        ]
        module = Weighted(parameters)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer(groups(parameters)), config=settings, dist_init_required=False
        )
        keep_optimizer(self.engine)
        self.places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self.optimizer = ShardedOptimizer(self.engine.optimizer)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part, without padding."""
        bounds = FlatPartition(numel=whole.numel(), world_size=self.group.size).bounds(self.group.rank)
        return whole.flatten()[slice(*bounds)]

    def step(self, number: int) -> None:
        self.engine.backward(self.engine(gradients(number, self.shapes)))
        self.engine.step()

    def shards(self) -> list[dict[str, Tensor]]:
        """What `ShardedOptimizer.shards` gives, copied, in the order of the parameters."""
        found = {self.places[id(p)]: {n: t.clone() for n, t in s.items()} for p, s in self.optimizer.shards()}
        return [found[place] for place in range(len(self.shapes))]

    def load(self, states: list[dict[str, Tensor]], steps: int, scalars: list[dict[str, Any]] | None = None) -> None:
        """`ShardedOptimizer.load` of whole tensors."""
        self.optimizer.load(lambda p: {n: self.own(t) for n, t in states[self.places[id(p)]].items()}, steps, scalars)


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    parts = parameters[:SECOND_GROUP], parameters[SECOND_GROUP:]
    return [{"params": part, **settings} for part, settings in zip(parts, SETTINGS, strict=True)]


def rates(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of `groups`, what every optimizer takes."""
    return [{"params": group["params"], "lr": group["lr"]} for group in given]


class Whole:
    """The same parameters, whole, under an optimizer of one process."""

    def __init__(self, optimizer: Any = torch.optim.AdamW) -> None:
        self.parameters = [nn.Parameter(value) for value in values(SHAPES)]
        self.optimizer = optimizer(groups(self.parameters))

    def step(self, number: int) -> None:
        for parameter, gradient in zip(self.parameters, gradients(number, SHAPES), strict=True):
            parameter.grad = gradient
        self.optimizer.step()

    def states(self) -> list[dict[str, Tensor]]:
        return [
            {MASTER: p.detach().clone()} | {name: self.optimizer.state[p][name].clone() for name in MOMENTS}
            for p in self.parameters
        ]


def assert_shards(found: list[dict[str, Tensor]], whole: list[dict[str, Tensor]], sharded: Sharded) -> None:
    """Bit-equal, with padding of zero."""
    for shape, shards, states in zip(sharded.shapes, found, whole, strict=True):
        numel = FlatPartition(numel=torch.Size(shape).numel(), world_size=sharded.group.size).shard_numel
        assert shards.keys() == states.keys()
        for name, shard in shards.items():
            assert (shard.dtype, shard.numel(), shard.requires_grad) == (torch.float32, numel, False)
            own = sharded.own(states[name])
            assert torch.equal(shard[: own.numel()], own), (name, shape)
            assert not shard[own.numel() :].any()


def read() -> None:
    for settings in CONFIGS.values():
        sharded, whole = Sharded(settings), Whole()
        assert_shards(sharded.shards(), [{MASTER: value} for value in values(SHAPES)], sharded)
        assert sharded.optimizer.steps == 0
        for number in range(STEPS):
            sharded.step(number)
            whole.step(number)
        assert_shards(sharded.shards(), whole.states(), sharded)
        assert sharded.optimizer.steps == STEPS


def written() -> None:
    """Into an optimizer that has not stepped, and over the state of one that has."""
    for settings in CONFIGS.values():
        for taken in (0, 2):
            sharded, whole = Sharded(settings), Whole()
            for number in range(taken):
                sharded.step(10 + number)
            for number in range(STEPS):
                whole.step(number)
            sharded.load(whole.states(), STEPS)
            assert_shards(sharded.shards(), whole.states(), sharded)
            assert sharded.optimizer.steps == STEPS
            sharded.step(STEPS)
            whole.step(STEPS)
            assert_shards(sharded.shards(), whole.states(), sharded)


def without_masters() -> None:
    sharded, whole = Sharded(CONFIGS["several sub-groups"]), Whole()
    whole.step(0)
    moments = [{name: state[name] for name in MOMENTS} for state in whole.states()]
    sharded.load(moments, 1)
    expected = [{MASTER: value, **state} for value, state in zip(values(SHAPES), moments, strict=True)]
    assert_shards(sharded.shards(), expected, sharded)


def settings_of_groups() -> None:
    sharded, whole = Sharded(CONFIGS["several sub-groups"]), Whole()
    for found, group in zip(sharded.optimizer.settings, whole.optimizer.param_groups, strict=True):
        assert {name: found[name] for name in ("lr", "betas", "eps", "weight_decay")} == {
            name: group[name] for name in ("lr", "betas", "eps", "weight_decay")
        }
        assert "params" not in found
    with pytest.raises(InputError, match=r"has 2 parameter groups, the checkpoint's had 1"):
        sharded.optimizer.settings = [{"lr": 1.0}]
    sharded.optimizer.settings = [{"lr": 0.25, "of another optimizer": 1}, {"weight_decay": 0.5}]
    first, second = sharded.optimizer.settings
    assert (first["lr"], second["lr"], second["weight_decay"]) == (0.25, SETTINGS[1]["lr"], 0.5)
    assert "of another optimizer" not in first
    whole.optimizer.param_groups[0]["lr"] = 0.25
    whole.optimizer.param_groups[1]["weight_decay"] = 0.5
    sharded.step(0)
    whole.step(0)
    assert_shards(sharded.shards(), whole.states(), sharded)


BLOCKS = [(70, 96), (61,), (80, 90)]  # sub-groups that are quantized, with bounds within a block


def eight_bits() -> None:
    """Quantization leaves a 254th of a block's largest entry at most, twice that where its scale shrinks; see there."""
    from bitsandbytes.optim import AdamW8bit

    sharded, other = (Sharded(config(), BLOCKS, AdamW8bit) for _ in range(2))
    for number in range(STEPS):
        sharded.step(number)
    before = sharded.shards()
    other.optimizer.load(lambda p: before[other.places[id(p)]], STEPS)
    assert other.optimizer.steps == STEPS
    for expected, found in zip(before, other.shards(), strict=True):
        assert expected.keys() == found.keys() == {MASTER, *MOMENTS}
        assert torch.equal(found[MASTER], expected[MASTER])
        for name in MOMENTS:
            bound = 2 / 127 * float(expected[name].abs().max())
            assert float(expected[name].abs().max()) > 0
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=bound)


class Lion(torch.optim.Optimizer):
    """One moment, no step count (arXiv:2302.06675)."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_((first * moment + (1 - first) * parameter.grad).sign(), alpha=group["lr"])
                moment.mul_(second).add_(parameter.grad, alpha=1 - second)


def bitsandbytes(name: str, **options: Any) -> Any:
    def make(given: list[dict[str, Any]]) -> Any:
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, name)(rates(given), **options)

    return make


def of_torch(name: str, **options: Any) -> Any:
    return lambda given: getattr(torch.optim, name)(rates(given), **options)


#: Whose state differs: step counts as tensors and numbers, further scalars, moments of two entries, none at all.
ELEMENTWISE: dict[str, Any] = {
    "SGD": of_torch("SGD"),
    "SGD with momentum": of_torch("SGD", momentum=0.9, nesterov=True),
    "AMSGrad": of_torch("AdamW", amsgrad=True),
    "Adagrad": of_torch("Adagrad", initial_accumulator_value=0.1, lr_decay=0.1),
    "RMSprop": of_torch("RMSprop", momentum=0.5, centered=True),
    "RAdam": of_torch("RAdam"),
    "NAdam": of_torch("NAdam"),
    "Adamax": of_torch("Adamax"),
    "Adadelta": of_torch("Adadelta"),
    "ASGD": of_torch("ASGD", t0=1),
    "Rprop": of_torch("Rprop"),
    "Lion": lambda given: Lion(rates(given)),
    "Lion of bitsandbytes": bitsandbytes("Lion"),
    "AdEMAMix": bitsandbytes("AdEMAMix"),
    "AdEMAMix with schedules": bitsandbytes("AdEMAMix", t_alpha=5, t_beta3=5),
    "AdamW of bitsandbytes": bitsandbytes("AdamW"),
}
_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """State with one or two entries per element, by the names of `ShardedOptimizer.shards`."""
    found = {}
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            found[_NAMES.get(name, name)] = value.clone()
        elif isinstance(value, Tensor) and value.shape == (2, *parameter.shape):
            found |= {f"{_NAMES.get(name, name)}_{row}": value[row].clone() for row in range(2)}
    return found


def same(found: list[dict[str, Tensor]], whole: Whole, sharded: Sharded) -> None:
    """To fp32 rounding: vector instructions end elsewhere in a shard."""
    for place, parameter in enumerate(whole.parameters):
        expected = {MASTER: parameter.detach(), **moments_of(whole.optimizer, parameter)}
        assert found[place].keys() == expected.keys()
        for name, shard in found[place].items():
            own = sharded.own(expected[name])
            torch.testing.assert_close(shard[: own.numel()], own, rtol=1e-5, atol=1e-7)


def every_elementwise_one() -> None:
    """Its steps are those of one process, and go on from its state; learning rates are written as schedules do."""
    for name, optimizer in ELEMENTWISE.items():
        try:
            sharded, other = (Sharded(config(), SHAPES, optimizer) for _ in range(2))
            whole = Whole(optimizer)
            check_elementwise(whole.optimizer)
            for number in range(STEPS):
                sharded.step(number)
                whole.step(number)
            same(sharded.shards(), whole, sharded)
            value, tensors = encode_state(sharded.optimizer.scalars)
            states = [{MASTER: p.detach().clone(), **moments_of(whole.optimizer, p)} for p in whole.parameters]
            other.load(states, STEPS, decode_state(value, tensors))
            other.optimizer.settings = sharded.optimizer.settings
            for stepping in (other.engine.basic_optimizer, sharded.engine.basic_optimizer, whole.optimizer):
                for group in stepping.param_groups:
                    group["lr"] *= 0.5
            for number in range(STEPS, 2 * STEPS):
                for stepping_one in (sharded, other, whole):
                    stepping_one.step(number)
            same(sharded.shards(), whole, sharded)
            same(other.shards(), whole, other)
            for one, another in zip(sharded.optimizer.scalars, other.optimizer.scalars, strict=True):
                assert {n: type(v) for n, v in one.items()} == {n: type(v) for n, v in another.items()}
                assert {n: float(v) for n, v in one.items()} == {n: float(v) for n, v in another.items()}
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


def other_optimizers() -> None:
    """State of another optimizer is refused, not dropped or begun anew."""
    whole = Whole()
    whole.step(0)
    for optimizer, message in (
        (of_torch("SGD", momentum=0.9), "holds the moments exp_avg, exp_avg_sq, but SGD keeps momentum_buffer"),
        (of_torch("NAdam"), "the checkpoint holds no mu_product, which NAdam keeps"),
        (of_torch("SGD"), "but SGD keeps none"),
    ):
        with pytest.raises(InputError, match=message):
            Sharded(config(), SHAPES, optimizer).load(whole.states(), 1, [{"step": torch.tensor(1.0)}] * 2)


def names_of_groups() -> None:
    sharded = Sharded(config())
    with pytest.raises(InputError, match="the parameter group None of the optimizer was 'lora_B' in the checkpoint"):
        sharded.optimizer.settings = [{"lr": 1.0}, {"lr": 1.0, "name": "lora_B"}]


CASES = {
    "every element-wise one": every_elementwise_one,
    "other optimizers": other_optimizers,
    "names of groups": names_of_groups,
    "read": read,
    "written": written,
    "without masters": without_masters,
    "settings": settings_of_groups,
    "eight bits": eight_bits,
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_against_torch(world_size: int) -> None:
    run_ranks(world_size, every_case)


def every_case() -> None:
    """All cases on the same ranks; a failure names its own."""
    for name, case in CASES.items():
        try:
            case()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
