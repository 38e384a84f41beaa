"""The README.md of adapters as they are really saved: by PEFT, Trainer, TRL and Lightning, who write it as well."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load
from transformers import TrainerCallback

from csulora_callback import CSULoRACallback, correct_adapter, restore_adapter
from csulora_callback.model_card import without_section
from csulora_callback.models.adapters import find_adapter
from tests.helpers import lightning as in_lightning
from tests.helpers import trl as in_trl
from tests.helpers.behaviour import PROBES
from tests.helpers.huggingface import callback, fresh_model, train
from tests.helpers.lab import PENALTY, assert_same, corrected_by_hand, make_trainer, raw, saved

RECORD = "csulora/correction.json"


@pytest.fixture(scope="module")
def runs(pair, subspace, tmp_path_factory):
    """The same run without the callback, in ``plain``, and with it, in ``corrected``; and the latter's trainer."""
    folder = tmp_path_factory.mktemp("runs")
    train(pair, folder / "plain", [])
    ours = CSULoRACallback(subspace=subspace, penalty=PENALTY)
    return folder, train(pair, folder / "corrected", [ours])


def sections(card: str) -> int:
    assert card.count("<!-- csulora:begin") == card.count("<!-- csulora:end -->")
    return card.count("<!-- csulora:begin")


def text_of(folder) -> str:
    return (folder / "README.md").read_bytes().decode()


def test_a_checkpoint_has_the_card_of_the_run_without_the_callback_and_a_section(runs):
    folder, _ = runs
    for step in (4, 8):
        card, plain = (text_of(folder / run / f"checkpoint-{step}") for run in ("corrected", "plain"))
        assert sections(card) == 1
        assert without_section(card).replace("- csulora\n", "") == plain
        record = json.loads((folder / f"corrected/checkpoint-{step}" / RECORD).read_text())
        assert f"| attenuation, 1 − ‖X‖/‖Δ‖ | {record['metrics']['csulora/attenuation']:.1%} |" in card
        assert record["subspace"]["fingerprint"] in card
        assert ModelCard(card).data.tags[-1] == "csulora"


def test_a_correction_after_training_writes_the_same_folder_as_the_callback(runs, subspace, tmp_path):
    folder, _ = runs
    beside = folder / "corrected/checkpoint-8"
    for name, source in (("first", folder / "plain/checkpoint-8"), ("again", beside)):
        correct_adapter(source, subspace, tmp_path / name, PENALTY)
        assert text_of(tmp_path / name) == text_of(beside)
    made = {str(path.relative_to(tmp_path / "first")) for path in (tmp_path / "first").rglob("*") if path.is_file()}
    for file in made - {"adapter_config.json", "csulora/raw/adapter_config.json"}:  # PEFT writes a set in any order
        assert file == RECORD or (tmp_path / "first" / file).read_bytes() == (beside / file).read_bytes(), file


def test_a_restored_adapter_has_the_card_of_the_run_without_the_callback(runs, tmp_path):
    folder, _ = runs
    restore_adapter(folder / "corrected/checkpoint-8", tmp_path / "raw")
    assert text_of(tmp_path / "raw") == text_of(folder / "plain/checkpoint-8")


def test_saving_again_changes_nothing_and_keeps_what_the_user_wrote(runs, tmp_path):
    _, trainer = runs
    trainer.model.save_pretrained(tmp_path)
    first = text_of(tmp_path)
    trainer.save_model(tmp_path)
    assert text_of(tmp_path) == first
    start = first.index("<!-- csulora:begin")
    (tmp_path / "README.md").write_text(f"{first[:start]}Mine, above.\n\n{first[start:]}\n\n## Mine, below")
    edited = text_of(tmp_path)
    trainer.save_model(tmp_path)
    assert text_of(tmp_path) == edited


def test_who_saves_other_weights_over_a_corrected_adapter_leaves_no_section_that_is_wrong(pair, subspace, tmp_path):
    model = train(pair, tmp_path / "run", [callback(pair)]).model
    model.save_pretrained(tmp_path / "saved")
    adapter = find_adapter(model)
    adapter.write({name: (2 * A, B) for name, (A, B) in adapter.read().items()})
    model.save_pretrained(tmp_path / "saved")
    card = text_of(tmp_path / "saved")
    assert "No correction of this adapter is recorded" in card
    assert "attenuation" not in card
    assert "csulora" not in ModelCard(card).data.tags


def test_the_cards_of_the_trainer_get_the_section_back(runs):
    folder, trainer = runs
    trainer.save_model()
    trainer.create_model_card(tags="mine")
    card = text_of(folder / "corrected")
    assert "generated automatically according to the information the Trainer had access to" in card
    assert sections(card) == 1
    assert {"csulora", "lora"} <= set(ModelCard(card).data.tags)
    assert ModelCard(card).data.library_name == "peft"


def test_an_evaluation_before_the_first_step_has_its_line_in_the_card_of_the_trainer(pair, tmp_path):
    """It knows no rows of the task yet, and so fewer keys, of which the Trainer makes the columns of its table."""
    ours = CSULoRACallback(base_model=pair[0], penalty=PENALTY, probes=PROBES)
    trainer = train(pair, tmp_path, [ours], max_steps=2, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    first, second = (record for record in trainer.state.log_history if "eval_loss" in record)
    assert second.keys() - first.keys() >= {"eval_csulora/task_loss", "eval_csulora/task_kl"}
    trainer.create_model_card()
    lines = [line.strip("| ").split("|") for line in text_of(tmp_path).splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines if len(line) == len(lines[0])]
    (before, after) = (dict(zip(header, row, strict=True)) for row in rows)
    assert before["Csulora/task Loss"] == "No log"
    assert after["Csulora/task Loss"] == f"{second['eval_csulora/task_loss']:.4f}"
    assert after["Validation Loss"] == f"{second['eval_loss']:.4f}"
    assert [record for record in trainer.state.log_history if "eval_loss" in record] == [first, second]


@pytest.mark.slow
def test_an_adapter_that_is_nan_says_in_its_card_that_it_was_not_corrected(pair, tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

    train(pair, tmp_path, [Breaks(), callback(pair)], max_steps=2, save_steps=2)
    card = text_of(tmp_path / "checkpoint-2")
    assert "**This adapter was not corrected.**" in card
    assert "hold NaN or Inf" in card
    assert "csulora" not in ModelCard(card).data.tags


@pytest.mark.slow
def test_an_adapter_with_a_name_of_its_own_has_its_card_where_peft_writes_it(pair, subspace, tmp_path):
    model = fresh_model(pair)
    model.add_adapter("mine", model.peft_config["default"])
    model.set_adapter("mine")
    model.delete_adapter("default")
    make_trainer(model, tmp_path / "run", [callback(pair)], max_steps=2, save_steps=2).train()
    model.save_pretrained(tmp_path / "after")
    correct_adapter(tmp_path / "run/checkpoint-2/mine", subspace, tmp_path / "made", PENALTY)
    for folder in (tmp_path / "run/checkpoint-2", tmp_path / "after", tmp_path / "made"):
        assert sections(text_of(folder)) == 1
        assert not (folder / "mine/README.md").exists()


def test_lightnings_adapter_has_a_section(pair, tmp_path):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    in_lightning.fit(pair, tmp_path, [in_lightning.callback(pair), saves])
    for step in (4, 8):
        assert sections(text_of(tmp_path / f"step={step}.adapter")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_trl_pushes_its_own_card_with_the_section(hub, pair, tmp_path, strategy):
    in_trl.words().save_pretrained(pair[1])
    settings = {"push_to_hub": True, "hub_token": "hf_fake", "hub_strategy": strategy}
    trainer = in_trl.make_trainer(pair, tmp_path / "model", [callback(pair)], max_steps=4, **settings)
    trainer.train()
    trainer.push_to_hub()
    expected = ["Training in progress, step 2", "Training in progress, step 4"] if strategy == "every_save" else []
    assert hub.messages() == [*expected, "End of training"]
    for message in hub.messages():
        files = hub.commit(message)
        card = files["README.md"].decode()
        assert "trained using [TRL]" in card
        assert sections(card) == 1
        assert {"trl", "sft", "csulora"} <= set(ModelCard(card).data.tags)
        metrics = json.loads(files[RECORD])["metrics"]
        assert f"{metrics['csulora/attenuation']:.1%}" in card
        assert not any("raw" in path for path in files)
    assert sections(text_of(tmp_path / "model/checkpoint-4")) == 1


class PushesItself(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            model.push_to_hub("during", token="hf_fake", commit_message="during")


@pytest.mark.slow
def test_a_model_that_pushes_itself_takes_record_and_section_along_and_no_raw_adapter(
    hub, pair, subspace, tmp_path, caplog
):
    trainer = make_trainer(fresh_model(pair), tmp_path, [PushesItself(), callback(pair)], max_steps=4, save_steps=2)
    trainer.train()
    trainer.model.push_to_hub("after", token="hf_fake", commit_message="after")
    for message, step in (("during", 2), ("after", 4)):
        files = hub.commit(message)
        assert {path for path in files if path.startswith("csulora/")} == {RECORD}
        folder = tmp_path / f"checkpoint-{step}"
        assert_same(load(files["adapter_model.safetensors"]), corrected_by_hand(raw(folder), subspace))
        card = files["README.md"].decode()
        assert sections(card) == 1
        assert "csulora" in ModelCard(card).data.tags
    assert "Save the model into a folder of yours too" in caplog.text
    with pytest.raises(FileNotFoundError, match="was not published with it"):
        restore_adapter(hub.fetch(tmp_path / "fetched"), tmp_path / "raw")

    # A card that was edited on the Hub since is taken from there.
    edited = {"README.md": files["README.md"] + b"\n\nWritten on the Hub.\n"}
    hub.commits.append(("edited", edited))
    trainer.model.push_to_hub("after", token="hf_fake", commit_message="again")
    assert hub.commit("again")["README.md"] == edited["README.md"]


@pytest.mark.slow
def test_pushes_and_cards_do_not_touch_training(hub, pair, tmp_path):
    settings = {"push_to_hub": True, "hub_token": "hf_fake", "hub_strategy": "every_save"}
    plain = train(pair, tmp_path / "plain", [])
    pushed = train(pair, tmp_path / "pushed", [PushesItself(), callback(pair)], **settings)
    pushed.push_to_hub()
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (plain, pushed)]
    assert losses[0] == losses[1]
    assert_same(raw(tmp_path / "pushed/checkpoint-8"), saved(tmp_path / "plain/checkpoint-8"))
