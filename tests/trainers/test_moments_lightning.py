"""Every moment at which weights are read or written in Lightning's Trainer, beside others who write weights.

As in the other trainer: what is trained is the same as without the callback, and what is written is the correction of
what is written without it.
"""

import functools
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from csulora_callback.models.factors import digest, from_peft_state_dict, to_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers.lab import Tokens, assert_same, corrected_by_hand, live
from tests.helpers.lightning import Module, assert_corrected, callback, factors_in, fit

OTHERS = {
    "nobody": lambda: [],
    "moving average": lambda: [EMAWeightAveraging(decay=0.8)],
    "stochastic averaging": lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)],
}
SLOW = [("moving average", "first"), ("stochastic averaging", "first"), ("stochastic averaging", "last")]
CASES = [
    pytest.param(*case, marks=pytest.mark.slow if case in SLOW else (), id=" ".join(case))
    for case in (("nobody", "first"), *((name, order) for name in list(OTHERS)[1:] for order in ("first", "last")))
]


class Watched(Module):
    """Looks at its weights in every validation step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen = []

    def validation_step(self, batch, batch_idx):
        self.seen.append(live(self.network))
        super().validation_step(batch, batch_idx)


class Saves(Callback):
    """Saves by hand from every event that a user might use, also weights only and from another thread."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.in_memory = {}

    def save(self, event: str, trainer, pl_module) -> None:
        place = self.output / f"{event}-{trainer.global_step}"
        if trainer.global_step not in (1, 4, 8) or place.exists() or trainer.sanity_checking:
            return
        self.in_memory[place.name] = live(pl_module.network)
        trainer.save_checkpoint(place / "whole.ckpt")
        trainer.save_checkpoint(place / "weights.ckpt", weights_only=True)
        thread = threading.Thread(target=trainer.save_checkpoint, args=(place / "thread.ckpt",))
        thread.start()
        thread.join()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.save("batch_end", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.save("validation_end", trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.save("epoch_end", trainer, pl_module)


def run(pair, output: Path, others: list, ours: list, order: str = "first", ckpt_path=None):
    module, saves = Watched(pair[1]), Saves(output / "by hand")
    checkpoints = ModelCheckpoint(output / "ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=2)
    callbacks = [saves, *ours, *others, checkpoints] if order == "last" else [saves, *others, *ours, checkpoints]
    trainer = fit(pair, output, callbacks, module, ckpt_path=ckpt_path)
    return trainer, module, saves


@pytest.fixture(scope="module")
def without(pair, tmp_path_factory):
    @functools.cache
    def reference(name: str):
        output = tmp_path_factory.mktemp("without")
        return output, *run(pair, output, OTHERS[name](), [])

    return reference


@pytest.mark.parametrize(("name", "order"), CASES)
def test_every_file_is_the_correction_of_what_is_written_without_the_callback(
    pair, subspace, without, tmp_path, name, order
):
    plain, reference, reference_module, reference_saves = without(name)
    trainer, module, saves = run(pair, tmp_path, OTHERS[name](), [callback(pair)], order)
    assert trainer.losses == reference.losses
    files = [path.relative_to(plain) for path in plain.rglob("*.ckpt")]
    assert len(files) > 12
    for file in files:
        expected, (state, kept) = factors_in(plain / file)[0], factors_in(tmp_path / file)
        assert_same(kept, expected)
        assert_same(state, corrected_by_hand(expected, subspace))
        assert_same(load_file((tmp_path / file).with_suffix(".adapter") / "adapter_model.safetensors"), state)
    assert len(module.seen) == len(reference_module.seen) > 0
    for ours, theirs in zip(module.seen, reference_module.seen, strict=True):
        assert_same(ours, corrected_by_hand(theirs, subspace))
    assert saves.in_memory.keys() == reference_saves.in_memory.keys()
    for event, weights in reference_saves.in_memory.items():
        assert_same(saves.in_memory[event], weights)  # anywhere but in a validation they are the raw ones
    assert_same(live(module.network), corrected_by_hand(live(reference_module.network), subspace))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nobody", "moving average"])
def test_a_resumed_run_ends_as_the_one_without_the_callback(pair, subspace, tmp_path, name):
    ends = []
    for folder, ours in (("without", []), ("with", [callback(pair)])):
        run(pair, tmp_path / folder / "whole", OTHERS[name](), ours)
        checkpoint = tmp_path / folder / "whole/ckpt/step=4.ckpt"
        ours = [callback(pair)] if ours else []
        ends.append(run(pair, tmp_path / folder / "resumed", OTHERS[name](), ours, ckpt_path=checkpoint))
    (reference, reference_module, _), (trainer, module, _) = ends
    assert trainer.losses == reference.losses
    assert_same(live(module.network), corrected_by_hand(live(reference_module.network), subspace))


def test_saves_after_the_fit_have_their_record_and_their_adapter(pair, tmp_path):
    trainer, module, _ = run(pair, tmp_path, [], [callback(pair)])
    shipped, (_, kept) = live(module.network), factors_in(tmp_path / "ckpt/step=8.ckpt")
    trainer.save_checkpoint(tmp_path / "run-0.1")
    trainer.save_checkpoint(tmp_path / "run-0.2", weights_only=True)
    for name in ("run-0.1", "run-0.2"):
        assert_same(factors_in(tmp_path / name)[0], shipped)
        assert_same(factors_in(tmp_path / name)[1], kept)
        assert_same(load_file(tmp_path / f"{name}.adapter/adapter_model.safetensors"), shipped)
        assert_same(load_file(tmp_path / f"{name}.adapter/csulora/raw/adapter_model.safetensors"), kept)
    module.network.half().save_pretrained(tmp_path / "half")
    assert_same(load_file(tmp_path / "half/adapter_model.safetensors"), {k: v.half() for k, v in shipped.items()})
    assert_same(load_file(tmp_path / "half/csulora/raw/adapter_model.safetensors"), kept)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    halves, record = factors_in(tmp_path / "half.ckpt")[0], torch.load(tmp_path / "half.ckpt")["csulora"]["record"]
    assert_same(halves, {k: v.half() for k, v in shipped.items()})
    assert record["corrected_digest"] == digest(from_peft_state_dict(halves, list(record["modules"]), "half.ckpt"))
    assert_same(to_peft_state_dict(Sidecar.load(tmp_path / "half.adapter").raw), kept)
    # What is changed after the fit is nobody's correction: it is written as it is, without a record.
    with torch.no_grad():
        for parameter in (p for n, p in module.named_parameters() if "lora_B" in n):
            parameter.zero_()
    trainer.save_checkpoint(tmp_path / "changed.ckpt")
    assert_same(factors_in(tmp_path / "changed.ckpt")[0], live(module.network))
    assert factors_in(tmp_path / "changed.ckpt")[1] is None
    assert not (tmp_path / "changed.adapter/csulora").exists()
    assert_same(load_file(tmp_path / "run-0.1.adapter/adapter_model.safetensors"), shipped)


def test_what_others_keep_of_the_state_dict_in_a_checkpoint_stays_raw(pair, subspace, tmp_path):
    class Keeps(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["kept"] = checkpoint["state_dict"]

    run(pair, tmp_path, [Keeps()], [callback(pair)])
    checkpoint = torch.load(tmp_path / "ckpt/step=4.ckpt")
    state, kept = factors_in(tmp_path / "ckpt/step=4.ckpt")
    for peft, key in checkpoint["csulora"]["keys"].items():
        assert torch.equal(checkpoint["kept"][key].cpu(), kept[peft])
    assert_same(state, corrected_by_hand(kept, subspace))


def test_two_saves_at_once_are_both_corrected(pair, subspace, tmp_path):
    """Another thread saves while this one has its dictionary made."""

    class Meanwhile(Callback):
        thread = None

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            if self.thread is None:
                path = tmp_path / "other.ckpt"
                self.thread = threading.Thread(target=trainer.save_checkpoint, args=(path,))
                self.thread.start()
                self.thread.join(timeout=0.5)  # it waits for this one

    meanwhile = Meanwhile()
    run(pair, tmp_path, [meanwhile], [callback(pair)])
    meanwhile.thread.join()
    for path in (tmp_path / "other.ckpt", *(tmp_path / "by hand/batch_end-1").glob("*.ckpt")):
        assert_corrected(path, subspace)


@pytest.mark.parametrize("mode", ["link", True])
def test_the_last_checkpoint_has_an_adapter_too(pair, tmp_path, mode):
    last = ModelCheckpoint(
        tmp_path, filename="{step}-{val_loss:.3f}", monitor="val_loss", save_top_k=1, save_last=mode
    )
    fit(pair, tmp_path, [callback(pair), last], max_epochs=3)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert {file.stem for file in files} == {adapter.stem for adapter in tmp_path.glob("*.adapter")}
    assert (tmp_path / "last.ckpt").is_symlink() == (tmp_path / "last.adapter").is_symlink() == (mode == "link")
    for file in files:
        adapter = file.with_suffix(".adapter")
        assert_same(load_file(adapter / "adapter_model.safetensors"), factors_in(file)[0])
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), adapter)


def test_a_file_that_was_changed_since_is_resumed_from_as_it_is(pair, tmp_path, caplog):
    run(pair, tmp_path / "whole", [], [callback(pair)])
    checkpoint = torch.load(tmp_path / "whole/ckpt/step=4.ckpt")
    for key in (key for key in checkpoint["state_dict"] if "lora_B" in key):
        checkpoint["state_dict"][key] = 2 * checkpoint["state_dict"][key]
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    begun = {}

    class Begin(Callback):
        def on_train_start(self, trainer, pl_module):
            begin = (tensor for name, tensor in pl_module.named_parameters() if "lora_B" in name)
            begun.update(enumerate(tensor.clone() for tensor in begin))

    fit(pair, tmp_path, [Begin(), callback(pair)], ckpt_path=tmp_path / "changed.ckpt")
    changed = [value for key, value in checkpoint["state_dict"].items() if "lora_B" in key]
    assert all(torch.equal(begun[index], value) for index, value in enumerate(changed))
    assert "changed after it was written" in caplog.text


def test_an_adapter_is_gone_before_its_checkpoint_changes(pair, tmp_path, monkeypatch):
    """Killed between the two files, a checkpoint has no adapter rather than that of an earlier save."""
    trainer = fit(pair, tmp_path, [callback(pair)], enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    assert (tmp_path / "best.adapter").is_dir()

    def full(*args, **kwargs):
        assert not (tmp_path / "best.adapter").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.strategy, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(tmp_path / "best.ckpt")
    assert not (tmp_path / "best.adapter").exists()


def test_validation_of_a_checkpoint_after_a_crash_sees_what_ships(pair, tmp_path):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise ZeroDivisionError

    module = Watched(pair[1])
    with pytest.raises(ZeroDivisionError):
        fit(pair, tmp_path, [callback(pair), Fails()], module, enable_checkpointing=False)
    data = DataLoader(Tokens(count=8, seed=4), batch_size=4)
    module.seen.clear()
    module.trainer.validate(module, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert len(module.seen) == 2
    for weights in module.seen:
        assert_same(weights, factors_in(tmp_path / "last.ckpt")[0])


def test_validation_after_the_fit_and_of_a_checkpoint_sees_what_ships(pair, tmp_path):
    trainer, module, _ = run(pair, tmp_path, [], [callback(pair)])
    shipped = live(module.network)
    module.seen.clear()
    data = DataLoader(Tokens(count=8, seed=4), batch_size=4)
    trainer.validate(module, data, verbose=False)
    trainer.validate(module, data, ckpt_path=tmp_path / "ckpt/step=8.ckpt", verbose=False)
    assert len(module.seen) == 4
    for weights in module.seen:
        assert_same(weights, shipped)
