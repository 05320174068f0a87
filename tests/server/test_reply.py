from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import tiny_tokenizer

from vicugna.errors import VicugnaError
from vicugna.server import worker
from vicugna.server.listen import bind, check_exposure
from vicugna.server.reply import ReasoningSplitter
from vicugna.server.worker import Busy, Job, Worker

TOKENIZER = tiny_tokenizer()


def split(pieces: list[str], prompt: list[int] | None = None) -> tuple[str, str]:
    splitter = ReasoningSplitter(TOKENIZER, prompt or [])
    parts = [splitter.push(piece, False) for piece in pieces] + [splitter.push("", True)]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(("text", "reasoning", "answer"), [
    ("just an answer", "", "just an answer"),
    ("<think>a b</think>c", "a b", "c"),
    ("\n<think>\na\n\nb\n</think>\n\nc\n", "a\n\nb", "c\n"),
    ("<think>never ends <", "never ends <", ""),
    ("<think></think>", "", ""),
    ("<thin", "", "<thin"),
    ("", "", ""),
    ("so <think>no</think>", "", "so <think>no</think>"),
    ("<think>a</think>b</think>c", "a", "b</think>c"),
    ("<think>1 < 2 </thin </think>x", "1 < 2 </thin ", "x")])
def test_reasoning_is_split_the_same_however_it_comes(text: str, reasoning: str,
                                                      answer: str) -> None:
    assert split([text]) == (reasoning, answer)
    assert split(list(text)) == (reasoning, answer)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "\n", "a", "<thi"])))
def test_pieces_never_change_the_split(pieces: list[str]) -> None:
    assert split(pieces) == split(["".join(pieces)])


def test_a_prompt_may_open_the_reasoning() -> None:
    opened = [1, TOKENIZER.id_of("<think>") or 0]
    assert split(["a</th", "ink>b"], opened) == ("a", "b")


def counting(n: int) -> Any:
    def start(cancelled: Any) -> Generator[int, None, None]:
        yield from range(n)
    return start


def run_worker(work: Any) -> Any:
    async def main() -> Any:
        running = Worker()
        try:
            return await work(running)
        finally:
            running.stop()
    return asyncio.run(main())


def test_worker_shares_its_time() -> None:
    async def work(running: Worker) -> list[str]:
        order: list[str] = []

        def start(name: str, n: int) -> Any:
            def steps(cancelled: Any) -> Generator[int, None, None]:
                for i in range(n):
                    order.append(name)
                    yield i
            return steps

        jobs = [Job(start("long", 50)), Job(start("short", 3))]
        for job in jobs:
            running.submit(job)
        running.start()
        assert [[i async for i in job.events()] for job in jobs] == [list(range(50)), [0, 1, 2]]
        return order

    assert run_worker(work)[:6] == ["long", "short"] * 3


def test_worker_survives_errors_and_reports_them() -> None:
    async def work(running: Worker) -> None:
        def broken(cancelled: Any) -> Generator[int, None, None]:
            yield 1
            raise VicugnaError("no")

        running.start()
        job = Job(broken)
        running.submit(job)
        with pytest.raises(VicugnaError, match="no"):
            [event async for event in job.events()]
        job = Job(counting(2))
        running.submit(job)
        assert [event async for event in job.events()] == [0, 1]

    run_worker(work)


def test_worker_refuses_when_full_and_forgets_the_cancelled(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WAITING", 2)

    async def work(running: Worker) -> None:
        jobs = [Job(counting(1)) for _ in range(3)]
        for job in jobs[:2]:
            running.submit(job)
        with pytest.raises(Busy):
            running.submit(jobs[2])
        jobs[0].cancel()
        running.submit(jobs[2])

    run_worker(work)


def test_stopping_ends_what_runs() -> None:
    closed = threading.Event()

    async def work(running: Worker) -> None:
        def endless(cancelled: Any) -> Generator[int, None, None]:
            try:
                while True:
                    yield 1
            finally:
                closed.set()

        running.start()
        job = Job(endless)
        running.submit(job)
        events = job.events()
        await anext(events)
        running.stop()
        with pytest.raises(Busy, match="stopping"):
            while True:
                await anext(events)
        assert closed.is_set()
        with pytest.raises(Busy):
            running.submit(Job(counting(1)))

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
