"""The generation thread: it steps one engine for all requests."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from queue import SimpleQueue

from vicugna.engine import Delta, Engine, Request, TextStream
from vicugna.server.protocol import ApiError
from vicugna.tokenizer import Tokenizer

REQUESTS = 512  # at once, waiting ones included; how many run is the engine's to say


@dataclass(eq=False)
class _Job:
    """A request on its way through the engine. `left`: nobody waits for it any more."""

    request: Request
    text: TextStream
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)
    left: bool = False

    def send(self, event: Delta | Exception) -> None:
        """Called by the thread."""
        if not self.left:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """Runs requests through `engine`. Call all but `join` from the event loop."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self._tokenizer = engine, tokenizer
        self._inbox = SimpleQueue[_Job | None]()  # None only wakes the thread
        self._jobs: set[_Job] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="generation", daemon=True)
        self._thread.start()
        self.join = self._thread.join

    def check(self) -> None:
        """Raise ApiError 503 when the queue is full or the worker is stopping."""
        if self._stopping or len(self._jobs) >= REQUESTS:
            raise ApiError(503, "The queue is full, or the server is stopping. Retry later.")

    def stop(self) -> None:
        """Accept no more requests and end all others with an error; returns immediately."""
        self._stopping = True
        for job in self._jobs:
            job.events.put_nowait(ApiError(503, "The server is stopping."))
        self._inbox.put(None)

    async def run(self, request: Request) -> AsyncIterator[Delta]:
        """What the request gains, buffered; closing this cancels it before the next step."""
        self.check()
        job = _Job(request, TextStream(self._tokenizer, request.sampling.stop),
                   asyncio.get_running_loop())
        self._jobs.add(job)
        self._inbox.put(job)
        try:
            reason = None
            while reason is None:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                reason = event.finish_reason
        finally:
            job.left = True
            self._jobs.discard(job)
            self._inbox.put(None)

    def _serve(self) -> None:
        """The thread: take what has arrived, step, send what was gained."""
        running: dict[int, _Job] = {}
        while not self._stopping:
            while not self._inbox.empty() or not running:
                if (job := self._inbox.get()) is not None and not job.left:
                    try:
                        running[self.engine.add(job.request)] = job
                    except Exception as error:
                        job.send(error)
                if self._stopping:
                    return
            for id in [id for id, job in running.items() if job.left]:
                self.engine.cancel(id)
                del running[id]
            self._step(running)

    def _step(self, running: dict[int, _Job]) -> None:
        """One step; an error ends all requests that run, and the engine goes on."""
        try:
            for output in self.engine.step():
                job = running[output.id]
                delta = job.text.push(output)
                if delta.finish_reason:
                    self.engine.cancel(output.id)
                    del running[output.id]
                job.send(delta)
        except Exception as error:
            for id, job in running.items():
                self.engine.cancel(id)
                job.send(error)
            running.clear()
