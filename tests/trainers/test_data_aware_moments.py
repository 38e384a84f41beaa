"""When the model reads for a data-aware penalty, and when it must not."""

import json
import threading

import pytest
from lightning.pytorch.callbacks import Callback
from transformers import TrainerCallback

from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.trainers.test_data_aware import callback, train


def test_a_save_from_another_thread_has_the_model_read_nothing(pair, tmp_path):
    """The model would go into evaluation mode in the middle of a step."""
    passes = {}

    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen = []
            hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
            thread = threading.Thread(target=model.save_pretrained, args=(tmp_path / "thread",))
            thread.start()
            thread.join()
            passes.setdefault("thread", []).append(len(seen))
            model.save_pretrained(tmp_path / "here")
            passes.setdefault("here", []).append(len(seen))
            hook.remove()

    train(pair, tmp_path, [callback(pair), Saves()], eval_strategy="no")
    assert not any(passes["thread"])
    assert all(passes["here"])


def test_rows_count_also_where_the_weights_did_not_move(pair, tmp_path):
    train(pair, tmp_path, [callback(pair)], learning_rate=0.0, max_steps=3, save_steps=1, eval_strategy="no")
    assert [Sidecar.load(tmp_path / f"checkpoint-{step}").texts.seen for step in (1, 2, 3)] == [4, 8, 12]


@pytest.mark.slow
def test_a_save_while_corrected_factors_are_live_does_not_change_what_is_measured(pair, tmp_path):
    class Saves(TrainerCallback):
        def on_save(self, args, state, control, model, **kwargs):
            model.save_pretrained(tmp_path / "by-hand")

    histories = []
    for name, others in (("without", []), ("with", [Saves()])):
        train(pair, tmp_path / name, [callback(pair), *others], save_steps=5, eval_strategy="no")
        state = json.loads((tmp_path / name / "checkpoint-8/trainer_state.json").read_text())
        drift = [{k: v for k, v in r.items() if k.startswith("csulora/")} for r in state["log_history"]]
        histories.append(drift)
    assert histories[0] == histories[1]


def test_an_exception_leaves_no_hook_in_the_module(pair, tmp_path):
    class Fails(Callback):
        def on_before_backward(self, trainer, *args):
            if trainer.global_step == 2:
                raise ZeroDivisionError

    module = in_lightning.Module(pair[1])
    with pytest.raises(ZeroDivisionError):
        in_lightning.fit(pair, tmp_path, [callback(pair), Fails()], module, enable_checkpointing=False)
    assert not any(part._forward_pre_hooks for part in module.modules())
