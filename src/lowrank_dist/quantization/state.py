"""The JSON beside an encoded weight in a file, as bitsandbytes writes it for its 4-bit weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowrank_dist.storage.parse import Record, is_integer, is_list_of, is_number, parse_object


def read_quant_state(values: Tensor, where: str) -> dict[str, Any]:
    """Parse the JSON beside an encoded weight (``<weight>.quant_state.bitsandbytes__nf4``, ...).

    Raises
    ------
    CheckpointError
        If it is damaged; `where` begins the message.
    """
    state = Record(parse_object(values.numpy().tobytes(), where), where)
    state.expect("shape", lambda v: is_list_of(is_integer)(v) and len(v) == 2, "two sizes")
    state.integer("blocksize", low=1, high=2**20)
    state.text("quant_type")
    if "nested_blocksize" in state:
        state.integer("nested_blocksize", low=1, high=2**20)
        state.expect("nested_offset", is_number, "a number")
    return state
