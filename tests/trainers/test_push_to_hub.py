"""What the Trainer uploads is corrected, with the raw factors beside it.

The Hub is faked at the HTTP boundary only: a server on this machine that answers what huggingface_hub asks.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import hub as transformers_hub

from csulora_callback import CSULoRACallback, SafetySubspace
from tests.helpers.lab import PENALTY, RANK, assert_same, corrected_by_hand, live, make_trainer, with_lora

ADAPTER = "adapter_model.safetensors"
RAW = "csulora/raw/adapter_model.safetensors"
RECORD = "csulora/correction.json"


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
            self.refuse()

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "orgs": []})
        else:  # huggingface_hub asks for things it can do without
            self.answer({"error": "not found"}, status=404)

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


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # What HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET set, read when huggingface_hub was imported long ago.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made anew, with this endpoint
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()
    assert server.unanswered == []


class WaitForUploads(TrainerCallback):
    """The Trainer drops a push while another runs; here each step's is to be seen."""

    def on_save(self, args, state, control, **kwargs):
        if getattr(self.trainer, "push_in_progress", None) is not None:
            for upload in self.trainer.push_in_progress.jobs:
                upload.result()


def train(pair, output: Path, resume: Path | None = None, with_callback: bool = True, **arguments):
    wait = WaitForUploads()
    ours = CSULoRACallback(
        base_model=pair[0], rank=RANK, penalty=PENALTY, cache_dir=pair[0].parent / "cache", resume_from=resume
    )
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1)
    wait.trainer = make_trainer(
        model, output, [wait, ours] if with_callback else [wait], **{"max_steps": 5, "save_steps": 2, **arguments}
    )
    wait.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return wait.trainer


def pushing(pair, output: Path, hub_strategy: str, **arguments):
    return train(pair, output, push_to_hub=True, hub_token="hf_fake", hub_strategy=hub_strategy, **arguments)


def assert_corrected_once(files: dict[str, bytes], raw: dict, subspace: SafetySubspace, prefix: str = "") -> None:
    """The uploaded sidecar holds ``raw``, and the uploaded adapter its correction, made here by hand."""
    assert_same(load(files[prefix + RAW]), raw)
    assert_same(load(files[prefix + ADAPTER]), corrected_by_hand(raw, subspace))
    assert any(not torch.equal(load(files[prefix + ADAPTER])[key], raw[key]) for key in raw)
    record = json.loads(files[prefix + RECORD])
    assert record["status"] == "corrected"
    assert record["raw_digest"] != record["corrected_digest"]


@pytest.fixture(scope="module")
def raw_at(pair, tmp_path_factory):
    """The adapter after steps 2, 4 and 5 of the training without the callback."""
    output = tmp_path_factory.mktemp("without")
    train(pair, output, with_callback=False)
    return {step: load((output / f"checkpoint-{step}" / ADAPTER).read_bytes()) for step in (2, 4, 5)}


FOLDER_OF_CHECKPOINT = {"every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-{step}"}


@pytest.mark.parametrize("strategy", FOLDER_OF_CHECKPOINT)
def test_each_upload_holds_the_corrected_adapter_of_its_step(hub, pair, subspace, raw_at, tmp_path, strategy):
    output = tmp_path / "model"
    trainer = pushing(pair, output, strategy)
    pushes = [f"Training in progress, step {step}" for step in (2, 4, 5)]
    assert [message for message in hub.messages() if not message.endswith(", checkpoint")] == pushes
    for step, message in zip((2, 4, 5), pushes, strict=True):
        assert_corrected_once(hub.commit(message), raw_at[step], subspace)
        for file in (ADAPTER, RAW, RECORD):
            assert hub.commit(message)[file] == (output / f"checkpoint-{step}" / file).read_bytes()
        if (folder := FOLDER_OF_CHECKPOINT[strategy]) is not None:
            files = hub.commit(f"{message}, checkpoint")
            assert_corrected_once(files, raw_at[step], subspace, prefix=f"{folder.format(step=step)}/")

    trainer.push_to_hub()
    final = hub.commit("End of training")
    assert_corrected_once(final, raw_at[5], subspace)
    assert_same(load(final[ADAPTER]), live(trainer.model))
    assert not any(path.startswith("checkpoint-") or path.endswith(".part") for path in final)


def test_nothing_is_uploaded_before_the_end_when_so_asked(hub, pair, subspace, raw_at, tmp_path):
    trainer = pushing(pair, tmp_path / "model", "end")
    assert hub.commits == []
    trainer.push_to_hub()
    trainer.save_model()
    assert hub.messages() == ["End of training", "Model save"]
    for message in hub.messages():
        assert_corrected_once(hub.commit(message), raw_at[5], subspace)
        assert_same(load(hub.commit(message)[ADAPTER]), live(trainer.model))


def test_the_best_model_is_uploaded_as_its_checkpoint_was_saved(hub, pair, subspace, raw_at, tmp_path):
    trainer = pushing(
        pair,
        tmp_path / "model",
        "end",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    best = trainer.state.best_global_step
    assert best in (2, 4)  # not the last
    trainer.push_to_hub()
    assert_corrected_once(hub.commit("End of training"), raw_at[best], subspace)


def test_training_resumes_exactly_from_a_downloaded_last_checkpoint(hub, pair, raw_at, tmp_path):
    pushing(pair, tmp_path / "model", "checkpoint")
    for path, content in hub.commit("Training in progress, step 4, checkpoint").items():
        (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / path).write_bytes(content)
    train(pair, tmp_path / "resumed", resume=tmp_path / "clone" / "last-checkpoint")
    assert_same(load((tmp_path / "resumed/checkpoint-5" / RAW).read_bytes()), raw_at[5])
