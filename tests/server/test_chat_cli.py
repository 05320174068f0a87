"""`vicugna chat` and `vicugna serve` as processes and as functions."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import typer
from live_server import random_model, scripted_model, wait_until
from typer.testing import CliRunner

from vicugna import model as face
from vicugna.cli.chat import chat
from vicugna.cli.serve import serve
from vicugna.errors import VicugnaError

app = typer.Typer()
app.command()(chat)
app.command()(serve)
PROCESS = """
import sys
from vicugna.cli.chat import chat
from vicugna.cli.serve import serve
from vicugna.errors import VicugnaError
import typer
app = typer.Typer()
app.command()(chat)
app.command()(serve)
try:
    app(sys.argv[1:], standalone_mode=False)
except VicugnaError as error:
    sys.exit(f"{error}.")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on disk, for processes of their own; its greedy answers fill the context."""
    path = tmp_path_factory.mktemp("models") / "tiny-model"
    model = random_model(context=8192)
    with torch.no_grad():
        model.network.lm_head.weight[list(model.tokenizer.eos_ids)] = 0
    model.save(path)
    return path


@pytest.fixture
def replying(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `load` return a model whose reply is always the same."""
    def use(reply: str, context: int = 512) -> None:
        monkeypatch.setattr(face, "load", lambda *_: scripted_model(reply, context))
    return use


def run(*arguments: str, text: str | None = None) -> tuple[str, str]:
    done = CliRunner().invoke(app, ["chat", "MODEL", *arguments], input=text)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_once_prints_the_answer_alone(replying: Any) -> None:
    replying("<think>hm</think>four\nfive")
    assert run("--once", "two plus two?") == ("four\nfive\n", "")
    answer = json.loads(run("--once", "two plus two?", "--json")[0])
    assert answer["text"] == "four\nfive" and answer["reasoning"] == "hm"
    assert answer["finish_reason"] == "stop" and answer["tokens"] > 4
    out, err = run("--once", "x", "--max-new-tokens", "2")
    assert out == "\n" and "token limit" in err


def test_pipe_answers_each_line_and_obeys_commands(replying: Any) -> None:
    replying("yes")
    out, err = run(text="one\n\n/system be brief\ntwo\n/reset\n/help\nthree\n/exit\nfour\n")
    assert out == "yes\nyes\nyes\n"
    assert "System prompt set" in err and "/exit" in err
    lines = run("--json", text="one\ntwo\n")[0].splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["yes", "yes"]


def test_too_long_a_conversation_is_refused_with_counts_not_cut(replying: Any) -> None:
    replying("yes", context=64)
    with pytest.raises(VicugnaError, match=r"is \d+ tokens long, .* holds 64 tokens"):
        run("--once", "many steps " * 60)
    with pytest.raises(VicugnaError, match="holds 64 tokens"):
        run(text="steps steps\n" * 20)


def test_bad_settings_and_models_are_one_line_errors(tmp_path: Path, folder: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, expected in ((["chat", str(tmp_path), "--once", "x"], str(tmp_path)),
                               (["chat", str(folder), "--top-p", "7"], "top_p"),
                               (["serve", str(folder), "--port", "99999"], "99999"),
                               (["serve", str(folder), "--host", "0.0.0.0"], "API key")):
        done = CliRunner().invoke(app, arguments, env={"VICUGNA_API_KEY": None})
        assert isinstance(done.exception, VicugnaError)
        assert expected in str(done.exception) and "\n" not in str(done.exception)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
    with pytest.raises(VicugnaError, match="UTF-8"):
        chat(str(folder), None, "", 1, 0.0, 1.0, 0, 0, None, "float32", "auto", "cpu", False)


@pytest.fixture
def process() -> Iterator[Any]:
    """Start a verb in a process of its own; ended at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("VICUGNA_API_KEY", None)
        started.append(subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], text=True,
                                        env=environment, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_reports_ready_and_ends_cleanly(process: Any, folder: Path, number: int) -> None:
    server = process("serve", str(folder), "--port", "0", "--json", stdout=subprocess.PIPE,
                     stderr=subprocess.PIPE)
    ready = json.loads(server.stdout.readline())
    assert ready["model"] == "tiny-model" and len(ready["digest"]) == 64
    models = httpx.get(f"{ready['url']}/v1/models", timeout=60).json()
    assert models["data"][0]["id"] == "tiny-model"
    taken = CliRunner().invoke(app, ["serve", str(folder), "--port",
                                     ready["url"].rpartition(":")[2]])
    assert isinstance(taken.exception, VicugnaError) and "in use" in str(taken.exception)
    server.send_signal(number)
    _, err = server.communicate(timeout=60)
    assert server.returncode == 0 and "Traceback" not in err


def test_terminal_ctrl_c_stops_the_answer_then_leaves(process: Any, folder: Path) -> None:
    try:
        ours, theirs = pty.openpty()
    except OSError as error:  # such as in a container without /dev/pts
        pytest.skip(f"no pseudo-terminal here: {error}")
    talk = process("chat", str(folder), "--temperature", "0", stdin=theirs, stdout=theirs,
                   stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = ""

    def read_until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    def interrupt_prompt() -> None:
        read_until("> ")
        time.sleep(0.5)  # a signal between readline's prompt and its wait is seen at the next key
        talk.send_signal(signal.SIGINT)

    read_until("> ")
    os.write(ours, b"/help\n")
    read_until("/reset")
    interrupt_prompt()
    read_until("again")
    read_until("> ")  # or the terminal would echo what comes next before readline does
    os.write(ours, b"hello\n")
    read_until("hello\r\n")
    while len(seen) <= len("\x1b[?2004l\r"):  # readline's last word; then the answer begins
        seen += os.read(ours, 4096).decode(errors="replace")
    talk.send_signal(signal.SIGINT)
    read_until("Stopped")
    interrupt_prompt()
    read_until("again")
    interrupt_prompt()
    wait_until(lambda: talk.poll() is not None)
    assert talk.returncode == 0
    os.close(ours)
