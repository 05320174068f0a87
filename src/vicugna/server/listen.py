"""Binds an address and serves on it until SIGINT or SIGTERM."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from vicugna.engine.budget import Budget
from vicugna.errors import VicugnaError
from vicugna.model import Model
from vicugna.server.app import create_app
from vicugna.server.guard import LOCAL_NAMES

DRAIN_SECONDS = 10  # time limit for running requests after a signal


def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, api_key: str | None) -> None:
    """Raise VicugnaError for an address that other machines can reach without an API key."""
    if api_key == "":
        raise VicugnaError("the API key is empty", "--api-key", "Give a long random one")
    if api_key is None and not is_loopback(host):
        raise VicugnaError("other machines can reach this address, and no API key is set", host,
                           "Set VICUGNA_API_KEY (or --api-key), or keep to --host 127.0.0.1")


def bind(host: str, port: int) -> socket.socket:
    """A socket listening on `host:port` (0 picks a free port).

    Raises VicugnaError naming the address if it is in use, privileged or of another machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
    except (OSError, OverflowError, ValueError) as error:
        what = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise VicugnaError(what, f"{host}:{port}", "Choose another --host or --port (from 1024 "
                           "to 65535), or stop the program that uses it") from error


class _Server(uvicorn.Server):
    """Requests still running DRAIN_SECONDS after the signal end with an error response."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, app.state.worker.stop)
        await super().shutdown(sockets)


def run(model: Model, name: str, bound: socket.socket, host: str, api_key: str | None,
        origins: frozenset[str], memory: int | None, ready: Callable[[str, Budget], None]) -> None:
    """Serve on `bound` until SIGINT or SIGTERM; running requests get `DRAIN_SECONDS` to finish.

    `memory` is that of the KV cache, bytes (None: half of what is free). `ready(url, budget)` is
    called just before requests are accepted.
    """
    shown = f"[{host}]" if ":" in host else host
    hosts = LOCAL_NAMES | {shown.lower()} if is_loopback(host) else None
    app = create_app(model, name, hosts, api_key, origins, memory)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                            ws="none", proxy_headers=False,
                            timeout_graceful_shutdown=DRAIN_SECONDS + 5)
    # uvicorn re-raises the signal once it has shut down.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    ready(f"http://{shown}:{bound.getsockname()[1]}", app.state.budget)
    _Server(config).run(sockets=[bound])
