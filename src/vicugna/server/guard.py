"""Checks of Host, Origin and API key: ASGI middleware in front of every route."""

import hmac
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vicugna.server.protocol import ApiError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
PUBLIC = frozenset({"/", "/health"})  # need no API key
HEADERS = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
           "Cache-Control": "no-store"}


class Guard:
    """Checks Host (against DNS rebinding), Origin (against other sites' pages) and the API key.

    `hosts`: names accepted in the Host header, None for any. `api_key`: None for no key.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, api_key: str | None) -> None:
        self.app, self.hosts = app, hosts
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.hosts is not None and re.sub(r":\d*$", "", host) not in self.hosts:
            return ApiError(403, f"This server answers only to {', '.join(sorted(self.hosts))}; "
                                 "the Host header names something else.", None, "host_not_allowed")
        if origin is not None and urlsplit(origin).netloc.lower() != host:
            return ApiError(403, "Requests from other sites' pages are refused.", None,
                            "origin_not_allowed")
        given = headers.get("authorization", "").encode("latin-1", "replace")
        if self.expected and path not in PUBLIC and not hmac.compare_digest(given, self.expected):
            return ApiError(401, "Missing or wrong API key: send 'Authorization: Bearer KEY'.",
                            None, "invalid_api_key")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = scope["type"] == "http" and self.refusal(scope["path"], Headers(scope=scope))
        await (refusal.response() if refusal else self.app)(scope, receive, send_guarded)
