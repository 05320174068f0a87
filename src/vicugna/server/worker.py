"""The one thread that computes: it gives every running request one step in turn."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

from vicugna.errors import VicugnaError

RUNNING = 4  # requests stepped in turn; each holds its own key/value cache, so memory bounds it
WAITING = 256  # requests queued behind them, first come first served
_END = object()


class Busy(VicugnaError):
    """The queue is full, or the server is stopping."""


class Job:
    """One request: `start(cancelled)` makes its generator; what that yields crosses to the loop.

    Made on the event loop. The generator is stepped and closed by the worker's thread alone.
    """

    def __init__(self, start: Callable[[Callable[[], bool]], Generator[Any, None, None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._cancelled = threading.Event()
        self.cancelled, self.cancel = self._cancelled.is_set, self._cancelled.set
        self._steps = start(self.cancelled)

    async def events(self) -> AsyncIterator[Any]:
        """What the generator yields; its exception, if any, is raised here. Leaving cancels it."""
        try:
            while (event := await self._events.get()) is not _END:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.cancel()

    def step(self) -> bool:
        """Advance once; False when the job is over. Never raises: errors go to `events`."""
        if self.cancelled():
            self.end()
            return False
        try:
            event = next(self._steps, _END)
        except Exception as error:
            event = error
            if not isinstance(error, VicugnaError):
                logging.getLogger(__name__).exception("generation failed")
        self._post(event)
        return not (event is _END or isinstance(event, Exception))

    def end(self, event: Any = _END) -> None:
        """Give the job up, with `event` as its last."""
        self._steps.close()
        self._post(event)

    def _post(self, event: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Worker:
    """Start with `start()`, feed with `submit(job)`, end with `stop()`.

    A long answer never blocks a short one: up to `RUNNING` jobs take turns, one token each.
    """

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self.start, self.join = self._thread.start, self._thread.join

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy when the queue is full or the worker is stopping."""
        with self._changed:
            self._waiting = deque(other for other in self._waiting if not other.cancelled())
            if self._stopping or len(self._waiting) >= WAITING:
                raise Busy("the server has too much to do, or is stopping", "", "Try again later")
            self._waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Take no more, and end what runs with a Busy error; returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _work(self) -> None:
        running: deque[Job] = deque()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: running or self._waiting or self._stopping)
                while self._waiting and (len(running) < RUNNING or self._stopping):
                    running.append(self._waiting.popleft())
            if self._stopping:
                break
            job = running.popleft()
            if job.step():
                running.append(job)
        for job in running:
            job.end(Busy("the server is stopping"))
