"""``training.report_to`` reports loss and drift to real trackers, offline, in both trainers."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.run import main
from tests.helpers.recipes import SMALL

RECIPES = {"huggingface": "recipes/quickstart.yaml", "lightning": "recipes/quickstart_lightning.yaml"}
DRIFT = "csulora/attenuation"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> list[str]:
    every = "corrections={mine: {preset: guard, rank: 2}, every: {preset: guard, rank: 2, every_n_steps: 2}}"
    return [*SMALL, f"toy.cache_dir={tmp_path_factory.mktemp('lab')}", every]


def run(trainer: str, lab: list[str], output: Path, tracker: str) -> None:
    assert main([RECIPES[trainer], *lab, f"output={output}", f"training.report_to={tracker}"]) == 0


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

    where, before = (tmp_path / "mlruns").as_uri(), mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    mlflow.set_tracking_uri(where)
    try:
        run(trainer, lab, tmp_path / "out", "mlflow")
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(before)
    client = mlflow.MlflowClient(where)
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {one.info.run_name for one in runs} == {"out-mine", "out-every"}
    assert all(DRIFT in one.data.metrics for one in runs)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", RECIPES)
def test_wandb_gets_a_run_for_each_training(trainer, lab, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run(trainer, lab, tmp_path / "out", "wandb")
    assert len(list(tmp_path.rglob("offline-run-*/*.wandb"))) == 2
