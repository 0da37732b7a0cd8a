"""Memory that is lent again and again: when it comes back, and when it must not."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import torch

from helpers.ranks import alone, run_ranks
from lowrank_dist.storage.buffers import Buffers

CPU = torch.device("cpu")
NBYTES = 40 * 2**20


def test_memory_comes_back_once_nothing_lies_in_it() -> None:
    buffers = Buffers(64, least=1)
    first = buffers.empty((8, 8), CPU)
    place = first.data_ptr()
    view = first[2:].flatten()
    del first
    assert buffers.empty((8, 8), CPU).data_ptr() != place  # the view is still there
    del view
    both = [buffers.empty((4, 4), CPU) for _ in range(2)]
    assert place in {tensor.data_ptr() for tensor in both}


def test_a_view_keeps_its_values() -> None:
    buffers = Buffers(6, least=1)
    kept = buffers.empty((2, 3), CPU).fill_(7.0).flatten()[1:].to(torch.float32)  # no copy: the same dtype
    for _ in range(5):
        buffers.empty((2, 3), CPU).zero_()
    assert kept.tolist() == [7.0] * 5


def test_a_lent_tensor_is_like_any_other() -> None:
    lent = Buffers(100, least=1).empty((7, 9), CPU)
    assert lent.shape == (7, 9)
    assert lent.dtype == torch.float32
    assert lent.is_contiguous()
    assert lent.data_ptr() % 64 == 0  # as torch allocates: a BLAS may round by alignment


def test_what_is_too_large_or_small_is_not_lent() -> None:
    buffers = Buffers(10, least=5)
    place = buffers.empty((2, 3), CPU).data_ptr()  # back at once
    for shape in ((2, 2), (3, 4), (0, 4)):
        other = buffers.empty(shape, CPU)
        assert other.shape == shape
        assert other.data_ptr() != place
        assert buffers.empty((2, 3), CPU).data_ptr() == place  # still there
    assert Buffers().empty((3000, 3000), CPU).shape == (3000, 3000)


@alone
def returned_bytes() -> int:
    """Of eight buffers of 40 MiB, which the C library hands back to the kernel as soon as they are freed."""
    buffers = Buffers(NBYTES // 4, least=1)
    several = [buffers.empty((NBYTES // 4,), CPU).fill_(1.0) for _ in range(8)]
    assert len({tensor.data_ptr() for tensor in several}) == 8
    before = resident_bytes()
    del several
    return before - resident_bytes()


def test_few_buffers_are_kept() -> None:
    """Three of eight; in a process of its own, whose heap holds nothing else that is freed."""
    (returned,) = run_ranks(1, returned_bytes)
    assert 4.5 * NBYTES < returned < 5.5 * NBYTES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_threads_may_share_them() -> None:
    buffers, wrong = Buffers(1000, least=1), []

    def use(number: int) -> None:
        for _ in range(500):
            tensor = buffers.empty((10, 100), CPU).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
