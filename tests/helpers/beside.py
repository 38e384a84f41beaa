"""Dense corrections in float64, of weights and updates as transformers and PEFT give them, to compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty
from csulora_callback.method.penalty import BLOCKS
from tests.helpers.lab import RANK


def dense(update: Tensor, D: Tensor, penalty: Penalty, transposed: bool = False) -> tuple[Tensor, dict[str, float]]:
    """The closest safe update by projections as wide as the weight, and the energies; all as stored.

    Args:
        update: ``(rows, columns)``.
        D: the displacement, as large.
        penalty: the table of multipliers.
        transposed: whether rows are inputs.
    """
    update = update.double()
    U, _, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    P, Q = U[:, :RANK] @ U[:, :RANK].T, Vh[:RANK].T @ Vh[:RANK]
    P_, Q_ = torch.eye(len(P)).double() - P, torch.eye(len(Q)).double() - Q
    blocks = [P @ update @ Q, P @ update @ Q_, P_ @ update @ Q, P_ @ update @ Q_]
    if transposed:
        blocks[1], blocks[2] = blocks[2], blocks[1]
    energy = {block: part.square().sum().item() for block, part in zip(BLOCKS, blocks, strict=True)}
    whole = sum(energy.values())
    gain = penalty.gain({block: part / whole for block, part in energy.items()})
    return sum(gain[block] * part for block, part in zip(BLOCKS, blocks, strict=True)), energy


def tables(folder: Path) -> dict[str, Tensor]:
    """Both embeddings of a checkpoint, as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        "model.embed_tokens": model.get_input_embeddings().weight.detach(),
        "lm_head": model.get_output_embeddings().weight.detach(),
    }


def by_hand(name: str, weight: Tensor, pair: tuple[Path, Path], penalty: Penalty) -> Tensor:
    """What is to be saved of an embedding that was trained to ``weight``; rows that no checkpoint has stay."""
    base, aligned = (tables(folder)[name] for folder in pair)
    count = min(len(aligned), len(weight))
    update, D = weight[:count] - aligned[:count], (aligned - base)[:count]
    closest, _ = dense(update, D, penalty, transposed=name != "lm_head")
    return torch.cat([aligned[:count] + closest, weight[count:].double()])


def key(name: str) -> str:
    """PEFT's, of a module that is saved whole."""
    return f"base_model.model.{name}.weight"


def saved(folder: Path) -> dict[str, Tensor]:
    """The adapter in a folder."""
    return load_file(folder / "adapter_model.safetensors")
