"""``training.report_to`` reports loss and drift to real trackers, offline, in both trainers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.recipes import SMALL

RECIPES = {"huggingface": "recipes/quickstart.yaml", "lightning": "recipes/quickstart_lightning.yaml"}
DRIFT = "csulora/attenuation"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> list[str]:
    every = "corrections={mine: {preset: guard, rank: 2}, every: {preset: guard, rank: 2, every_n_steps: 2}}"
    return [*SMALL, f"toy.cache_dir={tmp_path_factory.mktemp('lab')}", every]


def run(trainer: str, lab: list[str], output: Path, tracker: str, **environment: str) -> None:
    """In a process of its own: trackers keep sessions and experiments for as long as theirs lives."""
    command = ["-m", "recipes.run", RECIPES[trainer], *lab, f"output={output}", f"training.report_to={tracker}"]
    there = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RECIPES)
def test_tensorboard(trainer, lab, tmp_path):
    run(trainer, lab, tmp_path / "out", "[tensorboard]")
    for name in ("mine", "every"):
        (events,) = (tmp_path / "out" / name).rglob("events.out.tfevents.*")
        written = EventAccumulator(str(events)).Reload()
        tags = written.Tags()["scalars"]
        for wanted in (DRIFT, "loss"):
            (tag,) = [tag for tag in tags if tag.removeprefix("train/") == wanted]
            assert len(written.Scalars(tag)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RECIPES)
def test_mlflow(trainer, lab, tmp_path, monkeypatch):
    import mlflow

    where = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run(trainer, lab, tmp_path / "out", "mlflow", MLFLOW_EXPERIMENT_NAME="mine", MLFLOW_TRACKING_URI=where)
    client = mlflow.MlflowClient(where)
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {one.info.run_name for one in runs} == {"out-mine", "out-every"}
    assert all(DRIFT in one.data.metrics for one in runs)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RECIPES)
def test_wandb_gets_a_run_for_each_training(trainer, lab, tmp_path):
    run(trainer, lab, tmp_path / "out", "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert len(list(tmp_path.rglob("offline-run-*/*.wandb"))) == 2
