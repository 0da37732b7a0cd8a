"""Memory, communication, time and disk that a run needs, computed from shapes and settings before it starts.

Bytes of parameters, gradients and optimizer state are exact. Transient memory is an upper bound. Seconds rest on the
assumed rates of `Cluster`.
"""

from lowrank_dist.forecast.forecast import Forecast, forecast
from lowrank_dist.forecast.job import ModelShapes, RunSpec
from lowrank_dist.forecast.rates import Cluster

__all__ = ["Cluster", "Forecast", "ModelShapes", "RunSpec", "forecast"]
