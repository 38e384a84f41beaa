"""A small Llama that is trained to the same weights, bit for bit, on any machine.

Rounding differs between machines, by instruction set, number of threads and version of PyTorch, and some hundred steps
at a high rate make another model of such a difference. Here steps are computed in float64, and the weights kept on a
grid, so that every step rounds away what differs. transformers computes norms, rotary angles and losses in float32
whatever the model's dtype; they are replaced.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

GRID = 2.0**-22
"""Weights are multiples of it, and below 4: float32 holds them exactly."""


def llama(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A new model in float64, for :func:`loss`, :func:`settle` after each step, and :func:`save`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).double()
    bound = round(3**0.5 * config.initializer_range / GRID)  # uniform, with the usual spread
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # the generator's normal numbers differ in their last bits, whole ones do not
                weight.copy_(GRID * torch.randint(-bound, bound + 1, weight.shape))
    model.model.rotary_emb = _Rotary(config)
    for owner in list(model.modules()):
        for name, _ in list(owner.named_children()):
            if name.endswith("norm"):
                setattr(owner, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=torch.float64))
    return model.train()


def loss(model: LlamaForCausalLM, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy (nats) over the labelled tokens of a batch; all arguments ``(batch, length)``."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@torch.no_grad()
def settle(model: LlamaForCausalLM) -> None:
    """Round the weights to the grid."""
    for weight in model.parameters():
        weight.div_(GRID).round_().mul_(GRID)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model in float32, for any Llama to load."""
    copy.deepcopy(model).float().save_pretrained(folder)


class _Rotary(nn.Module):
    """Cosines and sines of the rotary angles, ``(batch, length, head_dim)`` each."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        dim = config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()
