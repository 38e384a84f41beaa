"""What others do inside our scopes, and runs inside runs: right, or refused by name."""

import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftModel
from schedulefree import AdamWScheduleFree
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.models.adapters import find_adapter
from tests.helpers import lightning as in_lightning
from tests.helpers.huggingface import callback, checkpoints, fresh_model, losses
from tests.helpers.lab import TRAINING, assert_same, corrected_by_hand, live, make_trainer, raw, saved, with_lora

SCHEDULE_FREE = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
EVAL = {"eval_strategy": "steps", "eval_steps": 2}


def compared(pair, subspace, tmp_path, make) -> tuple[Trainer, Trainer]:
    """The same run without and with the callback: what is trained is the same, and every file is its correction."""
    without = make(tmp_path / "without", [])  # sets the seed
    without.train()
    trainer = make(tmp_path / "with", [callback(pair)])
    trainer.train()
    assert losses(trainer) == losses(without)
    for folder in checkpoints(tmp_path / "without"):
        assert_same(raw(tmp_path / "with" / folder.name), saved(folder))
        assert_same(saved(tmp_path / "with" / folder.name), corrected_by_hand(saved(folder), subspace))
    return without, trainer


def test_schedule_free_weights_that_are_evaluated_after_training(pair, subspace, tmp_path):
    """The last step has no evaluation: the optimizer goes to its average only when the trained model is evaluated."""

    def make(output, ours):
        return make_trainer(fresh_model(pair), output, ours, save_steps=4, **SCHEDULE_FREE)

    without, trainer = compared(pair, subspace, tmp_path, make)
    assert_same(live(trainer.model), corrected_by_hand(live(without.model), subspace))
    for each in (without, trainer):
        each.evaluate()
        each.save_model(Path(each.args.output_dir) / "evaluated")
    expected = saved(tmp_path / "without/evaluated")
    assert_same(raw(tmp_path / "with/evaluated"), expected)
    assert_same(saved(tmp_path / "with/evaluated"), corrected_by_hand(expected, subspace))


class Switches(TrainerCallback):
    """Goes to the optimizer's other weights and back in on_save, and evaluates there."""

    def __init__(self) -> None:
        self.trainer = None

    def on_save(self, args, state, control, optimizer, **kwargs):
        optimizer.eval()
        optimizer.train()
        self.trainer.evaluate()


@pytest.mark.slow
def test_an_optimizer_that_goes_to_other_weights_and_back_in_on_save(pair, subspace, tmp_path):
    def make(output, ours):
        switches = Switches()
        trainer = make_trainer(fresh_model(pair), output, [switches, *ours], save_steps=2, **SCHEDULE_FREE)
        switches.trainer = trainer
        return trainer

    compared(pair, subspace, tmp_path, make)


class ScheduleFreeModule(in_lightning.Module):
    def configure_optimizers(self):
        return AdamWScheduleFree((p for p in self.parameters() if p.requires_grad), lr=2e-2)

    def on_train_batch_start(self, *args):
        self.trainer.optimizers[0].train()

    def validation_step(self, batch, batch_idx):
        self.trainer.optimizers[0].eval()
        super().validation_step(batch, batch_idx)
        self.trainer.optimizers[0].train()


def test_a_schedule_free_optimizer_in_lightning(pair, subspace, tmp_path):
    modules = [ScheduleFreeModule(pair[1]) for _ in range(2)]
    for module, ours, name in zip(modules, ([], [callback(pair)]), ("without", "with"), strict=True):
        trainer = in_lightning.fit(pair, tmp_path / name, ours, module, enable_checkpointing=False)
        module.losses = trainer.losses
    assert modules[0].losses == modules[1].losses
    assert_same(live(modules[1].network), corrected_by_hand(live(modules[0].network), subspace))


class SavesInsideASave(Callback):
    def __init__(self, place: Path) -> None:
        self.place, self.busy = place, False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if not self.busy:
            self.busy = True
            trainer.save_checkpoint(self.place / "inner.ckpt", weights_only=True)
            self.busy = False


def test_a_save_inside_a_save_and_one_by_peft_are_corrected(pair, subspace, tmp_path):
    class ByPeft(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.network.save_pretrained(tmp_path / "peft")
            thread = threading.Thread(target=pl_module.network.save_pretrained, args=(tmp_path / "thread",))
            thread.start()
            thread.join()
            trainer.save_checkpoint(tmp_path / "outer.ckpt")

    module = in_lightning.Module(pair[1])
    callbacks = [SavesInsideASave(tmp_path), ByPeft(), callback(pair)]
    in_lightning.fit(pair, tmp_path, callbacks, module, enable_checkpointing=False)
    trained = in_lightning.assert_corrected(tmp_path / "outer.ckpt", subspace)
    assert_same(in_lightning.assert_corrected(tmp_path / "inner.ckpt", subspace), trained)
    for name in ("peft", "thread"):
        assert_same(saved(tmp_path / name), corrected_by_hand(trained, subspace))
        assert_same(raw(tmp_path / name), trained)
    assert "save_pretrained" not in vars(module.network)


@pytest.mark.parametrize("shared", ["callback", "model"])
def test_a_trainer_inside_another_needs_a_callback_and_a_model_of_its_own(pair, tmp_path, shared):
    ours, found = callback(pair), []

    class Inner(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                inner_model = model if shared == "model" else fresh_model(pair)
                inner = [ours if shared == "callback" else callback(pair)]
                with pytest.raises(ValueError, match="another Trainer is still training") as raised:
                    make_trainer(inner_model, tmp_path / "inner", inner).train()
                found.append(raised.value)

    trainer = make_trainer(fresh_model(pair), tmp_path / "outer", [Inner(), ours])
    trainer.train()
    assert len(found) == 1
    assert (tmp_path / "outer/checkpoint-8/csulora/correction.json").is_file()


def test_a_callback_that_comes_late_says_so(pair, tmp_path):
    class Adds(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.add_callback(callback(pair))

    trainer = make_trainer(fresh_model(pair), tmp_path, [Adds()])
    with pytest.raises(RuntimeError, match=r"added before trainer\.train\(\)"):
        trainer.train()


def test_two_callbacks_in_lightning_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="expected one CSULoRACallback, but got several"):
        in_lightning.fit(pair, tmp_path, [callback(pair), callback(pair, penalty=Penalty.guard(1.0))])


def test_an_adapter_with_the_name_of_our_folder_is_refused(pair, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    lora = with_lora(AutoModelForCausalLM.from_pretrained(pair[1])).peft_config["default"]
    trainer = make_trainer(PeftModel(model, lora, adapter_name="csulora"), tmp_path, [callback(pair)])
    with pytest.raises(ValueError, match="expected an adapter of another name than 'csulora'"):
        trainer.train()


def test_arguments_of_save_pretrained_may_stand_in_their_places(pair, tmp_path):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.save_pretrained(tmp_path / "nothing", True, [])
            model.save_pretrained(tmp_path / "not here", True, None, "auto", False)
            model.save_pretrained(tmp_path / "all", True, ["default"])

    make_trainer(fresh_model(pair), tmp_path / "out", [Saves(), callback(pair)]).train()
    assert (tmp_path / "all/csulora").is_dir()
    assert not (tmp_path / "nothing/csulora").exists()
    assert not (tmp_path / "not here/csulora").exists()


def test_a_frozen_teacher_beside_the_student_is_left_alone(pair, subspace, tmp_path):
    class WithTeacher(in_lightning.Module):
        def __init__(self, aligned, plain: bool) -> None:
            torch.nn.Module.__init__(self)
            teacher = AutoModelForCausalLM.from_pretrained(aligned)
            holder = (teacher if plain else with_lora(teacher)).requires_grad_(False)
            super().__init__(aligned, late=True)
            self.teacher = holder
            self.build()

    for plain in (True, False):
        module = WithTeacher(pair[1], plain)
        output = tmp_path / str(plain)
        trainer = in_lightning.fit(pair, output, [callback(pair)], module, enable_checkpointing=False)
        shipped = live(module.network)
        trainer.save_checkpoint(output / "end.ckpt")
        assert_same(saved(output / "end.adapter"), shipped)
        assert_same(shipped, corrected_by_hand(raw(output / "end.adapter"), subspace))
        assert find_adapter(module).model is module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume_from": 3}, "`resume_from`: expected the path of a folder or None, but got 3"),
        ({"resume_from": ""}, "`resume_from`: expected the path of a folder or None, but got ''"),
        ({"cache_dir": 3}, "`cache_dir`: expected the path of a folder or None, but got 3"),
        ({"evaluate_corrected": "no"}, "`evaluate_corrected`: expected True or False, but got 'no'"),
        ({"export_adapter": 1}, "`export_adapter`: expected True or False, but got 1"),
    ],
)
def test_arguments_of_other_types(arguments, message):
    with pytest.raises(ValueError, match=message):
        CSULoRACallback(base_model="org/base", **arguments)


def test_a_trainer_without_a_history_logs_all_the_same(pair, tmp_path):
    class Silent(Trainer):
        def log(self, logs, start_time=None):
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    plain = make_trainer(fresh_model(pair), tmp_path, [callback(pair)])
    trainer = Silent(plain.model, plain.args, train_dataset=plain.train_dataset, callbacks=[callback(pair)])
    trainer.train()
    assert trainer.state.global_step == TRAINING["max_steps"]
