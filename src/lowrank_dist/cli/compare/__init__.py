"""``lowrank-dist compare``: runs that differ in their settings, side by side."""
