"""What a correction would do, from Gram matrices and without making it: for curves, at every log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from csulora_callback.method.blocks import shares_of
from csulora_callback.method.drift import Effect
from csulora_callback.method.grams import Grams
from csulora_callback.method.measure import drift_of
from csulora_callback.method.penalty import BLOCKS, Penalty, rank_one

# Squared norms of columns that float32 products tell to full precision, and how far the columns may cancel each other.
_SMALLEST, _LARGEST, _CANCELLED = 1e-20, 1e20, 100.0


def foresee(
    grams: Grams,
    scalings: Sequence[float],
    chances: Sequence[Mapping[str, float]],
    displacements: Sequence[float],
    penalty: Penalty,
    largest: float = math.inf,
) -> list[Effect] | None:
    r"""The effects that corrections to the modules' own rank would have; waits for the device twice.

    From products in float32 they are those of a correction in float64 to 1e-4 at worst and about 1e-6 usually, as
    shares of ``‖Δ‖²`` over all modules, and ``‖X* − X‖²`` to as much of ``‖X*‖²``.

    Args:
        grams: of modules with one rank, by activations where the penalty is data-aware.
        scalings: by module.
        chances: of :func:`~csulora_callback.method.measure.chance_shares`, by module.
        displacements: ``‖D‖²`` of what the subspace keeps, by module.
        penalty: one for all.
        largest: what the dtype of the factors can hold.

    Returns:
        ``None`` where that cannot be promised: factors hold NaN, Inf, or columns that are very large, very small or
        cancel each other, or it cannot be excluded that the corrected ones overflow.

    Example:
        >>> ones, basis = torch.ones(1, 3, 1), torch.eye(3)[None, :, :1]
        >>> grams = Grams.of(ones.mT, ones, basis, basis, torch.ones(1, 1), torch.float32)
        >>> chance = {"aligned": 1 / 9, "output": 2 / 9, "input": 2 / 9, "off": 4 / 9}
        >>> (effect,) = foresee(grams, [2.0], [chance], [1.0], Penalty.projection())
        >>> round(effect.raw.total_energy, 3), round(effect.corrected, 3)
        (36.0, 4.0)
    """
    numbers = torch.cat([grams.energies(), grams.along()[:, None], grams.moved(), _ranges(grams)], dim=1).tolist()
    energies, effects = [], []
    for row, scaling in zip(numbers, scalings, strict=True):
        energies.append({block: scaling * scaling * row[i] for i, block in enumerate(BLOCKS)})
    sizes = [scaling * scaling * row[8] for row, scaling in zip(numbers, scalings, strict=True)]
    if not all(_is_told(row[9:], largest) for row in numbers) or not math.isfinite(sum(sizes)):
        return None
    if sum(sizes) > _CANCELLED * sum(sum(energy.values()) for energy in energies):
        return None
    shares = [shares_of(energy) for energy in energies]
    gains = [penalty.gain(share) for share in shares]
    mixed = [i for i, gain in enumerate(gains) if rank_one(gain) is None]
    cut = {}
    if mixed:
        table = grams.whole_A.new_tensor([[gains[i][block] for block in BLOCKS] for i in mixed])
        cut = dict(zip(mixed, grams.at(mixed).mixed(table).tolist(), strict=True))
    for i, (row, energy, gain, scaling) in enumerate(zip(numbers, energies, gains, scalings, strict=True)):
        square = scaling * scaling
        closest = sum(gain[block] ** 2 * energy[block] for block in BLOCKS)
        truncated, changed, along = 0.0, sum((1 - gain[b]) ** 2 * energy[b] for b in BLOCKS), gain["aligned"] * row[4]
        if penalty.on_probes is not None:
            closest, changed, along = square * row[5], square * row[6], row[7]
        elif i in cut:
            truncated, changed, along = square * cut[i][0], square * cut[i][1], cut[i][2]
        raw = drift_of(energy, chances[i], scaling * row[4], displacements[i])
        effects.append(Effect(raw, max(0.0, closest - truncated), closest, truncated, changed, scaling * along))
    return effects


def _ranges(grams: Grams) -> Tensor:
    """``(m, 4)``: sizes, the least and the greatest ``‖column‖²``, and a bound of the corrected factors' squares."""
    diagonals = [torch.diagonal(gram, dim1=-2, dim2=-1) for gram in (grams.whole_A, grams.whole_B, grams.moved_A)]
    columns = torch.cat(diagonals, dim=-1)
    least = torch.where(columns == 0.0, 1.0, columns).amin(dim=-1)
    # Factors of X share its nuclear norm, of at most √r ‖A‖ ‖B‖, in the ratio that the old ones have.
    bound = math.sqrt(columns.shape[-1] / 3) * torch.stack([d.sum(dim=-1) for d in diagonals]).amax(dim=0)
    return torch.stack([grams.sizes(), least, columns.amax(dim=-1), bound], dim=1)


def _is_told(ranges: Sequence[float], largest: float) -> bool:
    least, most, bound = ranges
    return least >= _SMALLEST and most <= _LARGEST and bound <= largest * largest
