"""Pictures in requests: answered as the model answers them, or refused with a clean 400."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from live_server import serving
from pictures import encoded, llama4, picture, url, user

import vicugna
from vicugna.server.protocol import MAX_IMAGES

HILL, SLOPE = picture(40, 60), picture(20, 90, 1)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A served tiny Llama 4."""
    folder = tmp_path_factory.mktemp("llama4")
    llama4(folder)
    with serving(vicugna.load(folder)) as server:
        yield server


def shown(source: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source, **more}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def post(live: SimpleNamespace, *parts: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/chat/completions", timeout=60, json={
        "model": "tiny", "temperature": 0, "max_tokens": 8,
        "messages": [{"role": "user", "content": list(parts)}]})


def test_a_real_client_shows_pictures(seeing: SimpleNamespace) -> None:
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0)
    due = seeing.model.generate([user("From ", HILL, " to ", SLOPE)], max_new_tokens=8)
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8, "messages": [
        {"role": "user", "content": [
            said("From "), shown(url(encoded(HILL)), detail="auto"), said(" to "),
            shown(url(encoded(SLOPE)))]}]}
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == due.text
    assert answer.usage is not None and answer.usage.model_dump(include=due.usage) == due.usage
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == due.text


@pytest.mark.parametrize(("parts", "says"), [
    ([shown("https://example.org/a.png")], "nothing is fetched"),
    ([shown("/etc/hostname")], "nothing is fetched"), ([shown("")], "nothing is fetched"),
    ([shown("data:image/png;base64,AAAA")], "messages[0].content[0]"),
    ([said("a"), shown(url(encoded(HILL)[:-99]))], "messages[0].content[1]"),
    ([shown(url(encoded(HILL)), detail="low")], "detail"), ([shown(3)], "parts must"),
    ([{"type": "image", "path": "/etc/hostname"}], "parts must"),
    ([shown(url(encoded(HILL)))] * (MAX_IMAGES + 1), f"more than {MAX_IMAGES} images"),
    ([shown(url(encoded(picture(96, 96))))] * MAX_IMAGES, "context holds 2048"),
    ([shown(url(encoded(picture(9, 9).resize((7072, 7072)))))], "7072 * 7072 pixels")])
def test_bad_pictures_are_explained(seeing: SimpleNamespace, parts: list[Any], says: str) -> None:
    answer = post(seeing, *parts)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert says in error["message"] and error["param"].startswith("messages")
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 300


def test_a_model_without_eyes_says_so(live: SimpleNamespace) -> None:
    answer = post(live, said("What is it?"), shown(url(encoded(HILL))))
    assert answer.status_code == 400
    assert "no vision encoder" in answer.json()["error"]["message"]
