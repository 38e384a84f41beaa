"""Small checkpoints in shards that have been there for a while, and what may happen to their files."""

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from csulora_callback import SafetySubspace

NAMES = [f"layers.{layer}.{kind}" for layer in range(2) for kind in ("q_proj", "v_proj")]


def weights(seed: int) -> dict[str, torch.Tensor]:
    """What all seeds have in common, and something of their own: independent ones are warned of."""
    common, own = torch.Generator().manual_seed(100), torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": torch.randn(6, 8, generator=common) + 0.5 * torch.randn(6, 8, generator=own)
        for name in [*NAMES, "embed"]
    }


def write_shards(folder: Path, state: dict[str, torch.Tensor], shards: dict[str, list[str]]) -> None:
    folder.mkdir()
    for file, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settle(folder)


def settle(folder: Path) -> None:
    """As if its files had been there for a while."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60,) * 2)


def estimate(models: tuple, cache: Path | None, **arguments) -> SafetySubspace:
    return SafetySubspace.estimate(*models, NAMES, rank=2, progress=False, cache_dir=cache, **arguments)


def in_place(path: Path) -> None:
    """Same size, same inode."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    with path.open("r+b") as file:
        file.write(content)
