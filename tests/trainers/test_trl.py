"""The promises of the callback in TRL's SFTTrainer, which wraps the model itself and saves by its own ways."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from csulora_callback import CSULoRACallback
from tests.helpers.lab import (
    PENALTY,
    RANK,
    corrected_by_hand,
    live,
    raw,
    saved,
    saved_pair,
)
from tests.helpers.trl import make_trainer, words

DRIFT = {
    f"csulora/{name}"
    for name in (
        "aligned_energy",
        "partial_energy",
        "off_energy",
        "aligned_over_chance",
        "partial_over_chance",
        "off_over_chance",
        "alignment_undone",
        "alignment_undone_corrected",
        "attenuation",
        "relative_change",
        "truncation_error",
        "update_norm",
    )
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, aligned = saved_pair(tmp_path_factory.mktemp("pair"))
    words().save_pretrained(aligned)
    return base, aligned


def train(pair, output: Path, with_callback: bool, resume: str | None = None, **arguments) -> SFTTrainer:
    ours = CSULoRACallback(base_model=pair[0], rank=RANK, penalty=PENALTY, cache_dir=pair[0].parent / "cache")
    trainer = make_trainer(pair, output, [ours] if with_callback else [], **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """The same training without and with the callback."""
    folder = tmp_path_factory.mktemp("runs")
    return train(pair, folder / "without", False), train(pair, folder / "with", True)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


def checkpoints(trainer) -> list[Path]:
    found = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert [folder.name for folder in found] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    return found


def logged(trainer, key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in trainer.state.log_history if key in record}


def test_training_is_bit_identical_and_checkpoints_are_corrected(runs, subspace):
    without, with_it = runs
    for key in ("loss", "grad_norm", "mean_token_accuracy"):
        assert len(logged(without, key)) == 8
        assert logged(with_it, key) == logged(without, key)
    for folder, twin in zip(checkpoints(with_it), checkpoints(without), strict=True):
        assert same(raw(folder), saved(twin))
        assert not same(saved(folder), saved(twin))
        assert same(saved(folder), corrected_by_hand(raw(folder), subspace))
    assert same(live(with_it.model), corrected_by_hand(live(without.model), subspace))


def test_drift_stands_beside_the_loss(runs):
    without, with_it = runs
    records = [record for record in with_it.state.log_history if "loss" in record]
    assert len(records) == 8
    for record in records:
        assert record.keys() >= DRIFT
        assert record["csulora/update_norm"] > 0
        assert 0 < record["csulora/attenuation"] < 1
    assert not any(DRIFT & record.keys() for record in without.state.log_history)


def test_evaluation_sees_what_ships(pair, runs, tmp_path):
    without, with_it = runs
    seen = logged(with_it, "eval_loss")
    assert seen.keys() == {2, 4, 6, 8}
    assert all(seen[step] != loss for step, loss in logged(without, "eval_loss").items())
    for folder in checkpoints(with_it):
        shipped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[1]), folder)
        by_hand = make_trainer(pair, tmp_path, model=shipped).evaluate()["eval_loss"]
        assert seen[int(folder.name.split("-")[1])] == by_hand


def test_save_model_after_training_ships_the_corrected_adapter_once(runs, subspace, tmp_path):
    with_it = runs[1]
    with_it.save_model(tmp_path)
    last = checkpoints(with_it)[-1]
    assert same(saved(tmp_path), saved(last))
    assert same(raw(tmp_path), raw(last))
    assert same(live(with_it.model), saved(last))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resume_is_exact(pair, runs, tmp_path, step):
    whole = runs[1]
    start = tmp_path / f"checkpoint-{step}"
    shutil.copytree(Path(whole.args.output_dir) / start.name, start)
    resumed = train(pair, tmp_path, True, resume=str(start))
    for key in ("loss", "grad_norm", "eval_loss", *DRIFT):
        assert logged(resumed, key) == logged(whole, key)
    assert same(live(resumed.model), live(whole.model))
    for folder in tmp_path.glob("checkpoint-*"):
        twin = Path(whole.args.output_dir) / folder.name
        assert same(raw(folder), raw(twin))
        assert same(saved(folder), saved(twin))
