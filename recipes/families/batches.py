"""Something random to train a model of any task on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recipes.families.tiny import SPECIAL, VOCABULARY

ROWS, TOKENS, SAMPLES = 2, 12, 2000


def make_batch(task: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs and labels; images and speech where nothing else is read, texts alone where they suffice."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(SPECIAL, VOCABULARY, (ROWS, TOKENS), generator=generator)
    classes = torch.zeros(ROWS, dtype=torch.long)
    if task == "speech":
        return {**_speech(model, generator), "labels": tokens}
    if task == "image classes":
        size = getattr(model.config, "image_size", 32)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.rand(ROWS, 3, height, width, generator=generator), "labels": classes}
    labels = {"text classes": classes, "token classes": torch.zeros_like(tokens)}
    return {"input_ids": tokens, "labels": labels.get(task, tokens)}


def _speech(model: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    if model.main_input_name == "input_values":
        return {"input_values": torch.rand(ROWS, SAMPLES, generator=generator)}
    positions, bins = getattr(model.config, "max_source_positions", 32), getattr(model.config, "num_mel_bins", 80)
    return {"input_features": torch.rand(ROWS, bins, 2 * positions, generator=generator)}  # as Whisper's are
