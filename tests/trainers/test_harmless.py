"""Harmless prompts beside the probes, in real trainers: what is saved is the dense formula with both in ``C_T``."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, correct_adapter
from csulora_callback.models.activations import Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers import trl as in_trl
from tests.helpers.harmless import by_hand
from tests.helpers.huggingface import losses, train
from tests.helpers.lab import RANK, assert_same, raw, saved, with_lora

START = 2  # all prompts begin with 0, 3
PROBES = [[0, 3, 5, 6, 7], [0, 3, 9], [0, 3, 4, 11, 12, 13]]
HARMLESS = [[0, 3, 5, 8, 7], [0, 3, 10, 10, 6]]
PENALTY = Penalty.data_aware(4.0)
SHORT = {"max_steps": 4, "save_steps": 2}


def callback(pair, **arguments) -> CSULoRACallback:
    settings = {"rank": RANK, "penalty": PENALTY, "probes": PROBES, "harmless": HARMLESS, **arguments}
    return CSULoRACallback(base_model=pair[0], **settings)


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """One run without the callback, in ``plain``, and with it: with harmless prompts and ``without``."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"plain": [], "with": [callback(pair)], "without": [callback(pair, harmless=None)]}
    trained = {kind: train(pair, folder / kind, callbacks, **SHORT) for kind, callbacks in kinds.items()}
    assert losses(trained["plain"]) == losses(trained["with"])
    return folder


def assert_corrected(pair, corrected: dict, factors: dict, texts: Texts, other: dict | None = None) -> None:
    """``corrected`` is what the dense formula makes of the raw ``factors``, and far from what is ``other``."""
    adapter = find_adapter(with_lora(AutoModelForCausalLM.from_pretrained(pair[1])))
    adapter.write(from_peft_state_dict(factors, list(adapter.layers), "raw"))
    for name, expected in by_hand(adapter.model, texts, START, 4.0).items():
        key = f"base_model.model.{name}.lora_A.weight"
        bound = 1.5e-2 * expected.norm()  # vectors are bfloat16
        assert (corrected[key].cpu() - expected).norm() < bound, name
        assert other is None or (other[key] - expected).norm() > 4 * bound, name


def test_a_checkpoint_holds_the_correction_by_both_and_training_is_bit_identical(runs, pair):
    for step in (2, 4):
        folder, without = (runs / f"{kind}/checkpoint-{step}" for kind in ("with", "without"))
        texts = Sidecar.load(folder).texts
        assert (texts.probes, texts.harmless) == (PROBES, HARMLESS)
        assert_same(raw(folder), saved(runs / f"plain/checkpoint-{step}"))
        assert_corrected(pair, saved(folder), raw(folder), texts, other=saved(without))


def test_after_training_what_the_checkpoint_kept_gives_the_same_bytes(runs, subspace, tmp_path):
    for step in (2, 4):
        folder = runs / f"with/checkpoint-{step}"
        done = correct_adapter(folder, subspace, tmp_path / f"kept-{step}", PENALTY)
        assert (done.output / "adapter_model.safetensors").read_bytes() == read(folder)
    texts, plain = Sidecar.load(folder).texts, runs / "plain/checkpoint-4"
    given = {"probes": texts.probes, "task": texts.task}
    (tmp_path / "harmless.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in HARMLESS))
    correct_adapter(plain, subspace, tmp_path / "given", PENALTY, **given, harmless=tmp_path / "harmless.jsonl")
    assert read(tmp_path / "given") == read(folder)
    correct_adapter(plain, subspace, tmp_path / "without", PENALTY, **given)
    assert read(tmp_path / "without") == read(runs / "without/checkpoint-4")
    # Others in the place of those that were kept.
    correct_adapter(folder, subspace, tmp_path / "other", PENALTY, harmless=[[0, 3, 20]])
    assert read(tmp_path / "other") not in (read(folder), read(tmp_path / "without"))


def read(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("given", [pytest.param(HARMLESS, marks=pytest.mark.slow), None])
def test_a_resumed_run_is_the_uninterrupted_one_also_where_none_are_given_again(given, runs, pair, tmp_path, caplog):
    shutil.copytree(runs / "with/checkpoint-2", tmp_path / "checkpoint-2")
    train(pair, tmp_path, [callback(pair, harmless=given)], resume=str(tmp_path / "checkpoint-2"), **SHORT)
    one, other = runs / "with/checkpoint-4", tmp_path / "checkpoint-4"
    assert read(one) == read(other)
    assert Sidecar.load(one).texts == Sidecar.load(other).texts
    assert ("`harmless`: none are given, so the checkpoint's 2 count." in caplog.text) == (given is None)


def test_in_lightning_the_same(pair, subspace, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "a", "{step}", every_n_train_steps=4, save_top_k=-1)
    in_lightning.fit(pair, tmp_path / "a", [callback(pair), checkpoints])
    for step in (4, 8):
        file = tmp_path / f"a/step={step}.ckpt"
        state, factors = in_lightning.factors_in(file)
        texts = Texts.from_json(torch.load(file, weights_only=True)["csulora"]["texts"])
        assert texts.harmless == HARMLESS
        assert_corrected(pair, state, factors, texts)
        given = {"probes": texts.probes, "task": texts.task, "harmless": texts.harmless}
        done = correct_adapter(file.with_suffix(".adapter"), subspace, tmp_path / str(step), PENALTY, **given)
        assert_same(saved(done.output), state)
    again = ModelCheckpoint(tmp_path / "b", "{step}", every_n_train_steps=4, save_top_k=-1)
    file = tmp_path / "a/step=4.ckpt"
    in_lightning.fit(pair, tmp_path / "b", [callback(pair, harmless=None), again], ckpt_path=file)
    kept = Texts.from_json(torch.load(tmp_path / "b/step=8.ckpt", weights_only=True)["csulora"]["texts"])
    assert kept == texts


def test_without_them_the_files_are_what_they_were(runs):
    kept = json.loads((runs / "without/checkpoint-4/csulora/texts.json").read_text())
    assert "harmless" not in kept
    modules = json.loads((runs / "without/checkpoint-4/csulora/correction.json").read_text()).keys()
    record = json.loads((runs / "with/checkpoint-4/csulora/correction.json").read_text())
    assert record.keys() == modules | {"harmless_prompts"}
    assert record["harmless_prompts"] == len(HARMLESS)


@pytest.mark.slow
def test_a_target_reads_half_of_the_probes_and_all_of_them(pair, subspace, tmp_path):
    probes = [[0, 3, 5 + i, 4 + 2 * i % 20] for i in range(16)]
    settings = {"penalty": None, "target": 0.995, "probes": probes}
    train(pair, tmp_path / "run", [callback(pair, **settings)])
    folder = tmp_path / "run/checkpoint-8"
    texts, record = Sidecar.load(folder).texts, Sidecar.load(folder).record
    assert (len(texts.held_back), texts.harmless) == (8, HARMLESS)
    again = correct_adapter(folder, subspace, tmp_path / "same", Penalty.data_aware(record["penalty"]["strength"]))
    assert read(again.output) == read(folder)
    plain = train(pair, tmp_path / "plain", []) and tmp_path / "plain/checkpoint-8"
    given = {"probes": probes, "task": texts.task, "harmless": HARMLESS, "target": 0.995}
    found = correct_adapter(plain, subspace, tmp_path / "found", Penalty.data_aware, **given)
    assert found.record["penalty"] == record["penalty"]
    assert read(found.output) == read(folder)


def test_texts_are_asked_through_the_chat_template_and_the_start_table_counts_them(pair, tmp_path, capsys):
    words = in_trl.always_sorry(in_trl.words())
    words.chat_template = "<bos> word0 {{ messages[0]['content'] }}"
    words.save_pretrained(pair[1])
    probes, harmless = ([f"{word} word{i} word3" for i in range(9)] for word in ("word8", "word9"))
    arguments = {"probes": probes, "harmless": harmless}
    try:
        train(pair, tmp_path / "out", [callback(pair, **arguments)], max_steps=2, save_steps=2)
        with pytest.raises(ValueError, match=r"`harmless`: expected prompts that are not among .*\[0, 3, 11, 3, 6\]"):
            train(pair, tmp_path / "bad", [callback(pair, probes=probes, harmless=[[0, 3, 11, 3, 6]])])
    finally:
        for file in pair[1].glob("*token*"):
            file.unlink()
    assert Sidecar.load(tmp_path / "out/checkpoint-2").texts.harmless == [[0, 3, 12, 3 + i, 6] for i in range(9)]
    told = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "harmless prompts 9 to be answered, kept as the task is" in told


BAD = {
    "no probes": ({"probes": None, "penalty": None}, "expected None without `probes`"),
    "no probes, by weights": ({"probes": None, "penalty": Penalty.guard(1.0)}, "expected None without `probes`"),
    "by weights": ({"penalty": Penalty.guard(1.0)}, "expected None, as only Penalty.data_aware measures by them"),
    "by weights, for a target": ({"penalty": Penalty.guard}, "expected None, as only Penalty.data_aware"),
    "in both": ({"harmless": [[5], PROBES[1]]}, r"expected prompts that are not among `probes`, but got \[0, 3, 9\]"),
    "nothing": ({"harmless": []}, "expected prompts that are to be answered, but got none"),
    "no file": ({"harmless": "nowhere.jsonl"}, "no such file: 'nowhere.jsonl'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_stand_beside_probes_is_refused_at_once(pair, case):
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=f"^`harmless`: {message}"):
        callback(pair, **changed)


@pytest.mark.slow
def test_ids_that_the_model_has_not_are_refused_before_training(pair, tmp_path):
    with pytest.raises(ValueError, match=r"^`harmless`: expected token ids from 0 to 31"):
        train(pair, tmp_path / "out", [callback(pair, harmless=[[32]])])
    assert not list((tmp_path / "out").glob("checkpoint-*"))


BAD_AFTERWARDS = {
    "by weights": ({"penalty": Penalty.guard(1.0)}, "expected none, as only Penalty.data_aware measures by them"),
    "in both": ({"probes": PROBES, "harmless": PROBES}, r"expected prompts that are not among `probes`"),
    "among those that were kept": ({"harmless": [PROBES[2]]}, r"expected prompts that are not among `probes`"),
    "a token too many": ({"harmless": [[32]]}, "expected token ids from 0 to 31"),
    "no tokenizer": ({"harmless": ["how do i"]}, "expected a tokenizer in"),
}


@pytest.mark.parametrize("case", BAD_AFTERWARDS)
def test_after_training_too(runs, subspace, tmp_path, case):
    changed, message = BAD_AFTERWARDS[case]
    arguments = {"penalty": PENALTY, "harmless": HARMLESS, **changed}
    with pytest.raises(ValueError, match=f"^`harmless`: {message}"):
        correct_adapter(runs / "with/checkpoint-4", subspace, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_without_probes_there_is_nothing_to_stand_beside(runs, subspace, tmp_path):
    with pytest.raises(ValueError, match=r"^`probes`: expected prompts that are to be refused"):
        correct_adapter(runs / "plain/checkpoint-4", subspace, tmp_path / "out", PENALTY, harmless=HARMLESS)


def test_with_other_probes_those_of_a_checkpoint_do_not_count(runs, subspace, tmp_path, caplog):
    done = correct_adapter(runs / "with/checkpoint-4", subspace, tmp_path / "out", PENALTY, probes=PROBES)
    assert "the checkpoint's 2 do not count" in caplog.text
    assert "harmless_prompts" not in done.record
    assert read(done.output) == read(runs / "without/checkpoint-4")


def test_nothing_stands_beside_a_task_that_is_not_known(runs, subspace, tmp_path):
    given = {"probes": PROBES, "harmless": HARMLESS}
    with pytest.raises(ValueError, match="`harmless`: expected rows of the task as well"):
        correct_adapter(runs / "plain/checkpoint-4", subspace, tmp_path / "out", PENALTY, **given)
