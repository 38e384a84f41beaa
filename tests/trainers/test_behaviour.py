"""Behaviour is a curve beside the loss in real trainers: numbers of the right weights, and training untouched."""

import csv
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, EarlyStoppingCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.models.activations import Texts
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers import trl as in_trl
from tests.helpers.averages import MovingAverage
from tests.helpers.behaviour import PROBES, REFUSAL, TASK, by_hand
from tests.helpers.lab import (
    RANK,
    TRAINING,
    Tokens,
    assert_same,
    live,
    make_trainer,
    raw,
    saved,
    saved_pair,
    with_lora,
)
from tests.trainers.test_data_aware import EVAL
from tests.trainers.test_others_inside import SCHEDULE_FREE

KEYS = REFUSAL | TASK
KEPT = "csulora/refusal_kept_corrected"


def callback(pair, **arguments) -> CSULoRACallback:
    settings = {"rank": RANK, "penalty": Penalty.guard(2.0), "probes": PROBES, "cache_dir": pair[0].parent / "cache"}
    return CSULoRACallback(base_model=pair[0], **{**settings, **arguments})


def train(pair, output: Path, callbacks: list, resume=None, **arguments):
    # Dropout draws from the global generator at every step: one stray draw by the callback would show.
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1)
    trainer = make_trainer(model, output, callbacks, **{"save_steps": 4, **EVAL, **arguments})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def behaviour(record: dict, prefix: str = "") -> dict[str, float]:
    return {key: record[prefix + key] for key in KEYS if prefix + key in record}


def losses(trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_every_evaluation_and_save_says_it_and_training_is_bit_identical(pair, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    without = train(pair, tmp_path / "a", [])
    best = {"load_best_model_at_end": True, "metric_for_best_model": f"eval_{KEPT}", "greater_is_better": True}
    budget = {"max_drift": {"csulora/update_norm": 1e3}, "min_refusal": 0.01, "on_exceed": "stop"}  # not exceeded
    ours = [callback(pair, heat_maps=True, **budget), EarlyStoppingCallback(early_stopping_patience=100)]
    trainer = train(pair, tmp_path / "b", ours, report_to=["tensorboard"], **best)
    assert losses(trainer) == losses(without)

    evaluated = {r["step"]: behaviour(r, "eval_") for r in trainer.state.log_history if "eval_loss" in r}
    at_saves = {r["step"]: behaviour(r) for r in trainer.state.log_history if behaviour(r)}
    assert list(evaluated) == [2, 4, 6, 8]
    assert list(at_saves) == [4, 8]
    assert trainer.state.best_metric == max(values[KEPT] for values in evaluated.values())
    for step, values in at_saves.items():
        folder = tmp_path / f"b/checkpoint-{step}"
        assert_same(raw(folder), saved(tmp_path / f"a/checkpoint-{step}"))
        texts = Sidecar.load(folder).texts
        assert texts.seen == 4 * step
        assert values == pytest.approx(by_hand(pair[1], raw(folder), saved(folder), texts), rel=1e-3)
        assert values == evaluated[step]
        assert values["csulora/task_kl"] > 0
        written = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert [behaviour(record) for record in written if record["step"] == step and behaviour(record)] == [values]
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    for tag, curve in (("eval", evaluated), ("train", at_saves)):
        assert [(e.step, e.value) for e in events.Scalars(f"{tag}/{KEPT}")] == [
            (step, pytest.approx(values[KEPT], rel=1e-6)) for step, values in curve.items()
        ]


@pytest.mark.slow
def test_log_records_say_it_every_so_many_steps_if_asked(pair, tmp_path):
    arguments = {"eval_strategy": "no", "save_strategy": "no"}
    history = train(pair, tmp_path, [callback(pair, probe_every_n_steps=3)], **arguments).state.log_history
    assert {r["step"] for r in history if behaviour(r)} == {3, 6}
    assert all("loss" in record for record in history if behaviour(record))


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [Penalty.guard(2.0), Penalty.data_aware(2.0)])
def test_a_resumed_run_says_what_the_uninterrupted_one_says(pair, tmp_path, penalty):
    whole = train(pair, tmp_path / "whole", [callback(pair, penalty=penalty)])
    start = tmp_path / "whole/checkpoint-4"
    resumed = train(pair, tmp_path / "parts", [callback(pair, penalty=penalty, resume_from=start)], resume=start)
    histories = [
        [(r["step"], behaviour(r), behaviour(r, "eval_")) for r in trainer.state.log_history if r["step"] > 4]
        for trainer in (whole, resumed)
    ]
    assert histories[0] == histories[1]
    assert any(values for _, values, _ in histories[0])


@pytest.mark.parametrize("evaluate_corrected", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_beside_a_moving_average_it_is_of_the_average(pair, tmp_path, evaluate_corrected):
    ours = callback(pair, evaluate_corrected=evaluate_corrected)
    trainer = train(pair, tmp_path, [MovingAverage("on_save"), ours], save_steps=2)
    for step in (4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        expected = by_hand(pair[1], raw(folder), saved(folder), Sidecar.load(folder).texts)
        for prefix in ("", "eval_"):
            said = [behaviour(r, prefix) for r in trainer.state.log_history if r["step"] == step]
            assert [values for values in said if values] == [pytest.approx(expected, rel=1e-3)]


@pytest.mark.slow
def test_of_an_optimizer_that_keeps_other_weights_for_evaluations_it_is_of_those(pair, tmp_path):
    trainer = train(pair, tmp_path, [callback(pair)], save_steps=2, **SCHEDULE_FREE)
    for step in (4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        expected = by_hand(pair[1], raw(folder), saved(folder), Sidecar.load(folder).texts)
        for prefix in ("", "eval_"):
            said = [behaviour(r, prefix) for r in trainer.state.log_history if r["step"] == step]
            assert [values for values in said if values] == [pytest.approx(expected, rel=1e-3)]


class Everywhere(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None


@pytest.mark.parametrize("order", ["first", pytest.param("last", marks=pytest.mark.slow)])
def test_in_lightning_monitors_and_loggers_have_it_of_what_is_validated_and_saved(pair, tmp_path, order):
    def fit(name: str, ours: list):
        average = Everywhere()
        best = ModelCheckpoint(tmp_path / name, "{step}", monitor=KEPT if ours else None, mode="max", save_top_k=-1)
        stop = [EarlyStopping(KEPT, patience=100, mode="max")] if ours else []
        listed = [*ours, average] if order == "first" else [average, *ours]
        logger = CSVLogger(tmp_path / name, name="", version="csv")
        trainer = in_lightning.fit(pair, tmp_path / name, [*listed, best, *stop], logger=logger)
        return trainer, best

    (without, _), (trainer, best) = fit("a", []), fit("b", [callback(pair)])
    assert trainer.losses == without.losses
    with (tmp_path / "b/csv/metrics.csv").open() as file:
        rows = {int(r["step"]): r for r in csv.DictReader(file) if r.get(KEPT) and not r["loss"]}
    for step in (4, 8):
        path = tmp_path / f"b/step={step}.ckpt"
        state, factors = in_lightning.factors_in(path)
        assert_same(factors, in_lightning.factors_in(tmp_path / f"a/step={step}.ckpt")[0])
        texts = Texts.from_json(torch.load(path, weights_only=True)["csulora"]["texts"])
        expected = by_hand(pair[1], factors, state, texts)
        logged = [{key: float(row[key]) for key in KEYS} for at, row in rows.items() if at == step - 1]
        assert logged, rows.keys()
        assert all(values == pytest.approx(expected, rel=1e-3) for values in logged)
        assert best.best_k_models[str(path)] == pytest.approx(expected[KEPT])


# TRL.


@pytest.fixture(scope="module")
def words_pair(tmp_path_factory):
    base, aligned = saved_pair(tmp_path_factory.mktemp("pair"))
    in_trl.words().save_pretrained(aligned)
    return base, aligned


def preferences(count: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"word{i} word1", "chosen": f"word{i + 2} word3", "rejected": f"word{i % 5} word4 word5"}
            for i in range(count)
        ]
    )


def reward(completions, **kwargs) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def in_dpo(pair, output: Path, callbacks: list):
    args = DPOConfig(**settings(output), max_length=16)
    return trl(DPOTrainer, pair, args, callbacks)


def in_grpo(pair, output: Path, callbacks: list):
    sizes = {"num_generations": 2, "max_completion_length": 4, "per_device_eval_batch_size": 4, "temperature": 1.0}
    args = GRPOConfig(**settings(output), **sizes)
    return trl(GRPOTrainer, pair, args, callbacks, reward_funcs=reward)


def settings(output: Path) -> dict:
    training = {**TRAINING, "max_steps": 4, "save_steps": 2, "logging_steps": 4}
    # The first save is without an evaluation: what TRL gathers while the model trains goes on gathering.
    return {**training, "eval_strategy": "steps", "eval_steps": 4, "output_dir": str(output), "bf16": False}


def trl(kind, pair, args, callbacks: list, **more):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1)
    words = in_trl.words()
    data = {"train_dataset": preferences(), "eval_dataset": preferences(4)}
    trainer = kind(model=model, args=args, processing_class=words, callbacks=callbacks, **data, **more)
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("make", [in_dpo, in_grpo])
def test_in_trl_training_and_what_it_logs_itself_stay_the_same(words_pair, tmp_path, make):
    budget = {"max_drift": {"csulora/update_norm": 1e3}, "min_refusal": 0.01, "on_exceed": "stop"}  # not exceeded
    ours = callback(words_pair, penalty=Penalty.guard, target=0.999, heat_maps=True, **budget)
    without, trainer = make(words_pair, tmp_path / "a", []), make(words_pair, tmp_path / "b", [ours])
    mine, plain = (
        [{k: v for k, v in r.items() if "csulora" not in k and "eval" not in k} for r in run.state.log_history]
        for run in (trainer, without)
    )
    clocks = ("runtime", "per_second", "step_time", "tokens_per", "profiling")
    for record in (*mine, *plain):
        for key in [key for key in record if any(clock in key for clock in clocks)]:
            del record[key]
    logged = [record for record in mine if len(record) > 2]
    assert logged == [record for record in plain if len(record) > 2]
    assert any("loss" in record for record in logged)
    for step in (2, 4):
        assert_same(raw(tmp_path / f"b/checkpoint-{step}"), saved(tmp_path / f"a/checkpoint-{step}"))
    assert {r["step"] for r in trainer.state.log_history if behaviour(r).keys() == KEYS} == {2, 4}
    assert {r["step"] for r in trainer.state.log_history if behaviour(r, "eval_").keys() == KEYS} == {4}
    assert_same(live(trainer.model), saved(tmp_path / "b/checkpoint-4"))


@pytest.mark.slow
def test_a_supervised_run_counts_the_answers_alone(words_pair, tmp_path):
    """Where labels mask the prompt, so does the loss on the task."""
    rows = [{"prompt": f"word{i} word1 word2", "completion": f" word{i} word3"} for i in range(16)]
    args = SFTConfig(**{**settings(tmp_path), "max_steps": 2, "eval_strategy": "no"})
    model = with_lora(AutoModelForCausalLM.from_pretrained(words_pair[1]))
    common = {"model": model, "args": args, "processing_class": in_trl.words()}
    SFTTrainer(**common, train_dataset=Dataset.from_list(rows), callbacks=[callback(words_pair)]).train()
    texts = Sidecar.load(tmp_path / "checkpoint-2").texts
    assert list(texts.starts) == [3] * 8
    assert {len(row) for row in texts.task} == {6}  # and an end


@pytest.mark.slow
def test_what_came_by_without_labels_counts_whole(pair, tmp_path):
    train(pair, tmp_path, [callback(pair)], max_steps=2, save_steps=2, eval_strategy="no")
    texts = Sidecar.load(tmp_path / "checkpoint-2").texts
    assert list(texts.starts) == [0] * 8
    assert all(row in Tokens().tokens.tolist() for row in texts.task)
