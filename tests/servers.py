"""For `test_download.py`: a local server that answers as Hugging Face and the host of the authors' files do,
and the client, a process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported."""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from typing import Any, NamedTuple

import torch

import visualad
from visualad import Backbone, VisualAD

GOLDEN = Path(__file__).parent / "golden"
CLIP = GOLDEN / "clip_openai.safetensors"
ROOT = Path(visualad.__file__).parent


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


class Client:
    """A fresh process whose Hugging Face is at `url`, its cache and its tokens in `home`. A call runs one of
    TASKS there, in order, and returns or raises what that did. It is killed after `limit` seconds."""

    def __init__(self, url: str, home: Path, limit: float = 120) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= dict(HF_ENDPOINT=url, HF_HOME=str(home), PYTHONPATH=str(ROOT), no_proxy="127.0.0.1")
        env["OMP_NUM_THREADS"] = "1"
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self.process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
        self.timer = Timer(limit, self.process.kill)
        self.timer.daemon = True
        self.timer.start()

    def send(self, task: str, *args: Any, **options: Any) -> None:
        print(json.dumps([task, args, options], default=str), file=self.process.stdin, flush=True)

    def receive(self) -> str:
        line = self.process.stdout.readline()
        assert line, "the client's process ended, or was killed after its time limit: see its stderr"
        result, error, message = json.loads(line)
        if error:
            raise getattr(builtins, error, RuntimeError)(message)
        return result

    def __call__(self, task: str, *args: Any, **options: Any) -> str:
        self.send(task, *args, **options)
        return self.receive()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()


def hosted() -> Backbone:
    """The golden CLIP as a backbone that its own repository hosts."""
    sizes = Backbone.from_weights(visualad.read_tensors(CLIP), image_size=84, layers=(2, 4))
    return replace(sizes, repo="org/backbone", file="open_clip_model.safetensors")


def fingerprint(model: VisualAD) -> str:
    """One hash for a model's config, tensors and output: equal if they are, bit for bit."""
    images = torch.rand(1, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tensors = [*model.state_dict().values(), model.eval()(images).map]
    parts = [json.dumps(model.config()).encode(), *(tensor.numpy().tobytes() for tensor in tensors)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def load(source: str, **options: Any) -> str:
    return fingerprint(VisualAD.from_pretrained(source, **options))


def start(backbone: str, **options: Any) -> str:
    torch.manual_seed(0)
    return fingerprint(VisualAD.from_backbone(backbone, **options))


def push(folder: str, *args: Any, **options: Any) -> str:
    return VisualAD.from_pretrained(folder).push_to_hub(*args, **options)


def save(folder: str, *args: Any, **options: Any) -> str:
    return VisualAD.from_pretrained(folder).save_pretrained(*args, **options)


TASKS = dict(load=load, start=start, push=push, save=save)


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    visualad.BACKBONES["hosted"] = hosted()
    for line in sys.stdin:
        task, args, options = json.loads(line)
        try:
            answer = [TASKS[task](*args, **options), None, None]
        except Exception as error:
            answer = [None, type(error).__name__, str(error)]
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
