"""Imported by the server that ranks fork from: what libraries otherwise compute anew in every rank's first fit."""

from __future__ import annotations

import deepspeed.ops
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

# PEFT asks for it, and it compiles a thousand regular expressions
get_checkpoint_conversion_mapping("llama")
# DeepSpeed looks for what it can compile here
deepspeed.ops.__compatible_ops__  # noqa: B018
