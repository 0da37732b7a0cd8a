"""What a training step costs on an accelerator; ``python -m benchmarks.gpu --all``."""

import sys
from pathlib import Path

# the other benchmarks are programs, whose helpers lie beside them
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
