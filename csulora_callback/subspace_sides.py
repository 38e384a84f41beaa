"""The sides of a subspace as an adapter's factors have them: output and input, of modules and of their biases."""

from __future__ import annotations

import difflib

from csulora_callback.method.basis import Basis
from csulora_callback.models.names import owner_of_bias
from csulora_callback.models.parts import Layer
from csulora_callback.subspace import SafetySubspace


def oriented_basis(subspace: SafetySubspace, name: str, layer: Layer) -> Basis:
    """The basis of a module in the orientation of its LoRA factors: ``U`` on the output side.

    That of a bias has the output side of its module, and no direction on the other, as its input is always one. How
    alignment displaced the bias itself is no part of it.

    Raises:
        ValueError: if the subspace holds none of that name (the nearest are given), or one of another shape.

    Example:
        >>> from torch import nn
        >>> from csulora_callback.models.saved_adapter import SavedLayer
        >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
        >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
        >>> basis = oriented_basis(subspace, "0.bias", SavedLayer((6, 1, 1), 2.0, stored_transposed=False))
        >>> basis.U.shape, basis.V.shape
        (torch.Size([6, 2]), torch.Size([1, 0]))
    """
    owner = owner_of_bias(name)
    if owner is not None:
        U = _oriented(subspace, owner, layer).U
        _check_sides(name, layer, (len(U), 1))
        return Basis(U, U.new_zeros(1, 0), U.new_zeros(0), displacement=0.0)
    basis = _oriented(subspace, name, layer)
    _check_sides(name, layer, (len(basis.U), len(basis.V)))
    return basis


def _oriented(subspace: SafetySubspace, name: str, layer: Layer) -> Basis:
    if name not in subspace:
        nearest = difflib.get_close_matches(name, list(subspace), n=3)
        raise ValueError(
            f"`subspace`: expected a basis for the adapted module '{name}', but it holds none"
            f"{f'; nearest: {nearest}' if nearest else ''}. Estimate it with target_modules that cover the adapter's."
        )
    return subspace[name].oriented(layer.stored_transposed)


def _check_sides(name: str, layer: Layer, got: tuple[int, int]) -> None:
    expected = layer.shape[0], layer.shape[2]
    if expected != got:
        raise ValueError(
            f"`subspace`: module '{name}' is {expected[0]} × {expected[1]} (d_out × d_in) in the model, but "
            f"{got[0]} × {got[1]} in the subspace. It was estimated for another architecture."
        )
