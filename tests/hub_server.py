"""A Hub on the loopback interface: enough of its protocol to create, upload, commit and resolve, for real clients."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Files by repository and path, and the requests seen."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What a client process needs to talk to this Hub and no other."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if "/resolve/" in path:
            repository, _, rest = path.partition("/resolve/")
            content = self.server.repositories.get(repository, {}).get(rest.partition("/")[2])
            code = "RepoNotFound" if repository not in self.server.repositories else "EntryNotFound"
            return self.answer(content, error=code)
        if path.startswith("api/models/"):
            repository = "/".join(path.split("/")[2:4])
            files = self.server.repositories.get(repository)
            if files is None:
                return self.answer(None, error="RepoNotFound")
            if "/tree/" in path:
                listing = [{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files]
                return self.answer(json.dumps(listing).encode())
            information = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(json.dumps(information).encode())
        return self.answer(None, error="EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            request = json.loads(body)
            repository = f"{request.get('organization') or 'me'}/{request['name']}"
            self.server.repositories.setdefault(repository, {})
            reply: dict = {"url": f"{self.server.environment['HF_ENDPOINT']}/{repository}", "id": repository}
        elif "preupload" in parts:
            names = [file["path"] for file in json.loads(body)["files"]]
            reply = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "commit" in parts:
            repository = "/".join(parts[2:4])
            files = self.server.repositories[repository]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.environment['HF_ENDPOINT']}/{repository}/commit/{COMMIT}"
            reply = {"commitUrl": url, "commitOid": COMMIT}
        else:  # card validation
            reply = {"errors": [], "warnings": []}
        self.answer(json.dumps(reply).encode())

    def answer(self, content: bytes | None, error: str = "") -> None:
        self.send_response(404 if content is None else 200)
        content, found = content or b"", content is not None
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        if found:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


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
