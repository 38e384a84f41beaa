"""A checkpoint as transformers loads it, which renames and fuses weights; code that lies beside them is never run."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel


def load_through_transformers(folder: Path) -> tuple[nn.Module, set[str]]:
    """The model, and the names of parameters that the files lack and transformers made up.

    Raises:
        Exception: of a config or weights that are broken, in one of many ways.
    """
    # False, as with None transformers asks on the terminal whether to run code that lies in the folder.
    architecture = _architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures)
    # transformers draws what the files lack at random. Noise must neither pass for weights nor move the generator
    # that a training run draws from.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model, info = architecture.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    return model, set(info["missing_keys"])


def _architecture(named: object) -> type[PreTrainedModel]:
    """The first class that a config lists, which is somebody else's file and may list anything."""
    if isinstance(named, list) and named and isinstance(named[0], str):
        found = getattr(transformers, named[0], None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"config.json: expected the name of a model of transformers in `architectures`, but got {named!r}"
    )
