"""Heat maps in the real trackers' own files: at every evaluation, of the weights that were evaluated.

Trackers keep sessions for as long as their process lives: but for TensorBoard each has one, which runs this file.
"""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader

from csulora_callback import CSULoRACallback
from csulora_callback.inspection import Inspection
from csulora_callback.method.measure import Drift
from csulora_callback.models.factors import from_peft_state_dict
from csulora_callback.reporting.heat_maps import draw_pixels, heat_maps
from tests.helpers import lightning as in_lightning
from tests.helpers.averages import MovingAverage
from tests.helpers.huggingface import callback, checkpoints, fresh_model, losses, train
from tests.helpers.lab import SCALING, TARGETS, Tokens, make_trainer, raw, saved
from tests.helpers.trackers import (
    Images,
    mlflow_images,
    offline,
    tensorboard_images,
    trackio_images,
    wandb_images,
)

NAMES = {
    f"csulora/heat_map/{name}"
    for name in ("aligned_energy", "partial_energy", "off_energy", "alignment_undone", "update_energy")
}
EVERY_SECOND = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
READ = {
    "tensorboard": tensorboard_images,
    "wandb": wandb_images,
    "mlflow": mlflow_images,
    "trackio": trackio_images,
}


def fit_in_transformers(pair, folder: Path, ours: list, tracker: str):
    """Two data sets, each of which is an evaluation, and evaluations by hand, which are none of the run's."""
    arguments = {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True, "max_steps": 5}
    arguments["report_to"] = [tracker] if ours else []
    trainer = make_trainer(fresh_model(pair), folder, [MovingAverage("on_save"), *ours], **arguments)
    trainer.eval_dataset = {"one": Tokens(count=4, seed=4), "other": Tokens(count=4, seed=5)}
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    return losses(trainer)


class Everywhere(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None


LOGGERS = {
    "tensorboard": lambda: TensorBoardLogger(os.environ["TENSORBOARD_LOGGING_DIR"], name="", version=""),
    "wandb": lambda: WandbLogger(save_dir=os.environ["WANDB_DIR"], offline=True),
    "mlflow": MLFlowLogger,
}


def fit_in_lightning(pair, folder: Path, ours: list, tracker: str):
    """Sanity checking is no validation of the run, and neither is one by hand."""
    logger = LOGGERS[tracker]() if ours else False
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    arguments = {"logger": logger, "num_sanity_val_steps": 1, "val_check_interval": 2, "max_epochs": 1}
    trainer = in_lightning.fit(pair, folder, [Everywhere(), *ours, saving], **arguments)
    trainer.validate(trainer.lightning_module, trainer.val_dataloaders, verbose=False)
    return trainer.losses


def compare(trainer: str, tracker: str, pair: list[Path], folder: Path) -> None:
    """The same run without and with heat maps."""
    fit = {"transformers": fit_in_transformers, "lightning": fit_in_lightning}[trainer]
    without = fit(pair, folder / "without", [], tracker)
    ours = callback(pair, heat_maps=True, cache_dir=folder / "cache")
    assert fit(pair, folder / "with", [ours], tracker) == without


def dense(state: dict[str, torch.Tensor], subspace) -> Inspection:
    """The drift of every module, from whole matrices in float64."""
    modules, factors = {}, from_peft_state_dict(state, list(subspace), "")
    for name in sorted(subspace, key=lambda name: TARGETS.index(name.rpartition(".")[2])):  # as the model has them
        basis = subspace[name]
        A, B = (factor.double().cpu() for factor in factors[name])
        U, V, sigma = (tensor.double().cpu() for tensor in (basis.U, basis.V, basis.singular_values))
        update, D = SCALING * B @ A, U * sigma @ V.T
        left, right = U @ U.T @ update, update @ V @ V.T
        inside = U @ U.T @ right
        parts = {"aligned": inside, "output": left - inside, "input": right - inside}
        parts["off"] = update - sum(parts.values())
        energy = {block: part.square().sum().item() for block, part in parts.items()}
        modules[name] = Drift(energy, energy, (update * D).sum().item(), D.square().sum().item())
    return Inspection(modules)


def assert_shown(found: Images, written: dict[int, tuple[dict, dict]], subspace) -> None:
    """At each of these steps, and at no other, the maps of what was written: a raw and a corrected adapter."""
    assert list(found) == list(written)
    for step, (before, after) in written.items():
        assert set(found[step]) == NAMES
        for name, shown in heat_maps(dense(before, subspace), dense(after, subspace)).items():
            image = found[step][f"csulora/heat_map/{name}"]
            assert np.abs(image.astype(int) - draw_pixels(shown)).max() <= 1, (step, name)  # shades are rounded
    first, *_, last = found.values()
    assert all((first[name] != last[name]).any() for name in NAMES)


def written_in(trainer: str, folder: Path) -> dict[int, tuple[dict, dict]]:
    """The raw and the corrected adapter by the step that they are logged at."""
    if trainer == "transformers":
        return {int(path.name.split("-")[1]): (raw(path), saved(path)) for path in checkpoints(folder)}
    found = {}
    for step in (2, 4):
        corrected, factors = in_lightning.factors_in(folder / f"step={step}.ckpt")
        found[step - 1] = factors, corrected  # Lightning counts from zero
    return found


CASES = [("transformers", "tensorboard")]
CASES += [
    pytest.param(trainer, tracker, marks=pytest.mark.slow)
    for trainer, tracker in (
        ("lightning", "tensorboard"),
        ("transformers", "wandb"),
        ("lightning", "wandb"),
        ("transformers", "mlflow"),
        ("lightning", "mlflow"),
        ("transformers", "trackio"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "tracker"), CASES)
def test_trackers_have_what_was_evaluated_and_training_is_bit_identical(
    trainer, tracker, pair, subspace, tmp_path, monkeypatch
):
    if find_spec(tracker) is None:
        pytest.skip(f"needs {tracker}: pip install {tracker}")
    for name, value in offline(tmp_path).items():
        monkeypatch.setenv(name, value)
    if tracker == "tensorboard":
        compare(trainer, tracker, pair, tmp_path)
    else:
        command = [sys.executable, "-m", "tests.trainers.test_heat_maps", trainer, tracker, *pair, tmp_path]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
    found, written = READ[tracker](tmp_path), written_in(trainer, tmp_path / "with")
    if trainer == "transformers":
        assert set(found.pop(0)) == NAMES  # of no update at all
    assert_shown(found, written, subspace)


class Fail(Callback):
    def on_validation_batch_end(self, *args):
        raise ZeroDivisionError


@pytest.mark.slow
def test_in_lightning_a_validation_by_hand_after_one_that_raised_is_none_of_the_fit(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", offline(tmp_path)["TENSORBOARD_LOGGING_DIR"])
    ours, logger = [callback(pair, heat_maps=True), Fail()], LOGGERS["tensorboard"]()
    module = in_lightning.Module(pair[1])
    with pytest.raises(ZeroDivisionError):
        in_lightning.fit(pair, tmp_path / "output", ours, module, logger=logger)
    trainer = module.trainer
    trainer.callbacks.remove(ours[1])
    trainer.validate(module, DataLoader(Tokens(count=4), batch_size=4), verbose=False)
    logger.finalize("success")
    assert not tensorboard_images(tmp_path)


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "heat_maps" in r.getMessage()]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"report_to": [], **EVERY_SECOND}, "this run reports to none"),
        pytest.param({"report_to": ["tensorboard"]}, "this one does not", marks=pytest.mark.slow),
        pytest.param({"report_to": ["tensorboard"], **EVERY_SECOND}, None, marks=pytest.mark.slow),
    ],
)
def test_where_nobody_would_see_any_it_is_said_once(pair, tmp_path, caplog, arguments, said):
    train(pair, tmp_path, [callback(pair, heat_maps=True)], max_steps=1, **arguments)
    assert len(warned(caplog)) == (said is not None)
    assert said is None or said in warned(caplog)[0]


@pytest.mark.parametrize(
    ("logger", "arguments", "said"),
    [
        (CSVLogger, {}, "this run reports to none"),
        (TensorBoardLogger, {"limit_val_batches": 0}, "this one does not"),
        pytest.param(TensorBoardLogger, {}, None, marks=pytest.mark.slow),
    ],
)
def test_in_lightning_too(pair, tmp_path, caplog, logger, arguments, said):
    arguments = {**arguments, "logger": logger(tmp_path), "max_epochs": 1, "enable_checkpointing": False}
    in_lightning.fit(pair, tmp_path, [callback(pair, heat_maps=True)], **arguments)
    assert len(warned(caplog)) == (said is not None)
    assert said is None or said in warned(caplog)[0]


def test_without_the_extra_it_is_named_at_once(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "csulora_callback.reporting"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    CSULoRACallback(base_model="org/base")
    message = r"^`heat_maps=True` needs matplotlib, which is not installed: pip install 'csulora-callback\[report\]'$"
    with pytest.raises(ImportError, match=message):
        CSULoRACallback(base_model="org/base", heat_maps=True)


@pytest.mark.parametrize("flag", [1, "yes", None])
def test_it_is_on_or_off(flag):
    with pytest.raises(ValueError, match=r"^`heat_maps`: expected True or False, but got "):
        CSULoRACallback(base_model="org/base", heat_maps=flag)


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare(*sys.argv[1:3], [Path(path) for path in sys.argv[3:5]], Path(sys.argv[5]))
