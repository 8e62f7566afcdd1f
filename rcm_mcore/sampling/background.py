"""Work that goes on beside the caller's, in one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Calls `work` in a thread, in order, at most `ahead` items behind the caller. What it raises, `put` or the end raises.

    Leaving the context waits for everything; an exception inside it drops what has not begun.
    """

    def __init__(self, work: Callable[..., Any], *, ahead: int = 2) -> None:
        self._work, self._ahead = work, ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")
        self._pending: deque[Future[Any]] = deque()

    def put(self, *item: Any) -> None:
        """Hand over the arguments of a call; waits while `ahead` calls are not done."""
        while self._pending and (len(self._pending) >= self._ahead or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._work, *item))

    def __enter__(self) -> Background:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            while self._pending and error is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
