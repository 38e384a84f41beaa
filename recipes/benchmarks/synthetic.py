"""A synthetic pair of checkpoints with the shapes of a real one, in the files that transformers writes.

The displacement of each linear layer is ``left · diag(i^-0.7) · right`` with Gaussian factors, a power law over a
quarter of the smaller side's directions, and white noise of half its energy; together 2 % of the weight's norm, as
instruct tunes have. All else is the same in both checkpoints. The truth is what lies in the files after rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from recipes.benchmarks.shapes import Shape
from recipes.schema.recipe import RecipeError

DECAY = 0.7  # of the singular values, σ_i = i^-DECAY
DIRECTIONS = 4  # a part of the smaller side: as many of them decay
NOISE = 0.5  # energy of the noise over that of the power law
DISPLACEMENT = 0.02  # ‖D‖ / ‖W‖
_WEIGHT = 0.02  # standard deviation of the weights, as transformers initializes them
INDEX = "model.safetensors.index.json"


def write_pair(shape: Shape, folder: Path, shards: int) -> tuple[Path, Path]:
    """Base and aligned checkpoint in two folders below ``folder``, one shard of both in memory at a time."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    model.tie_weights()
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    pair = folder / "base", folder / "aligned"
    for side in pair:
        side.mkdir(parents=True)
        model.config.save_pretrained(side)
    parts, places = _divided(sizes, shards), {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        places |= dict.fromkeys(names, file)
        made = {name: _weights(name, sizes[name]) for name in names}
        for place, side in enumerate(pair):
            save_file({name: weights[place] for name, weights in made.items()}, side / file, {"format": "pt"})
    index = {"metadata": {"total_size": shape.checkpoint_bytes}, "weight_map": places}
    for side in pair:
        (side / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return pair


def check_space(shape: Shape, folder: Path) -> None:
    """Refuse a disk that the pair does not fit on.

    Raises:
        RecipeError: saying how much is needed, and how much there is.
    """
    needed, free = 2 * shape.checkpoint_bytes, shutil.disk_usage(folder).free
    if free < 1.2 * needed:  # a fifth more for adapters, caches and the small pairs
        raise RecipeError(
            f"'benchmark.scratch': expected {1.2 * needed / 1e9:.1f} GB of free disk for the pair, but {folder} has "
            f"{free / 1e9:.1f} GB; name another folder, or fewer 'benchmark.layers'"
        )


def files_with(folder: Path, names: Iterable[str]) -> dict[Path, list[str]]:
    """The tensors of these modules' weights by the file that holds them, in the order of the files."""
    places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files: dict[Path, list[str]] = {}
    for name in names:
        files.setdefault(folder / places[f"{name}.weight"], []).append(f"{name}.weight")
    return dict(sorted(files.items()))


def displacement(pair: tuple[Path, Path], name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """``D = W_aligned − W_base`` of one module as it lies in the files, exact in float64."""
    base, aligned = (_read(folder, name).to(device, dtype) for folder in pair)
    return aligned - base


def _read(folder: Path, name: str) -> Tensor:
    ((file, (key,)),) = files_with(folder, [name]).items()
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def _divided(sizes: dict[str, tuple[int, ...]], shards: int) -> list[list[str]]:
    """The names in their order, in ``shards`` parts of about the same number of weights."""
    numbers = {name: math.prod(size) for name, size in sizes.items()}
    most, parts, filled = sum(numbers.values()) / shards, [[]], 0
    for name, number in numbers.items():
        if filled >= most * len(parts) and len(parts) < shards:
            parts.append([])
        parts[-1].append(name)
        filled += number
    return parts


def _weights(name: str, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Base and aligned weight in bfloat16; the name alone decides what is drawn, whatever the number of threads."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16), torch.ones(size, dtype=torch.bfloat16)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator).mul_(_WEIGHT).bfloat16()
    if not name.endswith("_proj.weight"):
        return base, base.clone()
    return base, _displacement(size, generator).add_(base).bfloat16()


def _displacement(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    directions = max(1, min(size) // DIRECTIONS)
    decay = torch.arange(1, directions + 1).float().pow_(-DECAY)
    left = torch.randn(size[0], directions, generator=generator) * (decay / decay.norm())
    right = torch.randn(directions, size[1], generator=generator)
    unit = _WEIGHT * DISPLACEMENT / math.sqrt(1 + NOISE)
    noise = torch.randn(size, generator=generator).mul_(unit * math.sqrt(NOISE))
    return torch.addmm(noise, left, right, alpha=unit)  # entries of variance unit² · (1 + NOISE)
