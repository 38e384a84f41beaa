"""A content-aware penalty in real trainers: what is saved is the dense formula without the prefix of the probes."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, SafetyCorrector, correct_adapter
from csulora_callback.method.search import STRONGEST
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.factors import from_peft_state_dict
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers.content_aware import by_hand
from tests.helpers.huggingface import losses, train
from tests.helpers.lab import RANK, assert_same, raw, saved, with_lora

START = 2  # all probes begin with 0, 3
PROBES = [[0, 3, 5, 6, 7], [0, 3, 9], [0, 3, 4, 11, 12, 13]]
PENALTY = Penalty.content_aware(4.0)
SHORT = {"max_steps": 4, "save_steps": 2}


def callback(pair, **arguments) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair[0], **{"rank": RANK, "penalty": PENALTY, "probes": PROBES, **arguments})


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """One run without the callback, in ``plain``, one ``with`` it, and one that reads the ``whole`` of the probes."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {"plain": [], "with": [callback(pair)], "whole": [callback(pair, penalty=Penalty.data_aware(4.0))]}
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
        assert other is None or (other[key] - expected).norm() > 2 * bound, name


def read(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_checkpoint_holds_the_correction_and_training_is_bit_identical(runs, pair):
    for step in (2, 4):
        folder, whole = (runs / f"{kind}/checkpoint-{step}" for kind in ("with", "whole"))
        kept = Sidecar.load(folder)
        assert kept.record["penalty"] == {"name": "content_aware", "strength": 4.0}
        assert kept.texts == Sidecar.load(whole).texts
        assert_same(raw(folder), saved(runs / f"plain/checkpoint-{step}"))
        assert_corrected(pair, saved(folder), raw(folder), kept.texts, other=saved(whole))


def test_after_training_what_the_checkpoint_kept_gives_the_same_bytes(runs, subspace, tmp_path):
    for step in (2, 4):
        folder = runs / f"with/checkpoint-{step}"
        done = correct_adapter(folder, subspace, tmp_path / f"kept-{step}", PENALTY)
        assert read(done.output) == read(folder)
    other = correct_adapter(folder, subspace, tmp_path / "whole", Penalty.data_aware(4.0))
    assert read(other.output) == read(runs / "whole/checkpoint-4")
    texts = Sidecar.load(folder).texts
    given = {"probes": texts.probes, "task": texts.task}
    correct_adapter(runs / "plain/checkpoint-4", subspace, tmp_path / "given", PENALTY, **given)
    assert read(tmp_path / "given") == read(folder)


def test_a_resumed_run_is_the_uninterrupted_one(runs, pair, tmp_path):
    shutil.copytree(runs / "with/checkpoint-2", tmp_path / "checkpoint-2")
    train(pair, tmp_path, [callback(pair)], resume=str(tmp_path / "checkpoint-2"), **SHORT)
    one, other = runs / "with/checkpoint-4", tmp_path / "checkpoint-4"
    assert read(one) == read(other)
    assert Sidecar.load(one).texts == Sidecar.load(other).texts


def test_in_lightning_the_same(pair, subspace, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path / "a", "{step}", every_n_train_steps=4, save_top_k=-1)
    in_lightning.fit(pair, tmp_path / "a", [callback(pair), checkpoints])
    for step in (4, 8):
        file = tmp_path / f"a/step={step}.ckpt"
        state, factors = in_lightning.factors_in(file)
        texts = Texts.from_json(torch.load(file, weights_only=True)["csulora"]["texts"])
        assert_corrected(pair, state, factors, texts)
        given = {"probes": texts.probes, "task": texts.task}
        done = correct_adapter(file.with_suffix(".adapter"), subspace, tmp_path / str(step), PENALTY, **given)
        assert_same(saved(done.output), state)


@pytest.mark.slow
def test_a_target_reads_half_of_the_probes_without_the_prefix(pair, subspace, tmp_path):
    probes = [[0, 3, 5 + i, 4 + 2 * i % 20] for i in range(16)]
    settings = {"penalty": Penalty.content_aware, "target": 0.995, "probes": probes}
    train(pair, tmp_path / "run", [callback(pair, **settings)])
    folder = tmp_path / "run/checkpoint-8"
    texts, record = Sidecar.load(folder).texts, Sidecar.load(folder).record
    assert (len(texts.held_back), record["penalty"]["name"]) == (8, "content_aware")
    assert 0 < record["penalty"]["strength"] < STRONGEST
    again = correct_adapter(folder, subspace, tmp_path / "same", Penalty.content_aware(record["penalty"]["strength"]))
    assert read(again.output) == read(folder)
    plain = train(pair, tmp_path / "plain", []) and tmp_path / "plain/checkpoint-8"
    given = {"probes": probes, "task": texts.task, "target": 0.995}
    found = correct_adapter(plain, subspace, tmp_path / "found", Penalty.content_aware, **given)
    assert found.record["penalty"] == record["penalty"]
    assert read(found.output) == read(folder)


def test_the_start_table_says_what_counts(pair, tmp_path, capsys):
    train(pair, tmp_path / "out", [callback(pair)], max_steps=1, save_steps=1)
    told = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "content_aware (strength 4): as data_aware, by what the prompts say: without the prefix" in told


def test_probes_that_are_all_the_same_are_refused(pair, runs, subspace, tmp_path):
    message = "`probes`: expected prompts that differ, as a content-aware penalty reads"
    with pytest.raises(ValueError, match=message):
        train(pair, tmp_path / "run", [callback(pair, probes=[[0, 3, 5], [0, 3, 5]])], **SHORT)
    with pytest.raises(ValueError, match=message):
        correct_adapter(
            runs / "plain/checkpoint-4", subspace, tmp_path / "out", PENALTY, probes=[[0, 3]], task=[[4, 5]]
        )


def test_activations_that_were_read_otherwise_are_refused(pair, subspace):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    texts = Texts([[4, 5, 6]], PROBES, 1)
    for penalty, skip in ((PENALTY, False), (Penalty.data_aware(4.0), True)):
        corrector = SafetyCorrector(model, subspace, penalty, Activations.read(find_adapter(model), texts, skip))
        with pytest.raises(ValueError, match=r"`activations`: expected those .* but they were read otherwise"):
            corrector.compute()


def test_it_needs_probes(pair, runs, subspace, tmp_path):
    message = "`probes`: expected prompts that are to be refused, as the penalty is data-aware"
    with pytest.raises(ValueError, match=message):
        callback(pair, probes=None)
    with pytest.raises(ValueError, match=message):
        correct_adapter(runs / "plain/checkpoint-4", subspace, tmp_path / "out", PENALTY)
