"""``python -m lowrank_dist.cli``: the module that torchrun starts."""

import sys

from lowrank_dist.cli import program

sys.exit(program())
