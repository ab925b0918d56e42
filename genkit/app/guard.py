"""The requests that the page answers: by host, origin, token, path and size."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from genkit.app import jobs
from genkit.app.root import TOP, Root

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "genkit"
LARGEST = 1 << 20  # bytes of a request: two long texts
BODY = 30.0  # seconds for the body of a request to arrive
ONCE = (
    "host",
    "origin",
    "cookie",
    "content-length",
    "transfer-encoding",
)  # headers that may not be repeated
LISTENS = "/gradio_api/queue/data"  # the path of streams with the outcomes of queued jobs
HEARD = "genkit.heard"  # key of a request's scope: whether somebody still waits for the answer
# all that the page needs: no uploads, no files of this machine, no fetching of URLs, no editor
NEEDED = re.compile(
    r"/|/chapter-[a-z-]+/?"
    r"|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|run/\w+|heartbeat/\w+|startup-events|cancel|reset|info)/?"
)
PROXIED = (
    "if a proxy passes requests on, start genkit app with --root-path and the address that "
    "visitors use, such as https://example.org/genkit"
)
NO_SITE = "'none'"  # may show the page in a frame


def security_headers(framed_by: str = NO_SITE) -> list[tuple[bytes, bytes]]:
    """Return headers by which browsers load nothing of other sites: no fonts, scripts, pictures.

    Args:
        framed_by: the origin whose pages may show this one in a frame.
    """
    sources = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
    policy = f"{sources}; frame-ancestors {framed_by}"
    return [
        (b"content-security-policy", policy.encode()),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]


HEADERS = security_headers()


class RefusedError(Exception):
    """A request is refused, with an HTTP status and a reason."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """Stands before the page, for every kind of request.

    Args:
        app: the page.
        hosts: allowed Host headers, against DNS rebinding; None for any.
        token: what a request must bring, in its URL or as a cookie; None for nothing.
        root: where visitors find the page, if a proxy stands before it.
        framed_by: the origin whose pages may show this one in a frame.
    """

    def __init__(
        self,
        app: App,
        hosts: set[str] | None,
        token: str | None,
        root: Root = TOP,
        framed_by: str = NO_SITE,
    ) -> None:
        self.app, self.hosts, self.token, self.root = app, hosts, token, root
        self.headers = security_headers(framed_by)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        if self.root.path and scope["path"] == self.root.path:  # links are relative to a folder
            return await _redirect(send, scope, f"{self.root.path}/")
        scope = {**scope, "path": self.root.below(scope["path"])}
        try:
            self._check(scope, _headers(scope))
            body = await _read_body(receive)
        except RefusedError as refused:
            return await _send_text(send, refused.status, str(refused))
        extra = list(self.headers)
        if self.token is not None and self._is_right(_query_value(scope, "token")):
            cookie = (
                f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path={self.root.path or '/'}"
            )
            extra.append((b"set-cookie", cookie.encode()))

        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self._pass(scope, body, receive, send_more)

    async def _pass(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Pass a request on, and note in its scope whether somebody still waits for the answer."""
        gone, unread = asyncio.Event(), [body]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def replay() -> MutableMapping[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        scope[HEARD] = lambda: not gone.is_set()
        visitor = address(scope), _query_value(scope, "session_hash")
        listens = scope["path"].rstrip("/") == LISTENS
        watching = asyncio.create_task(watch())
        try:
            with jobs.QUEUE.listening(visitor) if listens else contextlib.nullcontext():
                await self.app(scope, replay, send)
        finally:
            watching.cancel()

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse a request of another host or origin, without the token, or of an unneeded path."""
        host = headers.get("host", "")
        if self.hosts is not None and _host_name(host) not in self.hosts:
            raise RefusedError(
                400,
                f"this page does not answer as {host!r:.100}, the Host header of this request; "
                f"{PROXIED}; to serve other machines directly, start it with --host 0.0.0.0",
            )
        if self.token is not None and not self._is_right(
            _query_value(scope, "token") or _cookie_token(headers)
        ):
            raise RefusedError(401, "open the address that genkit app printed, with its token")
        if "origin" in headers and headers["origin"] not in self._origins(scope, host):
            raise RefusedError(
                403,
                f"the Origin header, {headers['origin']!r:.100}, is not that of this page, "
                f"{scope['scheme']}://{host:.100}; {PROXIED}",
            )
        if not NEEDED.fullmatch(scope["path"]):
            raise RefusedError(404, f"this page has no path {scope['path']!r:.100}; {PROXIED}")
        length = headers.get("content-length", "0" if scope["method"] != "POST" else "")
        if "transfer-encoding" in headers and length:
            raise RefusedError(400, "a request has a length or a transfer encoding, not both")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > LARGEST:
            raise RefusedError(413, f"a request needs a length of at most {LARGEST:,} bytes")

    def _origins(self, scope: Scope, host: str) -> set[str]:
        """Return the origins whose pages may send requests."""
        return {f"{scope['scheme']}://{host}", self.root.origin} - {""}

    def _is_right(self, given: str) -> bool:
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def address(scope: Scope) -> str:
    """Return the IP address of a request's client."""
    return (scope.get("client") or ("",))[0]


def _headers(scope: Scope) -> dict[str, str]:
    """Return headers by name, and refuse a second one of those in `ONCE`."""
    headers: dict[str, str] = {}
    for name, value in ((n.decode("latin-1"), v.decode("latin-1")) for n, v in scope["headers"]):
        if name in ONCE and name in headers:
            raise RefusedError(400, f"a request has one header {name}, not two")
        headers[name] = value
    return headers


async def _read_body(receive: Receive) -> bytes:
    """Read a body; what counts is the bytes that arrive, not the headers."""
    body, more = b"", True
    try:
        async with asyncio.timeout(BODY):
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
                if len(body) > LARGEST:
                    raise RefusedError(413, f"a request has at most {LARGEST:,} bytes")
    except TimeoutError:
        raise RefusedError(408, "the body of a request takes too long") from None
    return body


def _host_name(host: str) -> str | None:
    """Return the name in a Host header, without the port; None if it is invalid."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _query_value(scope: Scope, name: str) -> str:
    """Return a value of a URL's query; of several the last, as gradio does."""
    query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    return query.get(name, [""])[-1]


def _cookie_token(headers: dict[str, str]) -> str:
    """Return the token in the cookie; "" if there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


async def _redirect(send: Send, scope: Scope, path: str) -> None:
    """Send a browser to another path, with the same query."""
    query = scope["query_string"]
    location = path.encode() + (b"?" + query if query else b"")
    headers = [(b"location", location), (b"content-length", b"0"), *HEADERS]
    await send({"type": "http.response.start", "status": 307, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _send_text(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    headers += [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
