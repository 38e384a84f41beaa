"""What a correction does, dense and in float64: of weights as transformers loads them, updates as PEFT merges them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

STRENGTH = 5.0


def as_output_by_input(module: nn.Module, weight: Tensor) -> Tensor:
    """``(d_out, d_in)`` of a weight as the module stores it."""
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight


def matrices(folder: Path) -> dict[str, Tensor]:
    """Weights ``(d_out, d_in)`` by module name."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    return {
        name: as_output_by_input(module, module.weight.detach())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }


def updates(aligned: Path, adapter: Path) -> dict[str, Tensor]:
    """``Δ (d_out, d_in)`` by module name, and of biases ``(d_out,)`` by ``NAME.bias``, from PEFT's own arithmetic."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned), adapter).double()
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default").detach()
            found[path] = as_output_by_input(module.get_base_layer(), delta)
            if module.lora_bias["default"]:
                found[f"{path}.bias"] = module.scaling["default"] * module.lora_B["default"].bias.detach()
    return found


def merged(aligned: Path, adapter: Path) -> dict[str, Tensor]:
    """The same out of the weights and biases of the model into which PEFT has merged the adapter."""
    before = AutoModelForCausalLM.from_pretrained(aligned).double()
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned), adapter).double()
    modules, found = dict(before.named_modules()), {}
    for name, module in after.merge_and_unload().named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            found[name] = as_output_by_input(module, (module.weight - modules[name].weight).detach())
            if getattr(module, "bias", None) is not None:
                found[f"{name}.bias"] = (module.bias - modules[name].bias).detach()
    return found


def closest(
    displacement: Tensor, update: Tensor, rank: int, lora_rank: int | None = None, strength: float = STRENGTH
) -> Tensor:
    """``X*`` of ``Penalty.csulora(strength)``, and its best approximation of ``lora_rank``.

    An update with one axis is that of a bias, which has the output side of the module whose displacement is given.
    """
    U, _, Vh = torch.linalg.svd(displacement)
    left, right = U[:, :rank] @ U[:, :rank].T, Vh[:rank].T @ Vh[:rank]
    matrix = update if update.ndim == 2 else update[:, None]
    if update.ndim == 1:
        right = torch.zeros(1, 1, dtype=matrix.dtype)
    aligned = left @ matrix @ right
    partial = left @ matrix + matrix @ right - 2 * aligned
    off = matrix - aligned - partial
    whole = matrix.square().sum()
    result = aligned + sum(part / (1 + strength * part.square().sum() / whole) for part in (partial, off))
    if lora_rank is not None:
        U, sigma, Vh = torch.linalg.svd(result, full_matrices=False)
        result = U[:, :lora_rank] * sigma[:lora_rank] @ Vh[:lora_rank]
    return result if update.ndim == 2 else result[:, 0]


def displacement_of(name: str, base: dict[str, Tensor], aligned: dict[str, Tensor]) -> Tensor:
    """Of a module, or of the one whose bias has that name."""
    name = name.removesuffix(".bias")
    return aligned[name] - base[name]
