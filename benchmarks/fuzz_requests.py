"""Requests to a live page corrupted in every part: framing, headers, paths, bodies, events.

After each request the page still answers, its memory is below 2 GiB, and the request was answered
or its connection closed in time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import app_models  # type: ignore[import-not-found]
import psutil
from hypothesis import strategies as st

from benchmarks.fuzz_watch import MEMORY, SECONDS, SECRET, Outcome

Example = dict[str, Any]
PATIENCE = SECONDS + 5  # of a busy machine, whose page waits for 30 s itself
JOIN = "/gradio_api/queue/join"
MODELS = ("language", "reader", "two_latents", "gan", "class_conditional", "training", "game")
METHODS = ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", ""]
TARGETS = [
    *("/", "/config", "/theme.css", "/assets/../../../etc/passwd", "/assets/%2e%2e/%2e%2e/secret"),
    *("/gradio_api/file=@secret", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd"),
    "/static/%00",
    *("/gradio_api/upload", "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/queue/join", "*"),
    *("/gradio_api/queue/data?session_hash=s", "/gradio_api/run/next_tokens", "/gradio_api/info"),
    *("/gradio_api/heartbeat/s", "/gradio_api/cancel", "/gradio_api/reset", "//", "/\xff", ""),
    *("/gradio_api/startup-events", "http://evil/", "/" + "a" * 70_000, "/gradio_api/stream/a/b/c"),
    *("/?token=" + "x" * 5000, "/gradio_api/run/predict", "/login", "/gradio_api/call/x"),
]  # fmt: skip
VERSIONS = ["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2", "", "ICY"]
HEADERS = [
    *(("Host", "@host"), ("Host", "evil.example"), ("Host", ""), ("Host", "[::1"), ("Host", "a b")),
    *(("Origin", "@origin"), ("Origin", "https://evil.example"), ("Origin", "null")),
    *(("Origin", "https://@host"), ("Content-Type", "text/plain"), ("Expect", "100-continue")),
    *(("Content-Type", "multipart/form-data; boundary=x"), ("Cookie", "genkit=" + "x" * 9000)),
    *(("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "gzip, chunked")),
    ("Range", "bytes=0-"),
    *(("Transfer-Encoding", "xchunked"), ("Content-Length", "-1"), ("Content-Length", "1e9")),
    *(("Content-Length", "300000000"), ("Content-Length", "5"), ("Content-Length", "0x10")),
    *(("Content-Length", "1, 1"), ("Content-Encoding", "gzip"), ("Connection", "Upgrade")),
    *(("Upgrade", "websocket"), ("Upgrade", "h2c"), ("X" * 70_000, "x"), ("X-A", "x" * 70_000)),
    *(("X-\u00e9", "\u00ff"), ("Bad Name", "x"), ("Authorization", "Basic x"), ("", "x")),
    *(("X-Forwarded-Host", "evil"), ("X-Gradio-Target", "http://127.0.0.1"), ("Cookie", "\x01")),
]  # fmt: skip
LENGTHS = ["right", "none", "chunked", "both", "twice", "short", "long", "endless"]
OFTEN = ["right"] * 30 + LENGTHS[:5] * 3 + LENGTHS  # with few of those that take long
VALUES: list[Any] = [None, True, 0, -1, 2.5, 1e308, "NaN", "", "The ", "x" * 10_000, [], {}, [[]]]
VALUES += [
    "language",
    "reader",
    "two_latents",
    "gan",
    "class_conditional",
    "../x",
    "/etc/passwd",
    "@secret",
]
VALUES += [10**9, 1 << 63, 10**400, "-1", {"path": "@secret"}, ["a"] * 1000, "<script>", "\ud800"]
VALUES += [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, {"url": "http://evil/"}]
BODIES = ["", "{", "null", "[]", "3", '{"data": 3}', "[" * 100_000, '{"data": [], "fn_index": 1e9}']
BODIES += [
    '{"data": [], "fn_index": -1, "session_hash": "s"}',
    '{"event_id": "x"}',
    "\xff",
    "x" * 9,
]


# ---------------------------------------------------------------------------------------------
# Drawing examples


def strategy(events: list[tuple[int, int]]) -> st.SearchStrategy[Example]:
    """Draw requests.

    Args:
        events: of the page: the number of each and how many values it takes.
    """
    value = st.sampled_from(VALUES)
    call = st.sampled_from(events).flatmap(
        lambda event: st.fixed_dictionaries(
            {
                "fn_index": st.sampled_from([event[0], event[0], event[0], -1, "x", None]),
                "data": st.one_of(
                    st.lists(value, min_size=event[1], max_size=event[1]),
                    st.lists(value, max_size=3),
                ),
                "session_hash": st.sampled_from(["s", "t", "", None, 3, "x" * 5000, "../x"]),
            }
        )
    )
    body = st.one_of(call.map(json.dumps), call.map(json.dumps), st.sampled_from(BODIES))
    join = st.fixed_dictionaries(
        {
            "method": st.just("POST"),
            "target": st.sampled_from([*[JOIN] * 3, "/gradio_api/run/next_tokens"]),
            "version": st.just("HTTP/1.1"),
            "headers": st.lists(st.sampled_from(HEADERS).map(list), max_size=1),
            "length": st.sampled_from(OFTEN),
            "body": body,
        }
    )  # fmt: skip
    other = st.fixed_dictionaries(
        {
            "method": st.sampled_from(METHODS),
            "target": st.sampled_from(TARGETS),
            "version": st.sampled_from(VERSIONS),
            "headers": st.lists(st.sampled_from(HEADERS).map(list), max_size=4),
            "length": st.sampled_from(OFTEN),
            "body": body,
        }
    )
    return st.one_of(join, other)


def _seed(target: str, length: str, *headers: tuple[str, str], body: str = "{}") -> Example:
    lines = [list(header) for header in headers]
    lines += [["Host", "@host"], ["Content-Type", "application/json"]]
    request = {"method": "POST", "target": target, "version": "HTTP/1.1", "headers": lines}
    return request | {"length": length, "body": body}


# Examples that failed in the past
SEEDS = [_seed(JOIN, length) for length in LENGTHS]
SEEDS += [_seed(JOIN, "right", header) for header in HEADERS]
SEEDS += [
    _seed(target, "right") | {"method": method} for target in TARGETS for method in METHODS[:2]
]
SEEDS += [_seed(JOIN, "right", body=body) for body in BODIES]


# ---------------------------------------------------------------------------------------------
# Sending them


class Requests:
    """The part of the fuzzer that corrupts requests.

    Args:
        address: of the page.
        secret: a file that the page must not send.
        process: the one that serves the page.
    """

    def __init__(self, address: str, secret: Path, process: psutil.Process) -> None:
        self.address, self.secret, self.process = address, secret, process
        self.url = urlsplit(address)
        with urllib.request.urlopen(f"{address}config") as response:
            page = json.loads(response.read())
        events = [(each["id"], len(each["inputs"])) for each in page["dependencies"]]
        self.strategy, self.seeds = strategy(events), SEEDS

    def run(self, example: Example) -> Outcome:
        """Send a request, then check the page."""
        started = time.monotonic()
        answer = self._send(example)
        seconds = time.monotonic() - started
        problem = self._problem(answer, seconds) or self._alive()
        memory = self._memory()
        if problem is None and memory > MEMORY:
            problem = f"the page takes {memory >> 20} MiB"
        line = answer.splitlines()[0].decode("latin-1") if answer else "closed"
        served = re.match(r"HTTP/1\.[01] [23]", line)
        kind = "failure" if problem else "result" if served else "refusal"
        return Outcome(kind, f"{problem} ({line})" if problem else line, memory, seconds)

    def _problem(self, answer: bytes, seconds: float) -> str | None:
        if seconds > PATIENCE:
            return f"neither answered nor closed within {SECONDS:g} s"
        if SECRET.encode() in answer or b"root:x:0" in answer:
            return "a secret was leaked"
        if b"Traceback (most recent" in answer:
            return "a traceback was leaked"
        return None

    def _alive(self) -> str | None:
        """Open the page as anybody else would."""
        try:
            with urllib.request.urlopen(self.address, timeout=SECONDS) as page:
                return None if page.status == 200 else f"the page answers {page.status}"
        except OSError as error:
            return f"the page does not answer: {error}"

    def _memory(self) -> int:
        """Return the memory of the page, or of the largest of its children."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [self.process, *self.process.children(recursive=True)]
            return max(each.memory_info().rss for each in family)
        return 0

    def _send(self, example: Example) -> bytes:
        """Send a request and return the answer; an event's stream is read for a second."""
        answer = b""
        with socket.create_connection((self.url.hostname, self.url.port)) as there:
            there.settimeout(1)
            with contextlib.suppress(OSError):
                for part in self._parts(example):
                    there.sendall(part)
            end = time.monotonic() + PATIENCE + 1
            while time.monotonic() < end:
                try:
                    data = there.recv(1 << 16)
                except TimeoutError:
                    if b"text/event-stream" in answer:
                        break
                    continue
                except OSError:
                    break
                answer += data
                if not data or _is_whole(answer):
                    break
        return answer

    def _parts(self, example: Example) -> Iterator[bytes]:
        body = self._filled(example["body"]).encode("utf-8", "surrogatepass")
        lines = [" ".join((example["method"], example["target"], example["version"]))]
        named = {name.lower() for name, _ in example["headers"]}
        given = example["headers"] + ([] if "host" in named else [["Host", "@host"]])
        given = given + ([] if "connection" in named else [["Connection", "close"]])
        given = given + ([] if "content-type" in named else [["Content-Type", "application/json"]])
        lines += [f"{name}: {value}" for name, value in given]
        length = example["length"]
        if length in ("right", "both", "twice"):
            lines += [f"Content-Length: {len(body)}"] * (2 if length == "twice" else 1)
        elif length in ("short", "long"):
            lines += [f"Content-Length: {max(len(body) + (-2 if length == 'short' else 9), 0)}"]
        if length in ("chunked", "both", "endless"):
            lines += ["Transfer-Encoding: chunked"]
        head = self._filled("\r\n".join(lines)) + "\r\n\r\n"
        yield head.encode("utf-8", "surrogatepass")
        if length == "endless":
            for _ in range(64):  # megabytes
                yield b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        elif length in ("chunked", "both"):
            yield b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        else:
            yield body

    def _filled(self, text: str) -> str:
        text = text.replace("@secret", str(self.secret)).replace("@host", self.url.netloc)
        return text.replace("@origin", f"http://{self.url.netloc}")


def _is_whole(answer: bytes) -> bool:
    """Whether an answer has arrived, by its length or its last chunk."""
    head, found, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        return body.endswith(b"0\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(found and length and len(body) >= int(length[1]))


@contextlib.contextmanager
def serving(home: Path) -> Iterator[Requests]:
    """Serve a page with tiny models from a process of its own."""
    app_models.make(home / "models")
    secret = home / "secret.txt"
    secret.write_text(SECRET)
    os.environ["GRADIO_TEMP_DIR"] = str(home / "gradio")
    models = [str(home / "models" / name) for name in MODELS]
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT)  # gradio logs what it refuses
    os.dup2(log, 2)
    with app_models.served(models) as address:
        process = psutil.Process().children()[-1]
        yield Requests(address, secret, process)
