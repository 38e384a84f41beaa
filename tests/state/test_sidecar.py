"""What lies beside a corrected adapter: believed only as it was written, and only beside the adapter it describes."""

import dataclasses
import json
import random
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetyCorrector, sidecar
from csulora_callback.models.activations import Texts
from csulora_callback.models.factors import equal, to_peft_state_dict
from csulora_callback.record import checked, seal
from csulora_callback.sidecar import Sidecar
from tests.helpers.huggingface import callback, fresh_model, losses
from tests.helpers.lab import assert_same, corrected_by_hand, live, make_trainer, raw, saved

FILES = ("correction.json", "texts.json", "raw/adapter_model.safetensors", "raw/adapter_config.json")


@pytest.fixture(scope="module")
def written(pair, subspace, tmp_path_factory) -> Path:
    """A checkpoint folder with all files that a sidecar may have."""
    folder = tmp_path_factory.mktemp("written")
    model = fresh_model(pair, init_lora_weights=False)
    corrector = SafetyCorrector(model, subspace, Penalty.csulora(5.0))
    with corrector.corrected() as adapter:
        model.save_pretrained(folder)
    beside = dataclasses.replace(adapter.sidecar, texts=Texts([[5, 6]], [[7, 8, 9]], 3))
    beside.save(folder, corrector.adapter.config)
    return folder


def test_what_is_saved_is_loaded(written, pair):
    loaded = Sidecar.load(written)
    assert loaded.texts == Texts([[5, 6]], [[7, 8, 9]], 3)
    assert_same(to_peft_state_dict(loaded.corrected), saved(written))
    raw_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), written / "csulora/raw")
    assert_same(live(raw_model), raw(written))


def damaged(content: bytes, generator: random.Random) -> bytes:
    """One to three bits flipped, or the end cut off."""
    if generator.random() < 0.3:
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damaged_file_is_accepted_with_other_content(written, tmp_path, file, times):
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    path, content, whole = folder / "csulora" / file, (written / "csulora" / file).read_bytes(), Sidecar.load(written)
    generator, refused = random.Random(file), 0
    for _ in range(times):
        path.write_bytes(damaged(content, generator))
        try:
            found = Sidecar.load(folder)
        except (ValueError, FileNotFoundError) as error:
            refused += str(folder) in str(error)
        else:
            assert equal(found.raw, whole.raw)
            assert equal(found.corrected, whole.corrected)
            assert found.texts == whole.texts
            assert found.record == whole.record
    assert refused > 0.9 * times


FOREIGN = {
    "a list": "[]",
    "a number": "3",
    "deeply nested": "[" * 100_000,
    "empty": "",
    "another format": '{"format": 1}',
    "not a number": '{"format": 2, "x": NaN}',
    "infinity": '{"format": 2, "x": 1e999}',
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_records_that_are_none_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"^correction\.json: expected"):
        checked(text.encode(), "correction.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("adapter", 3),
        ("adapter", "../../elsewhere"),
        ("modules", {}),
        ("modules", {"q_proj": {"scaling": "2"}}),
        ("modules", {"q_proj": {"scaling": True}}),
        ("metrics", {"csulora/update_norm": None}),
        ("raw_digest", "abc"),
        ("penalty", [1]),
        ("status", None),
        ("budget", "kept"),
        ("budget", {"on_exceed": "stop", "exceeded": [1]}),
    ],
)
def test_fields_of_other_types_are_refused_by_name(written, field, value):
    record = json.loads((written / "csulora/correction.json").read_text())
    del record["sha256"]
    checked(seal(record, record["files"]).encode(), "correction.json")
    with pytest.raises(ValueError, match=f"expected `{field}` to be"):
        checked(seal({**record, field: value}, record["files"]).encode(), "correction.json")


def test_a_record_is_not_believed_beside_another_adapter(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    adapter = tmp_path / "copy/adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(adapter).items()}, adapter)
    with pytest.raises(ValueError, match="expected the record of the adapter in"):
        Sidecar.load(tmp_path / "copy")


def test_nothing_is_written_beside_an_adapter_that_someone_else_has_put_there(written, tmp_path, caplog):
    shutil.copytree(written, tmp_path / "copy")
    beside = Sidecar.load(written)
    sidecar.discard(tmp_path / "copy")
    adapter = tmp_path / "copy/adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(adapter).items()}, adapter)
    beside.save(tmp_path / "copy", None)
    assert "someone else writes into the same folder" in caplog.text
    assert not (tmp_path / "copy/csulora").exists()


def test_a_copy_leaves_the_texts_behind_and_is_whole(written, tmp_path):
    shutil.copy(written / "adapter_model.safetensors", tmp_path)
    sidecar.copy(written, tmp_path)
    assert Sidecar.load(tmp_path).texts is None
    assert equal(Sidecar.load(tmp_path).raw, Sidecar.load(written).raw)


def test_a_copy_of_nothing_takes_an_old_record_away(written, tmp_path):
    shutil.copytree(written, tmp_path / "uploaded")
    sidecar.copy(tmp_path / "without", tmp_path / "uploaded")
    assert not (tmp_path / "uploaded/csulora").exists()


def test_beside_shards_the_raw_adapter_gets_a_config_and_the_live_one_stays(written, pair, tmp_path):
    model = fresh_model(pair)
    before = model.peft_config["default"].to_dict()
    Sidecar.load(written).save(tmp_path, model.peft_config["default"])
    assert model.peft_config["default"].to_dict() == before
    raw_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / "csulora/raw")
    assert_same(live(raw_model), raw(written))


def test_two_who_save_into_one_folder_leave_one_whole(written, pair, subspace, tmp_path):
    """Each thread is a run of its own with other weights; the last adapter's record is there, or none."""
    models = [fresh_model(pair, init_lora_weights=False, seed=seed) for seed in (2, 3)]
    correctors = [SafetyCorrector(model, subspace, Penalty.csulora(5.0)) for model in models]
    adapters = [corrector.compute() for corrector in correctors]
    failed = []

    def save(model, corrector, adapter) -> None:
        try:
            state = model.state_dict() | corrector.adapter.to_state_dict(adapter.corrected, model)
            for _ in range(15):
                sidecar.discard(tmp_path)
                model.save_pretrained(tmp_path, state_dict=state)
                adapter.sidecar.save(tmp_path, corrector.adapter.config)
        except BaseException as error:  # a half-written adapter of the other is his to mend, and named
            if "cannot be read" not in str(error):
                failed.append(error)

    threads = [threading.Thread(target=save, args=these) for these in zip(models, correctors, adapters, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert not list(tmp_path.glob(".*.part"))
    if (tmp_path / "csulora").exists():
        with suppress(ValueError):  # the last adapter may be that of the other
            assert any(equal(Sidecar.load(tmp_path).raw, adapter.raw) for adapter in adapters)


@pytest.mark.slow
def test_a_run_without_the_callback_into_the_same_folder_is_resumed_as_one(pair, tmp_path):
    make_trainer(fresh_model(pair), tmp_path, [callback(pair)]).train()
    make_trainer(fresh_model(pair), tmp_path, []).train()  # the old records stand beside plain adapters now
    assert (tmp_path / "checkpoint-4/csulora").exists()
    shutil.copytree(tmp_path, tmp_path.with_name("twin"))
    resume = str(tmp_path / "checkpoint-4")
    twin = make_trainer(fresh_model(pair), tmp_path.with_name("twin"), [])
    twin.train(resume_from_checkpoint=resume)
    trainer = make_trainer(fresh_model(pair), tmp_path, [callback(pair)])
    trainer.train(resume_from_checkpoint=resume)
    assert losses(trainer) == losses(twin)


def test_folders_that_vanish_while_sidecars_are_looked_for_are_passed_over(tmp_path):
    for name in ("a", "b/below", "c"):
        (tmp_path / name / "csulora").mkdir(parents=True)
    found = sidecar.places_below(tmp_path)
    first = next(found)  # it has seen that there is a folder b
    shutil.rmtree(tmp_path / "b")
    assert {first, *found} >= {tmp_path / "a", tmp_path / "c"}


def test_damaged_records_of_other_runs_do_not_stop_a_resume(pair, subspace, tmp_path, caplog):
    make_trainer(fresh_model(pair), tmp_path / "run", [callback(pair)]).train()
    shutil.move(tmp_path / "run/checkpoint-4", tmp_path / "run/last-checkpoint")  # as fetched from the Hub
    for name, text in FOREIGN.items():
        place = tmp_path / "run" / f"a {name}" / "csulora"
        place.mkdir(parents=True)
        (place / "correction.json").write_text(text)
    trainer = make_trainer(fresh_model(pair), tmp_path / "run", [callback(pair)])
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/last-checkpoint"))
    assert_same(saved(tmp_path / "run/checkpoint-8"), corrected_by_hand(raw(tmp_path / "run/checkpoint-8"), subspace))
    assert "Passed over while looking for raw factors" in caplog.text


def test_a_rerun_that_dies_before_the_adapter_is_written_leaves_no_record(pair, tmp_path, monkeypatch):
    make_trainer(fresh_model(pair), tmp_path, [callback(pair)]).train()

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.safe_save_file", die)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(fresh_model(pair), tmp_path, [callback(pair, penalty=Penalty.guard(3.0))]).train()
    assert (tmp_path / "checkpoint-4/adapter_model.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        Sidecar.load(tmp_path / "checkpoint-4")
