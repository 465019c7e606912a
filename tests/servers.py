"""A local server that answers as Hugging Face and the host of the authors' files do."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple


class Asked(NamedTuple):
    method: str
    path: str
    token: str | None  # the Authorization header
    body: bytes


class Server(ThreadingHTTPServer):
    """files: {path: content}, on Hugging Face /{repo}/resolve/{revision}/{name}. asked: what was asked of it.
    spoil: what to do to a body on its way; if that shortens it, the server is `down` for all later bodies."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.messages: list[str] = []  # of the commits
        self.heal()

    def heal(self) -> None:
        self.spoil, self.down = None, False

    def __enter__(self) -> Server:
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/agent-harnesses":  # huggingface_hub's own daily question, about no repo
            return self.reply(404)
        server.asked.append(Asked(self.command, path, self.headers.get("Authorization"), body))
        if self.command == "POST":
            return self.reply(200, json.dumps(self.api(path, body)).encode())
        if (content := server.files.get(path)) is None:
            repo = path.partition("/resolve/")[0] + "/"
            missing = "Entry" if any(name.startswith(repo) for name in server.files) else "Repo"
            return self.reply(404, **{"X-Error-Code": f"{missing}NotFound"})
        if self.command == "GET" and server.down:
            return self.reply(503)
        tag, commit = (getattr(hashlib, kind)(content).hexdigest() for kind in ("sha256", "sha1"))
        sent = server.spoil(content) if server.spoil and self.command == "GET" else content
        server.down = len(sent) < len(content)
        headers = {"Content-Length": str(len(content)), "ETag": f'"{tag}"', "X-Repo-Commit": commit}
        self.reply(200, sent, **headers)

    do_HEAD = do_POST = do_GET

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def api(self, path: str, body: bytes) -> dict[str, Any]:
        """What an upload asks for: a repo, modes, one commit; all else (/api/validate-yaml) is fine by us."""
        if path == "/api/repos/create":
            repo = json.loads(body)
            return {"url": f"{self.server.url}/{repo['organization'] or 'user'}/{repo['name']}"}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [dict(path=name, uploadMode="regular", shouldIgnore=False) for name in names]}
        if "/commit/" in path:
            repo, _, revision = path.removeprefix("/api/models").partition("/commit/")
            for item in map(json.loads, body.splitlines()):
                if item["key"] == "header":
                    self.server.messages.append(item["value"]["summary"])
                else:
                    name = f"{repo}/resolve/{revision}/{item['value']['path']}"
                    self.server.files[name] = base64.b64decode(item["value"]["content"])
            return {"commitUrl": f"{self.server.url}{repo}/commit/{'c' * 40}", "commitOid": "c" * 40}
        return {}

    def log_message(self, *_: Any) -> None:
        pass
