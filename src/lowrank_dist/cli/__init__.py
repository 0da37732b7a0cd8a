"""The command line: ``lowrank-dist COMMAND``, see ``--help``."""

from lowrank_dist.cli.commands import main, program

__all__ = ["main", "program"]
