"""`lowrank-dist submit`: python launch/slurm.py --config FILE --partition P --time 24:00:00 ..."""

import sys

from lowrank_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
