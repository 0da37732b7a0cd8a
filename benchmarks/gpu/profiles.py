"""What a profile says of copies and collectives: how long they take, and how much of that is hidden by arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


def on_streams(profiled: profile) -> dict[int, list[Interval]]:
    """Intervals of what ran on the device, in seconds, by stream."""
    streams: dict[int, list[Interval]] = defaultdict(list)
    events: Any = profiled.events()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            streams[event.device_resource_id].append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    return dict(streams)


def overlap(streams: dict[int, list[Interval]]) -> tuple[float, float]:
    """Seconds on all streams but the busiest, which computes; and how many of them it was busy meanwhile."""
    merged = {stream: union(intervals) for stream, intervals in streams.items()}
    if not merged:
        return 0.0, 0.0
    busiest = max(merged, key=lambda stream: _length(merged[stream]))
    others = union(interval for stream, intervals in merged.items() if stream != busiest for interval in intervals)
    both = union([*merged[busiest], *others])
    return _length(others), _length(merged[busiest]) + _length(others) - _length(both)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals that cover the same, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def profiler() -> profile:
    return profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
