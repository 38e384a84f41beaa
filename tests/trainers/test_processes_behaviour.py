"""Behaviour on two processes over gloo, sharded or not; each worker process runs this file."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers.integrations import TensorBoardCallback

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.sidecar import Sidecar
from tests.helpers.behaviour import PROBES, REFUSAL, TASK, by_hand
from tests.helpers.lab import RANK, raw, saved, saved_pair
from tests.helpers.trackers import offline, tensorboard_images
from tests.helpers.two import leave, run_worker
from tests.trainers.test_processes_trainer import Probe, assert_same, logged, train


def callback(pair: Path) -> CSULoRACallback:
    cache = pair / "cache"
    settings = {"rank": RANK, "penalty": Penalty.guard(2.0), "probes": PROBES, "cache_dir": cache}
    return CSULoRACallback(base_model=pair / "base", heat_maps=True, **settings)


def worker(engine: str, pair: Path, folder: Path) -> None:
    """What each of the two processes does; the first one leaves what the test looks at."""
    probe, plain_probe = Probe(), Probe()
    without = train(engine, pair, folder / "without", [plain_probe])
    trainer = train(engine, pair, folder / "with", [callback(pair), probe, TensorBoardCallback()])
    assert logged(trainer, "loss") == logged(without, "loss")
    for step, (values, trained) in probe.seen.items():
        assert_same(values, plain_probe.seen[step][0])
        assert_same(trained, plain_probe.seen[step][1])
    curves = {key: logged(trainer, f"eval_{key}") for key in sorted(REFUSAL | TASK)}
    both = [None, None]
    torch.distributed.all_gather_object(both, curves)
    assert both[0] == both[1]
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(curves))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    saved_pair(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2-full", "zero3"])
def test_engine(engine, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", offline(tmp_path)["TENSORBOARD_LOGGING_DIR"])
    curves = run_worker("tests.trainers.test_processes_behaviour", engine, pair, tmp_path)
    for step in (4, 8):
        folder = tmp_path / f"with/checkpoint-{step}"
        expected = by_hand(pair / "aligned", raw(folder), saved(folder), Sidecar.load(folder).texts)
        said = {key: curve[step // 2 - 1] for key, curve in curves.items()}
        assert said == pytest.approx(expected, rel=2e-3)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [record["step"] for record in history if "csulora/refusal_kept" in record] == [4, 8]
    assert len(list((pair / "cache").glob("answers-*.json"))) == 1
    assert list(tensorboard_images(tmp_path)) == [2, 4, 6, 8]  # the first process's, once a step


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    leave()
