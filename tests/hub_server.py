"""A small Hub on loopback: enough of its protocol for the real client to push and fetch."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

TOKEN, READER = "hf_loopback", "hf_reader"  # which may write, and only read


@dataclass
class Repository:
    """Commits are trees of whole files; branches name commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # SHA-256 of what came by LFS

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        """Make a tree the newest of a branch."""
        names = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in tree.items())
        content = json.dumps([names, len(self.commits)]).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha  # the one moment at which anybody sees it
        return sha

    def find_commit(self, revision: str) -> str | None:
        """Return the commit that a branch or the start of a commit's name stands for."""
        if revision in self.branches:
            return self.branches[revision]
        return next((sha for sha in self.commits if sha.startswith(revision)), None)


class Hub(ThreadingHTTPServer):
    """The server, its repositories and the requests it has had."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}  # of a Space by spaces/ and its name
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.slow = 0.0  # seconds that every request waits
        self.refused: tuple[str, str, int] | None = None  # method, pattern of a path, status
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def tree(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository."""
        repository = self.repositories[name]
        return repository.commits[repository.branches[revision]]

    def environment(self, home: Path) -> dict[str, str]:
        """Return what a process needs to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }

    def connect(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """Let this process take it for the Hub, with a cache of its own."""
        patch.setattr(constants, "ENDPOINT", self.address)
        template = f"{self.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        disable_progress_bars()
        for name in ("HF_TOKEN", "NO_PROXY"):
            patch.setenv(name, self.environment(home)[name])


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub in a thread."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def _answer(self) -> None:
        self.body = self._read()
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.server.asked.append((self.command, path))
        time.sleep(self.server.slow)
        method, pattern, status = self.server.refused or ("", "", 0)
        if self.command == method and re.search(pattern, path):
            return self._send(status, {"error": f"refused with {status}"})
        writes = self.command in ("POST", "PUT", "DELETE") and "validate-yaml" not in path
        known = [f"Bearer {token}" for token in (TOKEN, READER)]
        if writes and self.headers.get("Authorization", known[0]) not in known:
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        with self.server.lock:
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    return answer(self, **found.groupdict())
        return self._send(404, {"error": f"no route for {self.command} {path}"})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- accounts and repositories

    def whoami(self) -> None:
        self._send(200, {"type": "user", "name": "user", "auth": {"accessToken": {}}, "orgs": []})

    def fine(self, **_: str) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = _full_name(asked)
        if self.headers.get("Authorization") == f"Bearer {READER}":
            return self._send(403, {"error": "this token may not write"})
        if name in self.server.repositories:
            return self._send(
                409, {"error": "You already created this model repo", "url": self._page(name)}
            )
        is_space = asked.get("type") == "space"
        if is_space and asked.get("sdk") not in ("gradio", "docker", "static"):
            return self._send(400, {"error": "sdk must be one of gradio, docker, static"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repository = self.server.repositories[name] = Repository(private)
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        about = f"---\ntitle: Demo\nsdk: {asked.get('sdk')}\n---\n".encode()
        repository.commit("main", first | ({"README.md": about} if is_space else {}))
        return self._send(200, {"url": self._page(name), "name": name, "id": name})

    def delete(self) -> None:
        del self.server.repositories[_full_name(json.loads(self.body))]
        self._send(200, {})

    def delete_branch(self, name: str, branch: str) -> None:
        del self.server.repositories[name].branches[branch]
        self._send(200, {})

    def may_write(self, name: str) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self._send(*((200, {}) if allowed else (403, {"error": "this token may not write"})))

    def branch(self, name: str, branch: str) -> None:
        repository = self.server.repositories[name]
        if branch in repository.branches:
            return self._send(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.branches["main"]
        return self._send(200, {})

    def info(self, name: str, revision: str = "main") -> None:
        repository = self.server.repositories.get(name)
        sha = repository.find_commit(revision) if repository else None
        if repository is None or sha is None:
            return self._missing("RepoNotFound" if repository is None else "RevisionNotFound")
        files = [{"rfilename": path} for path in repository.commits[sha]]
        about = {"id": name, "modelId": name, "sha": sha, "private": repository.private}
        return self._send(200, about | {"siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def files(self, name: str, revision: str, path: str = "") -> None:
        repository = self.server.repositories[name]
        sha = repository.find_commit(revision)
        if sha is None:
            return self._missing("RevisionNotFound")
        listed, folders = [], set()
        for file, data in repository.commits[sha].items():
            folders |= {str(parent) for parent in Path(file).parents} - {"."}
            oid = hashlib.sha256(data).hexdigest()
            lfs = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 130}}
            entry = {"type": "file", "path": file, "size": len(data), "oid": blob(data)}
            listed.append(entry | (lfs if oid in repository.large else {}))
        listed += [{"type": "directory", "path": path, "oid": path} for path in sorted(folders)]
        return self._send(200, listed)

    # ---- reading and writing

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.server.repositories.get(name)
        sha = repository.find_commit(revision) if repository else None
        if repository is None or sha is None:
            return self._missing("RepoNotFound" if repository is None else "RevisionNotFound")
        data = repository.commits[sha].get(path)
        if data is None:
            return self._missing("EntryNotFound", {"X-Repo-Commit": sha})
        etag = hashlib.sha256(data).hexdigest()
        return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def preupload(self, name: str, revision: str) -> None:
        repository = self.server.repositories[name]
        sha = repository.find_commit(revision)
        tree = repository.commits[sha] if sha else {}
        listed = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith((".safetensors", ".png", ".gif"))
            known = tree.get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest()
            listed.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid if large or known is None else blob(known),
                }
            )
        self._send(200, {"files": listed})

    def batch(self, name: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            known = asked["oid"] in self.server.blobs
            href = f"{self.server.address}/lfs/{asked['oid']}"
            objects.append(asked | ({} if known else {"actions": {"upload": {"href": href}}}))
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "hash mismatch"})
        self.server.blobs[oid] = self.body
        return self._send(200, {})

    def commit(self, name: str, revision: str) -> None:
        repository = self.server.repositories[name]
        tree = dict(repository.commits[repository.branches[revision]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            parent = value.get("parentCommit") if kind == "header" else None
            if parent not in (None, repository.branches[revision]):
                return self._send(412, {"error": "a commit has happened since"})
            if kind == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                tree[value["path"]] = self.server.blobs[value["oid"]]
                repository.large.add(value["oid"])
            elif kind == "deletedFile":
                del tree[value["path"]]
        sha = repository.commit(revision, tree)
        url = f"{self._page(name)}/commit/{sha}"
        return self._send(200, {"commitOid": sha, "commitUrl": url, "success": True})

    def _page(self, name: str) -> str:
        return f"{self.server.address}/{name}"

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, {"error": code}, {"X-Error-Code": code} | (headers or {}))


def _full_name(asked: dict[str, Any]) -> str:
    """Return the name of the repository that a request is about."""
    name = f"{asked.get('organization') or 'user'}/{asked['name']}"
    return f"spaces/{name}" if asked.get("type") == "space" else name


def blob(data: bytes) -> str:
    """Return git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"(?P<name>(spaces/)?[\w.-]+(/[\w.-]+)?)"
API = rf"/api/(models/)?{NAME}"
READ = ("GET", "HEAD")
ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (READ, r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/validate-yaml", Handler.fine),
    (("POST",), r"/api/repos/create", Handler.create),
    (("DELETE",), r"/api/repos/delete", Handler.delete),
    (("DELETE",), rf"{API}/branch/(?P<branch>.+)", Handler.delete_branch),
    (("POST",), rf"{API}/branch/(?P<branch>.+)", Handler.branch),
    (("POST",), rf"{API}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), rf"{API}/commit/(?P<revision>.+)", Handler.commit),
    (READ, rf"{API}/auth-check/write", Handler.may_write),
    (READ, rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", Handler.files),
    (READ, rf"{API}/revision/(?P<revision>[^/]+)", Handler.info),
    (READ, API, Handler.info),
    (READ, rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", Handler.upload),
]
