"""Drift and attenuation over all modules of an adapter, as a torchmetrics metric."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torchmetrics import Metric

from csulora_callback.method.basis import Basis
from csulora_callback.method.measure import Drift, chance_shares, drift_of, kept_displacement, total
from csulora_callback.method.outcome import Outcome
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


@dataclass(frozen=True)
class Effect:
    """What a correction does to one module, or to several together: they are added up.

    Attributes:
        raw: where the update lies before it.
        corrected: ``‖X‖²``.
        closest: ``‖X*‖²``.
        truncated: ``‖X* − X‖²``.
        changed: ``‖X − Δ‖²``.
        corrected_along: ``⟨X, D⟩``.
    """

    raw: Drift
    corrected: float
    closest: float
    truncated: float
    changed: float
    corrected_along: float

    @classmethod
    def of(cls, correction: Outcome, basis: Basis) -> Effect:
        """Of one module, whose correction was made with the sides of ``basis``.

        Example:
            >>> import torch
            >>> from csulora_callback import Penalty, correct
            >>> basis = Basis(torch.eye(3)[:, :1], torch.eye(2)[:, :1], torch.tensor([2.0]), displacement=2.0)
            >>> done = correct(torch.ones(1, 2), torch.ones(3, 1), basis.U, basis.V, Penalty.projection())
            >>> effect = Effect.of(done, basis)
            >>> effect.raw.along, effect.corrected_along, round(effect.changed, 3)
            (2.0, 2.0, 5.0)
        """
        sigma = basis.singular_values.to(correction.along)
        before, after = (float(along @ sigma) for along in (correction.along, correction.corrected_along))
        chance = chance_shares(basis.U.shape, basis.V.shape)
        return cls(
            drift_of(correction.energy, chance, before, kept_displacement(basis)),
            corrected=correction.corrected_norm**2,
            closest=correction.closest_norm**2,
            truncated=(correction.truncation_error * correction.closest_norm) ** 2,
            changed=(correction.relative_change * correction.update_norm) ** 2,
            corrected_along=after,
        )


def drift_metrics(effects: Iterable[Effect]) -> dict[str, float]:
    """The metrics of :class:`SafetyDrift` of several modules.

    Example:
        >>> raw = Drift({"aligned": 1.0, "output": 0.0, "input": 0.0, "off": 3.0})
        >>> effect = Effect(raw, corrected=1.0, closest=1.0, truncated=0.0, changed=1.0, corrected_along=0.0)
        >>> seen = drift_metrics([effect, effect])
        >>> seen["csulora/aligned_energy"], seen["csulora/attenuation"]
        (0.25, 0.5)
    """
    effects = list(effects)
    raw = total(effect.raw for effect in effects)
    sums = {name: sum(getattr(effect, name) for effect in effects) for name in _SUMS}
    return _metrics(Effect(raw, **sums))


_SUMS = tuple(field.name for field in fields(Effect))[1:]


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
        size = 2 * len(BLOCKS) + 2 + len(_SUMS)
        self.add_state("sums", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, correction: Outcome, basis: Basis) -> None:
        """Add one module.

        Args:
            correction: made with the sides of ``basis``.
            basis: in any orientation: what is asked of it does not depend on which side is the output's.
        """
        raw, *sums = (getattr(Effect.of(correction, basis), name) for name in ("raw", *_SUMS))
        numbers = [*(part[b] for part in (raw.energy, raw.by_chance) for b in BLOCKS), raw.along, raw.displacement]
        self.sums += self.sums.new_tensor([*numbers, *sums])

    def compute(self) -> dict[str, float]:
        """The metrics of the table above."""
        numbers = iter(self.sums.tolist())
        energy, by_chance = ({block: next(numbers) for block in BLOCKS} for _ in range(2))
        return _metrics(Effect(Drift(energy, by_chance, next(numbers), next(numbers)), *numbers))


def _metrics(effect: Effect) -> dict[str, float]:
    raw, whole = effect.raw, effect.raw.total_energy
    energy, chance = raw.energy, raw.by_chance
    left = Drift(along=effect.corrected_along, displacement=raw.displacement)
    partial, partial_chance = (part["output"] + part["input"] for part in (energy, chance))
    return {
        "csulora/aligned_energy": _ratio(energy["aligned"], whole),
        "csulora/partial_energy": _ratio(partial, whole),
        "csulora/off_energy": _ratio(energy["off"], whole),
        "csulora/aligned_over_chance": _ratio(energy["aligned"], chance["aligned"]),
        "csulora/partial_over_chance": _ratio(partial, partial_chance),
        "csulora/off_over_chance": _ratio(energy["off"], chance["off"]),
        "csulora/alignment_undone": raw.undone,
        "csulora/alignment_undone_corrected": left.undone,
        "csulora/attenuation": 1.0 - math.sqrt(_ratio(effect.corrected, whole)) if whole > 0 else 0.0,
        "csulora/relative_change": math.sqrt(_ratio(effect.changed, whole)),
        "csulora/truncation_error": math.sqrt(_ratio(effect.truncated, effect.closest)),
        "csulora/update_norm": math.sqrt(whole),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
