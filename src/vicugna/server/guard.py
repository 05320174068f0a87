"""Checks of Host, Origin and API key: ASGI middleware in front of every route."""

import hmac
import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vicugna.errors import VicugnaError
from vicugna.server.protocol import ApiError

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
PUBLIC = frozenset({"/", "/health"})  # need no API key
HEADERS = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
           "Cache-Control": "no-store"}
_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[\w-]+(?:\.[\w-]+)*)\.?(?::(\d{0,5}))?")


def normalise(origin: str) -> str | None:
    """An origin (scheme, name, port) as browsers send it: lower case, punycode, without a default
    port or a final dot. None if it is not an http or https origin."""
    match = _ORIGIN.fullmatch(origin.lower())
    if not match:
        return None
    scheme, name, port = match.groups()
    try:
        name = name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return None
    default = port in (None, "", "443" if scheme == "https" else "80")
    return f"{scheme}://{name}" if default else f"{scheme}://{name}:{port}"


def public_origins(origins: Iterable[str]) -> frozenset[str]:
    """The values of --origin, normalised; VicugnaError for what is not an origin."""
    normalised = set[str]()
    for origin in origins:
        if (result := normalise(origin.removesuffix("/"))) is None:
            raise VicugnaError(f"{origin!r} is not an origin", "--origin",
                               "Write scheme and name, without a path: https://chat.example.org")
        normalised.add(result)
    return frozenset(normalised)


def _name(origin: str) -> str:
    return re.sub(r"^https?://|:\d+$", "", origin)


class Guard:
    """Checks Host (against DNS rebinding), Origin (against other sites' pages) and the API key.

    `hosts`: names accepted in the Host header, None for any. `origins`: public origins of a proxy
    in front, normalised: accepted as Origin, and their names in Host. `api_key`: None for no key.
    Forwarded headers are not read, as any client can send them.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, api_key: str | None,
                 origins: frozenset[str] = frozenset()) -> None:
        self.app, self.origins = app, origins
        self.hosts = hosts and hosts | {_name(origin) for origin in origins}
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        same = {normalise(f"{scheme}://{host}") for scheme in ("http", "https")} - {None}
        if self.hosts is not None and _name(normalise(f"http://{host}") or "") not in self.hosts:
            return self._refused(host, origin, "host_not_allowed")
        if origin is not None and normalise(origin) not in same | self.origins:
            return self._refused(host, origin, "origin_not_allowed")
        given = headers.get("authorization", "").encode("latin-1", "replace")
        if self.expected and path not in PUBLIC and not hmac.compare_digest(given, self.expected):
            return ApiError(401, "Missing or wrong API key: send 'Authorization: Bearer KEY'.",
                            None, "invalid_api_key")
        return None

    def _refused(self, host: str, origin: str | None, code: str) -> ApiError:
        sent = "no Origin header" if origin is None else f"the Origin header {origin[:200]!r}"
        hosts = ["any Host"] if self.hosts is None else sorted(self.hosts)
        origins = ["that of the Host", *sorted(self.origins)]
        return ApiError(
            403, f"The request has the Host header {host[:200]!r} and {sent}; accepted are "
            f"{', '.join(hosts)}, and as Origin {', '.join(origins)}. Behind a proxy, start the "
            "server with its public origin: --origin https://chat.example.org.", None, code)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = scope["type"] == "http" and self.refusal(scope["path"], Headers(scope=scope))
        await (refusal.response() if refusal else self.app)(scope, receive, send_guarded)
