"""A Hub of the tests' own: enough of its HTTP API for the real clients.

They publish a model to it and download it again, and stream data sets from it, with faults that a test asks for.
"""

import base64
import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

Tree = dict[str, bytes]
DATA_COMMIT = "a" * 40  # the one commit of every data set


@dataclass
class Repo:
    """Commits in their order, each the whole tree of files, and what `main` and the tags point to."""

    commits: list[tuple[str, str, Tree]] = field(default_factory=list)  # (oid, message, files)
    tags: dict[str, str] = field(default_factory=dict)

    def oid(self, revision: str) -> str | None:
        if revision == "main":
            return self.commits[-1][0] if self.commits else "0" * 40
        return self.tags.get(revision, revision if any(oid == revision for oid, _, _ in self.commits) else None)

    def tree(self, revision: str) -> Tree:
        return next((files for oid, _, files in self.commits if oid == self.oid(revision)), {})


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    :param what: a status; "drop" for a connection that ends before the request is read to its end, and without effect;
        "lost" for one that ends without an answer, after the request has done its work.
    :param at: pattern of the requests ("PUT /lfs/") of which the first one meets it.
    """

    what: int | str
    at: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class HubServer:
    """`with HubServer() as hub:` serves on hub.url; `hub.faults` holds what goes wrong before anything goes well.

    `hub.datasets` holds the files of data sets, `hub.private` the names of those that only the token may read, and
    `hub.file_faults` what goes wrong with a file of one instead of an answer: a status, "drop" for a connection that
    ends without one, "cut" for one that ends in the middle. The last of them stays until the test takes it away.

    While `hub.paused` is clear, requests that match `hub.pausing` wait, their bodies read: `hub.waiting` counts them.

    :param token: the one token that may write; reading is free.
    :param host: address to listen on.
    """

    def __init__(self, token: str = "hf_good", host: str = "127.0.0.1") -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.datasets: dict[str, Tree] = {}
        self.private: set[str] = set()
        self.faults: deque[int | Fault] = deque()
        self.file_faults: dict[str, list[int | str]] = {}
        self.requests: list[str] = []
        self.paused = threading.Event()
        self.paused.set()
        self.pausing = ""
        self.waiting = 0
        self.lock = threading.Lock()  # commits come one after the other
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer((host, 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.paused.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a header would wait for its body for 40 ms
    _mute = False

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        fault = self._fault(request)
        if fault.what == "drop":
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            return
        body = self._body()
        if re.match(hub.pausing, request) and not hub.paused.is_set():
            hub.waiting += 1
            hub.paused.wait()
        hub.requests.append(request)
        self._mute = fault.what == "lost"
        if isinstance(fault.what, int) and fault.what:
            return self._answer(fault.what, {"error": "fault of the test"}, dict(fault.headers))
        writes = self.command not in ("GET", "HEAD") and not path.startswith(("/lfs/", "/api/datasets/"))
        if writes and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer(401, {"error": "Invalid username or password."})
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in (self.command, "GET" if self.command == "HEAD" else None):
                return action(self, body, *found.groups())
        return self._answer(404, {"error": f"no such page: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _fault(self, request: str) -> Fault:
        with self.hub.lock:
            for fault in self.hub.faults:
                known = Fault(fault) if isinstance(fault, int) else fault
                if re.match(known.at, request):
                    self.hub.faults.remove(fault)
                    return known
        return Fault(0)

    def whoami(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid username or password."})
        self._answer(200, {"type": "user", "name": "asha", "orgs": []})

    def create_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo())
        self._answer(status, {"url": f"{self.hub.url}/{name}", "id": name})

    def validate_yaml(self, body: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        there = self.hub.repos[name].tree(revision)
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _oid(path, there[path]) if path in there else None,
            }
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        self._answer(200, {"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append({**wanted} if wanted["oid"] in self.hub.objects else {**wanted, "actions": upload})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.objects[oid] = body
        self._answer(200 if good else 400, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        with self.hub.lock:
            repo, files, message = self.hub.repos[name], dict(self.hub.repos[name].tree("main")), ""
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    message = value["summary"]
                    if value.get("parentCommit", repo.oid("main")) != repo.oid("main"):
                        return self._answer(412, {"error": "A commit has happened since."})
                elif item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
            oid = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
            repo.commits.append((oid, message, files))
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def tag(self, body: bytes, name: str, revision: str) -> None:
        tag = json.loads(body)["tag"]
        status = 409 if tag in self.hub.repos[name].tags else 200
        self.hub.repos[name].tags.setdefault(tag, self.hub.repos[name].oid(revision) or "")
        self._answer(status, {})

    def model_info(self, body: bytes, name: str, revision: str | None = None) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or repo.oid(revision or "main") is None:
            return self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in repo.tree(revision or "main")]
        self._answer(200, {"id": name, "sha": repo.oid(revision or "main"), "siblings": siblings, "tags": []})

    def tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> None:
        files = self.hub.repos[name].tree(revision)
        inside = {path: data for path, data in files.items() if folder is None or path.startswith(f"{folder}/")}
        if folder is not None and not inside:
            return self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in inside.items()
        ]
        self._answer(200, entries)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._answer(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        data = repo.tree(revision).get(path)
        if data is None:
            return self._answer(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": repo.oid(revision) or "", "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self._answer(200, data, headers)

    def dataset(self, body: bytes, name: str, rest: str = "") -> None:
        """Everything below /api/datasets/NAME."""
        files = self._files_of_dataset(name)
        verb, _, where = rest.partition("/")
        revision, _, folder = where.partition("/")
        if files is None:
            return
        if revision not in ("", "main", DATA_COMMIT):
            return self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        if verb == "tree":
            return self._answer(200, _entries(files, folder))
        if verb == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            folders = {"", *(path.rpartition("/")[0] for path in files)}
            entries = [entry for path in folders for entry in _entries(files, path)]
            return self._answer(200, [entry for entry in entries if entry["path"] in wanted])
        siblings = [{"rfilename": path} for path in files]
        self._answer(200, {"id": name, "sha": DATA_COMMIT, "private": False, "tags": [], "siblings": siblings})

    def dataset_file(self, body: bytes, name: str, revision: str, path: str) -> None:
        files = self._files_of_dataset(name)
        if files is None:
            return
        headers = {"X-Repo-Commit": DATA_COMMIT}
        if revision not in ("main", DATA_COMMIT):
            return self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        if path not in files:
            return self._answer(404, {"error": "no such file"}, headers | {"X-Error-Code": "EntryNotFound"})
        data = files[path]
        headers |= {"ETag": f'"{len(data)}"', "X-Linked-Size": str(len(data))}
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            status, data = 206, data[start : stop + 1]
        faults = self.hub.file_faults.get(path, [])
        fault = (faults.pop(0) if len(faults) > 1 else faults[0]) if faults and self.command == "GET" else None
        if isinstance(fault, int):
            return self._answer(fault, {"error": "fault of the test"})
        if fault:
            self.close_connection = True
            if fault == "cut":
                self._answer(status, data[: len(data) // 2], headers | {"Content-Length": str(len(data))})
            return
        self._answer(status, data, headers)

    def _files_of_dataset(self, name: str) -> Tree | None:
        refused = name in self.hub.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        if refused or name not in self.hub.datasets:
            self._answer(401 if refused else 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return self.hub.datasets[name]

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        if self._mute:
            self.close_connection = True
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(path: str, data: bytes) -> str:
    """The client leaves out of a commit what is there already by this name."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(files: Tree, folder: str) -> list[dict[str, Any]]:
    """The files and folders that lie directly in a folder of a data set."""
    inside = [path for path in files if path.rpartition("/")[0] == folder]
    below = {path.split("/")[0] for path in files if "/" in path} if not folder else set()
    return [{"type": "directory", "path": path, "oid": DATA_COMMIT} for path in sorted(below)] + [
        {"type": "file", "path": path, "size": len(files[path]), "oid": DATA_COMMIT} for path in inside
    ]


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/tag/([^/]+)", _Handler.tag),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_put),
    ("GET", rf"/api/models/{_NAME}", _Handler.model_info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.model_info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("GET", rf"/datasets/{_NAME}/resolve/([^/]+)/(.+)", _Handler.dataset_file),
    ("GET", rf"/api/datasets/{_NAME}/?(.*)", _Handler.dataset),
    ("POST", rf"/api/datasets/{_NAME}/(paths-info/.+)", _Handler.dataset),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
