"""Tiny vision-language models, and training data of which some rows have an image, some several, and some none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE = 31  # the placeholder
SIDE = 8  # of an image, in pixels
_TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_VISION = {"hidden_size": 16, "num_attention_heads": 2, "patch_size": 4}


def llava(seed: int = 0) -> PreTrainedModel:
    """LLaVA with a Llama and a CLIP tower; an image of 8 × 8 takes 4 placeholders."""
    torch.manual_seed(seed)
    tower = {**_VISION, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": SIDE, "projection_dim": 16}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", **_TEXT},
            vision_config={"model_type": "clip_vision_model", **tower},
            image_token_index=IMAGE,
        )
    )


def qwen(seed: int = 0) -> PreTrainedModel:
    """Qwen2-VL; an image of 4 × 2w patches takes 2w placeholders."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config={**tower, "spatial_merge_size": 2},
            image_token_id=IMAGE,
            video_token_id=30,
            vision_start_token_id=29,
            vision_end_token_id=28,
        )
    )


def idefics(seed: int = 0) -> PreTrainedModel:
    """Idefics3, which gets images by row, padded to as many as a row has; one of 8 × 8 takes 1 placeholder."""
    torch.manual_seed(seed)
    tower = {**_VISION, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": SIDE}
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={"model_type": "llama", **_TEXT}, vision_config=tower, image_token_id=IMAGE, scale_factor=2
        )
    )


def gemma(seed: int = 0) -> PreTrainedModel:
    """Gemma 3, in which the tokens of an image look at each other; one of 8 × 8 takes 4 placeholders."""
    torch.manual_seed(seed)
    tower = {**_VISION, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": SIDE}
    text = {**_TEXT, "head_dim": 8, "sliding_window": 16}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=tower, image_token_index=IMAGE, mm_tokens_per_image=4)
    )


MODELS = {"llava": llava, "qwen": qwen, "idefics": idefics, "gemma": gemma}
PLACEHOLDERS = {"llava": 4, "idefics": 1, "gemma": 4}  # of an image of 8 × 8
TYPES = {"qwen": "mm_token_type_ids", "gemma": "token_type_ids"}


class Pictures(torch.utils.data.Dataset):
    """Rows with so many images each, of random pixels, and some words behind them, for a kind of model."""

    def __init__(self, images: Sequence[int], kind: str, seed: int = 3) -> None:
        self.kind, self.rows = kind, []
        generator = torch.Generator().manual_seed(seed)
        for place, count in enumerate(images):
            words = torch.randint(3, 28, (7 + place % 3,), generator=generator).tolist()
            grids = [(1, 4, 2 * (1 + (place + i) % 3)) for i in range(count)]
            tokens = [t * h * w // 4 if kind == "qwen" else PLACEHOLDERS[kind] for t, h, w in grids]
            ids, others = [token for many in tokens for token in (29, *[IMAGE] * many, 28)], {}
            if count:
                patches = (sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4)
                shape = patches if kind == "qwen" else (count, 3, SIDE, SIDE)
                others["pixel_values"] = torch.randn(shape, generator=generator)
            if count and kind == "qwen":
                others["image_grid_thw"] = torch.tensor(grids)
            self.rows.append({"input_ids": [0, *ids, *words], **others})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """As processors of transformers do: ids are padded, and images stand one behind the other, or by row."""
        length = max(len(row["input_ids"]) for row in rows)
        padding = torch.full((len(rows), length), 2)
        batch = {"input_ids": padding, "attention_mask": torch.zeros_like(padding)}
        for place, row in enumerate(rows):
            batch["input_ids"][place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            batch["attention_mask"][place, : len(row["input_ids"])] = 1
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        images = {name: [row[name] for row in rows if name in row] for name in ("pixel_values", "image_grid_thw")}
        batch |= {name: torch.cat(own) for name, own in images.items() if own}
        if self.kind == "idefics" and images["pixel_values"]:
            most, of_row = max(map(len, images["pixel_values"])), [row.get("pixel_values") for row in rows]
            batch["pixel_values"] = torch.zeros(len(rows), most, 3, SIDE, SIDE)
            batch["pixel_attention_mask"] = torch.zeros(len(rows), most, SIDE, SIDE, dtype=torch.long)
            for place, own in enumerate(of_row):
                if own is not None:
                    batch["pixel_values"][place, : len(own)] = own
                    batch["pixel_attention_mask"][place, : len(own)] = 1
        if self.kind in TYPES:
            batch[TYPES[self.kind]] = (batch["input_ids"] == IMAGE).long()
        return batch
