"""Drift and attenuation over all modules of an adapter, as a torchmetrics metric."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from csulora_callback.method.correction import Correction
from csulora_callback.method.penalty import BLOCKS


class SafetyDrift(Metric):
    """Where an update lies relative to the safety subspace, and what a correction does to it.

    ``update`` takes one module's :class:`~csulora_callback.Correction` at a time; ``compute`` returns, over all of
    them (sums over modules of squared Frobenius norms, in float64):

    ===================================  =====================================================================
    ``csulora/aligned_energy``           share of ``‖Δ‖²`` in the fully aligned block
    ``csulora/partial_energy``           share in the two partially aligned halves
    ``csulora/off_energy``               share off the subspace
    ``csulora/attenuation``              ``1 − ‖X‖/‖Δ‖``
    ``csulora/relative_change``          ``‖X − Δ‖/‖Δ‖``
    ``csulora/truncation_error``         ``‖X* − X‖/‖X*‖``
    ``csulora/update_norm``              ``‖Δ‖``
    ===================================  =====================================================================

    All but the last are dimensionless; for ``Δ = 0`` everything is 0. Under a data-aware penalty the update may grow
    in directions that nothing excites: ``attenuation`` can be negative, and ``relative_change`` above 1.

    Example:
        >>> import torch
        >>> from csulora_callback import Penalty, SafetyDrift, correct
        >>> drift = SafetyDrift()
        >>> A, B, basis = torch.ones(1, 4), torch.ones(4, 1), torch.eye(4)[:, :2]
        >>> drift.update(correct(A, B, basis, basis, Penalty.projection()))
        >>> {name: round(value, 3) for name, value in drift.compute().items()}["csulora/aligned_energy"]
        0.25
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self) -> None:
        # Every process holds the whole adapter: summing over processes would count each module several times.
        super().__init__(sync_on_compute=False)
        self.add_state("energy", torch.zeros(len(BLOCKS), dtype=torch.float64), dist_reduce_fx="sum")
        for state in ("corrected", "closest", "truncated", "changed"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correction: Correction) -> None:
        """Add one module."""
        self.energy += torch.tensor([correction.energy[block] for block in BLOCKS], dtype=torch.float64)
        self.corrected += correction.corrected_norm**2
        self.closest += correction.closest_norm**2
        self.truncated += (correction.truncation_error * correction.closest_norm) ** 2
        self.changed += (correction.relative_change * correction.update_norm) ** 2

    def compute(self) -> dict[str, float]:
        """The metrics of the table above."""
        total = self.energy.sum()
        aligned, output, input_, off = self.energy
        return {
            "csulora/aligned_energy": _ratio(aligned, total),
            "csulora/partial_energy": _ratio(output + input_, total),
            "csulora/off_energy": _ratio(off, total),
            "csulora/attenuation": 1.0 - _ratio(self.corrected, total) ** 0.5 if total > 0 else 0.0,
            "csulora/relative_change": _ratio(self.changed, total) ** 0.5,
            "csulora/truncation_error": _ratio(self.truncated, self.closest) ** 0.5,
            "csulora/update_norm": total.sqrt().item(),
        }


def _ratio(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0
