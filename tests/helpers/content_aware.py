"""A data-aware correction by what follows a prefix of the probes, dense and in float64, from hooks of its own."""

from __future__ import annotations

from collections import defaultdict

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from csulora_callback.models.activations import Texts


def loras(model: PeftModel) -> dict[str, LoraLayer]:
    """The linear layers that have an adapter, by module name."""
    found = (
        (name, module) for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)
    )
    return {name: module for name, module in found if isinstance(module.get_base_layer(), torch.nn.Linear)}


@torch.no_grad()
def inputs_of(model: PeftModel, rows: list[list[int]], start: int) -> dict[str, Tensor]:
    """What goes into each of them after the first ``start`` tokens ``(n, d_in)``, row by row, without dropout."""
    seen, modes = defaultdict(list), {module: module.training for module in model.modules()}

    def keep(name):
        return lambda module, args: seen[name].append(args[0][0, start:].double().cpu())

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in loras(model).items()]
    model.eval()
    for row in rows:
        model(input_ids=torch.tensor([row], device=model.device))
    for hook in hooks:
        hook.remove()
    for module, mode in modes.items():
        module.training = mode
    return {name: torch.cat(own) for name, own in seen.items()}


def moment(vectors: Tensor) -> Tensor:
    """The second moment of vectors, whose trace is as large as it has rows."""
    C = vectors.double().T @ vectors.double()
    return C * (len(C) / C.trace())


def by_hand(model: PeftModel, texts: Texts, start: int, strength: float, ridge: float = 0.1) -> dict[str, Tensor]:
    """``A C_T (C_T + λ C_H)⁻¹`` of each layer, with ``C_H`` of what comes after so many tokens of each probe."""
    task, probes, found = inputs_of(model, texts.task, 0), inputs_of(model, texts.probes, start), {}
    for name, module in loras(model).items():
        C_T, C_H, identity = moment(task[name]), moment(probes[name]), torch.eye(task[name].shape[1]).double()
        C_T = (C_T + ridge * identity) / (1 + ridge)
        lora_A = module.lora_A["default"].weight.detach().cpu().double()
        found[name] = lora_A @ C_T @ torch.linalg.inv(C_T + strength * C_H)
    return found
