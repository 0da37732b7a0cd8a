"""``python -m lowrank_dist.cli``: what torchrun starts."""

import sys

from lowrank_dist.cli import main

sys.exit(main())
