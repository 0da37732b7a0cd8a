"""``lowrank-dist plan``: forecast what a run takes and whether it fits."""
