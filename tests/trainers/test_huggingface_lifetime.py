"""What the callback leaves behind, and how it shares models and trainers with others."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from csulora_callback import CSULoRACallback
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import to_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers.huggingface import callback, checkpoints, fresh_model, losses, train
from tests.helpers.lab import TARGETS, assert_same, corrected_by_hand, live, make_trainer, raw, saved


def test_copies_and_pickles_of_the_model_are_free_of_the_callback(pair, tmp_path):
    trainer = train(pair, tmp_path, [callback(pair)])
    for copied in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
        adapter = find_adapter(copied)
        adapter.write({name: (A * 0 + 1, B * 0 + 1) for name, (A, B) in adapter.read().items()})
        copied.save_pretrained(tmp_path / "copied")
        assert all(bool((tensor == 1).all()) for tensor in saved(tmp_path / "copied").values())
        assert not (tmp_path / "copied" / "csulora").exists()


class AtStep(TrainerCallback):
    """Calls a function with the model at the end of step 4."""

    def __init__(self, call) -> None:
        self.call = call

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 4:
            self.call(model)


def test_a_copy_that_is_saved_during_training_is_saved_as_it_is(pair, tmp_path):
    """An average that someone keeps in a copy of the model, say; the copy took the replaced method along."""

    def save_copy(model) -> None:
        copied = copy.deepcopy(model)
        adapter = find_adapter(copied)
        adapter.write({name: (A * 0 + 1, B * 0 + 1) for name, (A, B) in adapter.read().items()})
        copied.save_pretrained(tmp_path / "copied")

    train(pair, tmp_path / "run", [callback(pair), AtStep(save_copy)])
    assert all(bool((tensor == 1).all()) for tensor in saved(tmp_path / "copied").values())
    assert not (tmp_path / "copied/csulora").exists()


def test_training_a_copy_leaves_the_run_of_the_original_alone(pair, subspace, tmp_path):
    trainer = make_trainer(fresh_model(pair), tmp_path / "run", [callback(pair), AtStep(lambda model: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    copied = copy.deepcopy(trainer.model)
    assert "save_pretrained" in vars(copied)
    make_trainer(copied, tmp_path / "copied", [callback(pair)]).train()
    assert "save_pretrained" not in vars(copied)
    trainer.save_model(tmp_path / "interrupted")
    assert_same(saved(tmp_path / "interrupted"), corrected_by_hand(live(trainer.model), subspace))


def test_what_someone_else_wraps_meanwhile_stays_wrapped(pair, tmp_path):
    calls = []

    def wrap(model) -> None:
        original = model.save_pretrained

        def save_pretrained(*args, **kwargs):
            calls.append(args)
            return original(*args, **kwargs)

        model.save_pretrained = save_pretrained

    trainer = train(pair, tmp_path / "run", [callback(pair), AtStep(wrap)])
    calls.clear()
    trainer.save_model(tmp_path / "after")
    assert len(calls) == 1
    assert_same(saved(tmp_path / "after"), live(trainer.model))


def test_an_adapter_that_is_not_trained_is_saved_alone_and_without_a_record(pair, tmp_path):
    def save_other(model) -> None:
        model.save_pretrained(tmp_path / "saved", selected_adapters=["other"])

    model = fresh_model(pair)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    make_trainer(model, tmp_path / "run", [callback(pair), AtStep(save_other)]).train()
    assert [path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()] == ["other"]


def test_an_adapter_with_a_name_of_its_own_has_its_record_beside_its_folder(pair, subspace, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pair[1]), lora, adapter_name="task")
    make_trainer(model, tmp_path, [callback(pair)]).train()
    model.save_pretrained(tmp_path / "after")
    for folder in (tmp_path / "checkpoint-8", tmp_path / "after"):
        assert_same(saved(folder / "task"), live(model))
        assert_same(corrected_by_hand(to_peft_state_dict(Sidecar.load(folder).raw), subspace), live(model))


@pytest.mark.slow
def test_a_resume_in_another_dtype_is_the_one_without_the_callback(pair, tmp_path):
    """PEFT rounds what it loads to the dtype of the parameters, and then makes these float32."""
    resumed = []
    for name, ours in (("without", lambda: []), ("with", lambda: [callback(pair)])):
        train(pair, tmp_path / name, ours())
        trainer = make_trainer(fresh_model(pair).to(torch.bfloat16), tmp_path / name, ours())
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4"))
        resumed.append(trainer)
    assert losses(resumed[0]) == losses(resumed[1])
    assert_same(raw(tmp_path / "with/checkpoint-8"), saved(tmp_path / "without/checkpoint-8"))


def test_a_second_run_on_the_same_model_corrects_once(pair, subspace, tmp_path):
    model = fresh_model(pair)
    make_trainer(model, tmp_path / "first", [callback(pair)]).train()
    second = make_trainer(model, tmp_path / "second", [callback(pair)], save_steps=4)
    second.train()
    for folder in checkpoints(tmp_path / "second"):
        assert_same(saved(folder), corrected_by_hand(raw(folder), subspace))


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_goes_on_from_what_ships(pair, tmp_path):
    """It is not a resume: the raw factors that lie there are not looked for."""
    model, twin = fresh_model(pair), fresh_model(pair)
    make_trainer(model, tmp_path / "run", [callback(pair)]).train()
    find_adapter(twin).write(find_adapter(model).read())
    again = make_trainer(model, tmp_path / "run", [callback(pair)])
    again.train()
    clean = make_trainer(twin, tmp_path / "clean", [])
    clean.train()
    assert losses(again) == losses(clean)


class Wrapped(nn.Module):
    """A plain module around a PeftModel: the Trainer saves its state dict without `save_pretrained`."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids, labels):
        return self.inner(input_ids=input_ids, labels=labels)


def test_a_module_that_the_trainer_saves_by_itself_is_refused(pair, tmp_path):
    trainer = make_trainer(Wrapped(fresh_model(pair)), tmp_path, [callback(pair)])
    with pytest.raises(ValueError, match="expected a PeftModel or a transformers model with an adapter, but got a Wr"):
        trainer.train()


@pytest.mark.slow
def test_a_callback_that_was_removed_does_nothing(pair, tmp_path):
    def two_runs(output, callbacks):
        trainer = make_trainer(fresh_model(pair), output, callbacks, save_steps=2)
        adapter = find_adapter(trainer.model)
        start = adapter.read()
        trainer.train()
        trainer.remove_callback(CSULoRACallback)
        adapter.write(start)  # the first run left a corrected adapter
        trainer.train()
        return trainer

    clean, removed = two_runs(tmp_path / "clean", []), two_runs(tmp_path / "removed", [callback(pair)])
    assert losses(removed) == losses(clean)
    for folder in checkpoints(tmp_path / "clean"):
        assert_same(saved(tmp_path / "removed" / folder.name), saved(folder))


def test_a_refused_callback_can_be_removed(pair, tmp_path):
    trainer = make_trainer(fresh_model(pair), tmp_path, [CSULoRACallback(base_model=pair[1])])
    with pytest.raises(ValueError, match="base equal to aligned"):
        trainer.train()
    trainer.remove_callback(CSULoRACallback)
    trainer.train()


@pytest.mark.slow
def test_one_callback_in_two_trainers_keeps_their_models_apart(pair, subspace, tmp_path):
    ours = callback(pair)
    first = make_trainer(fresh_model(pair), tmp_path / "first", [ours])
    first.train()
    make_trainer(fresh_model(pair), tmp_path / "second", [ours], learning_rate=1e-3).train()
    first.save_model(tmp_path / "again")
    assert_same(saved(tmp_path / "again"), saved(tmp_path / "first/checkpoint-8"))
    assert_same(raw(tmp_path / "again"), raw(tmp_path / "first/checkpoint-8"))
