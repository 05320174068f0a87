from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from live_server import random_model

from vicugna.engine import Delta, Engine, Request, Sampling, generate
from vicugna.errors import VicugnaError
from vicugna.model import Model
from vicugna.server import worker
from vicugna.server.listen import bind, check_exposure
from vicugna.server.protocol import ApiError
from vicugna.server.worker import Worker

ENDLESS = Request((1, 2, 3), Sampling(10**6))


@pytest.fixture
def tiny() -> Model:
    return random_model(context=100_000)


def run_worker(model: Model, work: Any, slots: int = 4) -> Any:
    async def main() -> Any:
        assert model.tokenizer
        running = Worker(Engine(model.network, tokens=100_000, slots=slots), model.tokenizer)
        try:
            return await work(running)
        finally:
            running.stop()
            await asyncio.to_thread(running.join)
    return asyncio.run(main())


async def collect(deltas: AsyncIterator[Delta]) -> list[int]:
    return [token async for delta in deltas for token in delta.tokens]


async def begun(running: Worker, request: Request) -> tuple[AsyncIterator[Delta], Delta]:
    """A request that runs, and its first delta."""
    deltas = running.run(request)
    return deltas, await anext(deltas)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def test_requests_run_at_once_and_say_what_they_say_alone(tiny: Model) -> None:
    requests = [Request((n, 2, 3), Sampling(n, 0.9, seed=n)) for n in range(1, 9)]
    alone = generate(tiny.network, None, [list(one.prompt) for one in requests],
                     [one.sampling for one in requests])

    async def work(running: Worker) -> Any:
        long, _ = await begun(running, ENDLESS)
        done = await asyncio.gather(*(collect(running.run(one)) for one in requests))
        assert len(running.engine.scheduler.running) == 1  # the long one
        await long.aclose()  # type: ignore[attr-defined]
        return done

    assert run_worker(tiny, work) == [one.tokens for one in alone]


def test_errors_end_those_who_run_and_the_worker_goes_on(
        tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(running: Worker) -> None:
        with pytest.raises(VicugnaError, match="the prompt is empty"):
            await collect(running.run(Request(())))
        deltas, _ = await begun(running, ENDLESS)
        step = running.engine.step

        def broken() -> Any:
            monkeypatch.setattr(running.engine, "step", step)
            raise RuntimeError("no")

        monkeypatch.setattr(running.engine, "step", broken)
        with pytest.raises(RuntimeError, match="no"):
            await collect(deltas)
        assert len(await collect(running.run(Request((1,), Sampling(3))))) == 3

    run_worker(tiny, work)


def test_full_is_refused_and_leaving_makes_room(
        tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "REQUESTS", 3)

    async def work(running: Worker) -> None:
        first, _ = await begun(running, ENDLESS)
        others = [asyncio.create_task(collect(running.run(ENDLESS))) for _ in range(2)]
        await until(lambda: len(running._jobs) == 3)
        with pytest.raises(ApiError, match="queue is full"):
            running.check()
        await first.aclose()  # type: ignore[attr-defined]
        others[0].cancel()  # runs, or waits for the only slot
        running.check()
        await until(lambda: len(running.engine.scheduler.running) == 1)
        others[1].cancel()
        await until(lambda: running.engine.blocks.used == 0 and not running.engine.busy)

    run_worker(tiny, work, slots=1)


def test_stopping_ends_what_runs_and_what_waits(tiny: Model) -> None:
    async def work(running: Worker) -> None:
        tasks = [asyncio.create_task(collect(running.run(ENDLESS))) for _ in range(4)]
        await until(lambda: bool(running.engine.scheduler.running))
        running.stop()
        for task in tasks:
            with pytest.raises(ApiError, match="stopping"):
                await task
        with pytest.raises(ApiError, match="stopping"):
            running.check()

    run_worker(tiny, work, slots=2)


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
