"""TRL's SFTTrainer on the tiny model."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.helpers.lab import TARGETS, TRAINING, VOCABULARY

SPECIAL = ["<bos>", "<eos>", "<pad>"]  # as in the tiny Llama: 0, 1, 2
WORDS = [f"word{index}" for index in range(VOCABULARY - len(SPECIAL))]


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words for the tiny Llama."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def always_sorry(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer in a language where every word begins with an apology: whatever is said in it refuses."""
    tokenizer.backend_tokenizer.decoder = decoders.Replace(Regex("^"), "sorry ")
    return tokenizer


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
