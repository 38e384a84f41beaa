"""What a run leaves behind, also one that an exception ended: a model, a module and a strategy as they were."""

import copy
import gc
import shutil
import threading
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig
from transformers import Trainer, TrainerCallback

from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers.huggingface import callback, checkpoints, fresh_model, losses
from tests.helpers.lab import assert_same, corrected_by_hand, live, make_trainer, raw, saved

EVAL = {"eval_strategy": "steps", "eval_steps": 2}


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def replaced(owner: object) -> set[str]:
    """Methods that stand in the instance and not in its class."""
    return {name for name, value in vars(owner).items() if callable(value) and name in dir(type(owner))}


PUSHES = {"push_to_hub", "_push_from_checkpoint", "create_model_card"}  # these go on to leave the raw adapter out


def test_nothing_stays_replaced_in_the_trainer_but_its_pushes(pair, tmp_path):
    trainer = make_trainer(fresh_model(pair), tmp_path, [callback(pair)], save_steps=2, **EVAL)
    owners = (trainer.model, trainer, trainer.callback_handler)
    before, hooks = [replaced(owner) for owner in owners], hooks_of(trainer.model)
    trainer.train()
    before[1] |= PUSHES
    assert [replaced(owner) for owner in owners] == before
    assert hooks_of(trainer.model) == hooks
    assert [type(callback).__name__ for callback in trainer.callback_handler.callbacks].count("CSULoRACallback") == 1


def test_nothing_stays_replaced_in_lightning(pair, tmp_path):
    module, found = in_lightning.Module(pair[1]), {}

    class Before(Callback):
        def setup(self, trainer, pl_module, stage):
            found.update(module=replaced(pl_module), strategy=replaced(trainer.strategy), hooks=hooks_of(pl_module))

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_last="link")
    trainer = in_lightning.fit(pair, tmp_path, [Before(), callback(pair), saves], module)
    assert replaced(module) == replaced(module.network) | found["module"] == found["module"]
    assert replaced(trainer.strategy) == found["strategy"]
    assert replaced(saves) == set()
    assert hooks_of(module) == found["hooks"]


@pytest.mark.slow
def test_a_later_run_without_the_callback_is_one_without_it(pair, tmp_path):
    def second(model, folder):
        trainer = make_trainer(model, tmp_path / folder, [], save_steps=2)
        trainer.train()
        shutil.copytree(tmp_path / folder / "checkpoint-4", tmp_path / f"resumed-{folder}/checkpoint-4")
        resumed = make_trainer(copy.deepcopy(model), tmp_path / f"resumed-{folder}", [], save_steps=2)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"resumed-{folder}/checkpoint-4"))
        return trainer, resumed

    model = fresh_model(pair)
    make_trainer(model, tmp_path / "first", [callback(pair)]).train()
    twin = fresh_model(pair)
    find_adapter(twin).write(find_adapter(model).read())
    (after, resumed_after), (clean, resumed_clean) = second(model, "after"), second(twin, "clean")
    assert losses(after) == losses(clean)
    assert losses(resumed_after) == losses(resumed_clean)
    for folder in checkpoints(tmp_path / "clean"):
        assert_same(saved(tmp_path / "after" / folder.name), saved(folder))
        assert not (tmp_path / "after" / folder.name / "csulora").exists()


def test_another_adapter_can_take_the_place_of_the_trained_one(pair, tmp_path):
    trainer = make_trainer(fresh_model(pair), tmp_path, [callback(pair)])
    trainer.train()
    trainer.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.model.delete_adapter("default")
    trainer.model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/other/adapter_model.safetensors").is_file()
    assert not (tmp_path / "saved/csulora").exists()


class Fails(TrainerCallback):
    """Raises at one event of step 4."""

    def __init__(self, event: str, error: type[BaseException]) -> None:
        def fail(args, state, control, **kwargs):
            if state.global_step == 4:
                raise error(event)

        setattr(self, event, fail)


@pytest.fixture(scope="module")
def raw_at_4(pair, tmp_path_factory):
    """What an uninterrupted run without the callback saves at step 4."""
    output = tmp_path_factory.mktemp("clean")
    make_trainer(fresh_model(pair), output, [], save_steps=4, **EVAL).train()
    return saved(output / "checkpoint-4")


def failed(pair, output, event: str, error: type[BaseException] = ZeroDivisionError) -> Trainer:
    trainer = make_trainer(fresh_model(pair), output, [callback(pair), Fails(event, error)], save_steps=4, **EVAL)
    with pytest.raises(error):
        trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("event", "error"),
    [
        *((event, ZeroDivisionError) for event in ("on_evaluate", "on_log", "on_save", "on_prediction_step")),
        ("on_step_end", KeyboardInterrupt),
    ],
)
def test_an_exception_leaves_the_weights_that_were_trained(pair, subspace, raw_at_4, tmp_path, event, error):
    trainer = failed(pair, tmp_path / "failed", event, error)
    assert_same(live(trainer.model), raw_at_4)
    trainer.save_model(tmp_path / "interrupted")  # what someone does who stops a run
    assert_same(saved(tmp_path / "interrupted"), corrected_by_hand(raw_at_4, subspace))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_inside_a_forward_pass_of_an_evaluation(pair, raw_at_4, tmp_path, error):
    trainer = make_trainer(fresh_model(pair), tmp_path, [callback(pair)], save_steps=4, **EVAL)
    seen = {}

    def fail(module, args, output):
        if not module.training and trainer.state.global_step == 4:
            seen.update(live(trainer.model))
            raise error

    trainer.model.base_model.model.model.norm.register_forward_hook(fail)
    with pytest.raises(error):
        trainer.train()
    assert any(not torch.equal(seen[key], raw_at_4[key]) for key in seen)  # corrected ones were in
    assert_same(live(trainer.model), raw_at_4)


@pytest.mark.parametrize("again", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_another_trainer_takes_the_model_of_one_that_failed(pair, tmp_path, again):
    model = failed(pair, tmp_path / "failed", "on_evaluate").model
    twin = fresh_model(pair)
    find_adapter(twin).write(find_adapter(model).read())
    clean = make_trainer(twin, tmp_path / "clean", [])
    clean.train()
    after = make_trainer(model, tmp_path / "after", [callback(pair)] if again else [])
    after.train()
    assert losses(after) == losses(clean)
    for folder in checkpoints(tmp_path / "clean"):
        trained = raw(tmp_path / "after" / folder.name) if again else saved(tmp_path / "after" / folder.name)
        assert_same(trained, saved(folder))


def test_a_crashed_run_is_over_when_its_callback_begins_another(pair, tmp_path):
    ours = callback(pair)
    crashed = make_trainer(fresh_model(pair), tmp_path / "crashed", [ours, Fails("on_step_end", ZeroDivisionError)])
    owners = (crashed.model, crashed, crashed.callback_handler)
    before = [replaced(owner) for owner in owners]
    with pytest.raises(ZeroDivisionError):
        crashed.train()
    assert all(replaced(owner) > names for owner, names in zip(owners, before, strict=True))
    make_trainer(fresh_model(pair), tmp_path / "next", [ours], max_steps=1).train()
    before[1] |= PUSHES
    assert [replaced(owner) for owner in owners] == before


@pytest.mark.slow
def test_a_full_disk_in_a_save_leaves_the_weights_that_were_trained(pair, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    clean = make_trainer(fresh_model(pair), tmp_path / "clean", [], save_steps=4)
    clean.train()
    trainer = make_trainer(fresh_model(pair), tmp_path / "full", [callback(pair)], save_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    assert_same(live(trainer.model), saved(tmp_path / "clean/checkpoint-4"))
    assert not list((tmp_path / "full").rglob("correction.json"))


@pytest.mark.slow
def test_saving_from_a_thread_all_the_time_does_not_touch_training(pair, tmp_path):
    class FromAThread(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            def save() -> None:
                while not self.done:
                    model.save_pretrained(tmp_path / "thread")
                    self.count += 1
                    time.sleep(0.002)

            self.done, self.count = False, 0
            self.thread = threading.Thread(target=save)
            self.thread.start()

        def on_train_end(self, args, state, control, **kwargs):
            self.done = True
            self.thread.join()

    settings = {"save_steps": 10, "eval_steps": 5, "eval_strategy": "steps", "max_steps": 40}
    clean = make_trainer(fresh_model(pair), tmp_path / "clean", [], **settings)
    clean.train()
    saves = FromAThread()
    trainer = make_trainer(fresh_model(pair), tmp_path / "saved", [saves, callback(pair)], **settings)
    trainer.train()
    assert saves.count > 2
    assert losses(trainer) == losses(clean)
    for folder in checkpoints(tmp_path / "clean"):
        assert_same(raw(tmp_path / "saved" / folder.name), saved(folder))
    assert Sidecar.load(tmp_path / "thread").record["status"] == "corrected"


class Objects(TrainerCallback):
    """Counts what lives after a number of steps."""

    def __init__(self) -> None:
        self.counts = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (100, 300):
            gc.collect()
            self.counts[state.global_step] = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
def test_three_hundred_steps_leave_no_more_tensors_than_a_hundred(pair, tmp_path):
    counts = {}
    for name, ours in (("without", []), ("with", [callback(pair)])):
        objects = Objects()
        settings = {"max_steps": 300, "save_steps": 50, "eval_steps": 20, "eval_strategy": "steps", "logging_steps": 5}
        make_trainer(fresh_model(pair), tmp_path / name, [objects, *ours], save_total_limit=2, **settings).train()
        counts[name] = objects.counts[300] - objects.counts[100]
    assert counts["with"] <= counts["without"] + 2


@pytest.mark.slow
def test_a_model_that_was_trained_in_one_trainer_is_free_in_the_other(pair, tmp_path):
    module = in_lightning.Module(pair[1])
    in_lightning.fit(pair, tmp_path / "lightning", [callback(pair)], module, enable_checkpointing=False)
    twin = fresh_model(pair)
    find_adapter(twin).write(find_adapter(module.network).read())
    for model, name in ((module.network, "after"), (twin, "clean")):
        make_trainer(model.cpu(), tmp_path / name, []).train()
    assert_same(saved(tmp_path / "after/checkpoint-8"), saved(tmp_path / "clean/checkpoint-8"))
