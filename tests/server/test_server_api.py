"""The server as OpenAI's own Python client sees it."""

from __future__ import annotations

import itertools
import json
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from live_server import random_model, scripted_model, serving, wait_until

from vicugna import engine
from vicugna.chat import encode
from vicugna.engine import Sampling

ASK: list[Any] = [{"role": "user", "content": "How many steps are there?"}]


def client(live: SimpleNamespace, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, timeout=120)


def test_models_are_listed_and_found(live: SimpleNamespace) -> None:
    listed = client(live).models.list().data
    assert [model.id for model in listed] == ["tiny"]
    assert client(live).models.retrieve("tiny").model_extra == {"context_length": 2048}
    with pytest.raises(openai.NotFoundError):
        client(live).models.retrieve("other")


def test_answer_is_what_the_engine_generates(live: SimpleNamespace) -> None:
    prompt = encode(live.model.tokenizer, ASK)
    expected = engine.generate(live.model.network, live.model.tokenizer, [prompt],
                               [Sampling(max_new_tokens=24, temperature=0.8, seed=7, top_p=0.9)])[0]
    answer = client(live).chat.completions.create(
        model="tiny", messages=ASK, max_tokens=24, temperature=0.8, seed=7, top_p=0.9)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == len(prompt) + len(expected.tokens)


def test_streamed_and_whole_answers_agree(live: SimpleNamespace) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 3, "n": 1,
                                "max_completion_tokens": 20}
    whole = client(live).chat.completions.create(**settings)
    chunks = list(client(live).chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    own = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(c.delta.content or "" for c in own) == whole.choices[0].message.content
    assert [c.finish_reason for c in own if c.finish_reason] == [whole.choices[0].finish_reason]
    assert own[-1].finish_reason


def test_stream_has_openais_exact_form(live: SimpleNamespace) -> None:
    body = {"model": "tiny", "messages": ASK, "max_tokens": 4, "stream": True}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None,
                                        "finish_reason": "length"}
    assert all("usage" not in chunk for chunk in chunks)


def test_logprobs(live: SimpleNamespace) -> None:
    choice = client(live).chat.completions.create(
        model="tiny", messages=ASK, max_tokens=5, temperature=0, logprobs=True,
        top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    for entry in choice.logprobs.content:
        best = entry.top_logprobs
        assert len(best) == 3 and entry.token == best[0].token
        assert entry.logprob == pytest.approx(best[0].logprob)
        assert best[0].logprob >= best[1].logprob >= best[2].logprob
        assert bytes(entry.bytes or []).decode(errors="replace") == entry.token


def test_parts_roles_and_ignorable_settings(live: SimpleNamespace) -> None:
    parts: list[Any] = [{"role": "developer", "content": "Be brief."},
                        {"role": "user", "name": "ada", "content": [
                            {"type": "text", "text": "How many"}, {"type": "text", "text": "?"}]}]
    plain: list[Any] = [{"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "How many\n?"}]
    answers = [client(live).chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, user="u", store=False,
        metadata={"a": "b"}, tools=[], response_format={"type": "text"}, frequency_penalty=0)
        for messages in (parts, plain)]
    assert answers[0].choices == answers[1].choices and answers[0].usage == answers[1].usage


def test_stop_string_ends_the_text() -> None:
    with serving(scripted_model("one two three four")) as live:
        choice = client(live).chat.completions.create(
            model="tiny", messages=ASK, stop=["three", "nowhere"]).choices[0]
        assert choice.message.content == "one two " and choice.finish_reason == "stop"


def test_reasoning_is_a_field_of_its_own() -> None:
    with serving(scripted_model("<think>two plus two</think>four <think>")) as live:
        answer = client(live).chat.completions.create(model="tiny", messages=ASK)
        message: Any = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("two plus two", "four <think>")
        assert answer.usage is not None and answer.usage.completion_tokens_details is not None
        reasoning = answer.usage.completion_tokens_details.reasoning_tokens
        assert 0 < (reasoning or 0) < answer.usage.completion_tokens
        deltas: list[Any] = [chunk.choices[0].delta for chunk in client(live).chat.completions
                             .create(model="tiny", messages=ASK, stream=True)]
        assert "".join(d.content or "" for d in deltas) == "four <think>"
        assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == "two plus two"


def test_too_long_prompt_is_refused_with_both_counts() -> None:
    with serving(random_model(context=64)) as live:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client(live).chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "steps " * 200}],
                    stream=stream)  # type: ignore[call-overload]
            assert caught.value.code == "context_length_exceeded"
            assert caught.value.param == "messages"
            count = len(encode(live.model.tokenizer, [{"role": "user", "content": "steps " * 200}]))
            assert f" {count} tokens" in str(caught.value) and " 64 tokens" in str(caught.value)
        choice = client(live).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=1000,
            logit_bias={}, extra_body={"min_p": 0.01, "top_k": 50}).choices[0]
        assert choice.finish_reason in ("length", "stop")


def test_api_key_guards_everything_but_the_page_and_health() -> None:
    with serving(random_model(), api_key="sesame") as live:
        assert client(live, "sesame").models.list().data
        for wrong in ("Sesame", "sesame1", "s", "é"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                client(live, wrong).models.list()
        for path in ("/v1/models", "/v1/nothing", "/docs", "/openapi.json", "//v1/models"):
            assert httpx.get(live.url + path).status_code == 401
        body = {"model": "tiny", "messages": ASK}
        refused = httpx.post(f"{live.url}/v1/chat/completions", json=body)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{live.url}/").status_code == 200
        assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}


def test_short_request_overtakes_a_long_one(live: SimpleNamespace) -> None:
    """Both run at once: the second ends while the first is still answering."""
    steps = itertools.count()
    long = client(live).chat.completions.create(
        model="tiny", messages=ASK, max_tokens=1500, stream=True, temperature=0)
    with long:
        next(iter(long))
        short = client(live).chat.completions.create(model="tiny", messages=ASK, max_tokens=2)
        assert short.choices[0].message.content is not None
        assert all(chunk.choices for chunk in itertools.islice(long, 20) if next(steps) >= 0)


def test_concurrent_requests_get_their_own_answers(live: SimpleNamespace) -> None:
    def ask(seed: int) -> str | None:
        return client(live).chat.completions.create(
            model="tiny", messages=ASK, seed=seed, max_tokens=30).choices[0].message.content

    alone = [ask(seed) for seed in range(8)]
    together: list[str | None] = [None] * 8
    threads = [threading.Thread(target=lambda s=s: together.__setitem__(s, ask(s)))  # type: ignore
               for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len(set(alone)) == 8


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_cancels_the_generation(stream: bool) -> None:
    with serving(scripted_model("steps " * 3000, context=20_000)) as live:
        network: Any = live.model.network
        body = {"model": "tiny", "messages": ASK, "stream": stream}
        with httpx.Client() as http, pytest.raises(httpx.ReadTimeout), http.stream(
                "POST", f"{live.url}/v1/chat/completions", json=body,
                timeout=httpx.Timeout(60, read=1 if stream else 0.7)) as answer:
            for _ in answer.iter_lines():
                if network.calls > 5:
                    raise httpx.ReadTimeout("enough")
        wait_until(lambda: not live.engine.busy)
        assert 5 < network.calls < 2900 and live.engine.blocks.free_slots == 256


def test_a_failing_engine_is_a_500_and_the_server_lives(
        monkeypatch: pytest.MonkeyPatch, live: SimpleNamespace) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(live.engine, "step", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            client(live).chat.completions.create(model="tiny", messages=ASK)
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.APIError):
            list(client(live).chat.completions.create(model="tiny", messages=ASK, stream=True))
    assert client(live).chat.completions.create(model="tiny", messages=ASK, max_tokens=1).choices
