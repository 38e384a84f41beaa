"""Rows with images: what is read of the task is what went into the modules in training, or the row is left out."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter
from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from tests.helpers.lab import TRAINING, align, assert_same, live, raw, saved
from tests.helpers.vision import IMAGE, MODELS, Pictures
from tests.method.test_token_space import by_hand

STRENGTH = 4.0
PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]
TWO = ["llava", "qwen"]
EACH_ONE = [1] * 8
MIXED = [1, 2, 0, 1, 0, 3, 1, 0]
LANGUAGE = r".*(language_model|text_model).*\.(q_proj|down_proj)"


class Overhear(TrainerCallback):
    """Second moments of what enters adapted modules in the training steps, padding left out."""

    def __init__(self) -> None:
        self.moments, self.hooks, self.mask = {}, [], None

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.hooks.append(model.register_forward_pre_hook(self.begin, with_kwargs=True))
        for name, layer in find_adapter(model).layers.items():
            self.hooks.append(layer.module.register_forward_pre_hook(lambda m, a, name=name: self.hear(name, a[0])))

    def begin(self, model, args, kwargs):
        self.mask = kwargs["attention_mask"].bool() if torch.is_grad_enabled() else None

    def hear(self, name, vectors):
        if self.mask is not None:
            own = vectors.detach()[self.mask].double()
            self.moments[name] = self.moments.get(name, 0) + own.T @ own


def model_of(kind: str, target_modules=LANGUAGE):
    model = align(MODELS[kind]())
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, task_type="CAUSAL_LM"))


def train(kind, images, output, callbacks=(), target_modules=LANGUAGE, batch=2, resume=None, **arguments):
    data = Pictures(images, kind)
    steps = len(data) // batch
    # Weights stay as they are, so that all steps are of one model.
    settings = {**TRAINING, "max_steps": steps, "save_steps": steps, "learning_rate": 0.0, **arguments}
    trainer = Trainer(
        model=model_of(kind, target_modules),
        args=TrainingArguments(**{**settings, "output_dir": str(output), "per_device_train_batch_size": batch}),
        train_dataset=data,
        data_collator=data.collate,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def callback(kind, **arguments):
    settings = {"penalty": Penalty.data_aware(STRENGTH), "probes": PROBES, "rank": 3, **arguments}
    return CSULoRACallback(base_model=MODELS[kind](), **settings)


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def assert_read_as_trained(trainer, overheard):
    for name, vectors in trainer.csulora.activations.task.items():
        read = vectors.double().T @ vectors.double()
        assert cosine(read, overheard.moments[name]) > 0.9999, name
        torch.testing.assert_close(read, overheard.moments[name], rtol=0.02, atol=0.02 * read.abs().max().item())


def run(kind, images, output, **settings):
    """Of a callback that is asked before training ends, as what it measured by goes with the corrected weights."""
    ours, overheard = callback(kind), Overhear()
    trainer = train(kind, images, output, [overheard, ours], **settings)
    trainer.csulora = ours._corrector
    return trainer, overheard


ONE_EACH = [pytest.param(kind, EACH_ONE, 2, marks=() if kind == "qwen" else pytest.mark.slow) for kind in MODELS]
SEVERAL = [pytest.param(kind, MIXED, 2 if kind == "qwen" else 1, marks=pytest.mark.slow) for kind in MODELS]


@pytest.mark.parametrize(("kind", "images", "batch"), ONE_EACH + SEVERAL)
def test_rows_are_read_with_their_images(kind, images, batch, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, overheard = run(kind, images, tmp_path, batch=batch)
    assert_read_as_trained(trainer, overheard)
    texts = trainer.csulora.activations.texts
    assert (texts.seen, texts.left_out) == (8, 0)
    assert len(texts.inputs) == sum(map(bool, images))
    assert "not in the sample" not in caplog.text


@pytest.mark.slow
def test_rows_of_which_no_one_knows_whose_images_they_are_are_left_out(tmp_path, caplog):
    """Two rows and two images, both of the first row: the same shapes as one each."""
    images = [1, 1, 2, 0, 0, 2, 1, 2]
    with caplog.at_level(logging.WARNING):
        trainer, _ = run("llava", images, tmp_path, train_sampling_strategy="sequential")
    texts = trainer.csulora.activations.texts
    assert [row.count(IMAGE) for row in texts.task] == [4, 4, 0, 0]
    assert sorted(texts.inputs) == [0, 1]
    assert (texts.seen, texts.left_out) == (4, 4)
    assert caplog.text.count("rows of training data are not in the sample") == 1
    record = Sidecar.load(tmp_path / "checkpoint-4").record
    assert (record["left_out_rows"], record["rows_with_inputs"]) == (4, [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
def test_training_is_bit_identical_and_a_checkpoint_is_the_correction(kind, tmp_path):
    settings = {"learning_rate": 2e-2, "save_steps": 2}
    ours = callback(kind)
    without = train(kind, EACH_ONE, tmp_path / "a", **settings)
    trainer = train(kind, EACH_ONE, tmp_path / "b", [ours], **settings)
    assert_same(raw(tmp_path / "b/checkpoint-4"), saved(tmp_path / "a/checkpoint-4"))
    corrected, trained = saved(tmp_path / "b/checkpoint-4"), raw(tmp_path / "b/checkpoint-4")
    assert_same(live(trainer.model), corrected)
    assert_same(live(without.model), trained)
    seen = ours._corrector.activations
    for name, task in seen.task.items():
        key = f"base_model.model.{name}.lora_A.weight"
        expected = by_hand(trained[key], task, seen.probes[name], STRENGTH, 0.1)
        torch.testing.assert_close(corrected[key].double(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(corrected[key], trained[key])


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
def test_the_loss_on_the_task_is_that_of_training(kind, tmp_path):
    ours = callback(kind, penalty=Penalty.guard(4.0))
    trainer = train(kind, EACH_ONE, tmp_path, [ours], batch=1)
    record = next(record for record in trainer.state.log_history if "csulora/task_loss" in record)
    rows, losses = Pictures(EACH_ONE, kind), []
    for row in rows:
        batch = {name: value.to(trainer.model.device) for name, value in rows.collate([row]).items()}
        with torch.no_grad():
            losses += [trainer.model(**batch).loss.item()] * (len(row["input_ids"]) - 1)
    assert record["csulora/task_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
def test_modules_of_a_vision_tower_are_left_as_they_are_and_said_so(kind, tmp_path, caplog):
    target = r".*(q_proj|down_proj|qkv)" if kind == "qwen" else r".*(q_proj|down_proj)"
    with caplog.at_level(logging.WARNING):
        train(kind, EACH_ONE, tmp_path, [callback(kind)], target_modules=target, learning_rate=2e-2)
    assert caplog.text.count("No prompt reaches 2 of 6 adapted modules") == 1
    corrected, trained = saved(tmp_path / "checkpoint-4"), raw(tmp_path / "checkpoint-4")
    changed = {name for name in corrected if not torch.equal(corrected[name], trained[name])}
    assert changed == {name for name in corrected if "language_model" in name and "lora_A" in name}


@pytest.mark.slow
def test_a_resumed_run_trains_the_same_and_does_not_read_placeholders_as_text(tmp_path, caplog):
    images, settings = [1, 0, 1, 1, 0, 1, 0, 1], {"learning_rate": 2e-2, "save_steps": 4, "batch": 1}
    train("llava", images, tmp_path / "whole", [callback("llava")], **settings)
    stopped = tmp_path / "parts/checkpoint-4"
    train("llava", images, tmp_path / "parts", [callback("llava")], **settings)
    kept = Sidecar.load(stopped).texts
    ours = callback("llava")
    with caplog.at_level(logging.WARNING):
        train("llava", images, tmp_path / "parts", [ours], resume=str(stopped), **settings)
    assert_same(raw(tmp_path / "whole/checkpoint-8"), raw(tmp_path / "parts/checkpoint-8"))
    texts = ours._corrector.activations.texts
    assert texts.seen == 8
    assert set(texts.unreadable) == set(kept.inputs)
    assert not any(IMAGE in row and not own for row, _, own in zip(*texts.counted, strict=True))
    assert "sampled rows came with images or audio, which checkpoints do not hold" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", TWO)
def test_after_training_rows_that_had_images_are_not_read(kind, tmp_path, caplog):
    base, aligned = tmp_path / "base", tmp_path / "aligned"
    MODELS[kind]().save_pretrained(base)
    align(MODELS[kind]()).save_pretrained(aligned)
    images, settings = [1, 0, 1, 1, 0, 1, 0, 1], {"learning_rate": 2e-2, "batch": 1}
    trainer = train(kind, images, tmp_path / "run", [callback(kind)], **settings)
    checkpoint = tmp_path / "run/checkpoint-8"
    subspace = SafetySubspace.estimate(base, aligned, list(find_adapter(trainer.model).layers), rank=3, progress=False)
    penalty, again = Penalty.data_aware(STRENGTH), tmp_path / "again"
    with caplog.at_level(logging.WARNING):
        correct_adapter(checkpoint, subspace, again, penalty, aligned_model=aligned)
    assert "5 of 8 rows of the task came with images or audio" in caplog.text
    texts = [row for row in Sidecar.load(checkpoint).texts.task if IMAGE not in row]
    given = {"aligned_model": aligned, "probes": PROBES, "task": texts}
    correct_adapter(checkpoint, subspace, tmp_path / "texts", penalty, **given)
    assert_same(saved(again), saved(tmp_path / "texts"))
    assert not torch.equal(*(next(iter(saved(folder).values())) for folder in (again, checkpoint)))
