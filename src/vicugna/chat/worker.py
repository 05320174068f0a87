"""The process in which chat templates run (sandbox.py): started on first use, reused, and
restarted after a template exceeded its limits."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from vicugna.errors import VicugnaError

SECONDS = 0.5  # of the processor for a rendering, and another for every
CHARACTERS = 100_000  # characters of the input
MESSAGES = 400  # messages give another second for looking back from each over all before it,
LOOKING_BACK = 20.0  # twice as many four, and so on, up to so many
MEMORY = 256 << 20  # bytes for a rendering, and
BYTES = 200  # for each character of the input
SOURCE = 40_000  # characters of a template; the longest known has 30,000
OUTPUT = 300_000  # characters of the text, and 40 for each of the input
_PROGRAM = Path(__file__).with_name("sandbox.py")


class Worker:
    """One process; `render` may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._status = 0  # of the last process that ended

    def render(self, source: str, variables: dict[str, Any], **more: Any) -> str:
        """The text that a template makes of its variables (see sandbox.py for `more`). Raises
        VicugnaError for any failure, also of time or memory."""
        if len(source) > SOURCE:
            raise _refused("it is too long")
        size, messages = len(json.dumps(variables)), len(variables["messages"])
        seconds = SECONDS + size / CHARACTERS + min((messages / MESSAGES)**2, LOOKING_BACK)
        limits = json.dumps([seconds, MEMORY + BYTES * size], separators=(",", ":"))
        body = json.dumps({"source": source, "variables": variables,
                           "characters": OUTPUT + 40 * size, **more})
        request = f"{limits} {body}\n".encode()
        with self._lock:
            # Retried once: while a virtual machine is paused its CPU clock may run on.
            answer = self._ask(request) or self._ask(request)
        if answer is None:
            raise _refused("it runs for too long" if self._status == -signal.SIGPROF else
                           f"the process that renders it ended with status {self._status}")
        if "text" not in answer:
            raise _refused(answer["error"])
        return str(answer["text"])

    def _ask(self, request: bytes) -> dict[str, Any] | None:
        """The answer; None if the process ended over it."""
        process = self._process or subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, start_new_session=True)  # which Ctrl-C does not reach
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # Ctrl-C: drop the pending answer
            self.stop()
            raise
        answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        if answer is None:
            with suppress(subprocess.TimeoutExpired):  # its output is closed: it is ending
                process.wait(1)
        if answer is None or "broken" in answer:
            self.stop()
        return answer

    def stop(self) -> None:
        """End the process; the next rendering starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            with suppress(BrokenPipeError), process:  # closes its pipes and waits
                pass
            self._status = process.returncode


def _refused(reason: str) -> VicugnaError:
    return VicugnaError(f"the chat template refused or failed: {reason}", "chat_template.jinja",
                        "Correct the messages or the template")


WORKER = Worker()
_inherited: list[Any] = []


def _after_fork() -> None:
    """A forked process starts a worker of its own, and leaves its parent's alone."""
    _inherited.append(WORKER._process)
    WORKER.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_after_fork)
atexit.register(WORKER.stop)
