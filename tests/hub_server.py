"""A Hub on the loopback interface: enough of its protocol for real clients to create repositories, upload, commit,
tag, open pull requests and download."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """Commits by oid, each with all of its files, and what points at them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def __post_init__(self) -> None:
        self.commit({}, "main")

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        oid = hashlib.sha1(f"{branch}-{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        (self.pull_requests if branch.startswith("refs/pr/") else self.branches)[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The oid of a branch, a tag, a pull request or a commit."""
        refs = {oid: oid for oid in self.commits} | self.pull_requests | self.tags | self.branches
        return refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.find(revision) or ""]


class Hub(ThreadingHTTPServer):
    """Repositories by name.

    Attributes:
        objects: large files that were uploaded, by their sha256.
        cuts_off: what connections are cut in the middle of: `upload`, `commit` or nothing.
        read_only: whether everything that changes a repository is refused.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.cuts_off: str | None = None
        self.read_only = False

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.repositories[name] = Repository()
        self.repositories[name].commit(files, "main")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client process needs to talk to this Hub and no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        if "/resolve/" in path:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            return self.resolve(name, unquote(revision), unquote(file))
        parts = [unquote(part) for part in path.split("/")]
        repository = self.server.repositories.get("/".join(parts[2:4]))
        if parts[:2] != ["api", "models"] or repository is None:
            return self.refuse("RepoNotFound")
        kind = parts[4] if len(parts) > 4 else "revision"
        revision = parts[5] if len(parts) > 5 else "main"
        if kind == "refs":
            return self.reply(
                {
                    key: [
                        {"name": ref, "ref": f"refs/{place}/{ref}", "targetCommit": oid} for ref, oid in refs.items()
                    ]
                    for key, place, refs in (
                        ("branches", "heads", repository.branches),
                        ("tags", "tags", repository.tags),
                        ("converts", "convert", {}),
                    )
                }
            )
        oid = repository.find(revision)
        if oid is None:
            return self.refuse("RevisionNotFound")
        files = repository.commits[oid]
        if kind == "tree":
            return self.reply([{"type": "file", "path": file, "size": len(files[file]), "oid": oid} for file in files])
        siblings = [{"rfilename": file} for file in files]
        return self.reply({"id": "/".join(parts[2:4]), "sha": oid, "siblings": siblings})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refuse("RepoNotFound")
        oid = repository.find(revision)
        if oid is None:
            return self.refuse("RevisionNotFound")
        if file not in repository.commits[oid]:
            return self.refuse("EntryNotFound", oid)
        self.answer(200, repository.commits[oid][file], oid)

    def do_PUT(self) -> None:
        """A large file."""
        length = int(self.headers["Content-Length"])
        if self.server.cuts_off == "upload":
            return self.cut_off(length)
        self.server.objects[self.path.rpartition("/")[2]] = self.rfile.read(length)
        self.answer(200, b"")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if "commit" in parts and self.server.cuts_off == "commit":
            return self.cut_off(length)
        body = self.rfile.read(length)
        if self.server.read_only:
            return self.answer(403, b"{}")
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts[-1] == "batch":
            return self.reply(
                {"transfer": "basic", "objects": [self.upload_of(each) for each in json.loads(body)["objects"]]}
            )
        repository = self.server.repositories.get("/".join(parts[2:4]))
        if repository is None:  # card validation
            return self.reply({"errors": [], "warnings": []})
        kind, revision = parts[4:6]
        wants_pull_request = "create_pr" in parse_qs(url.query)
        if kind == "preupload":
            return self.reply(
                {"files": [self.mode_of(repository, revision, each) for each in json.loads(body)["files"]]}
            )
        if kind == "branch":
            if revision in repository.branches:
                return self.answer(409, b"{}")
            repository.branches[revision] = repository.branches["main"]
            return self.reply({})
        if kind == "tag":
            tag = json.loads(body)["tag"]
            if tag in repository.tags:
                return self.answer(409, b"{}")
            repository.tags[tag] = repository.find(revision) or ""
            return self.reply({})
        self.commit(repository, "/".join(parts[2:4]), revision, wants_pull_request, body)

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if name in self.server.repositories:
            return self.answer(409, json.dumps({"url": f"{self.server.url}/{name}"}).encode())
        self.server.repositories[name] = Repository(private=request.get("visibility") == "private")
        self.reply({"url": f"{self.server.url}/{name}", "id": name})

    def upload_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Where a large file is to be sent, if it is not here yet."""
        known = wanted["oid"] in self.server.objects
        actions = {} if known else {"actions": {"upload": {"href": f"{self.server.url}/objects/{wanted['oid']}"}}}
        return {"oid": wanted["oid"], "size": wanted["size"], **actions}

    def mode_of(self, repository: Repository, revision: str, file: dict[str, Any]) -> dict[str, Any]:
        content = repository.files(revision).get(file["path"])
        oid = None
        if content is not None:
            blob = b"blob %d\0%b" % (len(content), content)
            oid = hashlib.sha256(content).hexdigest() if is_large(file["path"]) else hashlib.sha1(blob).hexdigest()
        mode = "lfs" if is_large(file["path"]) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def commit(self, repository: Repository, name: str, revision: str, wants_pull_request: bool, body: bytes) -> None:
        files = dict(repository.files(revision))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        reply = {}
        if wants_pull_request:
            number = len(repository.pull_requests) + 1
            revision = f"refs/pr/{number}"
            reply["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        oid = repository.commit(files, revision)
        self.reply(reply | {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def cut_off(self, length: int) -> None:
        """Reads half of what is sent, and hangs up."""
        self.rfile.read(length // 2)
        self.close_connection = True
        self.connection.close()

    def reply(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode())

    def refuse(self, code: str, oid: str = "") -> None:
        self.answer(404, b"", oid, code)

    def answer(self, status: int, content: bytes, oid: str = "", error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        for header, value in (("X-Repo-Commit", oid), ("X-Error-Code", error)):
            if value:
                self.send_header(header, value)
        if status == 200:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A Hub that runs inside the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
