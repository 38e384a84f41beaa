"""The promises of the callback in TRL's SFTTrainer, which wraps the model itself and saves by its own ways."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from csulora_callback import CSULoRACallback
from tests.lab import PENALTY, RANK, TARGETS, TRAINING, VOCABULARY, corrected_by_hand, live, raw, saved, saved_pair

SPECIAL = ["<bos>", "<eos>", "<pad>"]  # as in the tiny Llama: 0, 1, 2
WORDS = [f"word{index}" for index in range(VOCABULARY - len(SPECIAL))]
DRIFT = {
    f"csulora/{name}"
    for name in (
        "aligned_energy",
        "partial_energy",
        "off_energy",
        "attenuation",
        "relative_change",
        "truncation_error",
        "update_norm",
    )
}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words for the tiny Llama."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, aligned = saved_pair(tmp_path_factory.mktemp("pair"))
    words().save_pretrained(aligned)
    return base, aligned


def texts(count: int, seed: int) -> Dataset:
    """Lines of 4 to 11 words, so that batches are padded."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for index in range(count):
        words = torch.randint(len(WORDS), (4 + index % 8,), generator=generator)
        lines.append(" ".join(WORDS[word] for word in words))
    return Dataset.from_dict({"text": lines})


def make_trainer(pair, output: Path, callbacks=None, model=None, **arguments) -> SFTTrainer:
    """SFTTrainer as its documentation starts it: from a checkpoint's name and a `peft_config`."""
    settings = {
        **TRAINING,
        "output_dir": str(output),
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_length": 16,
        "bf16": False,  # TRL's default, which needs a GPU
    }
    # Dropout draws from the global generator at every step: one stray draw by the callback would show.
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM")
    return SFTTrainer(
        model=str(pair[1]) if model is None else model,
        args=SFTConfig(**{**settings, **arguments}),
        train_dataset=texts(32, seed=3),
        eval_dataset=texts(8, seed=4),
        processing_class=PreTrainedTokenizerFast.from_pretrained(pair[1]),
        peft_config=lora if model is None else None,
        callbacks=callbacks,
    )


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
