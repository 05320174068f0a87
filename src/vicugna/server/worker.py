"""The generation thread: running requests get one decoding step each in turn (round robin)."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vicugna.server.protocol import ApiError

RUNNING = 4  # concurrent requests; each has its own KV cache, so memory is the limit
WAITING = 256  # queued requests, first come first served
_END = object()
Steps = Generator[Any, None, None]


class Worker:
    """Steps up to `RUNNING` requests round robin. Call all but `join` from the event loop."""

    def __init__(self) -> None:
        self._thread, self._slots = ThreadPoolExecutor(1, "generation"), asyncio.Semaphore(RUNNING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping, self.join = False, self._thread.shutdown

    def check(self) -> None:
        """Raise ApiError 503 when the queue is full or the worker is stopping."""
        if self._stopping or len(self._tasks) >= RUNNING + WAITING:
            raise ApiError(503, "The queue is full, or the server is stopping. Retry later.")

    def stop(self) -> None:
        """Accept no more requests and end all others with an error; returns immediately."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()

    async def run(self, start: Callable[[Callable[[], bool]], Steps]) -> AsyncIterator[Any]:
        """What the generator `start(cancelled)` yields, buffered; closing this cancels it."""
        events: asyncio.Queue[Any] = asyncio.Queue()
        cancelled = threading.Event()
        task = asyncio.create_task(self._steps(start(cancelled.is_set), events))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(events.put_nowait)  # the task itself marks the end
        try:
            while (event := await events.get()) is not task:
                yield event
            if task.cancelled():
                raise ApiError(503, "The server is stopping.")
            task.result()
        finally:
            cancelled.set()
            task.cancel()

    async def _steps(self, steps: Steps, events: asyncio.Queue[Any]) -> None:
        step = partial(asyncio.get_running_loop().run_in_executor, self._thread, next, steps, _END)
        try:
            async with self._slots:
                while (event := await step()) is not _END:
                    events.put_nowait(event)
        finally:
            self._thread.submit(steps.close)
