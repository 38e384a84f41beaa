"""The safety subspace of one module: leading singular vectors of ``D = W_aligned − W_base``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_callback.method.singular import leading_singular_triplets


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by; see SafetySubspace.fingerprint
class Basis:
    """The safety subspace of one module, in the orientation in which its weight is stored.

    Attributes:
        U: ``(rows, k)`` float32, orthonormal columns; the output side of an ``nn.Linear``.
        V: ``(columns, k)`` float32, orthonormal columns; the input side of an ``nn.Linear``.
        singular_values: ``(k,)`` float32, descending.
        displacement: ``‖D‖``, Frobenius norm of the whole displacement; 0 where alignment left the module alone.

    Example:
        >>> import torch
        >>> U, V = torch.eye(3)[:, :1], torch.eye(4)[:, :1]
        >>> basis = Basis(U, V, singular_values=torch.ones(1), displacement=2.0)
        >>> basis.energy
        0.25
    """

    U: Tensor
    V: Tensor
    singular_values: Tensor
    displacement: float

    @property
    def energy(self) -> float:
        """Share of ``‖D‖²`` that the subspace keeps, in ``[0, 1]``; 1 for a displacement of zero."""
        if self.displacement == 0.0:
            return 1.0
        return min(1.0, self.singular_values.double().square().sum().item() / self.displacement**2)


def basis_of(name: str, base: Tensor, aligned: Tensor, rule: dict, device: torch.device | str | None = None) -> Basis:
    """The basis of one module from its weights ``(rows, columns)``, of any floating dtypes.

    Args:
        name: of the module; with ``rule["seed"]`` it fixes the random start.
        base: the weight before alignment.
        aligned: the weight after it.
        rule: ``rank`` or ``energy``, ``method`` and ``seed``, see :meth:`csulora_callback.SafetySubspace.estimate`.
        device: where to compute; by default where ``aligned`` is.

    Example:
        >>> rule = {"rank": 1, "energy": None, "method": "exact", "seed": 0}
        >>> basis = basis_of("q_proj", torch.zeros(2, 3), torch.ones(2, 3), rule)
        >>> basis.U.shape, basis.V.shape, round(basis.displacement**2, 3)
        (torch.Size([2, 1]), torch.Size([3, 1]), 6.0)
    """
    device = aligned.device if device is None else device
    wide = torch.promote_types(torch.promote_types(base.dtype, aligned.dtype), torch.float32)
    D = aligned.to(device, wide) - base.to(device, wide)
    # Rows first, then float64: one float32 sum over 4096 × 4096 squares is wrong by 1e-3, and with it every energy.
    norm = torch.linalg.vector_norm(D, dim=1).cpu().double().norm().item()
    if norm == 0.0:
        return Basis(torch.zeros(D.shape[0], 0), torch.zeros(D.shape[1], 0), torch.zeros(0), 0.0)
    U, sigma, V = leading_singular_triplets(name, D / norm, rule)
    return Basis(U.float().cpu().contiguous(), V.float().cpu().contiguous(), (sigma * norm).float().cpu(), norm)


def check_rank_rule(rank: int, energy: float | None) -> None:
    """Refuse a rank that is no whole number ≥ 1 and an energy outside ``(0, 1]``, with a ValueError.

    Example:
        >>> check_rank_rule(64, 1.5)
        Traceback (most recent call last):
        ValueError: `energy`: expected a share in (0, 1] or None, but got 1.5.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"`rank`: expected a whole number ≥ 1, but got {rank!r}.")
    if energy is not None and not (isinstance(energy, (int, float)) and 0.0 < energy <= 1.0):
        raise ValueError(f"`energy`: expected a share in (0, 1] or None, but got {energy!r}.")
