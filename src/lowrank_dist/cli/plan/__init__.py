"""``lowrank-dist plan``: what a run takes, and whether it fits, before anything runs."""
