"""Clients of the page without a browser, by its queue or byte by byte."""

import json
import os
import socket
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from app_models import ask

DRAW = [
    "class_conditional",
    "one after the other",
    0,
    64,
    "ddpm",
    1000,
    1.0,
]  # the most that is allowed


class Visitor:
    """A session of the page: it queues jobs, and listens for what comes of them."""

    def __init__(self, address: str, session: str) -> None:
        self.address, self.session = address, session
        config = json.loads(ask(f"{address}config")[1])
        self._functions = {each["api_name"]: each["id"] for each in config["dependencies"]}
        self.done: list[str] = []
        self.states: list[str] = []  # of results that are not there yet
        self.begun = threading.Event()  # of a result that grows

    def join(self, name: str, data: list) -> int:
        """Queue a job; return the status."""
        call = {"data": data, "fn_index": self._functions[name], "session_hash": self.session}
        return ask(f"{self.address}gradio_api/queue/join", call)[0]

    def choose(self, model: str) -> None:
        """Choose a model of images, and wait until its classes and samplers can be chosen."""
        self.ask("about_images", [model, ""])

    def call(self, name: str) -> None:
        """Send a request that does not queue."""
        call = {"data": [], "session_hash": self.session}
        assert ask(f"{self.address}gradio_api/run/{name}", call)[0] == 200

    def ask(self, name: str, data: list) -> str:
        """Queue a job, and wait for its outcome."""
        assert self.join(name, data) == 200
        self.listen()
        (found,) = self.wait()
        self.leave()
        self.done.clear()
        return found

    def listen(self) -> None:
        """Keep the outcomes in `done`, until all that was queued is done, or `leave`."""
        self._stream = urllib.request.urlopen(
            f"{self.address}gradio_api/queue/data?session_hash={self.session}", timeout=120
        )
        self._listening = threading.Thread(target=self._read, daemon=True)
        self._listening.start()

    def _read(self) -> None:
        try:
            for line in self._stream:
                message = json.loads(line.removeprefix(b"data: ")) if line.strip() else {}
                if message.get("msg") == "process_generating":
                    self.begun.set()
                    self.states.append(str(message["output"].get("data", [""])[0]))
                if message.get("msg") == "process_completed":
                    self.done.append(message["output"].get("data", [""])[0])
        except (OSError, ValueError, AttributeError):
            pass  # it has left

    def wait(self, count: int = 1, seconds: float = 100) -> list[str]:
        """Wait for so many outcomes."""
        end = time.monotonic() + seconds
        while len(self.done) < count and time.monotonic() < end:
            time.sleep(0.005)
        assert len(self.done) >= count, f"{self.session}: nothing after {seconds} s"
        return self.done

    def leave(self) -> None:
        """Close the stream, whatever is under way."""
        if self._stream.fp is not None:  # not ended by the page
            self._stream.fp.raw._sock.shutdown(socket.SHUT_RDWR)
        self._listening.join(20)
        self._stream.close()


def connect(address: str, seconds: float = 30) -> socket.socket:
    """Open a connection to the page."""
    url = urlsplit(address)
    return socket.create_connection((url.hostname, url.port), timeout=seconds)


def request(address: str, *headers: str, path: str = "gradio_api/run/refresh") -> bytes:
    """Write the head of a POST to the page."""
    lines = [f"POST /{path} HTTP/1.1", *headers]
    if not any(header.lower().startswith("host:") for header in headers):
        lines.append(f"Host: {urlsplit(address).netloc}")
    return "\r\n".join([*lines, "", ""]).encode()


def status(connection: socket.socket) -> int:
    """Read an answer up to its end; return its status."""
    answer = b""
    while chunk := connection.recv(1 << 16):
        answer += chunk
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer.split()[1])


def send(connection: socket.socket, block: bytes, count: int) -> None:
    """Send a block so many times, read or not."""
    for _ in range(count):
        connection.sendall(block)


def memory(pid: int) -> int:
    """Return the most bytes that a process has had in memory since `forget`."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget(pid: int) -> None:
    """Count a process's memory from here on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def can_measure(pid: int) -> bool:
    """Whether this system lets us measure the peak memory of a process."""
    return os.access(f"/proc/{pid}/clear_refs", os.W_OK)
