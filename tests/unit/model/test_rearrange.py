"""Rows of fused projections: each parameter has the values that transformers gives it, from any rows that are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.families import FAMILIES
from lowrank_dist.model.names import CheckpointKeys
from lowrank_dist.storage.reader import CheckpointReader

#: Chunks of queries, keys and values, of gates and inputs; joined convolutions.
FUSED = ["nomic_bert (masked LM)", "gte (masked LM)", "dinov2 (SwiGLU)", "olmo_hybrid"]


@pytest.mark.parametrize("name", FUSED)
def test_every_parameter_is_the_one_of_transformers(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    family.save(tmp_path)
    model = family.auto_class.from_pretrained(tmp_path, dtype=torch.float32)
    reader = CheckpointReader(tmp_path)
    keys, moved = CheckpointKeys(model, reader), 0
    for parameter, value in model.named_parameters():
        key = keys.find(parameter)
        assert key is not None, parameter
        info = reader.info(key)
        assert info.shape == value.shape
        assert info.nbytes == value.nbytes
        moved += key not in reader
        rows, width = len(value), value[0].numel()
        for start, stop in ((0, rows), (rows // 3, rows // 3 + 2), (rows - 1, rows)):
            assert torch.equal(reader.rows(key, start, stop), value[start:stop])
        first, last = width // 2, width * rows - width // 3
        assert torch.equal(reader.flat(key, first, last), value.flatten()[first:last])
        places = [(reader.flat(stored, at, at + count)) for stored, at, count in reader.places(key, first, last)]
        assert torch.equal(torch.cat(places), value.flatten()[first:last])
    assert moved > 0
    reader.close()
