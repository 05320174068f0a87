from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator
from typing import Any

import pytest

from vicugna.errors import VicugnaError
from vicugna.server import worker
from vicugna.server.listen import bind, check_exposure
from vicugna.server.protocol import ApiError
from vicugna.server.worker import Worker


def run_worker(work: Any) -> Any:
    async def main() -> Any:
        running = Worker()
        try:
            return await work(running)
        finally:
            running.stop()
    return asyncio.run(main())


async def collect(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


def test_worker_shares_its_time() -> None:
    async def work(running: Worker) -> list[str]:
        order: list[str] = []

        def start(name: str, n: int) -> Any:
            def steps(cancelled: Any) -> Generator[int, None, None]:
                for i in range(n):
                    order.append(name)
                    yield i
            return steps

        long, short = await asyncio.gather(collect(running.run(start("long", 50))),
                                           collect(running.run(start("short", 3))))
        assert long == list(range(50)) and short == [0, 1, 2]
        return order

    assert run_worker(work)[:6] == ["long", "short"] * 3


def test_worker_survives_errors_and_reports_them() -> None:
    async def work(running: Worker) -> None:
        def broken(cancelled: Any) -> Generator[int, None, None]:
            yield 1
            raise VicugnaError("no")

        with pytest.raises(VicugnaError, match="no"):
            await collect(running.run(broken))
        assert await collect(running.run(lambda cancelled: (i for i in range(2)))) == [0, 1]

    run_worker(work)


def endless(cancelled: Any) -> Generator[int, None, None]:
    while True:
        yield 1


def test_worker_refuses_when_full_and_forgets_those_who_leave(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WAITING", 1)

    async def work(running: Worker) -> None:
        tasks = []
        for _ in range(worker.RUNNING + 1):
            running.check()
            tasks.append(asyncio.create_task(collect(running.run(endless))))
            await asyncio.sleep(0)
        with pytest.raises(ApiError, match="queue is full"):
            running.check()
        tasks[0].cancel()
        tasks[-1].cancel()
        await asyncio.wait((tasks[0], tasks[-1]))
        await asyncio.sleep(0.01)
        running.check()
        running.stop()
        await asyncio.wait(tasks)

    run_worker(work)


def test_stopping_ends_what_runs_and_what_waits() -> None:
    async def work(running: Worker) -> None:
        tasks = [asyncio.create_task(collect(running.run(endless)))
                 for _ in range(worker.RUNNING + 3)]
        await asyncio.sleep(0.05)
        running.stop()
        for task in tasks:
            with pytest.raises(ApiError, match="stopping"):
                await task
        with pytest.raises(ApiError, match="stopping"):
            running.check()

    run_worker(work)


def test_leaving_is_seen_by_the_step_under_way() -> None:
    seen = threading.Event()

    async def work(running: Worker) -> None:
        def prefill(cancelled: Any) -> Generator[int, None, None]:
            while not cancelled():
                time.sleep(0.001)
            seen.set()
            yield 1

        task = asyncio.create_task(collect(running.run(prefill)))
        await asyncio.sleep(0.02)
        task.cancel()
        assert await asyncio.to_thread(seen.wait, 30)

    run_worker(work)


def test_port_in_use_and_bad_addresses() -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(VicugnaError, match="in use"):
        bind("127.0.0.1", bound.getsockname()[1])
    for host, port in (("127.0.0.1", 70000), ("127.0.0.1", -1), ("no such host", 80),
                       ("192.0.2.1", 8000)):
        with pytest.raises(VicugnaError) as caught:
            bind(host, port)
        assert str(port) in caught.value.where


def test_only_loopback_goes_without_a_key() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.5"):
        check_exposure(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(VicugnaError, match="API key"):
            check_exposure(host, None)
        check_exposure(host, "sesame")
    with pytest.raises(VicugnaError, match="empty"):
        check_exposure("127.0.0.1", "")
