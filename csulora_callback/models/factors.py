"""An adapter's factors by module name, apart from any model, and as PEFT's files hold them."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

Factors = dict[str, tuple[Tensor, Tensor]]
"""``(lora_A, lora_B)`` by module name, shapes ``(r, d_in)`` and ``(d_out, r)``."""

# PEFT's key of a factor inside an adapter file, fixed by its documented checkpoint format.
_PEFT_KEY = "base_model.model.{name}.lora_{factor}.weight"


def digest(factors: Factors) -> str:
    """SHA-256 over names and values of all factors.

    Values are hashed in float32 at least: PEFT loads a 16-bit adapter file into float32 parameters, and these are the
    same weights.
    """
    sha = hashlib.sha256()
    for name in sorted(factors):
        sha.update(name.encode())
        for tensor in factors[name]:
            wide = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).contiguous()
            sha.update(wide.numpy().tobytes())
    return sha.hexdigest()


def all_finite(factors: Factors) -> bool:
    """Whether no factor holds NaN or Inf."""
    return all(bool(torch.isfinite(tensor).all()) for pair in factors.values() for tensor in pair)


def to_peft_state_dict(factors: Factors) -> dict[str, Tensor]:
    """Factors under the keys of a PEFT adapter file (``adapter_model.safetensors``), contiguous and on the CPU."""
    state = {}
    for name, (lora_A, lora_B) in factors.items():
        state[_PEFT_KEY.format(name=name, factor="A")] = lora_A.cpu().contiguous()
        state[_PEFT_KEY.format(name=name, factor="B")] = lora_B.cpu().contiguous()
    return state


def save_as_peft_adapter(factors: Factors, config: PeftConfig, folder: str | os.PathLike) -> None:
    """Write a folder that ``PeftModel.from_pretrained`` loads; it appears whole or not at all.

    An earlier folder of that name is replaced.
    """
    folder = Path(folder)
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(to_peft_state_dict(factors), unfinished / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    for_loading = copy.copy(config)
    for_loading.inference_mode = True
    for_loading.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def from_peft_state_dict(state: Mapping[str, Tensor], names: list[str], source: str) -> Factors:
    """The factors of the modules ``names`` out of a PEFT adapter state dict.

    Raises:
        ValueError: if a factor of one of the modules is missing; ``source`` names the file in the message.
    """
    factors = {}
    for name in names:
        keys = [_PEFT_KEY.format(name=name, factor=factor) for factor in "AB"]
        for key in keys:
            if key not in state:
                raise ValueError(f"{source}: expected the LoRA factor '{key}', but the file does not hold it.")
        factors[name] = (state[keys[0]], state[keys[1]])
    return factors
