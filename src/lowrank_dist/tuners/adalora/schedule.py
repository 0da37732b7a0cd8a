"""How many triplets of all layers together AdaLoRA keeps at every step, and when it chooses them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from peft import AdaLoraConfig


@dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """AdaLoRA's cubic schedule, equation (12) of the paper, with the steps counted as PEFT counts them, from 0.

    Attributes
    ----------
    initial, target
        Triplets per layer at the start and, on average, at the end.
    warmup
        The last step before which nothing is pruned (``tinit``).
    fixed_from
        The step from which the choice is fixed (``total_step - tfinal``).
    interval
        Triplets are chosen at multiples of it (``deltaT``), and at `fixed_from`.
    """

    initial: int
    target: int
    warmup: int
    fixed_from: int
    interval: int

    @classmethod
    def of(cls, config: AdaLoraConfig) -> BudgetSchedule:
        """The schedule of a configuration without an `objection`."""
        assert config.total_step is not None
        return cls(
            initial=config.init_r,
            target=config.target_r,
            warmup=config.tinit,
            fixed_from=config.total_step - config.tfinal,
            interval=config.deltaT,
        )

    def budget(self, step: int, layers: int) -> int:
        """Triplets of `layers` layers together that are kept at `step`."""
        initial, target = self.initial * layers, self.target * layers
        if step <= self.warmup:
            return initial
        if step >= self.fixed_from:
            return target
        left = 1 - (step - self.warmup) / (self.fixed_from - self.warmup)
        return int((initial - target) * left**3 + target)

    def measures(self, step: int) -> bool:
        """Whether the importance of the triplets changes with `step`."""
        return step < self.fixed_from

    def chooses(self, step: int) -> bool:
        """Whether the triplets that are kept are chosen at `step`."""
        return step == self.fixed_from or (self.warmup < step < self.fixed_from and step % self.interval == 0)

    def masks(self, step: int) -> bool:
        """Whether the triplets that are not kept are set to 0 at `step`."""
        return self.chooses(step) or step > self.fixed_from

    def as_dict(self) -> dict[str, Any]:
        """The attributes, for checkpoints."""
        return asdict(self)


def objection(config: AdaLoraConfig) -> str | None:
    """Why the schedule of a configuration cannot be followed, with the remedy; None if it can."""
    least = {"target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
    for name, low in least.items():
        if getattr(config, name) < low:
            return f"{name}={getattr(config, name)} must be at least {low}"
    if config.target_r > config.init_r:
        return (
            f"target_r={config.target_r} is more than init_r={config.init_r}, but the budget only falls; choose "
            "init_r about 1.5 times target_r"
        )
    for name in ("beta1", "beta2"):
        if not 0 < getattr(config, name) < 1:
            return f"{name}={getattr(config, name)} must be between 0 and 1"
    if config.orth_reg_weight < 0:
        return f"orth_reg_weight={config.orth_reg_weight} must not be negative"
    if config.total_step is None or config.tinit >= config.total_step - config.tfinal:
        return (
            f"tinit={config.tinit} and tfinal={config.tfinal} leave no steps of total_step={config.total_step} in "
            "which the budget falls; choose tinit + tfinal < total_step"
        )
    last = config.total_step - 1
    if config.tfinal == 0 and last % config.deltaT:
        return (
            f"with tfinal=0, triplets are chosen for the last time at step {last - last % config.deltaT} of "
            f"{config.total_step} (deltaT={config.deltaT}); those that are pruned then would be trained on and be cut "
            "when saved; choose tfinal of at least 1"
        )
    return None


def objection_to_steps(config: AdaLoraConfig, steps: float) -> str | None:
    """Why the schedule does not fit a run of `steps` optimizer steps, with the remedy; None if it does."""
    if config.total_step == steps:
        return None
    known = f"{steps:.0f} optimizer steps" if 0 < steps < float("inf") else "no known number of optimizer steps"
    remedy = f"total_step={steps:.0f}" if 0 < steps < float("inf") else f"Trainer(max_steps={config.total_step})"
    return (
        f"total_step={config.total_step} of AdaLoraConfig, by which the budget falls, but this run has {known}; pass "
        f"{remedy}"
    )
