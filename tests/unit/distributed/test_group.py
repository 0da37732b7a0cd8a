"""Options of `lowrank_dist.distributed.group`."""

from __future__ import annotations

import pytest

from lowrank_dist.distributed.group import LOW_LATENCY, ShardGroup
from lowrank_dist.errors import InputError


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOW_LATENCY, "yes")
    with pytest.raises(InputError, match="LOWRANK_DIST_LOW_LATENCY='yes' must be 1, or 0"):
        ShardGroup()
