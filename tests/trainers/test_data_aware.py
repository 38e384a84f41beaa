"""A data-aware penalty in real trainers: what is saved is its correction, and training stays bit-identical.

What a checkpoint holds is compared with the dense formula, on the activations of a fresh model with the raw adapter.
"""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from csulora_callback import CSULoRACallback, Penalty, SafetyCorrector, SafetySubspace
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict
from csulora_callback.models.probes import read_prompts, tokenize
from csulora_callback.models.training_rows import ROWS
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers import trl as in_trl
from tests.helpers.lab import DEVICE, RANK, SCALING, Tokens, assert_same, live, make_trainer, raw, saved, with_lora
from tests.method.test_token_space import by_hand

PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]
STRENGTH = 4.0
EVAL = {"eval_strategy": "steps", "eval_steps": 2}


def callback(pair, probes=PROBES, **arguments) -> CSULoRACallback:
    settings = {"rank": RANK, "penalty": Penalty.data_aware(STRENGTH), **arguments}
    return CSULoRACallback(base_model=pair[0], probes=probes, **settings)


def train(pair, output: Path, callbacks: list, resume=None, **arguments):
    # Dropout draws from the global generator at every step: one stray draw by the callback would show.
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1)
    trainer = make_trainer(model, output, callbacks, **{"save_steps": 4, **EVAL, **arguments})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def assert_corrected(pair, corrected: dict, factors: dict, texts: Texts) -> None:
    """``corrected`` is what the dense formula makes of the raw ``factors``."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1])).to(DEVICE)
    adapter = find_adapter(model)
    raw_factors = from_peft_state_dict(factors, list(adapter.layers), "raw")
    adapter.write(raw_factors)
    seen = Activations.read(adapter, texts)
    changed = 0.0
    for name, factors_there in from_peft_state_dict(corrected, list(adapter.layers), "corrected").items():
        (A, B), (raw_A, raw_B) = (factor.cpu() for factor in factors_there), raw_factors[name]
        assert torch.equal(B, raw_B)
        expected = by_hand(raw_A, seen.task[name], seen.probes[name], STRENGTH, 0.1)
        torch.testing.assert_close(A.double(), expected, rtol=1e-4, atol=1e-5)
        changed += (A - raw_A).norm()
    assert changed > 0


def test_checkpoints_are_corrected_and_training_is_bit_identical(pair, tmp_path):
    without, trainer = train(pair, tmp_path / "a", []), train(pair, tmp_path / "b", [callback(pair)])
    for step in (4, 8):
        folder = tmp_path / f"b/checkpoint-{step}"
        assert_same(raw(folder), saved(tmp_path / f"a/checkpoint-{step}"))
        sidecar = Sidecar.load(folder)
        assert sidecar.texts.seen == 4 * step
        assert sidecar.texts.probes == PROBES
        assert_corrected(pair, saved(folder), raw(folder), sidecar.texts)
        assert sidecar.record["penalty"] == {"name": "data_aware", "strength": STRENGTH}
    assert_same(live(trainer.model), saved(folder))
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    losses = [[r["loss"] for r in run.state.log_history if "loss" in r] for run in (without, trainer)]
    assert losses[0] == losses[1]
    drift = [r["csulora/relative_change"] for r in trainer.state.log_history if "loss" in r]
    assert len(drift) == 8
    assert all(math.isfinite(value) and value > 0 for value in drift)


def test_the_rows_are_those_of_the_training_data_as_it_passes(pair, tmp_path):
    train(pair, tmp_path, [callback(pair)], gradient_accumulation_steps=2, max_steps=4, save_steps=4)
    texts = Sidecar.load(tmp_path / "checkpoint-4").texts
    assert texts.seen == len(texts.task) == 4 * 2 * 4 <= ROWS
    assert sorted(texts.task) == sorted(Tokens().tokens.tolist())  # one epoch


def test_evaluation_and_what_follows_the_last_step_see_what_ships(pair, tmp_path):
    trainer = train(pair, tmp_path, [callback(pair)], save_steps=2, load_best_model_at_end=True)
    for record in (r for r in trainer.state.log_history if "eval_loss" in r):
        folder = tmp_path / f"checkpoint-{record['step']}"
        shipped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), folder)
        assert make_trainer(shipped, tmp_path / "by_hand").evaluate()["eval_loss"] == pytest.approx(
            record["eval_loss"], rel=1e-6
        )
    assert_same(live(trainer.model), saved(Path(trainer.state.best_model_checkpoint)))
    trainer.save_model(tmp_path / "shipped")
    assert_same(saved(tmp_path / "shipped"), live(trainer.model))
    assert {file.name for file in (tmp_path / "shipped/csulora").iterdir()} == {
        "correction.json",
        "raw",
    }


def test_a_resumed_run_is_the_uninterrupted_one(pair, tmp_path):
    train(pair, tmp_path / "whole", [callback(pair)])
    train(pair, tmp_path / "parts", [callback(pair)], max_steps=8, save_steps=4)
    for left in (tmp_path / "parts/checkpoint-8").rglob("*"):
        left.is_file() and left.unlink()
    train(pair, tmp_path / "parts", [callback(pair)], resume=tmp_path / "parts/checkpoint-4")
    one, other = tmp_path / "whole/checkpoint-8", tmp_path / "parts/checkpoint-8"
    assert_same(raw(one), raw(other))
    assert_same(saved(one), saved(other))
    assert Sidecar.load(one).texts == Sidecar.load(other).texts
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, other)]
    for mine, expected in zip(*histories, strict=True):
        drift = {key: value for key, value in expected.items() if key.startswith(("csulora/", "loss", "eval_loss"))}
        assert {key: mine[key] for key in drift} == drift


@pytest.mark.slow
def test_rows_of_the_training_data_are_never_uploaded(hub, pair, tmp_path, caplog):
    settings = {"push_to_hub": True, "hub_token": "hf_fake", "hub_strategy": "checkpoint"}
    trainer = train(pair, tmp_path / "model", [callback(pair, push_raw=True)], **settings)
    trainer.push_to_hub()
    folder = tmp_path / "model/checkpoint-8"
    assert Sidecar.load(folder).texts is not None
    assert "last-checkpoint/csulora/raw/adapter_model.safetensors" in hub.files()
    assert not any("texts.json" in path for path in hub.files())

    shutil.copytree(tmp_path / "model/checkpoint-4", tmp_path / "fetched", ignore=shutil.ignore_patterns("texts.json"))
    assert Sidecar.load(tmp_path / "fetched").texts is None
    ours = callback(pair, resume_from=tmp_path / "fetched")
    train(pair, tmp_path / "resumed", [ours], resume=tmp_path / "fetched")
    assert "begins a new sample of the training data" in caplog.text
    assert_same(raw(tmp_path / "resumed/checkpoint-8"), raw(folder))


class SaveByHand(TrainerCallback):
    def __init__(self, folder: Path) -> None:
        self.folder, self.trainer = folder, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            self.trainer.save_model(str(self.folder))


def test_where_evaluations_are_raw_a_save_is_corrected_by_what_the_model_reads_then(pair, tmp_path):
    arguments = {"evaluate_corrected": False, "log_every_n_steps": 100}
    train(pair, tmp_path, [callback(pair, **arguments)], eval_steps=4)
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        texts = Sidecar.load(folder).texts
        assert texts.seen == 4 * step
        assert_corrected(pair, saved(folder), raw(folder), texts)


def test_only_what_is_trained_on_counts_as_the_task(pair, tmp_path):
    class Read(TrainerCallback):
        """Another callback that has the model read, and generate, in the middle of a step."""

        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model(input_ids=torch.full((2, 5), 3, device=DEVICE))
            model.generate(input_ids=torch.full((1, 4), 3, device=DEVICE), max_new_tokens=2)

    train(pair, tmp_path, [Read(), callback(pair)])
    texts = Sidecar.load(tmp_path / "checkpoint-8").texts
    assert sorted(texts.task) == sorted(Tokens().tokens.tolist())


@pytest.mark.slow
def test_an_earlier_checkpoints_texts_do_not_stay_in_a_folder(pair, tmp_path):
    train(pair, tmp_path, [callback(pair)])
    assert (tmp_path / "checkpoint-8/csulora/texts.json").exists()
    train(pair, tmp_path, [callback(pair, probes=None, penalty=Penalty.guard(1.0))])
    assert not list(tmp_path.rglob("texts.json"))


def test_a_save_by_hand_is_corrected(pair, tmp_path):
    by_hand_too = SaveByHand(tmp_path / "by-hand")
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1])).to(DEVICE)
    by_hand_too.trainer = make_trainer(model, tmp_path / "run", [callback(pair), by_hand_too])
    by_hand_too.trainer.train()
    texts = Sidecar.load(tmp_path / "run/checkpoint-8").texts
    assert len(texts.task) == texts.seen == 32  # in order, as no more than are kept
    read = Texts(texts.task[:24], PROBES, 24)
    assert_corrected(pair, saved(tmp_path / "by-hand"), raw(tmp_path / "by-hand"), read)
    assert Sidecar.load(tmp_path / "by-hand").texts is None  # training data stays in checkpoints


@pytest.mark.slow
def test_correcting_every_few_steps_goes_on_from_the_corrected_weights(pair, tmp_path):
    trainer, without = train(pair, tmp_path / "a", [callback(pair, every_n_steps=2)]), train(pair, tmp_path / "b", [])
    losses = [[r["loss"] for r in run.state.log_history if "loss" in r] for run in (trainer, without)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2:] != losses[1][2:]


def test_a_correction_can_be_redone_with_another_strength_from_a_checkpoint(pair, tmp_path):
    train(pair, tmp_path, [callback(pair)])
    sidecar = Sidecar.load(tmp_path / "checkpoint-8")
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1])).to(DEVICE)
    adapter = find_adapter(model)
    adapter.write(sidecar.raw)
    subspace = SafetySubspace.estimate(*pair, target_modules=list(adapter.layers), rank=RANK, progress=False)
    activations = Activations.read(adapter, sidecar.texts)
    norms = []
    for strength in (STRENGTH, 100.0):
        corrector = SafetyCorrector(model, subspace, Penalty.data_aware(strength), activations)
        corrected = corrector.compute().corrected
        excited = [
            (SCALING * B @ A @ activations.probes[name].float().T.to(DEVICE)).norm() ** 2
            for name, (A, B) in corrected.items()
        ]
        norms.append(sum(excited).item())
        if strength == STRENGTH:
            for name, (A, _) in corrected.items():
                key = f"base_model.model.{name}.lora_A.weight"
                torch.testing.assert_close(A.cpu(), saved(tmp_path / "checkpoint-8")[key], rtol=1e-5, atol=1e-6)
    assert norms[1] < norms[0]


def test_a_model_that_never_shows_its_rows_is_warned_about(pair, tmp_path, caplog):
    """Its forward is called past its hooks, as some compiled models' is."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1])).to(DEVICE)
    trainer = make_trainer(model, tmp_path, [callback(pair)], max_steps=2)
    trainer.compute_loss = lambda model, inputs, **kwargs: model.forward(**inputs).loss
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "No row of training data was seen" in caplog.text


BAD = {
    "no probes": ({"probes": None}, "`probes`: expected prompts that are to be refused"),
    "none in the list": ({"probes": []}, "`probes`: expected prompts that are to be refused, but got none"),
    "blank": ({"probes": ["  ", ""]}, "`probes`: expected prompts that are to be refused, but got none"),
    "no file": ({"probes": "nowhere.jsonl"}, "`probes`: no such file: 'nowhere.jsonl'"),
    "no package": ({"probes": "nowhere_at_all:a.csv"}, "`probes`: no installed package 'nowhere_at_all'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused_at_once(pair, case):
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}".replace("(", r"\(")):
        callback(pair, **changed)


def test_a_table_without_prompts_is_refused_and_lines_and_columns_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": " one "}\n{"prompt": "two"}\n{"prompt": ""}\n')
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "c.csv").write_text("question\none\n")
    assert read_prompts(tmp_path / "a.jsonl") == read_prompts(str(tmp_path / "b.txt")) == ["one", "two"]
    with pytest.raises(ValueError, match=r"`probes`: .*c.csv: expected a column 'prompt' or 'text'"):
        read_prompts(tmp_path / "c.csv")


def test_texts_without_a_tokenizer_are_refused_before_training(pair, tmp_path):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1])).to(DEVICE)
    trainer = make_trainer(model, tmp_path / "out", [callback(pair, probes=["how do i"])])
    with pytest.raises(ValueError, match=r"`probes`: expected a tokenizer in .*aligned"):
        trainer.train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_prompts_are_asked_through_the_chat_template(tmp_path):
    words = in_trl.words()
    words.save_pretrained(tmp_path / "plain")
    words.chat_template = "<bos> {{ messages[0]['content'] }} {% if add_generation_prompt %}word9{% endif %}"
    words.save_pretrained(tmp_path / "chat")
    ids = words.convert_tokens_to_ids(["word1", "word2"])
    assert tokenize(["word1 word2"], str(tmp_path / "plain")) == [ids]
    assert tokenize(["word1 word2"], str(tmp_path / "chat")) == [[0, *ids, words.convert_tokens_to_ids("word9")]]


def test_trl_with_prompts_from_a_file(tmp_path, pair):
    in_trl.always_sorry(in_trl.words()).save_pretrained(pair[1])
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"word{i} word{i + 1} word3"}) + "\n" for i in range(9)))
    trainer = in_trl.make_trainer(pair, tmp_path / "out", [callback(pair, probes=file)])
    trainer.train()
    folder = tmp_path / "out/checkpoint-8"
    texts = Sidecar.load(folder).texts
    assert texts.probes == tokenize([f"word{i} word{i + 1} word3" for i in range(9)], str(pair[1]))
    assert all(2 not in row for row in texts.task)  # no padding
    assert_corrected(pair, saved(folder), raw(folder), texts)


def test_in_lightning(pair, tmp_path):
    fit = in_lightning.fit
    checkpoints = ModelCheckpoint
    without = fit(pair, tmp_path / "a", [checkpoints(tmp_path / "a", "{step}", every_n_train_steps=4, save_top_k=-1)])
    both = [callback(pair), checkpoints(tmp_path / "b", "{step}", every_n_train_steps=4, save_top_k=-1)]
    trainer = fit(pair, tmp_path / "b", both)
    assert trainer.losses == without.losses
    for step in (4, 8):
        file = tmp_path / f"b/step={step}.ckpt"
        state, factors = in_lightning.factors_in(file)
        assert_same(factors, in_lightning.factors_in(tmp_path / f"a/step={step}.ckpt")[0])
        texts = Texts.from_json(torch.load(file, weights_only=True)["csulora"]["texts"])
        assert texts.seen == 4 * step
        assert_corrected(pair, state, factors, texts)
        assert_same(saved(file.with_suffix(".adapter")), state)
        assert Sidecar.load(file.with_suffix(".adapter")).texts is None  # training data stays in checkpoints
    # Lightning keeps no generator, so that dropout draws anew after a resume: the run without us is the measure.
    again, twin = (
        [*mine, checkpoints(tmp_path / name, "{step}", every_n_train_steps=4, save_top_k=-1)]
        for name, mine in (("c", [callback(pair)]), ("d", []))
    )
    resumed = fit(pair, tmp_path / "c", again, ckpt_path=tmp_path / "b/step=4.ckpt")
    assert resumed.losses == fit(pair, tmp_path / "d", twin, ckpt_path=tmp_path / "a/step=4.ckpt").losses
    state, factors = in_lightning.factors_in(tmp_path / "c/step=8.ckpt")
    assert_same(factors, in_lightning.factors_in(tmp_path / "d/step=8.ckpt")[0])
    assert Texts.from_json(torch.load(tmp_path / "c/step=8.ckpt", weights_only=True)["csulora"]["texts"]) == texts
    assert_corrected(pair, state, factors, texts)


def test_nan_in_the_factors_saves_the_raw_adapter_and_does_not_stop_the_run(pair, tmp_path, caplog):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                next(p for n, p in model.named_parameters() if "lora_B" in n).data.fill_(math.nan)

    with caplog.at_level(logging.WARNING):
        train(pair, tmp_path, [callback(pair), Break()])
    assert "hold NaN or Inf" in caplog.text
    folder = tmp_path / "checkpoint-4"
    record = Sidecar.load(folder).record
    assert record["status"].startswith("not corrected")
    for key, value in saved(folder).items():
        assert torch.equal(value.nan_to_num(7.0), raw(folder)[key].nan_to_num(7.0))
