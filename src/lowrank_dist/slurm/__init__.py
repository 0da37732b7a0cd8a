"""Jobs on a cluster: their options, the checks before submission, and the program of every task."""

from lowrank_dist.slurm.job import TrainingJob
from lowrank_dist.slurm.options import SubmitError, SubmitOptions
from lowrank_dist.slurm.submit import Submission, prepare

__all__ = ["Submission", "SubmitError", "SubmitOptions", "TrainingJob", "prepare"]
