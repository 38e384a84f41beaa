"""What the Trainer uploads: corrected adapters with their records and cards, and the raw ones only where asked to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter, restore_adapter
from csulora_callback.sidecar import NotPublishedError
from tests.helpers.lab import PENALTY, RANK, assert_same, corrected_by_hand, live, make_trainer, raw, with_lora

ADAPTER = "adapter_model.safetensors"
RAW = "csulora/raw/adapter_model.safetensors"
RECORD = "csulora/correction.json"
BESIDE = {RECORD, RAW, "csulora/raw/adapter_config.json"}


def train(pair, output: Path, resume: Path | None = None, with_callback: bool = True, push_raw=False, **arguments):
    settings = {"rank": RANK, "penalty": PENALTY, "cache_dir": pair[0].parent / "cache", "resume_from": resume}
    ours = CSULoRACallback(base_model=pair[0], push_raw=push_raw, **settings)
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1)
    callbacks = [ours] if with_callback else []
    trainer = make_trainer(model, output, callbacks, **{"max_steps": 5, "save_steps": 2, **arguments})
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def pushing(pair, output: Path, hub_strategy: str, **arguments):
    return train(pair, output, push_to_hub=True, hub_token="hf_fake", hub_strategy=hub_strategy, **arguments)


def assert_published(files: dict[str, bytes], raw_state: dict, subspace: SafetySubspace, above="", with_raw=False):
    """The adapter corrected once, its record and card, and the raw adapter only where it was asked for."""
    assert_same(load(files[above + ADAPTER]), corrected_by_hand(raw_state, subspace))
    assert any(not torch.equal(load(files[above + ADAPTER])[key], raw_state[key]) for key in raw_state)
    record = json.loads(files[above + RECORD])
    assert record["status"] == "corrected"
    assert record["raw_digest"] != record["corrected_digest"]
    assert files[above + "README.md"].count(b"<!-- csulora:begin") == 1
    ours = {path.removeprefix(above) for path in files if path.startswith(f"{above}csulora/")}
    assert ours == (BESIDE if with_raw else {RECORD})
    if with_raw:
        assert_same(load(files[above + RAW]), raw_state)
    else:
        assert not any("raw" in path for path in files)


@pytest.fixture(scope="module")
def raw_at(pair, tmp_path_factory):
    """The adapter after steps 2, 4 and 5 of the training without the callback."""
    output = tmp_path_factory.mktemp("without")
    train(pair, output, with_callback=False)
    return {step: load((output / f"checkpoint-{step}" / ADAPTER).read_bytes()) for step in (2, 4, 5)}


FOLDER_OF_CHECKPOINT = {"every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-{step}"}
SLOW = pytest.mark.slow
PUSHES = [
    ("every_save", False),
    ("checkpoint", True),
    pytest.param("every_save", True, marks=SLOW),
    pytest.param("all_checkpoints", True, marks=SLOW),
]


@pytest.mark.parametrize(("strategy", "push_raw"), PUSHES)
def test_each_upload_holds_the_corrected_adapter_of_its_step(
    hub, pair, subspace, raw_at, tmp_path, strategy, push_raw
):
    output = tmp_path / "model"
    trainer = pushing(pair, output, strategy, push_raw=push_raw)
    pushes = [f"Training in progress, step {step}" for step in (2, 4, 5)]
    assert [message for message in hub.messages() if not message.endswith(", checkpoint")] == pushes
    for step, message in zip((2, 4, 5), pushes, strict=True):
        assert_published(hub.commit(message), raw_at[step], subspace, with_raw=push_raw)
        for file in (ADAPTER, RECORD, "README.md"):
            assert hub.commit(message)[file] == (output / f"checkpoint-{step}" / file).read_bytes()
        if (folder := FOLDER_OF_CHECKPOINT[strategy]) is not None:
            files = hub.commit(f"{message}, checkpoint")
            assert_published(files, raw_at[step], subspace, above=f"{folder.format(step=step)}/", with_raw=True)

    trainer.push_to_hub()
    final = hub.commit("End of training")
    assert_published(final, raw_at[5], subspace, with_raw=push_raw)
    assert_same(load(final[ADAPTER]), live(trainer.model))
    assert not any(path.startswith("checkpoint-") or path.endswith(".part") for path in final)
    for folder in (output, *output.glob("checkpoint-*")):  # on this machine nothing is left out
        assert_same(raw(folder), raw_at[5 if folder == output else int(folder.name.split("-")[1])])


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_what_training_resumes_from_is_not_published_without_being_asked(hub, pair, tmp_path, strategy):
    with pytest.raises(ValueError, match=f"`push_raw`: expected True with hub_strategy='{strategy}'"):
        pushing(pair, tmp_path / "model", strategy)
    assert hub.commits == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nothing_is_uploaded_before_the_end_when_so_asked(hub, pair, subspace, raw_at, tmp_path):
    trainer = pushing(pair, tmp_path / "model", "end")
    assert hub.commits == []
    trainer.push_to_hub()
    trainer.save_model()
    assert hub.messages() == ["End of training", "Model save"]
    for message in hub.messages():
        assert_published(hub.commit(message), raw_at[5], subspace)
        assert_same(load(hub.commit(message)[ADAPTER]), live(trainer.model))


@pytest.mark.slow
def test_the_best_model_is_uploaded_as_its_checkpoint_was_saved(hub, pair, subspace, raw_at, tmp_path):
    trainer = pushing(
        pair,
        tmp_path / "model",
        "end",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    best = trainer.state.best_global_step
    assert best in (2, 4)  # not the last
    trainer.push_to_hub()
    assert_published(hub.commit("End of training"), raw_at[best], subspace)


@pytest.mark.slow
def test_training_resumes_exactly_from_a_downloaded_last_checkpoint(hub, pair, raw_at, tmp_path):
    pushing(pair, tmp_path / "model", "checkpoint", push_raw=True)
    for path, content in hub.commit("Training in progress, step 4, checkpoint").items():
        (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / path).write_bytes(content)
    train(pair, tmp_path / "resumed", resume=tmp_path / "clone" / "last-checkpoint")
    assert_same(load((tmp_path / "resumed/checkpoint-5" / RAW).read_bytes()), raw_at[5])


def test_adapters_that_lie_deeper_are_left_raw_out_of_a_push_in_the_background_too(hub, pair, tmp_path):
    trainer = pushing(pair, tmp_path / "model", "end")
    trainer.save_model(tmp_path / "model/final/one")
    hub.commits.clear()  # of a save elsewhere, too
    trainer.remove_callback(CSULoRACallback)  # the folder holds what it holds
    trainer.push_to_hub(blocking=False).result()
    assert (tmp_path / "model/final/one" / RAW).is_file()
    files = hub.commit("End of training")
    assert f"final/one/{RECORD}" in files
    assert not any("raw" in path for path in files)


def test_another_trainer_without_the_callback_publishes_no_raw_adapter(hub, pair, tmp_path, caplog):
    model = train(pair, tmp_path / "model").model
    other = make_trainer(model, tmp_path / "other")
    other.push_to_hub(token="hf_fake")
    assert RECORD in hub.files()
    assert not any("raw" in path for path in hub.files())
    assert "has the record of the correction, and not the raw adapter" in caplog.text


def test_whoever_reads_a_published_adapter_is_told_where_its_raw_one_is(hub, pair, subspace, tmp_path):
    trainer = pushing(pair, tmp_path / "model", "end")
    trainer.push_to_hub()
    published = hub.fetch(tmp_path / "published")
    told = "whose raw one was not published with it. That lies where the adapter was trained"
    with pytest.raises(NotPublishedError, match=f"^`checkpoint`: .*{told}"):
        restore_adapter(published, tmp_path / "raw")
    with pytest.raises(NotPublishedError, match=f"^`adapter`: .*{told}"):
        correct_adapter(published, subspace, tmp_path / "again", Penalty.guard(3.0))
    assert not (tmp_path / "raw").exists()
    config = "csulora/raw/adapter_config.json"  # a part of the raw adapter is damage, and not an adapter left out
    (published / config).parent.mkdir()
    shutil.copy(tmp_path / "model" / config, published / config)
    with pytest.raises(ValueError, match="one of them was changed or is missing"):
        restore_adapter(published, tmp_path / "raw")


@pytest.mark.slow
def test_a_resume_without_the_raw_adapter_says_so_before_training(pair, tmp_path):
    train(pair, tmp_path / "model")
    shutil.copytree(tmp_path / "model/checkpoint-4", tmp_path / "fetched")
    shutil.rmtree(tmp_path / "fetched/csulora/raw")
    with pytest.raises(NotPublishedError, match=r"`resume_from`: .* was not published with it"):
        train(pair, tmp_path / "resumed", resume=tmp_path / "fetched")
    assert not list(tmp_path.glob("resumed/checkpoint-*"))
