"""Host and Origin: what is accepted, directly and behind a proxy, and what the refusal says."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from live_server import random_model, serving

from vicugna.errors import VicugnaError
from vicugna.server.guard import normalise, public_origins

PUBLIC = "https://chat.example.org"


def get(live: SimpleNamespace, **headers: str) -> httpx.Response:
    return httpx.get(f"{live.url}/v1/models", headers=headers)


def test_other_hosts_and_other_sites_are_refused(live: SimpleNamespace) -> None:
    for host in ("localhost", f"127.0.0.1:{live.port}", "[::1]:80", "LOCALHOST:1", "localhost.",
                 "localhost:"):
        assert get(live, host=host).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1",
                 "evil@localhost", "localhost/", "localhost:80:90", "local host", "127.0.0.1.."):
        assert get(live, host=host).status_code == 403
    for host, origin in (("localhost:9", "http://localhost:9"), ("localhost", "http://localhost:80"),
                         ("localhost:443", "https://localhost"), ("[::1]:9", "http://[::1]:9")):
        assert get(live, host=host, origin=origin).status_code == 200
    for origin in ("http://evil.example", "null", "", "http://localhost:9", "http://[::1", PUBLIC,
                   "chrome-extension://abc", f"http://localhost:{live.port}/x"):
        assert get(live, host=f"localhost:{live.port}", origin=origin).status_code == 403
    answer = httpx.get(f"{live.url}/health")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_refusal_names_both_headers_and_what_to_do(live: SimpleNamespace) -> None:
    for headers in ({"host": "chat.example.org"}, {"origin": PUBLIC},
                    {"host": "chat.example.org", "origin": PUBLIC}):
        message = get(live, **headers).json()["error"]["message"]
        for word in (*headers.values(), "localhost", "--origin https://"):
            assert word in message
    long = get(live, origin="http://" + "a" * 5000).json()["error"]["message"]
    assert len(long) < 1000


@pytest.fixture(scope="module")
def proxied() -> Iterator[SimpleNamespace]:
    """A server with two public origins."""
    origins = public_origins([f"{PUBLIC}/", "http://Other.example:8080"])
    with serving(random_model(), origins=origins) as server:
        yield server


@pytest.mark.parametrize("headers", [
    {"origin": PUBLIC},                                  # nginx as in the guide: proxy_pass's Host
    {"host": "chat.example.org", "origin": PUBLIC},      # nginx with $host
    {"host": "chat.example.org:443", "origin": PUBLIC},  # nginx with $host:$server_port
    {"host": "chat.example.org:80", "origin": PUBLIC},   # the same behind a load balancer
    {"host": "CHAT.example.org.", "origin": PUBLIC},
    {"host": "chat.example.org", "origin": PUBLIC, "x-forwarded-host": "chat.example.org",
     "x-forwarded-for": "10.0.0.1", "x-forwarded-proto": "https"},  # Caddy
    {"host": "chat.example.org"},                                   # a client without a browser
    {"host": "other.example:8080", "origin": "http://other.example:8080"},
    {"host": "localhost"}])
def test_a_proxy_at_a_public_origin(proxied: SimpleNamespace, headers: dict[str, str]) -> None:
    assert get(proxied, **headers).status_code == 200


@pytest.mark.parametrize("headers", [
    {"host": "evil.example", "origin": PUBLIC},
    {"host": "evil.example", "x-forwarded-host": "chat.example.org"},
    {"host": "chat.example.org", "origin": "https://evil.example"},
    {"origin": "https://chat.example.org:8443"}, {"origin": "http://chat.example.org"},
    {"host": "chat.example.org", "origin": "null"}, {"origin": "http://other.example"},
    {"host": "chat.example.org.evil.example", "origin": PUBLIC}])
def test_nothing_else_is_let_in(proxied: SimpleNamespace, headers: dict[str, str]) -> None:
    assert get(proxied, **headers).status_code == 403


def test_on_a_public_address_any_host_serves_its_own_pages() -> None:
    with serving(random_model(), hosts=None, api_key="k", origins=public_origins([PUBLIC])) as live:
        key = {"authorization": "Bearer k"}
        assert get(live, host="10.0.0.7:8000", origin="http://10.0.0.7:8000", **key).is_success
        assert get(live, host="10.0.0.7:8000", origin=PUBLIC, **key).is_success
        assert get(live, host="10.0.0.7", origin="http://evil.example", **key).status_code == 403


def test_origins_are_normalised_and_checked() -> None:
    assert normalise("HTTPS://Chat.Example.org.:443") == PUBLIC
    assert normalise("https://b\u00fccher.example") == "https://xn--bcher-kva.example"
    assert public_origins(["http://[::1]:80", PUBLIC]) == {"http://[::1]", PUBLIC}
    for wrong in ("chat.example.org", "https://", "ftp://a.example", "https://a.example/chat",
                  "https://u@a.example", "*", "null", "", "https://a b", "https://a.example?x",
                  "https://*.a.example", "https://a,b", "https://a;b", "https://.", "https://a..b",
                  "https://%61.example", "https://a:123456"):
        with pytest.raises(VicugnaError, match="not an origin"):
            public_origins([wrong])


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_a_body(live: SimpleNamespace, path: str) -> None:
    head, got = (httpx.request(method, live.url + path) for method in ("HEAD", "GET"))
    assert head.status_code == got.status_code == 200 and head.content == b""
    for name in ("content-type", "content-length", "x-content-type-options"):
        assert head.headers[name] == got.headers[name]


def test_other_methods_are_405_with_the_allowed_ones(live: SimpleNamespace) -> None:
    for method in ("OPTIONS", "PUT", "DELETE"):
        refused = httpx.request(method, f"{live.url}/v1/models")
        assert refused.status_code == 405
        assert {*refused.headers["allow"].split(", ")} == {"GET", "HEAD"}
    assert httpx.head(f"{live.url}/v1/chat/completions").headers["allow"] == "POST"
    assert httpx.head(f"{live.url}/nothing").status_code == 404


def test_the_page_asks_relative_to_its_own_address(live: SimpleNamespace) -> None:
    """So that a proxy may have it under a path such as /chat/."""
    page = httpx.get(f"{live.url}/").text
    assert 'api("v1/' in page and '"/v1' not in page
