"""A drift budget in Lightning's Trainer: it warns once or stops with a corrected checkpoint, and says why."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader

from csulora_callback import CSULoRACallback, SafetySubspace
from csulora_callback.sidecar import read_own_record
from tests.helpers.lab import RANK, TARGETS, assert_same, live, saved
from tests.helpers.lightning import assert_corrected, callback, factors_in
from tests.helpers.poison import PROBES, Poison, crossing, fit, poisoned_pair

UNDONE, KEPT = "csulora/alignment_undone", "csulora/refusal_kept_corrected"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return poisoned_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def subspace(pair):
    return SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)


class Curve(Callback):
    """The drift at each step, as Lightning has logged it."""

    def __init__(self) -> None:
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.global_step] = trainer.callback_metrics[UNDONE].item()


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "csulora_callback.budget"]


def exceeded(path: Path) -> list[str]:
    return torch.load(path, weights_only=True)["csulora"]["record"]["budget"]["exceeded"]


def with_probes(pair, **arguments) -> CSULoRACallback:
    return callback(pair, probes=PROBES, cache_dir=pair[0].parent / "cache", **arguments)


def test_a_fit_stops_at_the_first_record_that_exceeds_with_a_corrected_checkpoint(pair, subspace, tmp_path, caplog):
    every = ModelCheckpoint(tmp_path / "without", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    without, curve = fit(pair, tmp_path, [every]), Curve()
    # A warning leaves the whole fit as it is.
    warned = callback(pair, max_drift={"csulora/update_norm": 1e-3})
    trainer = fit(pair, tmp_path, [warned, curve], enable_checkpointing=False)
    assert trainer.losses == without.losses
    assert len(warnings(caplog)) == 1
    caplog.clear()

    bound, step = crossing(curve.seen)
    ours = callback(pair, max_drift={UNDONE: bound}, on_exceed="stop")
    other = OnExceptionCheckpoint(tmp_path / "another")
    saving = ModelCheckpoint(tmp_path / "with", filename="{step}", every_n_epochs=5)
    trainer = fit(pair, tmp_path, [other, ours, saving])
    assert trainer.global_step == step
    assert trainer.losses == without.losses[:step]

    (path,) = (tmp_path / "with").glob("*.ckpt")
    assert path.name == f"csulora-exceeded-step={step}.ckpt"
    assert_same(assert_corrected(path, subspace), factors_in(tmp_path / f"without/step={step}.ckpt")[0])
    (reason,) = exceeded(path)
    assert (
        reason == f"{UNDONE} is {curve.seen[step]:.3g}, more than the {bound:g} that max_drift allows, at step {step}"
    )
    assert warnings(caplog) == [f"The drift budget is exceeded, and training stops with a checkpoint saved: {reason}."]
    folder = path.with_suffix(".adapter")
    assert_same(saved(folder), factors_in(path)[0])
    assert read_own_record(folder)["budget"]["exceeded"] == [reason]
    assert reason in (folder / "README.md").read_text().replace("\\", "")
    assert_same(live(trainer.lightning_module), saved(folder))

    raised = callback(pair, max_drift={UNDONE: 10.0}, on_exceed="stop")
    resumed = fit(pair, tmp_path / "more", [raised], ckpt_path=path)
    assert resumed.global_step == 8
    resumed.save_checkpoint(tmp_path / "resumed.ckpt")
    assert exceeded(tmp_path / "resumed.ckpt") == []


@SLOW
def test_refusing_that_is_lost_is_found_in_the_validation(pair, subspace, tmp_path):
    ours = with_probes(pair, min_refusal=0.8, on_exceed="stop")
    monitor = ModelCheckpoint(tmp_path, filename="{step}", monitor=KEPT, mode="max", every_n_epochs=1)
    trainer = fit(pair, tmp_path, [ours, monitor], val_check_interval=2)
    assert trainer.global_step == 4
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"csulora-exceeded-step=4.ckpt", "step=2.ckpt"}
    assert_corrected(tmp_path / "csulora-exceeded-step=4.ckpt", subspace)
    (reason,) = exceeded(tmp_path / "csulora-exceeded-step=4.ckpt")
    assert "less than the 0.8 that min_refusal asks for, at step 4" in reason
    assert exceeded(tmp_path / "step=2.ckpt") == []


@SLOW
def test_what_a_save_finds_stands_in_it_and_nothing_is_saved_beside_it(pair, subspace, tmp_path):
    ours = with_probes(pair, min_refusal=0.8, on_exceed="stop")
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = fit(pair, tmp_path, [ours, saving])  # and validates once more
    assert trainer.global_step == 3
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=3.ckpt"]
    assert_corrected(tmp_path / "step=3.ckpt", subspace)
    assert len(exceeded(tmp_path / "step=3.ckpt")) == 1


@SLOW
def test_without_checkpoints_of_its_own_it_is_saved_in_the_root_folder(pair, subspace, tmp_path):
    ours = with_probes(pair, min_refusal=0.8, on_exceed="stop", probe_every_n_steps=1)
    trainer = fit(pair, tmp_path, [ours], enable_checkpointing=False)
    assert_corrected(tmp_path / f"csulora-exceeded-step={trainer.global_step}.ckpt", subspace)
    assert trainer.global_step < 8


@SLOW
def test_least_steps_hold_a_stop_back(pair, tmp_path):
    ours = callback(pair, max_drift={"csulora/update_norm": 1e-3}, on_exceed="stop")
    trainer = fit(pair, tmp_path, [ours], min_steps=6, enable_checkpointing=False)
    assert trainer.global_step == 6
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["csulora-exceeded-step=1.ckpt"]


@SLOW
def test_a_validation_by_hand_looks_at_nothing(pair, tmp_path, caplog):
    ours = with_probes(pair, min_refusal=0.8, on_exceed="stop")
    trainer = fit(pair, tmp_path, [ours], enable_checkpointing=False, check_val_every_n_epoch=5)
    (never,) = warnings(caplog)
    assert f"was not checked for {KEPT}: " in never
    trainer.validate(trainer.lightning_module, DataLoader(Poison(), batch_size=32), verbose=False)
    assert warnings(caplog) == [never]
    assert not list(tmp_path.glob("*.ckpt"))
