"""A real chat model behind the server, in an evaluation, and in the terminal."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import serving

import vicugna
from vicugna import evals
from vicugna import model as face
from vicugna.errors import VicugnaError
from vicugna.model import Model

# Without the second sentence "The" and "L'" are about as probable as each other: rounding decides.
QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def smollm2() -> Model:
    try:
        return vicugna.load("smollm2")
    except VicugnaError as error:
        pytest.skip(f"{error}")


def test_a_chat_completion_is_right_whole_and_streamed(smollm2: Model) -> None:
    body: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 24,
                            "messages": [{"role": "user", "content": QUESTION}]}
    with serving(smollm2) as live:
        url = f"{live.url}/v1/chat/completions"
        choice = httpx.post(url, json=body, timeout=300).json()["choices"][0]
        streamed = httpx.post(url, json={**body, "stream": True}, timeout=300).text
    assert "Paris" in choice["message"]["content"] and choice["finish_reason"] == "stop"
    events = [json.loads(event.removeprefix("data: ")) for event in streamed.split("\n\n")[:-2]]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == (
        choice["message"]["content"])


def test_own_questions_are_scored(smollm2: Model, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        json.dumps({"prompt": QUESTION, "answers": ["Paris"]}) + "\n"
        + json.dumps({"prompt": QUESTION, "answers": ["Lyon"]}))
    assert smollm2.tokenizer
    plan, task = evals.plan_items(tmp_path / "mine.jsonl", smollm2.tokenizer, date(2026, 1, 1), 24)
    row = evals.run(smollm2, plan, tmp_path / "r", own_tasks={task.name: task}).rows[0]
    assert (row.right, row.wrong) == (1, 1)


def test_the_terminal_answers(smollm2: Model, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "load", lambda *_: smollm2)
    ended = cli("chat", "smollm2", "--once", QUESTION, "--temperature", 0)
    assert ended.code == 0 and "Paris" in ended.out
