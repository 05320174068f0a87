"""Standard streams in any encoding: no crash; what cannot be decoded is one clean line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vicugna import model as face
from vicugna.cli import main, output
from vicugna.ledger import Ledger, recorded

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
from live_server import scripted_model

Chat = Callable[..., tuple[int, bytes, str]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    """`vicugna chat` of a model that says `reply`, with bytes through streams of an encoding."""
    def run(data: bytes, encoding: str, reply: str = "yes", *options: str
            ) -> tuple[int, bytes, str]:
        monkeypatch.setattr(face, "load", lambda *_: scripted_model(reply, 512))
        streams = {name: io.BytesIO() for name in ("stdout", "stderr")}
        # The C locale's way with undecodable bytes, which would make them lone surrogates.
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(
            io.BytesIO(data), encoding, errors="surrogateescape"))
        for name, raw in streams.items():
            monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding, write_through=True))
        monkeypatch.setattr(sys, "argv", ["vicugna", "chat", "MODEL", *options])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code, streams["stdout"].getvalue(),  # type: ignore[return-value]
                streams["stderr"].getvalue().decode(encoding))

    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("encoding", "shown"), [
    ("utf-8", "caf\u00e9 \u6771 \U0001f999"), ("utf-16", "caf\u00e9 \u6771 \U0001f999"),
    ("latin-1", "caf\u00e9 \\u6771 \\U0001f999"), ("ascii", "caf\\xe9 \\u6771 \\U0001f999"),
    ("cp1252", "caf\u00e9 \\u6771 \\U0001f999")])
def test_what_the_encoding_lacks_is_escaped(chat: Chat, encoding: str, shown: str) -> None:
    code, out, err = chat("hi\n".encode(encoding), encoding, "caf\u00e9 \u6771 \U0001f999")
    assert (code, out.decode(encoding), err) == (0, f"{shown}\n", "")
    code, out, _ = chat("hi\n".encode(encoding), encoding, "caf\u00e9 \u6771 \U0001f999", "--json")
    assert json.loads(out.decode(encoding))["text"] == "caf\u00e9 \u6771 \U0001f999"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1", "shift-jis"])
def test_input_is_decoded_by_its_encoding(chat: Chat, encoding: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\u6771" if encoding == "shift-jis" else "caf\u00e9"
    received: list[str] = []
    monkeypatch.setattr(sys.modules["vicugna.cli.chat"], "_handle",
                        lambda chat, line, as_json: received.append(line))
    assert chat(f"{text}\n".encode(encoding), encoding)[0] == 0
    assert received == [text]


@pytest.mark.parametrize(("data", "encoding", "expected"), [
    (b"\xff\xfe\n", "utf-8", "not UTF-8 text: byte 0xff"), (b"caf\xe9\n", "utf-8", "byte 0xe9"),
    (b"caf\xc3\xa9\n", "ascii", "not ASCII text: byte 0xc3"), (b"\xed\xa0\x80\n", "utf-8", "0xed"),
    (b"hi", "utf-16", "UTF-16"), (b"\xff\xfea", "utf-16", "UTF-16")])
def test_an_undecodable_byte_is_one_line(chat: Chat, data: bytes, encoding: str,
                                         expected: str) -> None:
    code, out, err = chat(data, encoding)
    assert code == 2 and out in (b"", b"\xff\xfe")
    assert err.startswith("vicugna: standard input: ") and expected in err and err.count("\n") == 1
    assert "surrogate" not in err


def test_arguments_that_are_not_text_are_one_line(chat: Chat) -> None:
    for option in ("--once", "--system"):
        code, _, err = chat(b"hi\n", "utf-8", "yes", option, "caf\udce9")
        assert code == 2 and err.startswith(f"vicugna: {option}: not text") and err.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "utf-8"])
def test_tables_and_json_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, write_through=True))
    output.prepare_streams()
    output.table("caf\u00e9 \udcff \u6771", ("a", "b"), [("\u6771" * 80, "\udcff" * 90)])
    assert "caf" in raw.getvalue().decode(encoding)
    start = raw.tell()
    output.as_json({"path": "\u6771\udcff\U0001f999"})
    written = raw.getvalue()[start:].decode("utf-16-le" if encoding == "utf-16" else encoding)
    assert json.loads(written) == {"path": "\u6771\udcff\U0001f999"}


def test_closed_streams_are_as_the_null_device() -> None:
    done = subprocess.run(["sh", "-c", '"$0" -m vicugna plan llama-3.1-8b <&- >&- 2>&-',
                           sys.executable], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_a_missing_file_with_any_name_is_one_line(encoding: str, tmp_path: Path) -> None:
    """In a process of its own: bytes in arguments, the C locale, errors on a stream of it."""
    name = os.fsencode(tmp_path) + b"/caf\xe9-\xe6\x9d\xb1"
    done = subprocess.run([sys.executable, "-m", "vicugna", "info", name], capture_output=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": encoding})
    assert done.returncode == 2 and done.stdout in (b"", b"\xff\xfe")
    assert done.stderr.decode(encoding).startswith("vicugna: ") and b"Traceback" not in done.stderr


def test_the_ledger_takes_names_of_any_bytes(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(ValueError), recorded(
            book, book.open("eval", "research", "r", "c", "d", folder="caf\udce9"), tmp_path):
        raise ValueError("caf\udce9")
    (attempt,) = book.attempts()
    assert (attempt.folder, attempt.result) == ("caf\\udce9", {"error": "caf\\udce9"})
