"""What a run takes before it starts: memory, communication, time, disk; from shapes and settings alone.

Bytes of parameters, gradients and optimizer state are exact. Transient memory is an upper bound, seconds rest on the
assumed rates of `Cluster`.
"""

from lowrank_dist.forecast.forecast import Forecast, forecast
from lowrank_dist.forecast.job import ModelShapes, RunSpec
from lowrank_dist.forecast.rates import Cluster

__all__ = ["Cluster", "Forecast", "ModelShapes", "RunSpec", "forecast"]
