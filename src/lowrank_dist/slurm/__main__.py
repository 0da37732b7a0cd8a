"""Entry point of ``python -m lowrank_dist.slurm``."""

from lowrank_dist.slurm.job import main

main()
