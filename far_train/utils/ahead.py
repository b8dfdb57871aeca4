"""Compute items in threads ahead of the loop that uses them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")
MOST_THREADS = 8
EACH = 2  # items that a thread may be ahead, since all of them are held in memory


def spare_threads(processes: int = 1) -> int:
    """How many threads one of so many processes on this machine may use: its share of the cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(cores // processes, MOST_THREADS), 1)


def threads_beside(device: torch.device, processes: int = 1) -> int:
    """How many threads may prepare work for ``device``: one beside a CPU, which is busy itself."""
    return 1 if device.type == "cpu" else spare_threads(processes)


@contextmanager
def computed_ahead(work: Callable[[int], T], count: int, threads: int) -> Iterator[Iterator[T]]:
    """The values ``work(0)`` to ``work(count - 1)``, in order; the next ones are computed in ``threads`` meanwhile.

    What ``work`` raises is raised where its value would come. When the context ends, what has not begun is dropped and
    the rest is waited for. It pays for work that releases the GIL, as Pillow and zlib do.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="far-ahead") as pool:
        numbers = iter(range(count))
        queue: deque[Future[T]] = deque(pool.submit(work, i) for i in islice(numbers, EACH * threads))

        def values() -> Iterator[T]:
            while queue:
                value = queue.popleft().result()
                queue.extend(pool.submit(work, i) for i in islice(numbers, 1))
                yield value

        try:
            yield values()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
