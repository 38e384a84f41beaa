"""The Hub, faked at the HTTP boundary only: a server on this machine that answers what huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants
from transformers.utils import hub as transformers_hub


class FakeHub(ThreadingHTTPServer):
    """Keeps every commit as ``(message, {path: bytes})``; big files arrive by LFS, small ones inside the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.large_files: dict[str, bytes] = {}
        self.unanswered: list[str] = []

    def messages(self) -> list[str]:
        return [message for message, _ in self.commits]

    def commit(self, message: str) -> dict[str, bytes]:
        (files,) = [files for other, files in self.commits if other == message]
        return files

    def files(self) -> dict[str, bytes]:
        """What the repository holds after all commits."""
        return {path: content for _, files in self.commits for path, content in files.items()}

    def fetch(self, folder: Path) -> Path:
        """All files, as somebody downloads them."""
        for path, content in self.files().items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/large/")
        self.server.large_files[self.path.removeprefix("/large/")] = content
        self.answer({})

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self.body()
        if path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/me/{json.loads(body)['name']}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            large = (".safetensors", ".bin", ".pt", ".pth")
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {file: "lfs" if file.endswith(large) else "regular" for file in files}
            self.answer({"files": [{"path": f, "uploadMode": modes[f], "shouldIgnore": False} for f in files]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {}
            for value in (line["value"] for line in lines[1:]):
                large = "oid" in value
                files[value["path"]] = (
                    self.server.large_files[value["oid"]] if large else base64.b64decode(value["content"])
                )
            self.server.commits.append((lines[0]["value"]["summary"], files))
            self.answer({"commitUrl": f"{self.server.url}/me/model/commit/0", "commitOid": "0"})
        else:
            self.server.unanswered.append(self.path)
            self.answer({"error": "not found"}, status=404)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "orgs": []})
        elif self.file() in self.server.files():
            self.answer_file()
        else:  # huggingface_hub asks for things it can do without
            self.answer({"error": "not found"}, status=404)

    def do_HEAD(self) -> None:
        if self.file() in self.server.files():
            return self.answer_file()
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def file(self) -> str:
        return self.path.partition("/resolve/main/")[2]

    def answer_file(self) -> None:
        content = self.server.files()[self.file()]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", hashlib.sha256(content).hexdigest())
        self.send_header("X-Repo-Commit", f"{len(self.server.commits):040d}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def answer(self, content: dict, status: int = 200) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *args) -> None:
        pass


_run_as_future = HfApi.run_as_future


def _run_and_wait(api: HfApi, function: Callable, *args, **kwargs) -> Future:
    """In the background, but done before its caller goes on.

    The Trainer drops a push while another runs, and it and TRL write over files, their card among them, which one that
    still runs then reads half written. Here each upload is to be seen, as it was asked for.
    """
    future = _run_as_future(api, function, *args, **kwargs)
    wait([future])
    return future


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A fake Hub that huggingface_hub of this process talks to."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # What HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET set, read when huggingface_hub was imported long ago.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made anew, with this endpoint
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(HfApi, "run_as_future", _run_and_wait)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()
    assert server.unanswered == []
