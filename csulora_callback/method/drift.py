"""Drift and attenuation over all modules of an adapter, as a torchmetrics metric."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from csulora_callback.method.basis import Basis
from csulora_callback.method.correction import Correction
from csulora_callback.method.measure import Drift, chance_shares, kept_displacement
from csulora_callback.method.penalty import BLOCKS

DRIFT_KEYS = (
    "csulora/aligned_energy",
    "csulora/partial_energy",
    "csulora/off_energy",
    "csulora/aligned_over_chance",
    "csulora/partial_over_chance",
    "csulora/off_over_chance",
    "csulora/alignment_undone",
    "csulora/alignment_undone_corrected",
    "csulora/attenuation",
    "csulora/relative_change",
    "csulora/truncation_error",
    "csulora/update_norm",
)
"""What :class:`SafetyDrift` computes, by name."""

_SUMS = ("corrected", "closest", "truncated", "changed", "along", "corrected_along", "displacement")


class SafetyDrift(Metric):
    """Where an update lies relative to the safety subspace, which way it points, and what a correction does to it.

    ``update`` takes one module's :class:`~csulora_callback.Correction` and basis at a time; ``compute`` returns, over
    all of them (sums over modules, of squared Frobenius norms and of inner products, in float64):

    ======================================  ==================================================================
    ``csulora/aligned_energy``              share of ``‖Δ‖²`` in the fully aligned block
    ``csulora/partial_energy``              share in the two partially aligned halves
    ``csulora/off_energy``                  share off the subspace
    ``csulora/aligned_over_chance``         the first share over what a random update has there; 1 is chance
    ``csulora/partial_over_chance``         the same of the second
    ``csulora/off_over_chance``             the same of the third
    ``csulora/alignment_undone``            ``−⟨Δ, D⟩/‖D‖²``, the share of the alignment that the update undoes
    ``csulora/alignment_undone_corrected``  ``−⟨X, D⟩/‖D‖²``, what is left of that after the correction
    ``csulora/attenuation``                 ``1 − ‖X‖/‖Δ‖``
    ``csulora/relative_change``             ``‖X − Δ‖/‖Δ‖``
    ``csulora/truncation_error``            ``‖X* − X‖/‖X*‖``
    ``csulora/update_norm``                 ``‖Δ‖``
    ======================================  ==================================================================

    All but the last are dimensionless; for ``Δ = 0`` everything is 0. Under a data-aware penalty the update may grow
    in directions that nothing excites: ``attenuation`` can be negative, and ``relative_change`` above 1.

    *Chance* is how much of the space a block is: ``k²/(d_out·d_in)`` for the aligned one, and so on
    (:func:`~csulora_callback.method.measure.chance_shares`), each module counted by its share of ``‖Δ‖²``. Over a
    chance of 0 (no subspace, or one that is the whole space) the ratio is 0.

    ``D`` is the part ``U S Vᵀ`` of the displacement that the subspace keeps, exactly; the directions beyond it are
    left out of ``⟨Δ, D⟩`` and of ``‖D‖²`` alike. ``SafetySubspace.energy_kept`` says how large the kept part is.
    ``alignment_undone`` is 1 for ``Δ = −D``, near 0 for a random update, and negative where the update goes on in the
    direction of the alignment. ``csulora inspect`` measures the same, and of the whole ``D`` where it is given the
    checkpoints.

    Example:
        >>> import torch
        >>> from csulora_callback import Penalty, SafetyDrift, SafetySubspace, correct
        >>> base, aligned = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> basis = SafetySubspace.estimate(base, aligned, rank=1, progress=False)["0"]
        >>> A, B = basis.V.T, -basis.U * basis.singular_values  # takes back all that the subspace keeps
        >>> drift = SafetyDrift()
        >>> drift.update(correct(A, B, basis.U, basis.V, Penalty.guard(1.0)), basis)
        >>> seen = drift.compute()
        >>> for key in ("aligned_energy", "aligned_over_chance", "alignment_undone", "alignment_undone_corrected"):
        ...     print(key, round(seen[f"csulora/{key}"], 3))
        aligned_energy 1.0
        aligned_over_chance 16.0
        alignment_undone 1.0
        alignment_undone_corrected 0.25
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self) -> None:
        # Every process holds the whole adapter: summing over processes would count each module several times.
        super().__init__(sync_on_compute=False)
        for state in ("energy", "by_chance"):
            self.add_state(state, torch.zeros(len(BLOCKS), dtype=torch.float64), dist_reduce_fx="sum")
        for state in _SUMS:
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correction: Correction, basis: Basis) -> None:
        """Add one module.

        Args:
            correction: made with the sides of ``basis``.
            basis: in any orientation: what is asked of it does not depend on which side is the output's.
        """
        energy = torch.tensor([correction.energy[block] for block in BLOCKS], dtype=torch.float64)
        chance = chance_shares(basis.U.shape, basis.V.shape)
        self.energy += energy
        self.by_chance += energy.sum() * torch.tensor([chance[block] for block in BLOCKS], dtype=torch.float64)
        self.corrected += correction.corrected_norm**2
        self.closest += correction.closest_norm**2
        self.truncated += (correction.truncation_error * correction.closest_norm) ** 2
        self.changed += (correction.relative_change * correction.update_norm) ** 2
        sigma = basis.singular_values.to(correction.along)
        self.along += (correction.along * sigma).sum().item()
        self.corrected_along += (correction.corrected_along * sigma).sum().item()
        self.displacement += kept_displacement(basis)

    def compute(self) -> dict[str, float]:
        """The metrics of the table above."""
        total = self.energy.sum()
        aligned, output, input_, off = self.energy
        by_chance = dict(zip(BLOCKS, self.by_chance, strict=True))
        undone, undone_corrected = (
            Drift(along=along.item(), displacement=self.displacement.item()).undone
            for along in (self.along, self.corrected_along)
        )
        return {
            "csulora/aligned_energy": _ratio(aligned, total),
            "csulora/partial_energy": _ratio(output + input_, total),
            "csulora/off_energy": _ratio(off, total),
            "csulora/aligned_over_chance": _ratio(aligned, by_chance["aligned"]),
            "csulora/partial_over_chance": _ratio(output + input_, by_chance["output"] + by_chance["input"]),
            "csulora/off_over_chance": _ratio(off, by_chance["off"]),
            "csulora/alignment_undone": undone,
            "csulora/alignment_undone_corrected": undone_corrected,
            "csulora/attenuation": 1.0 - _ratio(self.corrected, total) ** 0.5 if total > 0 else 0.0,
            "csulora/relative_change": _ratio(self.changed, total) ** 0.5,
            "csulora/truncation_error": _ratio(self.truncated, self.closest) ** 0.5,
            "csulora/update_norm": total.sqrt().item(),
        }


def _ratio(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0
