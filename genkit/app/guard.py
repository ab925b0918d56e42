"""Who may ask the page for what: hosts, origins, a token, and nothing but what the page needs."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "genkit"
LARGEST = 1 << 20  # bytes of a request: two long texts
# No upload, no file of this machine, no fetching of addresses, no editor: none of it is needed
NEEDED = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|run/\w+|heartbeat/\w+|startup-events|cancel|reset|info)/?"
)
# A page of this server alone: neither fonts nor scripts nor pictures of others
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def is_loopback(host: str) -> bool:
    """Tell an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Stands before the page, for every kind of request.

    Args:
        app: the page.
        hosts: names that the page may be asked for by, so that no name of a stranger leads here;
            None for any.
        token: what a request must bring, in its address or as a cookie; None for nothing.
    """

    def __init__(self, app: App, hosts: set[str] | None, token: str | None) -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        refused = self._refuse(scope, headers)
        if refused:
            return await _answer(send, *refused)
        extra = list(HEADERS)
        if self.token is not None and self._is_right(_asked(scope)):
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            extra.append((b"set-cookie", cookie.encode()))

        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self.app(scope, receive, send_more)

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Say why not, as status and text."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return 400, "this page is not of that host"
        if self.token is not None and not self._is_right(_asked(scope) or _kept(headers)):
            return 401, "open the address that genkit printed, with its token"
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return 403, "another page asked"
        if not NEEDED.fullmatch(scope["path"]):
            return 404, "there is no such thing here"
        length = headers.get("content-length", "0" if scope["method"] != "POST" else "")
        if not length.isdecimal() or int(length) > LARGEST:
            return 413, f"a request must tell its length, at most {LARGEST:,} bytes"
        return None

    def _is_right(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def _name(host: str) -> str | None:
    """Return the name in a Host header, without the port; None for what is no host."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _asked(scope: Scope) -> str:
    return parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]


def _kept(headers: dict[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
