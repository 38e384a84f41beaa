"""Adapters corrected after training are what the callback would have written, and nothing is corrected twice."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetyCorrector, correct_adapter
from csulora_callback.model_card import without_section
from csulora_callback.sidecar import Sidecar
from tests.helpers.huggingface import callback, fresh_model, train
from tests.helpers.lab import DEVICE, PENALTY, assert_same, corrected_by_hand, live, make_trainer, raw, saved

PENALTIES = [Penalty.csulora(5.0), Penalty.separable(5.0), Penalty.guard(3.0), Penalty.projection()]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory) -> Path:
    """The same run without the callback, in ``plain``, and with it, in ``corrected``."""
    folder = tmp_path_factory.mktemp("runs")
    train(pair, folder / "plain", [])
    train(pair, folder / "corrected", [callback(pair)])
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(DEVICE != "cpu", reason="to the bit only where both are computed on the same kind of device")
def test_what_the_callback_writes_is_what_a_correction_after_training_writes(runs, subspace, tmp_path):
    for step in (4, 8):
        out = tmp_path / str(step)
        done = correct_adapter(runs / f"plain/checkpoint-{step}", subspace, out, PENALTY)
        beside = runs / f"corrected/checkpoint-{step}"
        assert (out / WEIGHTS).read_bytes() == (beside / WEIGHTS).read_bytes()
        assert (out / "csulora/raw" / WEIGHTS).read_bytes() == (beside / "csulora/raw" / WEIGHTS).read_bytes()
        options, expected = (json.loads((place / "adapter_config.json").read_text()) for place in (out, beside))
        assert options["inference_mode"] is True
        assert sorted(options.pop("target_modules")) == sorted(expected.pop("target_modules"))  # PEFT holds a set
        assert options == expected
        ours, theirs = Sidecar.load(out).record, Sidecar.load(beside).record
        assert done.record == {key: value for key, value in ours.items() if key not in ("files", "sha256")}
        assert ours["metrics"] == pytest.approx(theirs["metrics"])
        assert ours["modules"] == theirs["modules"]
        for key in ("raw_digest", "corrected_digest", "penalty", "adapter", "status"):
            assert ours[key] == theirs[key]
        assert not done.from_raw
        assert len(repr(done)) < 1000


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_a_corrected_adapter_is_corrected_from_its_raw_factors(runs, subspace, tmp_path, penalty, caplog):
    with caplog.at_level(logging.INFO):
        first = correct_adapter(runs / "plain/checkpoint-8", subspace, tmp_path / "a", penalty)
        assert "starting from its raw factors" not in caplog.text
        again = correct_adapter(runs / "corrected/checkpoint-8", subspace, tmp_path / "b", penalty)
        assert "starting from its raw factors" in caplog.text
        thrice = correct_adapter(tmp_path / "b", subspace, tmp_path / "c", penalty)
    assert (first.from_raw, again.from_raw, thrice.from_raw) == (False, True, True)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert files(tmp_path / "b").keys() == files(tmp_path / "c").keys()
    assert files(tmp_path / "b") == files(tmp_path / "c")


def test_the_input_stays_as_it_is_and_the_result_is_a_peft_folder(runs, pair, subspace, tmp_path):
    before = files(runs)
    done = correct_adapter(runs / "corrected/checkpoint-4", subspace, tmp_path / "out", Penalty.guard(2.0))
    assert files(runs) == before
    assert done.output == tmp_path / "out"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), done.output)
    assert_same(live(model), saved(done.output))
    # A checkpoint's optimizer, tokenizer and texts are not the adapter's.
    names = {"README.md", WEIGHTS, "adapter_config.json", "csulora"}
    assert {path.name for path in done.output.iterdir()} == names
    assert {path.name for path in (done.output / "csulora").iterdir()} == {"raw", "correction.json"}
    cards = [(folder / "README.md").read_text() for folder in (done.output, runs / "corrected/checkpoint-4")]
    assert without_section(cards[0]) == without_section(cards[1])


def test_a_saved_subspace_and_texts_as_paths(runs, subspace, tmp_path):
    subspace.save(tmp_path / "s.safetensors")
    correct_adapter(str(runs / "plain/checkpoint-4"), str(tmp_path / "s.safetensors"), str(tmp_path / "out"), PENALTY)
    assert_same(saved(tmp_path / "out"), saved(runs / "corrected/checkpoint-4"))


def test_an_adapter_in_sixteen_bits_and_in_a_bin_file(runs, subspace, tmp_path):
    """What is stored is what is corrected, in the dtype that it is stored in."""
    shutil.copytree(runs / "plain/checkpoint-8", tmp_path / "half")
    state = {key: value.bfloat16() for key, value in load_file(tmp_path / "half" / WEIGHTS).items()}
    (tmp_path / "half" / WEIGHTS).unlink()
    torch.save(state, tmp_path / "half/adapter_model.bin")
    correct_adapter(tmp_path / "half", subspace, tmp_path / "out", PENALTY)
    assert_same(saved(tmp_path / "out"), corrected_by_hand(state, subspace))
    assert {tensor.dtype for tensor in saved(tmp_path / "out").values()} == {torch.bfloat16}
    assert_same(raw(tmp_path / "out"), state)


def test_an_adapter_with_a_name_of_its_own(pair, subspace, tmp_path):
    """PEFT gives it a subfolder, and its raw factors lie above: both folders mean the same adapter."""
    model = fresh_model(pair, init_lora_weights=False)
    model.add_adapter("mine", model.peft_config["default"])
    model.set_adapter("mine")
    model.delete_adapter("default")
    make_trainer(model, tmp_path / "run", [callback(pair)], max_steps=2, save_steps=2).train()
    folder = tmp_path / "run/checkpoint-2"
    assert (folder / "mine" / WEIGHTS).exists()
    for name, place in (("above", folder), ("inside", folder / "mine")):
        done = correct_adapter(place, subspace, tmp_path / name, PENALTY)
        assert done.from_raw
        assert done.record["adapter"] == "mine"
        assert_same(saved(tmp_path / name), saved(folder / "mine"))
        assert_same(raw(tmp_path / name), raw(folder))
        assert Sidecar.load(tmp_path / name).record["adapter"] == "mine"
    shutil.rmtree(folder / "csulora")
    assert not correct_adapter(folder, subspace, tmp_path / "twice", PENALTY).from_raw


def test_a_folder_of_two_adapters_is_refused_with_their_names(pair, subspace, tmp_path):
    model = fresh_model(pair)
    for name in ("one", "two"):
        model.add_adapter(name, model.peft_config["default"])
    model.save_pretrained(tmp_path / "both", selected_adapters=["one", "two"])
    with pytest.raises(FileNotFoundError, match=r"has adapters in \['one', 'two'\]. Pass one of these"):
        correct_adapter(tmp_path / "both", subspace, tmp_path / "out", PENALTY)
    correct_adapter(tmp_path / "both/one", subspace, tmp_path / "out", PENALTY)


def test_resized_embeddings_are_taken_along(pair, subspace, tmp_path, caplog):
    model = fresh_model(pair, init_lora_weights=False)
    model.get_base_model().resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "trained", save_embedding_layers=True)
    corrector = SafetyCorrector(model, subspace, PENALTY)
    with caplog.at_level(logging.INFO), corrector.corrected():
        correct_adapter(tmp_path / "trained", subspace, tmp_path / "out", PENALTY)
        model.save_pretrained(tmp_path / "expected", save_embedding_layers=True)
    assert "embed_tokens.weight" in caplog.text
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
    assert saved(tmp_path / "out")["base_model.model.model.embed_tokens.weight"].shape == (40, 16)
    assert raw(tmp_path / "out")["base_model.model.model.embed_tokens.weight"].shape == (40, 16)
