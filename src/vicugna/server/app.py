"""The OpenAI-compatible routes and the chat page, over one loaded model."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vicugna import engine
from vicugna.engine import Delta
from vicugna.errors import VicugnaError
from vicugna.model import Model
from vicugna.server.guard import Guard
from vicugna.server.protocol import (
    MAX_BODY_BYTES,
    MAX_SEED,
    ApiError,
    ChatRequest,
    dump,
    parse,
    token_logprobs,
)
from vicugna.server.reply import ContextExceeded, ReasoningSplitter, prompt_tokens, tokenizer_of
from vicugna.server.worker import Busy, Job, Worker

BODY_SECONDS = 60  # a body that takes longer to arrive is given up


class Server:
    """The model being served, under the id clients know it by. Raises without a tokenizer."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name, self.tokenizer = model, name, tokenizer_of(model)
        self.worker, self.fingerprint = Worker(), f"vicugna-{model.digest[:12]}"
        self.card = {"id": name, "object": "model", "created": int(time.time()),
                     "owned_by": "vicugna",
                     "context_length": int(model.config.max_position_embeddings)}

    def find(self, name: str) -> dict[str, Any]:
        """The card of the model called `name`; ApiError when it is not the one served."""
        if name != self.name:
            raise ApiError(404, f"The model '{name}' does not exist; this server has "
                                f"'{self.name}'.", "model", "model_not_found")
        return self.card

    def prompt(self, request: ChatRequest) -> list[int]:
        """The prompt as tokens. Raises ApiError for an unknown model or an overlong prompt."""
        self.find(request.model)
        try:
            return prompt_tokens(self.model, [message.turn() for message in request.messages])
        except VicugnaError as error:
            code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
            raise ApiError(400, f"{error}.", "messages", code) from error

    def job(self, request: ChatRequest, prompt: list[int]) -> Job:
        """Queue the generation; its events are (choice index, Delta), one choice after another."""
        sampling = request.sampling()

        def start(cancelled: Callable[[], bool]) -> Generator[tuple[int, Delta], None, None]:
            for index in range(request.n):
                own = replace(sampling, seed=(sampling.seed + index) % MAX_SEED)
                for delta in engine.stream(self.model.network, self.tokenizer, prompt, own,
                                           cancelled):
                    yield index, delta

        job = Job(start)
        self.worker.submit(job)
        return job


class Answer:
    """Turns one request's deltas into OpenAI's objects, and keeps the count of tokens."""

    def __init__(self, server: Server, request: ChatRequest, prompt: list[int]) -> None:
        self.request, self.tokenizer = request, server.tokenizer
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
                     "model": server.name, "system_fingerprint": server.fingerprint}
        self.prompt_tokens, self.completion_tokens, self.reasoning_tokens = len(prompt), 0, 0
        self.splitters = [ReasoningSplitter(self.tokenizer, prompt) for _ in range(request.n)]

    def usage(self) -> dict[str, Any]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
                "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens}}

    async def pieces(self, job: Job) -> AsyncIterator[
            tuple[int, dict[str, str], list[dict[str, Any]], str | None]]:
        """(choice index, text by field, logprob entries, finish reason) of every delta."""
        async for index, delta in job.events():
            splitter = self.splitters[index]
            reasoning, content = splitter.push(delta.text, delta.finish_reason is not None)
            self.completion_tokens += len(delta.tokens)
            if reasoning or splitter.reasoning:
                self.reasoning_tokens += len(delta.tokens)
            fields = {"reasoning_content": reasoning, "content": content}
            yield (index, {key: text for key, text in fields.items() if text},
                   token_logprobs(delta, self.tokenizer) if self.request.logprobs else [],
                   delta.finish_reason)

    async def whole(self, job: Job) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = [_choice(index, "message", {"role": "assistant", "content": ""}, [], None)
                   for index in range(self.request.n)]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in choices]
        async for index, pieces, entries, reason in self.pieces(job):
            message = choices[index]["message"]
            for key, text in pieces.items():
                message[key] = message.get(key, "") + text
            logprobs[index] += entries
            choices[index] = _choice(index, "message", message, logprobs[index], reason)
        return {**self.head, "object": "chat.completion", "choices": choices,
                "usage": self.usage()}

    async def chunks(self, job: Job) -> AsyncIterator[str]:
        """The answer as server-sent events, ending with [DONE], or with an error event."""
        options = self.request.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        head = {**self.head, "object": "chat.completion.chunk", **usage}

        def event(*choices: dict[str, Any], **more: Any) -> str:
            return f"data: {dump({**head, 'choices': choices, **more})}\n\n"

        try:
            for index in range(self.request.n):
                yield event(_choice(index, "delta", {"role": "assistant", "content": ""}, [], None))
            async for index, pieces, entries, reason in self.pieces(job):
                if pieces or entries:
                    yield event(_choice(index, "delta", pieces, entries, None))
                if reason is not None:
                    yield event(_choice(index, "delta", {}, [], reason))
            if usage:
                yield event(usage=self.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {dump(_as_api_error(error).body())}\n\n"


def _choice(index: int, form: str, pieces: dict[str, str], entries: list[dict[str, Any]],
            finish_reason: str | None) -> dict[str, Any]:
    """One entry of `choices`; `form` is "delta" or "message"."""
    shown = {"content": entries, "refusal": None} if entries else None
    return {"index": index, form: pieces, "logprobs": shown, "finish_reason": finish_reason}


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VicugnaError):
        return ApiError(503 if isinstance(error, Busy) else 500, f"{error}.")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.")
    return ApiError(500, "The server failed while answering; its log says why.")


async def _on_error(request: Request, error: Exception) -> Response:
    return _as_api_error(error).response()


async def _body(request: Request) -> bytes:
    body = bytearray()
    too_large = ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive in {BODY_SECONDS} seconds.") from None
    except ClientDisconnect:
        raise ApiError(400, "The client left before the body was complete.") from None
    return bytes(body)


async def _complete(server: Server, request: Request) -> Response:
    wanted = await asyncio.to_thread(parse, await _body(request))
    prompt = await asyncio.to_thread(server.prompt, wanted)
    job, answer = server.job(wanted, prompt), Answer(server, wanted, prompt)
    if wanted.stream:
        return StreamingResponse(answer.chunks(job), media_type="text/event-stream",
                                 background=BackgroundTask(job.cancel))

    async def cancel_when_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watch = asyncio.create_task(cancel_when_left())
    try:
        return Response(dump(await answer.whole(job)), media_type="application/json")
    finally:
        watch.cancel()
        job.cancel()


def _page() -> Response:
    """The chat page; its policy allows its own script and style by their hashes, nothing else."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = ("default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
              f"form-action 'none'; frame-ancestors 'none'; script-src {hashes('script')}; "
              f"style-src {hashes('style')}")
    return HTMLResponse(html, headers={"Content-Security-Policy": policy,
                                       "Referrer-Policy": "no-referrer"})


def create_app(model: Model, name: str, hosts: frozenset[str] | None = None,
               api_key: str | None = None) -> FastAPI:
    """The ASGI application serving `model` under the id `name`.

    `hosts` are the names accepted in the Host header (None: any); with `api_key`, every path but
    the page and /health needs it.
    """
    server, page = Server(model, name), _page()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.worker.stop()
        await asyncio.to_thread(server.worker.join)

    app = FastAPI(title="Vicugna", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.worker = server.worker
    app.add_middleware(Guard, hosts=hosts, api_key=api_key)
    for kind in (ApiError, VicugnaError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)

    @app.get("/")
    async def chat_page() -> Response:
        return page

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [server.card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return server.find(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _complete(server, request)

    return app
