"""What the callback leaves behind, and how it shares models and trainers with others."""

import copy
import pickle

import pytest
from peft import PeftModel
from torch import nn

from csulora_callback import CSULoRACallback
from csulora_callback.models.adapters import find_adapter
from tests.helpers.huggingface import callback, checkpoints, fresh_model, losses, train
from tests.helpers.lab import assert_same, corrected_by_hand, make_trainer, raw, saved


def test_copies_and_pickles_of_the_model_are_free_of_the_callback(pair, tmp_path):
    trainer = train(pair, tmp_path, [callback(pair)])
    for copied in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
        adapter = find_adapter(copied)
        adapter.write({name: (A * 0 + 1, B * 0 + 1) for name, (A, B) in adapter.read().items()})
        copied.save_pretrained(tmp_path / "copied")
        assert all(bool((tensor == 1).all()) for tensor in saved(tmp_path / "copied").values())
        assert not (tmp_path / "copied" / "csulora").exists()


def test_a_second_run_on_the_same_model_corrects_once(pair, subspace, tmp_path):
    model = fresh_model(pair)
    make_trainer(model, tmp_path / "first", [callback(pair)]).train()
    second = make_trainer(model, tmp_path / "second", [callback(pair)], save_steps=4)
    second.train()
    for folder in checkpoints(tmp_path / "second"):
        assert_same(saved(folder), corrected_by_hand(raw(folder), subspace))


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


def test_one_callback_in_two_trainers_keeps_their_models_apart(pair, subspace, tmp_path):
    ours = callback(pair)
    first = make_trainer(fresh_model(pair), tmp_path / "first", [ours])
    first.train()
    make_trainer(fresh_model(pair), tmp_path / "second", [ours], learning_rate=1e-3).train()
    first.save_model(tmp_path / "again")
    assert_same(saved(tmp_path / "again"), saved(tmp_path / "first/checkpoint-8"))
    assert_same(raw(tmp_path / "again"), raw(tmp_path / "first/checkpoint-8"))
