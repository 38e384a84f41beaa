"""The promises of the callback in Lightning's Trainer, each against the same run without it."""

import copy
import csv
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict, to_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers.lab import DEVICE, PENALTY, Tokens, assert_same, corrected_by_hand, live
from tests.helpers.lightning import Module, assert_corrected, callback, factors_in, fit

CHECKPOINTS = {
    "every epoch": {"save_top_k": -1},
    "weights only": {"save_top_k": -1, "save_weights_only": True},
    "save last": {"save_last": True},
    "monitored best": {"monitor": "val_loss", "save_top_k": 1},
    "train steps": {"every_n_train_steps": 3, "save_top_k": -1},
    "at train epoch end": {"save_on_train_epoch_end": True, "save_top_k": -1},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_are_corrected_and_training_is_bit_identical(pair, subspace, tmp_path, kind):
    def run(folder, callbacks):
        saving = ModelCheckpoint(tmp_path / folder, filename="{step}", **CHECKPOINTS[kind])
        return fit(pair, tmp_path, [*callbacks, saving])

    without, trainer = run("without", []), run("with", [callback(pair)])
    assert trainer.losses == without.losses
    written = sorted((tmp_path / "with").glob("*.ckpt"))
    assert written
    for path in written:
        raw = assert_corrected(path, subspace)
        twin = tmp_path / "without" / path.name
        if twin.exists():  # validation losses differ, and so may the best
            assert_same(raw, factors_in(twin)[0])
    assert_same(live(trainer.lightning_module), corrected_by_hand(live(without.lightning_module), subspace))


@pytest.mark.parametrize("variant", ["late", "manual", pytest.param("compiled", marks=pytest.mark.slow)])
def test_modules_of_every_make(pair, subspace, tmp_path, variant):
    without = fit(pair, tmp_path, [], Module(pair[1], **{variant: True}), enable_checkpointing=False)
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    trainer = fit(pair, tmp_path, [callback(pair), saving], Module(pair[1], **{variant: True}))
    assert trainer.losses == without.losses
    for path in tmp_path.glob("*.ckpt"):
        assert_corrected(path, subspace)
    assert_same(live(trainer.lightning_module), corrected_by_hand(live(without.lightning_module), subspace))


def test_validation_sees_what_ships(pair, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    trainer = fit(pair, tmp_path, [callback(pair), saving])
    seen = trainer.callback_metrics["val_loss"].item()
    raw = fit(pair, tmp_path, [callback(pair, evaluate_corrected=False)], enable_checkpointing=False)
    without = fit(pair, tmp_path, [], enable_checkpointing=False)
    data = DataLoader(Tokens(count=8, seed=4), batch_size=4)

    fresh = Module.load_from_checkpoint(tmp_path / "step=8.ckpt", aligned=pair[1])
    plain = L.Trainer(accelerator=DEVICE, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    assert plain.validate(fresh, data, verbose=False)[0]["val_loss"] == seen
    # By the same trainer too, which must not take the checkpoint for one to resume from, nor correct it again.
    assert trainer.validate(ckpt_path=tmp_path / "step=8.ckpt", dataloaders=data, verbose=False)[0]["val_loss"] == seen
    assert raw.callback_metrics["val_loss"] == without.callback_metrics["val_loss"] != seen


@pytest.mark.parametrize("step", [3, 4, 6])
def test_resume_is_exact(pair, tmp_path, step):
    def saving(folder):
        return ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    whole = fit(pair, tmp_path, [callback(pair), saving("whole")])
    path = tmp_path / "whole" / f"step={step}.ckpt"
    resumed = fit(pair, tmp_path, [callback(pair), saving("resumed")], ckpt_path=path)
    without = fit(pair, tmp_path, [saving("without")])
    twin = fit(pair, tmp_path, [saving("twin")], ckpt_path=tmp_path / "without" / f"step={step}.ckpt")
    # Dropout draws anew after a resume, as Lightning does not keep the generator: the run without us is the measure.
    assert resumed.losses == twin.losses
    assert_same(factors_in(tmp_path / "resumed/step=8.ckpt")[1], factors_in(tmp_path / "twin/step=8.ckpt")[0])
    assert whole.losses == without.losses


def test_saves_by_hand_during_and_after_the_fit(pair, subspace, tmp_path):
    class SaveByHand(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"during-{trainer.global_step}.ckpt")

        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"validating-{trainer.global_step}.ckpt")

        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    trainer = fit(pair, tmp_path, [SaveByHand(), callback(pair)], enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "after-weights.ckpt", weights_only=True)
    for path in tmp_path.glob("*.ckpt"):
        assert_corrected(path, subspace)
    assert_same(factors_in(tmp_path / "after.ckpt")[0], live(trainer.lightning_module))
    assert_same(factors_in(tmp_path / "after-weights.ckpt")[0], factors_in(tmp_path / "validating-8.ckpt")[0])


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_leaves_the_weights_that_were_trained(pair, subspace, tmp_path, error):
    before = {}

    class Fail(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *arguments):
            raise error

        def on_train_batch_end(self, trainer, pl_module, *arguments):
            before.update(live(pl_module))

    module = Module(pair[1])
    rescue = OnExceptionCheckpoint(tmp_path, filename="rescue")
    with pytest.raises((error, SystemExit)):
        fit(pair, tmp_path, [callback(pair), Fail(), rescue], module)
    assert_same(live(module), before)
    if error is ZeroDivisionError:
        assert_same(assert_corrected(tmp_path / "rescue.ckpt", subspace), before)


def test_every_n_steps_and_a_second_fit(pair, subspace, tmp_path):
    class CorrectByHand(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step % 3 == 0:
                adapter = find_adapter(pl_module)
                done = corrected_by_hand(to_peft_state_dict(adapter.read()), subspace)
                adapter.write(from_peft_state_dict(done, list(adapter.layers), ""))

    by_hand = fit(pair, tmp_path, [CorrectByHand()], enable_checkpointing=False)
    ours = fit(pair, tmp_path, [callback(pair, every_n_steps=3)], enable_checkpointing=False)
    assert ours.losses == by_hand.losses
    assert_same(live(ours.lightning_module), corrected_by_hand(live(by_hand.lightning_module), subspace))

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    fit(pair, tmp_path, [callback(pair), saving], ours.lightning_module)
    for path in tmp_path.glob("*.ckpt"):
        assert_corrected(path, subspace)


def test_every_n_steps_counts_steps_and_not_accumulated_batches(pair, subspace, tmp_path):
    class CorrectByHand(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx % 2 == 1 and trainer.global_step % 2 == 0:
                adapter = find_adapter(pl_module)
                done = corrected_by_hand(to_peft_state_dict(adapter.read()), subspace)
                adapter.write(from_peft_state_dict(done, list(adapter.layers), ""))

    def run(folder, ours, ckpt_path=None):
        module = Module(pair[1])
        adapter = find_adapter(module)  # one that was trained before: the correction is no identity on it
        adapter.write({name: (A, torch.full_like(B, 0.01)) for name, (A, B) in adapter.read().items()})
        saving = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"accumulate_grad_batches": 2, "ckpt_path": ckpt_path}
        return fit(pair, tmp_path, [ours, saving], module, **settings)

    by_hand, ours = run("hand", CorrectByHand()), run("ours", callback(pair, every_n_steps=2))
    assert ours.losses == by_hand.losses
    assert_same(live(ours.lightning_module), live(by_hand.lightning_module))
    checkpoints = [tmp_path / folder / "step=2.ckpt" for folder in ("hand", "ours")]
    by_hand, ours = (
        run("resumed-hand", CorrectByHand(), checkpoints[0]),
        run("resumed-ours", callback(pair, every_n_steps=2), checkpoints[1]),
    )
    assert ours.losses == by_hand.losses
    assert_same(live(ours.lightning_module), live(by_hand.lightning_module))


def test_drift_goes_through_the_loggers_with_the_loss(pair, subspace, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = fit(pair, tmp_path, [callback(pair)], logger=logger, enable_checkpointing=False)
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    names = ("aligned_energy", "partial_energy", "off_energy", "attenuation", "relative_change", "truncation_error")
    for row in rows:
        assert all(float(row[f"csulora/{name}"]) >= 0 for name in (*names, "update_norm"))
        shares = sum(float(row[f"csulora/{name}"]) for name in names[:3])
        assert shares == pytest.approx(1.0, abs=1e-5)
    assert all(float(row["csulora/alignment_undone"]) != 0 for row in rows)
    assert {"csulora/alignment_undone", "csulora/attenuation"} <= trainer.progress_bar_metrics.keys()
    assert "csulora/update_norm" not in trainer.progress_bar_metrics


def test_bad_input_is_refused_before_the_first_step(pair, tmp_path):
    with pytest.raises(ValueError, match="base equal to aligned"):
        fit(pair, tmp_path, [CSULoRACallback(base_model=pair[1])])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_callback_is_lightnings_own_and_copies_and_pickles(pair):
    ours = callback(pair)
    assert isinstance(ours, CSULoRACallback)
    assert isinstance(ours, Callback)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(copied, CSULoRACallback)
        assert isinstance(copied, Callback)
        assert copied.penalty == PENALTY


@pytest.mark.slow
def test_neither_trainer_imports_the_other():
    code = (
        "import sys\nfrom csulora_callback import CSULoRACallback\nCSULoRACallback(base_model='a/b')\n"
        "print([name for name in ('lightning', 'pytorch_lightning', 'transformers.trainer') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_checkpoint_has_an_adapter_folder_that_peft_loads(pair, tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", filename="{step}", monitor="step", mode="max", save_top_k=2)
    trainer = fit(pair, tmp_path, [callback(pair), saving], max_epochs=3)
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"step=8.ckpt", "step=8.adapter", "step=12.ckpt", "step=12.adapter"}
    for path in (tmp_path / "kept").glob("*.ckpt"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), path.with_suffix(".adapter"))
        assert_same(live(loaded), factors_in(path)[0])
        assert_same(to_peft_state_dict(Sidecar.load(path.with_suffix(".adapter")).raw), factors_in(path)[1])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert (tmp_path / "after.adapter" / "adapter_config.json").is_file()

    fit(pair, tmp_path, [callback(pair, export_adapter=False), ModelCheckpoint(tmp_path / "alone")])
    assert not list((tmp_path / "alone").glob("*.adapter"))


def test_flat_parameters_are_refused(pair):
    from lightning.pytorch.strategies import FSDPStrategy

    # Lightning itself refuses FSDPStrategy without a GPU, before any callback is asked.
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"`strategy`: .* FSDPStrategy, whose flat parameters hold no whole factors"):
        callback(pair).setup(trainer, None, "fit")


def test_one_callback_in_two_trainers_keeps_their_modules_apart(pair, subspace, tmp_path):
    ours = callback(pair)
    first = fit(pair, tmp_path, [ours], enable_checkpointing=False)
    second = fit(pair, tmp_path, [ours], enable_checkpointing=False, max_epochs=1)
    second.save_checkpoint(tmp_path / "second.ckpt")
    assert_corrected(tmp_path / "second.ckpt", subspace)
    assert_same(factors_in(tmp_path / "second.ckpt")[0], live(second.lightning_module))
    first.save_checkpoint(tmp_path / "again.ckpt")
    assert_corrected(tmp_path / "again.ckpt", subspace)
    assert_same(factors_in(tmp_path / "again.ckpt")[0], live(first.lightning_module))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "again.adapter")
    assert_same(live(loaded), live(first.lightning_module))
