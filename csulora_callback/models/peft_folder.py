"""The folder that PEFT writes an adapter into: its weights with all that PEFT saves beside the factors, its config."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csulora_callback.models.factors import to_peft_state_dict
from csulora_callback.models.slots import Factors, Slot, slots_in
from csulora_callback.models.whole_slots import WholeSlot, tied_keys

WEIGHTS = SAFETENSORS_WEIGHTS_NAME


def adapter_folder(folder: str | os.PathLike, name: str) -> Path:
    """Where the adapter ``name`` lies in what was saved into ``folder``: PEFT gives names of one's own a subfolder.

    Example:
        >>> adapter_folder("out", "default").name
        'out'
    """
    folder = Path(folder)
    inside = folder / name
    return inside if any((inside / file).is_file() for file in (WEIGHTS, WEIGHTS_NAME)) else folder


def adapter_beside(checkpoint: str | os.PathLike) -> Path:
    """``NAME.adapter`` of the checkpoint ``NAME.ckpt``, or of ``NAME`` where it has another ending or none.

    Example:
        >>> adapter_beside("out/best.ckpt").name, adapter_beside("out/run-0.1").name
        ('best.adapter', 'run-0.1.adapter')
    """
    path = Path(checkpoint)
    return path.with_name(f"{path.name.removesuffix('.ckpt')}.adapter")


def read_adapter(folder: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in an adapter's folder, on the CPU; nothing where the folder holds no adapter.

    Raises:
        ValueError: if the file is corrupt.
    """
    folder = Path(folder)
    try:
        if (folder / WEIGHTS).is_file():
            return load_file(folder / WEIGHTS)
        if (folder / WEIGHTS_NAME).is_file():
            return torch.load(folder / WEIGHTS_NAME, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        LookupError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{folder}: expected a PEFT adapter, but its weights cannot be read ({error}).") from error
    return {}


def write_with_factors(
    source: Path, factors: Factors, target: Path, config: PeftConfig, slots: Sequence[Slot] | None = None
) -> None:
    """Write what lies in the adapter folder ``source`` into ``target``, with other factors in it.

    Whatever else PEFT saved (resized embeddings, a config with its ``auto_mapping``) is taken along. Where ``source``
    holds no adapter, as beside shards, ``target`` gets the factors in these ``slots`` and ``config``.
    """
    target.mkdir(parents=True, exist_ok=True)
    state = {}
    if (source / CONFIG_NAME).is_file():
        state = read_adapter(source)
        shutil.copyfile(source / CONFIG_NAME, target / CONFIG_NAME)
    else:
        config = copy.copy(config)
        config.inference_mode = True
        config.save_pretrained(target)
    slots = slots_in(state, factors) or slots
    made = to_peft_state_dict(factors, slots)
    if state and config.ensure_weight_tying:
        for slot in [each for each in slots if isinstance(each, WholeSlot)]:
            tied = {key: made[slot.keys[0]].clone() for key in tied_keys(state, slot) if key not in made}
            made |= tied
    state |= made
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
