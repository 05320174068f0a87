from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny networks are faster so

import pytest
from runs import Ended, run_to_its_end

# A shell's background jobs ignore Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

Cli = Callable[..., Ended]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """`cli("run", ...)` runs the command line in this process and gives how it ended."""
    from vicugna.cli import main

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["vicugna", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        return Ended(end.value.code, said.out, said.err)  # type: ignore[arg-type]

    kept = [(number, signal.getsignal(number))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield call
    for number, handler in kept:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run, made undisturbed by the command line; not to be changed."""
    folder = tmp_path_factory.mktemp("work") / "runs" / "tiny"
    ended = run_to_its_end(folder)
    assert ended.code == 0, ended.err
    return folder
