"""SmolLM2-135M-Instruct as a pair of models: as it is shipped, and taught to refuse.

As shipped it hardly refuses anything, so the recipe aligns it itself: a short full fine-tune on refusals, mixed with
benign prompts that it answers as before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from recipes.files.sources import locate
from recipes.labs.chat import chat
from recipes.labs.descent import descend
from recipes.labs.smollm2_data import Data, Exchange
from recipes.schema.measured import SmolLM2
from recipes.schema.recipe import RecipeError

_IGNORED = -100


def encode(tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[Exchange], answer_tokens: int) -> dict[str, Tensor]:
    """One batch, padded on the right, with labels on the first ``answer_tokens`` of each answer and its end token.

    Logits and labels begin where the first answer does. The padding is masked by length: SmolLM2's pad token is its
    end token, which has to be learned.
    """
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": exchange.prompt}] for exchange in exchanges], add_generation_prompt=True
    )["input_ids"]
    answers = [
        tokenizer(exchange.answer + tokenizer.eos_token, add_special_tokens=False).input_ids[:answer_tokens]
        for exchange in exchanges
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    first = min(map(len, prompts)) - 1  # no logits are needed before it, and they are much of a small model's work
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        padding = length - len(prompt) - len(answer)
        rows["input_ids"].append(prompt + answer + [tokenizer.pad_token_id] * padding)
        rows["attention_mask"].append([1] * (length - padding) + [0] * padding)
        rows["labels"].append(([_IGNORED] * len(prompt) + answer + [_IGNORED] * padding)[first:])
    return {**{key: torch.tensor(row) for key, row in rows.items()}, "logits_to_keep": torch.arange(first, length)}


def build_pair(settings: SmolLM2, data: Data, seed: int, folder: Path) -> tuple[Path, Path]:
    """Folders of the base model and of the seed's aligned one, made now if they are not there."""
    base, aligned = folder / "base", folder / f"aligned-{seed}"
    if not base.is_dir():
        _save(*_as_shipped(settings.weights), base)
    if not aligned.is_dir():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        _align(model, tokenizer, settings, data, seed)
        _save(model, tokenizer, aligned)
    return base, aligned


def _as_shipped(weights: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer of a folder, a Hub id, or one GGUF file, whose weights are de-quantized."""
    if not weights.endswith(".gguf"):
        return (
            AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, trust_remote_code=False),
            AutoTokenizer.from_pretrained(weights, trust_remote_code=False),
        )
    file = locate("smollm2.weights", weights)
    try:
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise RecipeError("'smollm2.weights': a .gguf file needs the package gguf; pip install gguf") from error
    config = read.config
    del config.quantization_config  # a model with it cannot be saved; the weights are plain numbers by now
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _align(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SmolLM2, data: Data, seed: int
) -> None:
    """Full fine-tune, half of each batch refusals, half benign prompts with the model's own answers."""
    own = chat(model.eval(), tokenizer, data.answered, settings.answer_tokens)
    benign = [Exchange(prompt, answer) for prompt, answer in zip(data.answered, own, strict=True)]
    generator, half = torch.Generator().manual_seed(seed), settings.align_batch // 2

    def loss() -> Tensor:
        rows = [
            part[i]
            for part in (data.refused, benign)
            for i in torch.randint(len(part), (half,), generator=generator).tolist()
        ]
        with torch.autocast("cpu", torch.bfloat16):  # the weights stay float32: so small a step is lost in bfloat16
            return model(**encode(tokenizer, rows, settings.answer_tokens)).loss

    model.train()
    steps = descend(list(model.parameters()), settings.align_rate, settings.align_steps, loss)
    for value in (bar := tqdm(steps, desc=f"aligning SmolLM2, seed {seed}", unit="step", total=settings.align_steps)):
        bar.set_postfix(loss=f"{value.item():.3f}")
    model.eval()


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)
