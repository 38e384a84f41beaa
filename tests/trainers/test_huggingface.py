"""The promises of the callback in a real Trainer: what is saved is corrected, what is trained is not.

Every run with the callback is compared with the same run without it.
"""

import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from csulora_callback import SafetySubspace
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict, to_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers.huggingface import callback, checkpoints, fresh_model, losses, train
from tests.helpers.lab import assert_same, corrected_by_hand, live, make_trainer, raw, saved

EVAL = {"eval_strategy": "steps", "eval_steps": 2}
STRATEGIES = {
    "steps": {"save_steps": 3, **EVAL},
    "epoch": {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "best": {"save_strategy": "best", "metric_for_best_model": "loss", **EVAL},
    "last step only": {"save_steps": 1000},
    "accumulation": {"save_steps": 2, "gradient_accumulation_steps": 3, "max_steps": 5},
    "total limit": {"save_steps": 2, "save_total_limit": 1},
    "best at end": {
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the worst, so that best and last differ
        **EVAL,
    },
}


SLOW = "epoch", "accumulation", "total limit"


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in STRATEGIES]
)
def test_checkpoints_are_corrected_and_training_is_bit_identical(pair, subspace, tmp_path, strategy):
    arguments = STRATEGIES[strategy]
    without = train(pair, tmp_path / "without", [], **arguments)
    with_it = train(pair, tmp_path / "with", [callback(pair)], **arguments)

    assert losses(with_it) == losses(without)
    written = checkpoints(tmp_path / "with")
    assert written
    for folder in written:
        assert_same(saved(folder), corrected_by_hand(raw(folder), subspace))
        twin = tmp_path / "without" / folder.name
        if strategy in ("best", "best at end") and not twin.exists():
            continue  # evaluations differ, and so may the steps that were best
        assert_same(raw(folder), saved(twin))
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert pickle.dumps(_plain(torch.load(folder / file, weights_only=False))) == pickle.dumps(
                _plain(torch.load(twin / file, weights_only=False))
            )
    if strategy == "best at end":
        assert_same(live(with_it.model), saved(Path(with_it.state.best_model_checkpoint)))
        assert with_it.state.best_model_checkpoint != str(written[-1])
    else:
        assert_same(live(with_it.model), corrected_by_hand(live(without.model), subspace))
    with_it.save_model(tmp_path / "shipped")
    assert_same(saved(tmp_path / "shipped"), live(with_it.model))
    assert_same(corrected_by_hand(raw(tmp_path / "shipped"), subspace), live(with_it.model))


def _plain(value):
    """Tensors as lists, so that two states can be compared byte by byte."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def test_evaluation_sees_what_ships(pair, tmp_path):
    without = train(pair, tmp_path / "without", [], save_steps=2, **EVAL)
    trainer = train(pair, tmp_path / "with", [callback(pair)], save_steps=2, **EVAL)
    raw_eval = train(pair, tmp_path / "raw", [callback(pair, evaluate_corrected=False)], save_steps=2, **EVAL)

    def eval_losses(trainer):
        return {r["step"]: r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r}

    for folder in checkpoints(tmp_path / "with"):
        shipped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), folder)
        by_hand = make_trainer(shipped, tmp_path / "by_hand").evaluate()["eval_loss"]
        assert eval_losses(trainer)[int(folder.name.split("-")[1])] == by_hand
        assert_same(saved(tmp_path / "raw" / folder.name), saved(folder))
    assert eval_losses(raw_eval) == eval_losses(without) != eval_losses(trainer)


@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 6))])
def test_resume_is_exact_from_any_checkpoint(pair, tmp_path, step):
    arguments = {"save_steps": 2, **EVAL}
    whole = train(pair, tmp_path / "whole", [callback(pair)], **arguments)
    first = train(pair, tmp_path / "parts", [callback(pair)], **arguments)
    assert losses(first) == losses(whole)
    for folder in checkpoints(tmp_path / "parts"):
        if int(folder.name.split("-")[1]) > step:
            for file in sorted(folder.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            folder.rmdir()
    resumed = train(pair, tmp_path / "parts", [callback(pair)], resume=True, **arguments)
    assert losses(resumed) == losses(whole)
    assert_same(live(resumed.model), live(whole.model))
    for folder in checkpoints(tmp_path / "whole"):
        assert_same(raw(tmp_path / "parts" / folder.name), raw(folder))
        assert_same(saved(tmp_path / "parts" / folder.name), saved(folder))


def test_a_run_begun_without_the_callback_resumes_with_it_and_the_reverse(pair, subspace, tmp_path):
    without = train(pair, tmp_path / "a", [], save_steps=4)
    resumed = train(pair, tmp_path / "b", [callback(pair)], resume=str(tmp_path / "a/checkpoint-4"), save_steps=4)
    assert losses(resumed) == losses(without)
    assert_same(raw(tmp_path / "b/checkpoint-8"), saved(tmp_path / "a/checkpoint-8"))
    assert_same(live(resumed.model), corrected_by_hand(live(without.model), subspace))


class SaveByHand(TrainerCallback):
    """Saves from every event that a user might use, and remembers where."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.trainer = None

    def save(self, event: str, state) -> None:
        self.trainer.save_model(self.output / f"{event}-{state.global_step}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.save("step_begin", state)

    def on_step_end(self, args, state, control, **kwargs):
        self.save("step_end", state)

    def on_log(self, args, state, control, **kwargs):
        self.save("log", state)

    def on_save(self, args, state, control, **kwargs):
        self.save("save", state)

    def on_train_end(self, args, state, control, **kwargs):
        self.save("train_end", state)


def test_saves_by_hand_during_and_after_training_are_corrected_once(pair, subspace, tmp_path):
    without = train(pair, tmp_path / "without", [], save_steps=4, **EVAL)
    hand = SaveByHand(tmp_path / "hand")
    trainer = make_trainer(fresh_model(pair), tmp_path / "with", [hand, callback(pair)], save_steps=4, **EVAL)
    hand.trainer = trainer
    trainer.train()
    assert losses(trainer) == losses(without)
    folders = list((tmp_path / "hand").iterdir())
    assert {folder.name.rsplit("-", 1)[0] for folder in folders} == {
        "step_begin",
        "step_end",
        "log",
        "save",
        "train_end",
    }
    for folder in folders:
        assert_same(saved(folder), corrected_by_hand(raw(folder), subspace))
    assert_same(raw(tmp_path / "hand/step_end-4"), saved(tmp_path / "without/checkpoint-4"))
    assert_same(raw(tmp_path / "hand/save-8"), saved(tmp_path / "without/checkpoint-8"))
    trainer.save_model(tmp_path / "after")
    trainer.model.save_pretrained(tmp_path / "again")
    assert_same(saved(tmp_path / "after"), saved(tmp_path / "with/checkpoint-8"))
    assert_same(saved(tmp_path / "again"), saved(tmp_path / "with/checkpoint-8"))


class AskLate(TrainerCallback):
    """Stands after CSULoRACallback in the list and asks for an evaluation and a save at step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_evaluate = True


def test_what_a_later_callback_asks_for_is_corrected(pair, subspace, tmp_path):
    trainer = train(pair, tmp_path, [callback(pair), AskLate()], save_steps=1000)
    folder = tmp_path / "checkpoint-3"
    assert_same(saved(folder), corrected_by_hand(raw(folder), subspace))
    shipped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), folder)
    by_hand = make_trainer(shipped, tmp_path / "by_hand").evaluate()["eval_loss"]
    assert [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r] == [by_hand]


class Watch(TrainerCallback):
    """Remembers the live factors at each event."""

    def __init__(self) -> None:
        self.seen = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen["step_end", state.global_step] = to_peft_state_dict(find_adapter(model).read())

    def on_train_end(self, args, state, control, model, **kwargs):
        self.seen["train_end", state.global_step] = to_peft_state_dict(find_adapter(model).read())


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_see_raw_weights_in_training_and_corrected_ones_at_its_end(pair, subspace, tmp_path, first):
    watch, ours = Watch(), callback(pair)
    trainer = train(pair, tmp_path, [watch, ours] if first else [ours, watch], save_steps=2)
    for folder in checkpoints(tmp_path):
        assert_same(watch.seen["step_end", int(folder.name.split("-")[1])], raw(folder))
    assert_same(watch.seen["train_end", 8], live(trainer.model))
    assert_same(live(trainer.model), corrected_by_hand(raw(tmp_path / "checkpoint-8"), subspace))


class CorrectByHand(TrainerCallback):
    """The proximal step of `every_n_steps`, written with nothing but `correct`."""

    def __init__(self, every: int, subspace: SafetySubspace) -> None:
        self.every, self.subspace = every, subspace

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0:
            adapter = find_adapter(model)
            done = from_peft_state_dict(
                corrected_by_hand(to_peft_state_dict(adapter.read()), self.subspace), list(adapter.layers), ""
            )
            adapter.write(done)


def test_every_n_steps_corrects_the_live_weights_and_compounds(pair, subspace, tmp_path):
    by_hand = train(pair, tmp_path / "hand", [CorrectByHand(2, subspace)], save_steps=3)
    trainer = train(pair, tmp_path / "ours", [callback(pair, every_n_steps=2)], save_steps=3)
    assert losses(trainer) == losses(by_hand)
    ours = tmp_path / "ours"
    assert_same(raw(ours / "checkpoint-3"), saved(tmp_path / "hand/checkpoint-3"))
    assert_same(saved(ours / "checkpoint-3"), corrected_by_hand(raw(ours / "checkpoint-3"), subspace))
    # Steps 6 and 8 were corrected in place: their checkpoints hold that, and not a correction of it.
    for step in (6, 8):
        assert_same(saved(ours / f"checkpoint-{step}"), saved(tmp_path / f"hand/checkpoint-{step}"))
        assert_same(raw(ours / f"checkpoint-{step}"), saved(ours / f"checkpoint-{step}"))
        record = Sidecar.load(ours / f"checkpoint-{step}").record
        assert record["raw_digest"] == record["corrected_digest"]
    assert_same(live(trainer.model), live(by_hand.model))
    for step in (3, 6):
        resumed = train(
            pair,
            tmp_path / f"resumed-{step}",
            [callback(pair, every_n_steps=2, resume_from=ours / f"checkpoint-{step}")],
            resume=str(ours / f"checkpoint-{step}"),
            save_steps=3,
        )
        assert_same(live(resumed.model), live(trainer.model))


def test_a_crash_inside_the_window_is_undone_by_the_next_run(pair, tmp_path):
    trainer = make_trainer(fresh_model(pair), tmp_path, [callback(pair)], save_steps=1000, **EVAL)
    trainer.compute_metrics = lambda _: 1 / 0
    before = {}

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            before.update(to_peft_state_dict(find_adapter(model).read()))

    class Compare(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 0:
                assert_same(live(trainer.model), before)

    trainer.add_callback(Remember())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert_same(live(trainer.model), before)
    trainer.compute_metrics = None
    trainer.remove_callback(Remember)
    trainer.add_callback(Compare())
    trainer.train()
