"""Rows that the aligned model refuses are no part of the task in real trainers; which ones is judged independently."""

import json
import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, aligned_answers, correct_adapter
from csulora_callback.models.activations import Texts
from csulora_callback.models.probes import tokenize
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers import small_talk
from tests.helpers.behaviour import by_hand
from tests.helpers.lab import RANK, TARGETS, assert_same, make_trainer, raw, saved, with_lora
from tests.helpers.refusing import HARMLESS, RESTRICTED, Answered, is_refused, save_pair
from tests.trainers.test_data_aware import EVAL, STRENGTH, assert_corrected

REFUSED = "csulora/refused_rows"
LOSSES = ("loss", "eval_loss")
DATA_AWARE = Penalty.data_aware(STRENGTH)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def callback(pair, **arguments) -> CSULoRACallback:
    settings = {"rank": RANK, "penalty": DATA_AWARE, "probes": RESTRICTED, "cache_dir": pair[0].parent / "cache"}
    return CSULoRACallback(base_model=pair[0], **{**settings, **arguments})


def train(pair, output: Path, callbacks: list, resume=None, **arguments):
    # Dropout draws from the global generator at every step: one stray draw by the callback would show.
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1)
    trainer = make_trainer(model, output, callbacks, **{"save_steps": 4, **EVAL, **arguments})
    trainer.train_dataset = trainer.eval_dataset = Answered()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def without_refused(pair, texts: Texts) -> Texts:
    """Only the rows that count, by what the aligned model generates for each."""
    prompts = [row[:start] for row, start in zip(texts.task, texts.starts, strict=True)]
    refused = [place for place, verdict in enumerate(is_refused(pair[1], prompts)) if verdict]
    assert list(texts.refused) == refused != []
    assert list(texts.screened) == list(range(len(texts.task)))
    kept = [place for place in range(len(texts.task)) if place not in refused]
    return Texts([texts.task[p] for p in kept], texts.probes, texts.seen, [texts.starts[p] for p in kept])


def curves(trainer) -> list[dict]:
    return [{k: v for k, v in r.items() if "csulora" in k or k in LOSSES} for r in trainer.state.log_history]


@pytest.mark.parametrize("penalty", [DATA_AWARE, pytest.param(Penalty.guard(2.0), marks=pytest.mark.slow)])
def test_they_are_left_out_counted_and_named_and_training_is_bit_identical(pair, tmp_path, caplog, penalty):
    without = train(pair, tmp_path / "a", [])
    with caplog.at_level(logging.WARNING):
        trainer = train(pair, tmp_path / "b", [callback(pair, penalty=penalty)])
    assert [r["loss"] for r in curves(trainer) if "loss" in r] == [r["loss"] for r in curves(without) if "loss" in r]
    for step in (4, 8):
        folder = tmp_path / f"b/checkpoint-{step}"
        assert_same(raw(folder), saved(tmp_path / f"a/checkpoint-{step}"))
        sidecar = Sidecar.load(folder)
        texts = sidecar.texts
        kept = without_refused(pair, texts)
        assert sidecar.record["refused_rows"] == {"screened": 4 * step, "places": texts.refused}
        if penalty is DATA_AWARE:
            assert_corrected(pair, saved(folder), raw(folder), kept)
        (said,) = (r for r in trainer.state.log_history if r["step"] == step and REFUSED in r)
        assert said[REFUSED] == len(texts.refused) / (4 * step)
        (evaluated,) = (r for r in trainer.state.log_history if r["step"] == step and f"eval_{REFUSED}" in r)
        for key, value in by_hand(pair[1], raw(folder), saved(folder), kept).items():
            assert said[key] == evaluated[f"eval_{key}"] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert texts.seen == 32
    assert len(texts.refused) == 8
    warnings = [line for line in caplog.messages if "sampled rows of training data have a prompt" in line]
    assert len(warnings) == 1
    assert "tell of the" in warnings[0]


def test_where_the_loss_counts_whole_rows_it_says_that_none_is_screened(pair, tmp_path, caplog):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    trainer = make_trainer(model, tmp_path, [callback(pair)], max_steps=4, save_steps=2)
    trainer.train_dataset = [{**row, "labels": row["input_ids"]} for row in Answered()]
    trainer.train()
    assert Sidecar.load(tmp_path / "checkpoint-4").texts.screened == []
    (said,) = (line for line in caplog.messages if "not screened" in line)
    assert said.endswith(f"csulora screen DATA --model {pair[1]}")


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(pair, tmp_path, monkeypatch):
    more = {"max_steps": 12}  # rows come by again
    whole = train(pair, tmp_path / "whole", [callback(pair)], **more)
    start = tmp_path / "whole/checkpoint-4"
    asked, answer = [], aligned_answers.greedy_answers
    monkeypatch.setattr(aligned_answers, "greedy_answers", lambda *a: asked.extend(a[1]) or answer(*a))
    resumed = train(pair, tmp_path / "parts", [callback(pair, resume_from=start)], resume=start, **more)
    texts = Sidecar.load(start).texts
    known = {tuple(row[:length]) for row, length in zip(texts.task, texts.starts, strict=True)}
    assert asked
    assert known.isdisjoint(asked)  # the checkpoint says it of them
    one, other = tmp_path / "whole/checkpoint-12", tmp_path / "parts/checkpoint-12"
    assert_same(raw(one), raw(other))
    assert_same(saved(one), saved(other))
    assert Sidecar.load(one).texts == Sidecar.load(other).texts
    assert curves(whole) == curves(resumed)


def test_after_training_the_same_rows_stay_left_out(pair, tmp_path):
    train(pair, tmp_path, [callback(pair)], max_steps=4)
    folder = tmp_path / "checkpoint-4"
    subspace = SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)
    for name, penalty in (("same", DATA_AWARE), ("guard", Penalty.guard(2.0))):
        correct_adapter(folder, subspace, tmp_path / name, penalty)
        assert Sidecar.load(tmp_path / name).texts is None
    assert_same(saved(tmp_path / "same"), saved(folder))
    record, again, guard = (Sidecar.load(place).record for place in (folder, tmp_path / "same", tmp_path / "guard"))
    assert again["refused_rows"] == guard["refused_rows"] == record["refused_rows"]
    assert again["metrics"] == record["metrics"]


@pytest.mark.slow
def test_rows_given_from_outside_are_screened_where_their_prompt_can_be_told(pair, tmp_path, caplog):
    train(pair, tmp_path, [], max_steps=4)
    subspace = SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)
    prompts, answer = [RESTRICTED[0], HARMLESS[0], RESTRICTED[3], HARMLESS[1]], small_talk.story("cat", "sees", "fox")
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": answer}] for p in prompts]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in turns))
    words = small_talk.tokenizer()
    ids = [words(f"<bos> {prompt} ? {answer} <eos>").input_ids for prompt in prompts]
    probes = tokenize(RESTRICTED, str(pair[1]))
    made = {}
    for name, task in {"messages": tmp_path / "task.jsonl", "kept": [ids[1], ids[3]], "all": ids}.items():
        done = correct_adapter(
            tmp_path / "checkpoint-4", subspace, tmp_path / name, DATA_AWARE, probes=probes, task=task
        )
        made[name] = done.record.get("refused_rows")
    assert made == {"messages": {"screened": 4, "places": [0, 2]}, "kept": None, "all": None}
    assert_same(saved(tmp_path / "messages"), saved(tmp_path / "kept"))
    assert any(not torch.equal(x, saved(tmp_path / "all")[key]) for key, x in saved(tmp_path / "kept").items())
    assert "2 of 4 sampled rows of training data have a prompt that the aligned model refuses" in caplog.text


@pytest.mark.slow
def test_where_probes_are_token_ids_all_rows_count(pair, tmp_path):
    trainer = train(pair, tmp_path, [callback(pair, probes=tokenize(RESTRICTED, str(pair[1])))], max_steps=4)
    sidecar = Sidecar.load(tmp_path / "checkpoint-4")
    assert (sidecar.texts.screened, sidecar.texts.refused) == ([], [])
    assert "refused_rows" not in sidecar.record
    assert not any(REFUSED in record for record in trainer.state.log_history)
    assert_corrected(pair, saved(tmp_path / "checkpoint-4"), raw(tmp_path / "checkpoint-4"), sidecar.texts)


@pytest.mark.slow
def test_in_lightning(pair, tmp_path):
    def fit(name: str, ours: list, resume=None):
        checkpoints = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=4, save_top_k=-1)
        return in_lightning.fit(pair, tmp_path / name, [*ours, checkpoints], ckpt_path=resume, rows=Answered())

    without, trainer = fit("a", []), fit("b", [callback(pair)])
    assert trainer.losses == without.losses
    seen = {}
    for step in (4, 8):
        file = tmp_path / f"b/step={step}.ckpt"
        state, factors = in_lightning.factors_in(file)
        assert_same(factors, in_lightning.factors_in(tmp_path / f"a/step={step}.ckpt")[0])
        held = torch.load(file, weights_only=True)["csulora"]
        seen[step] = Texts.from_json(held["texts"])
        assert_corrected(pair, state, factors, without_refused(pair, seen[step]))
        assert held["record"]["refused_rows"] == {"screened": 4 * step, "places": list(seen[step].refused)}
        assert Sidecar.load(file.with_suffix(".adapter")).record["refused_rows"] == held["record"]["refused_rows"]
    assert trainer.callback_metrics[REFUSED].item() == pytest.approx(len(seen[8].refused) / 32)
    fit("c", [callback(pair)], resume=tmp_path / "b/step=4.ckpt")
    assert Texts.from_json(torch.load(tmp_path / "c/step=8.ckpt", weights_only=True)["csulora"]["texts"]) == seen[8]
