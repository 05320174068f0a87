"""The OpenAI-compatible routes and the chat page, over one loaded model."""

import asyncio
import base64
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from vicugna.chat import ReplyParser
from vicugna.engine import Engine
from vicugna.engine import Request as EngineRequest
from vicugna.errors import VicugnaError
from vicugna.model import ContextExceeded, Model
from vicugna.server.guard import Guard
from vicugna.server.protocol import ApiError, ChatRequest, parse, token_logprobs
from vicugna.server.worker import Worker

MAX_BODY_BYTES = 10_000_000
BODY_SECONDS = 60  # time limit for receiving a request body
TOKEN_BUDGET = 256  # of a step: what those who get an answer wait for while a prompt is read


class Server:
    """The served model and its id, and an engine with `memory` bytes of KV cache (None: half of
    what is free). Raises VicugnaError if the model has no tokenizer."""

    def __init__(self, model: Model, name: str, memory: int | None = None) -> None:
        self.model, self.name, self.tokenizer = model, name, model.text_tokenizer()
        engine = Engine(model.network, memory=memory, token_budget=TOKEN_BUDGET)
        self.budget, self.worker = engine.budget, Worker(engine, self.tokenizer)
        self.fingerprint = f"vicugna-{model.digest[:12]}"
        self.card = {"id": name, "object": "model", "created": int(time.time()),
                     "owned_by": "vicugna", "context_length": self.budget.longest}

    def find(self, name: str) -> dict[str, Any]:
        """The card of the model called `name`; ApiError when it is not the one served."""
        if name != self.name:
            raise ApiError(404, f"The model '{name}' does not exist; this server has "
                                f"'{self.name}'.", "model", "model_not_found")
        return self.card

    def read(self, body: bytes) -> "Completion":
        """The completion that a request body asks for. Raises ApiError if the body is invalid."""
        request = parse(body)
        self.find(request.model)
        messages = [{"role": message.role, "content": message.content,
                     "reasoning": message.reasoning_content} for message in request.messages]
        try:
            prompt, images = self.model.read_chat(messages, self.budget.longest)
        except VicugnaError as error:
            code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
            raise ApiError(400, f"{error}.", "messages", code) from error
        return Completion(self, request, prompt, images)

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions, whole or streamed; a client's disconnect cancels it."""
        completion = await asyncio.to_thread(self.read, await _body(request))
        self.worker.check()
        if completion.request.stream:
            return StreamingResponse(completion.chunks(), media_type="text/event-stream")
        whole = asyncio.create_task(completion.whole())
        gone = asyncio.ensure_future(request.receive())  # after the body only http.disconnect comes
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ApiError(408, "The client disconnected before the response was complete.")
            return JSONResponse(whole.result())
        finally:
            whole.cancel()
            gone.cancel()


class Completion:
    """One request's chat completion in OpenAI's format, whole or streamed, with its usage."""

    def __init__(self, server: Server, request: ChatRequest, prompt: list[int],
                 images: Tensor | None) -> None:
        self.server, self.request, self.prompt, self.images = server, request, prompt, images
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
                     "model": server.name, "system_fingerprint": server.fingerprint}
        self.completion_tokens = self.reasoning_tokens = 0

    def usage(self) -> dict[str, Any]:
        """Token counts so far, as OpenAI's `usage`."""
        return {"prompt_tokens": len(self.prompt), "completion_tokens": self.completion_tokens,
                "total_tokens": len(self.prompt) + self.completion_tokens,
                "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens}}

    async def _steps(self) -> AsyncIterator[tuple[dict[str, str], list[Any], str | None]]:
        """Per decoding step: (new text by field, logprob entries, finish reason)."""
        server, parser = self.server, ReplyParser(self.server.tokenizer, self.prompt)
        request = EngineRequest(tuple(self.prompt), self.request.sampling(), self.images,
                                tuple(server.tokenizer.eos_ids), key=self.request.cache_salt)
        async for delta in server.worker.run(request):
            new = parser.push(delta.tokens, delta.text, delta.finish_reason is not None)
            self.completion_tokens += len(delta.tokens)
            if new.reasoning or parser.in_reasoning:
                self.reasoning_tokens += len(delta.tokens)
            texts = {"reasoning_content": new.reasoning, "content": new.content}
            yield ({key: text for key, text in texts.items() if text},
                   token_logprobs(delta, self.server.tokenizer) if self.request.logprobs else [],
                   delta.finish_reason)

    async def whole(self) -> dict[str, Any]:
        """The response body of a request that does not stream."""
        message, logprobs, reason = {"role": "assistant", "content": ""}, [], None
        async for texts, entries, reason in self._steps():  # noqa: B007 - the last one is used
            for key, text in texts.items():
                message[key] = message.get(key, "") + text
            logprobs += entries
        return {**self.head, "object": "chat.completion", "usage": self.usage(),
                "choices": [_choice("message", message, logprobs, reason)]}

    async def chunks(self) -> AsyncIterator[str]:
        """The response as server-sent events, ending with [DONE] or an error event."""
        usage = {"usage": None} if (self.request.stream_options or {}).get("include_usage") else {}
        head = {**self.head, "object": "chat.completion.chunk", **usage}

        def event(*choices: dict[str, Any], **more: Any) -> str:
            return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

        try:
            yield event(_choice("delta", {"role": "assistant", "content": ""}))
            async for texts, entries, reason in self._steps():
                if texts or entries:
                    yield event(_choice("delta", texts, entries))
                if reason is not None:
                    yield event(_choice("delta", {}, reason=reason))
            if usage:
                yield event(usage=self.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            if not isinstance(error, ApiError | VicugnaError):
                logging.getLogger(__name__).exception("generation failed")
            yield f"data: {json.dumps(_as_api_error(error).body)}\n\n"


def _choice(form: str, texts: dict[str, str], entries: Sequence[Any] = (),
            reason: str | None = None) -> dict[str, Any]:
    logprobs = {"content": entries, "refusal": None} if entries else None
    return {"index": 0, form: texts, "logprobs": logprobs, "finish_reason": reason}


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VicugnaError):
        return ApiError(500, f"{error}.")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
    return ApiError(500, "Internal server error; the server's log has the traceback.")


async def _body(request: Request) -> bytes:
    body, size = bytearray(), int(request.headers.get("content-length", 0))
    try:
        async with asyncio.timeout(BODY_SECONDS):
            chunks = request.stream()
            while size <= MAX_BODY_BYTES and (chunk := await anext(chunks, None)) is not None:
                body += chunk
                size = max(size, len(body))
    except (TimeoutError, ClientDisconnect):
        raise ApiError(408, f"The body did not arrive in {BODY_SECONDS} seconds.") from None
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    return bytes(body)


def _page() -> Response:
    """The chat page, with a Content-Security-Policy that allows only its own script and style."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def source(tag: str) -> str:
        content = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()
        return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"

    policy = ("default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action "
              f"'none'; frame-ancestors 'none'; script-src {source('script')}; "
              f"style-src {source('style')}")
    return HTMLResponse(html, headers={"Content-Security-Policy": policy,
                                       "Referrer-Policy": "no-referrer"})


def create_app(model: Model, name: str, hosts: frozenset[str] | None = None,
               api_key: str | None = None, origins: frozenset[str] = frozenset(),
               memory: int | None = None) -> FastAPI:
    """The ASGI application serving `model` under the id `name`, with `memory` bytes of KV cache.

    `hosts` are the names accepted in the Host header (None: any); with `api_key`, every path but
    the page and /health needs it.
    """
    server, page = Server(model, name, memory), _page()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.worker.stop()
        await asyncio.to_thread(server.worker.join)

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    for kind in (ApiError, VicugnaError, HTTPException, Exception):
        app.add_exception_handler(kind, lambda _, error: _as_api_error(error).response())
    app.state.worker, app.state.budget = server.worker, server.budget
    app.add_middleware(Guard, hosts=hosts, api_key=api_key, origins=origins)

    get = partial(app.api_route, methods=["GET", "HEAD"])
    get("/")(lambda: page)
    get("/health")(lambda: {"status": "ok"})
    get("/v1/models")(lambda: {"object": "list", "data": [server.card]})
    get("/v1/models/{name:path}")(server.find)
    app.post("/v1/chat/completions")(server.complete)
    return app
