"""What a correction did to one module's update, whatever form the update has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from csulora_callback.method.penalty import BLOCKS


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a correction of one module's update did. Shares, gains and errors are dimensionless.

    Attributes:
        energy: ``‖Π_b Δ‖²`` by block, scaling included.
        relative_energy: ``ρ_b = ‖Π_b Δ‖² / ‖Δ‖²`` by block; all zero for ``Δ = 0``.
        gain: ``g_b`` by block, of the penalty's table.
        relative_change: ``‖X − Δ‖ / ‖Δ‖`` of the returned update ``X``; 0 for ``Δ = 0``. At most 1, unless the penalty
            is data-aware.
        truncation_error: ``‖X* − X‖ / ‖X*‖``, the part of the closest safe update that rank ``r`` cannot hold.
        closest_norm: ``‖X*‖``, the norm of the closest safe update before any truncation.
        along: ``uᵢᵀ Δ vᵢ`` of each pair of columns of ``U`` and ``V``, ``(min(k, k'),)`` float64 on the CPU: which way
            the update points. With singular values ``σ``, ``Σᵢ σᵢ · along[i] = ⟨Δ, U S Vᵀ⟩``.
        corrected_along: the same of the returned update.
    """

    energy: dict[str, float]
    relative_energy: dict[str, float]
    gain: dict[str, float]
    relative_change: float
    truncation_error: float
    closest_norm: float
    along: Tensor
    corrected_along: Tensor

    @property
    def update_norm(self) -> float:
        """``‖Δ‖``, the Frobenius norm of the update before correction."""
        return math.sqrt(sum(self.energy.values()))

    @property
    def corrected_norm(self) -> float:
        """``‖X‖``, the norm of the returned update."""
        return self.closest_norm * math.sqrt(1.0 - self.truncation_error**2)


def closest_norm(gain: Mapping[str, float], energy: Mapping[str, float]) -> float:
    """``‖X*‖`` of the gains and energies by block.

    Example:
        >>> whole = dict.fromkeys(BLOCKS, 1.0)
        >>> closest_norm(dict.fromkeys(BLOCKS, 0.5), whole)
        1.0
    """
    return math.sqrt(sum(gain[block] ** 2 * energy[block] for block in BLOCKS))


def relative_change(gain: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """``‖X* − Δ‖ / ‖Δ‖`` of the gains and shares of the energy by block.

    Example:
        >>> relative_change(dict.fromkeys(BLOCKS, 0.5), dict.fromkeys(BLOCKS, 0.25))
        0.5
    """
    return math.sqrt(sum((1 - gain[block]) ** 2 * shares[block] for block in BLOCKS))
