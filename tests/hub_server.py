"""A real HTTP server that plays the Hugging Face Hub for uploads and downloads, with the standard library alone."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".parquet")


@dataclass(frozen=True)
class Request:
    """One request as it came in; `body` holds what was read of it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Trouble:
    """What goes wrong with requests of `method` whose path contains `where`, the next `times` times.

    `how` is "drop" (half of the body is read, then the connection is cut), "unanswered" (the request is carried out,
    then the connection is cut), "silent" (no answer ever comes) or a status code to answer with. `times` may be
    `math.inf`.
    """

    method: str
    where: str
    how: str | int
    times: float = 1


@dataclass
class Repository:
    """The commits of one repository, newest last; a commit is its message and the contents by path."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(
        default_factory=lambda: [("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})]
    )

    @property
    def files(self) -> dict[str, bytes]:
        """The newest contents by path."""
        return self.commits[-1][1]

    def sha(self, number: int = -1) -> str:
        """The id of a commit."""
        number = number % len(self.commits)
        names = "\n".join(f"{path} {_sha256(data)}" for path, data in sorted(self.commits[number][1].items()))
        return hashlib.sha1(f"{number} {names}".encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Id and contents of "main" or of a commit id; None if there is no such commit."""
        for number in range(len(self.commits)):
            if revision == self.sha(number) or (revision == "main" and number == len(self.commits) - 1):
                return self.sha(number), self.commits[number][1]
        return None


class HubServer:
    """The Hub on 127.0.0.1 for the time of a `with` block; repositories are kept in memory.

    Attributes: `url`; `token`, the only one that may write; `user`, its owner; `refuse`, a status to answer every
    write with instead (401 or 403); `repositories` by id; `requests`, everything that came in; `troubles`.
    """

    def __init__(self, token: str, user: str = "user") -> None:
        self.token, self.user = token, user
        self.refuse: int | None = None
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.troubles: list[Trouble] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def received(self) -> Iterator[bytes]:
        """Everything that clients sent, file contents decoded: paths, bodies, and all that is stored."""
        for request in self.requests:
            yield request.path.encode()
            yield request.body
        yield from self.lfs.values()
        for repository in self.repositories.values():
            for message, files in repository.commits:
                yield message.encode()
                for path, data in files.items():
                    yield path.encode()
                    yield data

    def trouble_for(self, method: str, path: str) -> str | int | None:
        """How this request is to go wrong, counted off the `troubles`; None if it is not."""
        with self._lock:
            for trouble in self.troubles:
                if trouble.method == method and trouble.where in path and trouble.times > 0:
                    trouble.times -= 1
                    return trouble.how
        return None

    def record(self, request: Request) -> None:
        """Add a request to `requests`."""
        with self._lock:
            self.requests.append(request)


class _Answer(Exception):
    """The end of a request: status, JSON or bytes, headers."""

    def __init__(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def _missing(code: str) -> _Answer:
    return _Answer(404, {"error": code}, {"X-Error-Code": code})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are recorded, not printed."""

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):
            super().handle()

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        trouble = self.hub.trouble_for(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length // 2 if trouble == "drop" else length)
        self.hub.record(Request(self.command, self.path, dict(self.headers), body))
        if trouble == "silent":
            self.hub.closing.wait()
        if trouble in ("drop", "silent"):
            self.close_connection = True
            return
        answer = self._refusal(trouble) if isinstance(trouble, int) else self._answer(path, body)
        if trouble == "unanswered":
            self.close_connection = True
            return
        self._send(answer)

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _answer(self, path: str, body: bytes) -> _Answer:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method:
                try:
                    return action(self, body, *match.groups())
                except _Answer as answer:
                    return answer
        return _missing("NoSuchRoute")

    def _refusal(self, status: int) -> _Answer:
        # Some servers repeat what was sent to them; a client must not print that.
        return _Answer(status, {"error": f"refused what came with {self.headers.get('Authorization')}"})

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _may_write(self) -> None:
        if not self._authorized():
            raise self._refusal(401)
        if self.hub.refuse is not None:
            raise self._refusal(self.hub.refuse)

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._authorized()):
            raise _missing("RepoNotFound")
        return repository

    def _at(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self._repository(repo_id).at(revision)
        if found is None:
            raise _missing("RevisionNotFound")
        return found

    def create(self, body: bytes) -> _Answer:
        self._may_write()
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return _Answer(409, {**answer, "error": "You already created this model repo"})
        self.hub.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        return _Answer(200, answer)

    def validate_yaml(self, body: bytes) -> _Answer:
        if not json.loads(body)["content"].startswith("---\n"):
            return _Answer(400, {"errors": [{"message": "no metadata"}], "warnings": []})
        return _Answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> _Answer:
        self._may_write()
        present = self._at(repo_id, revision)[1]
        files = []
        wanted = json.loads(body)
        # What the client does not say about ignored files stands in the repository.
        ignored = wanted.get("gitIgnore", present.get(".gitignore", b"").decode()).split()
        for file in wanted["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            data = present.get(file["path"])
            oid = None if data is None else _sha256(data) if mode == "lfs" else _git_sha(data)
            ignore = any(fnmatch(file["path"], pattern) for pattern in ignored)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        return _Answer(200, {"files": files})

    def lfs_batch(self, body: bytes, repo_id: str) -> _Answer:
        self._may_write()
        self._repository(repo_id)
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}?Signature=secret-of-the-store"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> _Answer:
        if _sha256(body) != oid:
            return _Answer(400, {"error": "not these bytes"})
        self.hub.lfs[oid] = body
        return _Answer(200)

    def lfs_verify(self, body: bytes) -> _Answer:
        wanted = json.loads(body)
        stored = self.hub.lfs.get(wanted["oid"], b"")
        return _Answer(200 if len(stored) == wanted["size"] else 404, {})

    def commit(self, body: bytes, repo_id: str, revision: str) -> _Answer:
        self._may_write()
        files = dict(self._at(repo_id, revision)[1])
        message = ""
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.lfs:
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                return _Answer(400, {"error": f"cannot do {line!r}"})
        repository = self._repository(repo_id)
        repository.commits.append((message, files))
        url = f"{self.hub.url}/{repo_id}/commit/{repository.sha()}"
        return _Answer(200, {"success": True, "commitOid": repository.sha(), "commitUrl": url})

    def info(self, body: bytes, repo_id: str, revision: str | None) -> _Answer:
        sha, files = self._at(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self._repository(repo_id).private
        return _Answer(200, {"id": repo_id, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo_id: str, revision: str) -> _Answer:
        files = self._at(repo_id, revision)[1]
        return _Answer(200, [_tree_entry(path, data) for path, data in sorted(files.items())])

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> _Answer:
        sha, files = self._at(repo_id, revision)
        if path not in files:
            raise _missing("EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_sha(data)}"'}
        if path.endswith(LFS_SUFFIXES):
            headers |= {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
        return _Answer(200, data, headers)


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., _Answer]]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", r"/lfs-verify", _Handler.lfs_verify),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", _Handler.commit),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/api/models/{REPO}(?:/revision/([^/]+))?", _Handler.info),
    ("GET HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _tree_entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_sha(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
