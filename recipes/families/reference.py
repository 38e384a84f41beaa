"""What a checkpoint has to hold, from outside: dense, in float64, and by the weights of merged models alone.

Shares no code with the library: projectors from a full SVD of what transformers loads, and the update of every weight
as PEFT gives it to whoever loads and merges the adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.families.pair import RANK, Pair

STRENGTH = 10.0  # of Penalty.guard, whose gains factor over the two sides: no rank is cut


@dataclass(frozen=True)
class Checked:
    """How far the saved update is from the closest safe one.

    Attributes:
        matrices: how many were updated, each expert's of a stack counted.
        worst: the largest ``‖X − X*‖ / ‖X*‖`` of them.
        where: the weight that it is of.
        new: weights that the base has none of, which are to be saved as they were trained.
        lost: keys of the adapter's file that PEFT does not load again; what they hold is checked all the same.
    """

    matrices: int
    worst: float
    where: str
    new: list[str]
    lost: list[str]


def check(pair: Pair, raw: Path, saved: Path) -> Checked:
    """Compare the corrected adapter in a folder with what its raw one has to become.

    Raises:
        ValueError: if nothing was updated, or something that is no matrix and no stack of them; or by NaN.
    """
    base, lacking = pair.load(pair.base)
    aligned, _ = pair.load(pair.aligned)
    before, middle = _weights(base), _weights(aligned)
    (trained, _), (ships, lost) = (_merged(pair, folder) for folder in (raw, saved))
    errors, new = [], []
    for name, weight in middle.items():
        update, found = trained[name] - weight, ships[name] - weight
        if not update.any() and not found.any():
            continue
        if name in lacking:
            new.append(name)
            errors.append((_distance(found, update), name))
            continue
        if update.ndim not in (2, 3):
            raise ValueError(f"expected updates of matrices, but '{name}' has the shape {tuple(update.shape)}")
        for place, (D, delta, X) in enumerate(
            zip(*map(_stacked, (weight - before[name], update, found)), strict=True)
        ):
            errors.append((_distance(X, closest(D, delta)), f"{name}[{place}]" if update.ndim == 3 else name))
    if not errors:
        raise ValueError("expected updates of matrices, but nothing differs from the aligned model")
    if any(math.isnan(error) for error, _ in errors):
        raise ValueError("expected finite weights, but some are NaN")
    worst, where = max(errors)
    return Checked(len(errors) - len(new), worst, where, new, lost)


def closest(displacement: Tensor, update: Tensor) -> Tensor:
    """``X*`` of ``Penalty.guard(STRENGTH)``: on each side what lies in the subspace is divided by ``1 + STRENGTH``.

    Example:
        >>> D = torch.diag(torch.tensor([9.0, 8.0, 7.0, 6.0, 0.0]).double())
        >>> closest(D, torch.eye(5, dtype=torch.float64)).diagonal().mul(121).round().tolist()
        [1.0, 1.0, 1.0, 1.0, 121.0]
    """
    U, _, Vh = torch.linalg.svd(displacement, full_matrices=False)
    share = STRENGTH / (1 + STRENGTH)
    U, V = U[:, :RANK], Vh[:RANK].T
    update = update - share * U @ (U.T @ update)
    return update - share * (update @ V) @ V.T


def _stacked(weights: Tensor) -> Tensor:
    return weights if weights.ndim == 3 else weights[None]


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _merged(pair: Pair, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of the aligned model with an adapter merged into it, and what PEFT did not load of that."""
    aligned, _ = pair.load(pair.aligned)
    model, file = PeftModel.from_pretrained(aligned, folder), load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    lost = [key for key, live in get_peft_model_state_dict(model).items() if not torch.equal(live, file[key])]
    for key, live in get_peft_model_state_dict(model).items():
        live.copy_(file[key])  # the parameters' own memory
    return _weights(model.double().merge_and_unload()), lost


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}
