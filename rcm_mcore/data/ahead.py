"""Work that threads do ahead of the one who needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def ahead(
    start: Callable[[S, ThreadPoolExecutor], Future[T]], items: Iterable[S], *, workers: int
) -> Iterator[tuple[S, Future[T]]]:
    """Each item and its future, in order, with `workers` of them started ahead of the one handed out."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[tuple[S, Future[T]]] = deque()
    try:
        for item in items:
            waiting.append((item, start(item, pool)))
            if len(waiting) > workers:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
