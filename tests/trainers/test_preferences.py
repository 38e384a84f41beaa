"""TRL's preference trainers: what is to be learned is the chosen completions, and no rejected one is ever the task."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from csulora_callback import CSULoRACallback, Penalty
from csulora_callback.sidecar import Sidecar
from tests.helpers import trl as in_trl
from tests.helpers.lab import RANK, TARGETS, TRAINING

PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]
ROWS = 16
PAIRS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "orpo": (ORPOTrainer, ORPOConfig, {}),
    "cpo": (CPOTrainer, CPOConfig, {}),
    "tpo": (TPOTrainer, TPOConfig, {"tpo_alpha": 1.0}),
    "tpo without the best": (TPOTrainer, TPOConfig, {"tpo_alpha": 0.0}),
}


def said(kind: int, row: int) -> str:
    """Three words that only completions of one kind have."""
    return " ".join(f"word{8 + 6 * kind + (row + i) % 6}" for i in range(3))


def pairs() -> Dataset:
    prompts = [f"word{row % 8} word{(3 * row) % 8} word{(5 * row + 1) % 8} " for row in range(ROWS)]
    names = ("chosen", "rejected", "reference")
    kinds = {name: [said(kind, row) for row in range(ROWS)] for kind, name in enumerate(names)}
    return Dataset.from_dict({"prompt": prompts, **kinds})


def singles() -> Dataset:
    labels = [row % 3 != 0 for row in range(ROWS)]
    completions = [said(0 if label else 1, row) for row, label in enumerate(labels)]
    return Dataset.from_dict({"prompt": pairs()["prompt"], "completion": completions, "label": labels})


def train(trainer, config, data, pair, output, **settings):
    in_trl.words().save_pretrained(pair[1])
    settings = {**TRAINING, "max_steps": 4, "save_steps": 4, "bf16": False, "max_length": 24, **settings}
    trainer(
        model=str(pair[1]),
        args=config(output_dir=str(output), **settings),
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(pair[1]),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[CSULoRACallback(base_model=pair[0], rank=RANK, probes=PROBES, penalty=Penalty.data_aware(4.0))],
    ).train()
    return Sidecar.load(output / "checkpoint-4")


def kinds_in(task) -> list[set[int]]:
    """Of each row, which kinds of completions it holds words of."""
    words = in_trl.words()
    numbers = [[int(word[4:]) for word in words.convert_ids_to_tokens(row) if word.startswith("word")] for row in task]
    return [{(number - 8) // 6 for number in row if number >= 8} for row in numbers]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "dpo" else pytest.mark.slow) for name in PAIRS]
)
def test_of_pairs_the_chosen_one_is_the_task(name, pair, tmp_path):
    trainer, config, settings = PAIRS[name]
    saved = train(trainer, config, pairs(), pair, tmp_path, **settings)
    expected = [{0}, {2}] if settings.get("tpo_alpha") else [{0}]
    kinds = kinds_in(saved.texts.task)
    assert all(kind in expected for kind in kinds)
    assert [kinds.count(kind) for kind in expected] == [ROWS] * len(expected)
    assert saved.texts.seen == ROWS * len(expected)
    assert "left_out_rows" not in saved.record


@pytest.mark.slow
def test_of_single_completions_the_desirable_ones_are_the_task(pair, tmp_path):
    saved = train(KTOTrainer, KTOConfig, singles(), pair, tmp_path)
    assert kinds_in(saved.texts.task) == [{0}] * sum(singles()["label"])
    assert saved.texts.seen == sum(singles()["label"])
