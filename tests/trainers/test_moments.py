"""Every moment at which weights are read or written in the Trainer, beside others who write weights.

A run with the callback is compared with the same run without it: what the first one trains is the same, and what it
writes is the correction of what the second one writes, file by file.
"""

import copy
import functools
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from csulora_callback.models.adapters import find_adapter
from tests.helpers import lab, trl
from tests.helpers.averages import MovingAverage, Spy, merged_by_peft, saved_by_hand
from tests.helpers.huggingface import callback, checkpoints, fresh_model, losses
from tests.helpers.lab import assert_same, corrected_by_hand, live, raw, saved

OTHERS = {
    "nobody": (lambda: [], {}),
    "average back on save": (lambda: [MovingAverage("on_save")], {}),
    "average back on evaluate": (lambda: [MovingAverage("on_evaluate")], {}),
    "schedule-free": (lambda: [], {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}),
}
FAST = [("nobody", "first"), ("average back on save", "first")]
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id=" ".join(case))
    for case in ((n, o) for n in OTHERS for o in (("first", "last") if "average" in n else ("first",)))
]
CORRECTED_EVENTS = ("save", "train_end")  # where what lies in memory is what ships


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, aligned = lab.saved_pair(tmp_path_factory.mktemp("pair"))
    trl.words().save_pretrained(aligned)
    return base, aligned


def make_trainer(kind: str, pair, output: Path, callbacks: list, **arguments):
    settings = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **arguments}
    if kind == "TRL":
        return trl.make_trainer(pair, output, callbacks, **settings)
    return lab.make_trainer(fresh_model(pair), output, callbacks, **settings)


def run(kind: str, pair, output: Path, others: list, ours: list, order: str = "first", **arguments):
    spy = Spy(output / "spy")
    callbacks = [spy, *ours, *others] if order == "last" else [spy, *others, *ours]
    trainer = make_trainer(kind, pair, output, callbacks, **arguments)
    spy.watch(trainer)
    trainer.train()
    return trainer, spy


@pytest.fixture(scope="module")
def without(pair, tmp_path_factory):
    """The same run without the callback, once for each trainer and each of the others."""

    @functools.cache
    def reference(kind: str, name: str):
        make, arguments = OTHERS[name]
        return run(kind, pair, tmp_path_factory.mktemp("without"), make(), [], **arguments)

    return reference


@pytest.mark.parametrize("kind", ["Trainer", pytest.param("TRL", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "order"), CASES)
def test_every_file_is_the_correction_of_what_is_written_without_the_callback(
    pair, subspace, without, tmp_path, kind, name, order
):
    make, arguments = OTHERS[name]
    reference, reference_spy = without(kind, name)
    trainer, spy = run(kind, pair, tmp_path, make(), [callback(pair)], order, **arguments)
    plain = Path(reference.args.output_dir)

    assert losses(trainer) == losses(reference)
    for folder in checkpoints(plain):
        assert_same(raw(tmp_path / folder.name), saved(folder))
        assert_same(saved(tmp_path / folder.name), corrected_by_hand(saved(folder), subspace))
    assert spy.evaluated.keys() == reference_spy.evaluated.keys() != set()
    for step, weights in reference_spy.evaluated.items():
        assert_same(spy.evaluated[step], corrected_by_hand(weights, subspace))
    for place in (plain / "spy").iterdir():
        check_event(pair, subspace, tmp_path / "spy" / place.name, place)
    assert_same(live(trainer.model), corrected_by_hand(live(reference.model), subspace))
    assert len(list((tmp_path / "spy").iterdir())) == len(list((plain / "spy").iterdir())) > 6


def check_event(pair, subspace, place: Path, plain: Path) -> None:
    """All that the spy wrote at one event."""
    expected = corrected_by_hand(saved_by_hand(plain)["by hand"], subspace)
    for way, adapter in saved_by_hand(place).items():
        assert_same(adapter, expected)
        assert_same(raw(place / way), saved_by_hand(plain)[way])
    in_memory = torch.load(place / "state.pt")
    ships = plain.name.startswith(CORRECTED_EVENTS)
    assert_same(in_memory, expected if ships else torch.load(plain / "state.pt"))
    if ships:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), place / "by hand")
        torch.testing.assert_close(torch.load(place / "merged.pt"), merged_by_peft(model), rtol=0, atol=1e-6)


def test_what_a_trainer_of_ones_own_writes_with_a_checkpoint_is_corrected(pair, subspace, tmp_path):
    class Own(Trainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            torch.save(live(self.model), tmp_path / f"checkpoint-{self.state.global_step}/own.pt")

    arguments = TrainingArguments(**lab.TRAINING, output_dir=tmp_path, save_steps=4)
    Own(model=fresh_model(pair), args=arguments, train_dataset=lab.Tokens(), callbacks=[callback(pair)]).train()
    for folder in checkpoints(tmp_path):
        assert_same(torch.load(folder / "own.pt"), corrected_by_hand(raw(folder), subspace))


def test_weights_that_are_written_in_on_save_stay(pair, tmp_path):
    class Zero(MovingAverage):
        def on_step_end(self, *args, **kwargs):
            pass

        def on_train_end(self, *args, **kwargs):
            pass

        @torch.no_grad()
        def on_save(self, args, state, control, model, **kwargs):
            for parameter in (p for n, p in model.named_parameters() if "lora_B" in n and "layers.0" in n):
                parameter.zero_()

    def train(output, ours):
        trainer = make_trainer("Trainer", pair, output, [Zero(""), *ours])
        trainer.train()
        return trainer

    reference, trainer = train(tmp_path / "without", []), train(tmp_path / "with", [callback(pair)])
    assert losses(trainer) == losses(reference)
    for folder in checkpoints(tmp_path / "without"):
        assert_same(raw(tmp_path / "with" / folder.name), saved(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_after_training_a_cast_model_is_saved_as_it_is_with_its_record(pair, tmp_path, dtype):
    trainer = make_trainer("Trainer", pair, tmp_path, [callback(pair)])
    trainer.train()
    shipped = live(trainer.model)
    trainer.model.to(dtype)
    trainer.model.save_pretrained(tmp_path / "cast")
    assert_same(saved(tmp_path / "cast"), {key: value.to(dtype) for key, value in shipped.items()})
    assert_same(raw(tmp_path / "cast"), raw(tmp_path / "checkpoint-8"))


def test_corrected_shows_what_ships_and_puts_back_what_was_there(pair, subspace, tmp_path):
    ours, seen = callback(pair), []

    class Look(MovingAverage):
        def on_step_end(self, args, state, control, model, **kwargs):
            before = live(model)
            with ours.corrected():
                seen.append((before, live(model)))
            assert_same(live(model), before)

        def on_train_end(self, *args, **kwargs):
            pass

    with pytest.raises(RuntimeError, match="expected training to have begun"):
        ours.corrected()
    trainer = make_trainer("Trainer", pair, tmp_path, [Look(""), ours])
    trainer.train()
    assert len(seen) == 8
    for before, inside in seen:
        assert_same(inside, corrected_by_hand(before, subspace))
    after = live(trainer.model)
    with ours.corrected():
        assert_same(live(trainer.model), after)


def test_corrected_inside_corrected_is_one_and_an_exception_ends_both(pair, subspace, tmp_path):
    ours = callback(pair)
    trainer = make_trainer("Trainer", pair, tmp_path, [ours])
    trainer.train()
    adapter = find_adapter(trainer.model)
    factors = {name: (A + 0.1, B + 0.1) for name, (A, B) in adapter.read().items()}  # weights of nobody's correction
    adapter.write(factors)
    before = live(trainer.model)
    doubled = {key: 2 * value if "lora_A" in key else value for key, value in before.items()}

    def fail() -> None:
        with ours.corrected(), ours.corrected():
            assert_same(live(trainer.model), corrected_by_hand(before, subspace))
            adapter.write({name: (2 * A, B) for name, (A, B) in factors.items()})
            with ours.corrected():
                assert_same(live(trainer.model), corrected_by_hand(doubled, subspace))
                adapter.write(factors)
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_same(live(trainer.model), before)


def test_tokens_that_were_added_are_in_every_adapter(pair, tmp_path):
    """PEFT saves resized embeddings with the adapter: so do we, corrected and raw."""

    def model() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(pair[1])
        torch.manual_seed(11)
        model.resize_token_embeddings(lab.VOCABULARY + 4, mean_resizing=False)
        return lab.with_lora(model)

    trainer = lab.make_trainer(model(), tmp_path, [callback(pair)])
    trainer.train()
    assert saved(tmp_path / "checkpoint-8").keys() == raw(tmp_path / "checkpoint-8").keys()
    embeddings = [key for key in raw(tmp_path / "checkpoint-8") if "lora_" not in key]
    assert embeddings
    ids = torch.tensor([[5, lab.VOCABULARY, lab.VOCABULARY + 3]])
    trainer.model.cpu()
    for folder, adapter in ((".", live(trainer.model)), ("csulora/raw", None)):
        torch.manual_seed(99)
        base = AutoModelForCausalLM.from_pretrained(pair[1])
        base.resize_token_embeddings(lab.VOCABULARY + 4, mean_resizing=False)
        loaded = PeftModel.from_pretrained(base, tmp_path / "checkpoint-8" / folder).eval()
        reference = copy.deepcopy(trainer.model).eval()
        if adapter is None:
            reference.load_adapter(tmp_path / "checkpoint-8/csulora/raw", "default")
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits)
