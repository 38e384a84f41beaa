"""A tiny model of a family before and after alignment, as folders that transformers loads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from recipes.families.catalogue import TASKS, Entry
from recipes.families.tiny import tiny_config

RANK = 4  # of what alignment did to each matrix, but for some noise
LARGEST = 30e6  # parameters; what is larger has sizes that no name tells


@dataclass(frozen=True)
class Pair:
    """Folders of a base and an aligned model, and the class that is trained."""

    base: Path
    aligned: Path
    kind: type[PreTrainedModel]

    def load(self, side: Path) -> tuple[PreTrainedModel, set[str]]:
        """One side in float32, and the parameters that its folder lacks, which are the same on every load."""
        torch.manual_seed(0)
        model, info = self.kind.from_pretrained(side, dtype=torch.float32, output_loading_info=True)
        return model, set(info["missing_keys"])


def make_pair(entry: Entry, folder: Path) -> Pair:
    """Build both from a tiny config, and save them.

    Raises:
        ValueError: if the model is not tiny, or transformers does not load what it saved.
        Exception: whatever transformers raises for a config that it cannot build.
    """
    kind = getattr(transformers, entry.kind)
    config = config_for(kind, tiny_config(entry.family))
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"not tiny: {count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    base = kind(config)
    aligned = align(base)
    for name, model in {"base": base, "aligned": aligned}.items():
        (model.base_model if TASKS[entry.task].new_head else model).save_pretrained(folder / name)
    pair = Pair(folder / "base", folder / "aligned", kind)
    _check_loaded(pair, base, TASKS[entry.task].new_head)
    return pair


def _check_loaded(pair: Pair, base: PreTrainedModel, new_head: bool) -> None:
    loaded, missing = pair.load(pair.base)
    if new_head:
        base, loaded = base.base_model, loaded.base_model
    weights = dict(base.named_parameters())
    other = [name for name, weight in loaded.named_parameters() if not torch.equal(weight, weights[name])]
    if other:
        raise ValueError(
            f"transformers loads {len(other)} other weights than it saved, such as '{other[0]}'"
            f"{', whose keys it does not find' if missing else ''}"
        )


def config_for(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The part that a class is made from: of a multimodal family the text model's, where the class is one of text."""
    if type(config) is kind.config_class:
        return config
    text = config.get_text_config(decoder=True)
    return text if type(text) is kind.config_class else config


@torch.no_grad()
def align(base: PreTrainedModel) -> PreTrainedModel:
    """A copy whose matrices, those of stacked experts each, are displaced in ``RANK`` directions above small noise."""
    generator = torch.Generator().manual_seed(1)
    aligned = copy.deepcopy(base)
    for parameter in aligned.parameters():
        if parameter.ndim in (2, 3) and parameter.is_floating_point():
            parameter += 0.1 * _displacement(parameter, generator)
    return aligned


def _displacement(weight: nn.Parameter, generator: torch.Generator) -> Tensor:
    *stack, rows, columns = weight.shape
    left, right, noise = (
        torch.randn(*stack, *shape, generator=generator) for shape in ((rows, RANK), (RANK, columns), (rows, columns))
    )
    return (left @ right / RANK**0.5 + 0.01 * noise).to(weight.dtype) * weight.std().clamp_min(1e-2)
