r"""The closest safe updates of several modules at once, as stacks of one module's matrices.

:mod:`csulora_callback.method.correction` says what is computed; here is how. With ``F = [P_U B, Q_U B]`` and
``H = [P_V Aᵀ, Q_V Aᵀ]``, of ``2r`` columns each, and their triangular factors ``F = E_F R_F``, ``H = E_H R_H``,

    ``X* = s·F (G ⊗ I) Hᵀ = s·E_F · C · E_Hᵀ``,  ``C = R_F (G ⊗ I) R_Hᵀ = L Σ Rᵀ``,

so that the energies of the blocks, the singular values of ``X*`` and the gauge are all in the small matrices ``R_F``,
``R_H`` and ``C``. The orthonormal ``E_F`` and ``E_H`` are never formed: ``E_F L Σ = F (G ⊗ I) R_Hᵀ R``, and likewise
on the other side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from csulora_callback.method.blocks import Side, along_pairs, blocks_of, picked, shares_of
from csulora_callback.method.gauge import CorrectionOverflowError, closest_gauge, narrowed
from csulora_callback.method.outcome import Outcome, closest_norm, relative_change
from csulora_callback.method.penalty import BLOCKS, Penalty, rank_one
from csulora_callback.method.precision import as_given
from csulora_callback.method.token_space import InputGain


@dataclass(frozen=True)
class Correction(Outcome):
    """A corrected LoRA update and what the correction did.

    Attributes:
        lora_A: ``(r', d_in)``, dtype and device of the input factor; ``r' = r`` unless ``rank="expand"``.
        lora_B: ``(d_out, r')``.
    """

    lora_A: Tensor
    lora_B: Tensor

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """``(lora_A, lora_B)``, as an adapter's factors are kept by module."""
        return self.lora_A, self.lora_B


def correct_each(
    lora_A: Tensor,
    lora_B: Tensor,
    U: Tensor,
    V: Tensor,
    penalty: Penalty,
    scalings: Sequence[float],
    rank: Literal["truncate", "expand"] = "truncate",
    input_gains: Sequence[InputGain] | None = None,
    names: Sequence[str] | None = None,
    wide: torch.dtype = torch.float64,
) -> list[Correction]:
    """:func:`~csulora_callback.correct` of ``m`` modules with the same shapes, whose arguments are taken as checked.

    Waits for the device twice, however many modules there are: for the energies, which say what the gains are, and for
    what the corrections did.

    Args:
        lora_A: ``(m, r, d_in)``.
        lora_B: ``(m, d_out, r)``.
        U: ``(m, d_out, k)``.
        V: ``(m, d_in, k')``.
        penalty: one for all; the gains are each module's own.
        scalings: by module.
        rank: as of ``correct``.
        input_gains: by module, for a data-aware penalty.
        names: of the modules, for errors.
        wide: of the products with a ``d_out`` or ``d_in``; what is ``2r × 2r`` is computed in float64. In float32 the
            error of ``X*`` is about 1e-6 of ``‖s·B‖·‖A‖``, and so are those of norms; of shares 1e-6.

    Raises:
        CorrectionOverflowError: as ``correct``, naming the module.

    Example:
        >>> ones, basis = torch.ones(2, 3, 1), torch.eye(3)[:, :1].repeat(2, 1, 1)
        >>> done = correct_each(ones.mT, ones, basis, basis, Penalty.guard(1.0), scalings=[1.0, 2.0])
        >>> [round(correction.update_norm, 3) for correction in done]
        [3.0, 6.0]
    """
    with as_given(lora_A.device):
        return _Stack(lora_A, lora_B, U, V, scalings, names, wide).correct(penalty, rank, input_gains)


@dataclass(frozen=True)
class _Made:
    """What some modules of a stack became."""

    places: list[int]  # which they are
    A: Tensor  # (n, r', d_in), wide
    B: Tensor  # (n, r', d_out), in rows
    numbers: Tensor  # (n, 3): relative change, truncation error, ‖X*‖
    along: Tensor  # (n, pairs), without the scalings


class _Stack:
    """The modules of one :func:`correct_each`."""

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        U: Tensor,
        V: Tensor,
        scalings: Sequence[float],
        names: Sequence[str] | None,
        wide: torch.dtype,
    ) -> None:
        self.dtypes, self.scalings, self.names = (lora_A.dtype, lora_B.dtype), scalings, names
        rows = lora_A, lora_B.mT, U, V
        self.A, self.B, U, self.V = (t.detach().to(lora_A.device, wide).contiguous() for t in rows)  # B in rows, too
        self.output, self.input = Side.of(self.B, U), Side.of(self.A, self.V)
        self.along = along_pairs(self.output.inner, self.input.inner)
        self.energies = self._energies()
        self.totals = [sum(energy.values()) for energy in self.energies]
        self.shares = [shares_of(energy) for energy in self.energies]

    def correct(
        self, penalty: Penalty, rank: Literal["truncate", "expand"], input_gains: Sequence[InputGain] | None
    ) -> list[Correction]:
        self.gains = [penalty.gain(share) for share in self.shares]
        every = range(len(self.gains))
        # An update of zero stays as it is.
        sides = [rank_one(gain) if total else _AS_IT_IS for gain, total in zip(self.gains, self.totals, strict=True)]
        moved = [i for i in every if input_gains is not None and self.totals[i]]
        factored = [i for i in every if sides[i] is not None and i not in moved]
        mixed = [i for i in every if sides[i] is None]
        made = []
        if factored:
            made.append(self._factored(factored, [sides[i] for i in factored]))
        if moved:
            made.append(self._moved(moved, [input_gains[i] for i in moved]))
        if mixed:
            made.append(self._mixed(mixed, rank))
        narrow = [narrowed(part.A, part.B.mT, *self.dtypes) for part in made]
        seen = [
            torch.cat(
                [part.numbers, fits[:, None].to(part.numbers), picked(self.along, part.places), part.along], dim=1
            )
            for part, (_, _, fits) in zip(made, narrow, strict=True)
        ]
        seen = dict(zip((i for part in made for i in part.places), torch.cat(seen).double().cpu(), strict=True))
        factors = {}
        for part, (A, B, _) in zip(made, narrow, strict=True):
            factors |= dict(zip(part.places, zip(A, B, strict=True), strict=True))
        return [self._correction(i, *factors[i], seen[i]) for i in every]

    def _correction(self, i: int, A: Tensor, B: Tensor, seen: Tensor) -> Correction:
        change, truncation_error, norm, fits = seen[:4].tolist()
        if not fits:
            kind, largest = str(self.dtypes[1]).removeprefix("torch."), torch.finfo(self.dtypes[1]).max
            raise self._overflow(
                i,
                f"whose correction {kind} can hold, but got entries beyond {largest:.3g} in both factors. Train with "
                "a smaller learning rate, and not in float16.",
            )
        along, corrected_along = (self.scalings[i] * seen[4:]).chunk(2)
        # Each in memory of its own.
        A, B = (factor.clone(memory_format=torch.contiguous_format) for factor in (A, B))
        return Correction(
            A,
            B,
            energy=self.energies[i],
            relative_energy=self.shares[i],
            gain=self.gains[i],
            relative_change=change,
            truncation_error=truncation_error,
            closest_norm=norm,
            along=along,
            corrected_along=corrected_along,
        )

    def _energies(self) -> list[dict[str, float]]:
        cores = blocks_of(self.output, self.input).values()
        energies = []
        for i, squares in enumerate(torch.stack([core.square().sum((-2, -1)) for core in cores], dim=1).tolist()):
            scaling = self.scalings[i]
            energy = {block: scaling * scaling * square for block, square in zip(BLOCKS, squares, strict=True)}
            total = sum(energy.values())
            if not math.isfinite(total):
                raise self._overflow(
                    i,
                    f"whose energy ‖Δ‖² is finite in {self.A.dtype}, but got {total}, with scaling {scaling:g}. Train "
                    "with a smaller learning rate.",
                )
            energies.append(energy)
        return energies

    def _overflow(self, i: int, what: str) -> CorrectionOverflowError:
        module = "" if self.names is None else f"module '{self.names[i]}': "
        return CorrectionOverflowError(f"{module}`lora_A`, `lora_B`: expected an update {what}")

    def _factored(self, places: list[int], sides: list[tuple[tuple[float, float], tuple[float, float]]]) -> _Made:
        """Of gains of rank one: they are written into the factors, in the gauge that these are in."""
        on_output, on_input = zip(*sides, strict=True)
        B = _attenuate(picked(self.B, places), picked(self.output.inside, places), on_output)
        A = _attenuate(picked(self.A, places), picked(self.input.inside, places), on_input)
        numbers, aligned = [], []
        for i in places:
            gain, energy, share = self.gains[i], self.energies[i], self.shares[i]
            numbers.append([relative_change(gain, share), 0.0, closest_norm(gain, energy)])
            aligned.append([gain["aligned"] if self.totals[i] else 1.0])
        along = self._small(aligned) * picked(self.along, places)
        return _Made(places, A, B, self._small(numbers), along)

    def _moved(self, places: list[int], input_gains: list[InputGain]) -> _Made:
        """Of activations: the input side is moved, and the output side stays."""
        before, B, output = picked(self.A, places), picked(self.B, places), self.output.at(places)
        A = torch.stack([gain(one) for gain, one in zip(input_gains, before, strict=True)])
        inside, outside = output.roots
        root = (inside + outside).to(A.dtype)  # of B
        norms = [_norm(root @ factor).to(output.root.dtype) for factor in (A - before, A)]
        change, closest = (abs(self._small([self.scalings[i] for i in places])) * norm for norm in norms)
        change = change / self._small([math.sqrt(self.totals[i]) for i in places])
        along = along_pairs(output.inner, A @ picked(self.V, places))
        return _Made(places, A, B, torch.stack([change, torch.zeros_like(change), closest], dim=1), along)

    def _mixed(self, places: list[int], rank: Literal["truncate", "expand"]) -> _Made:
        """Of gains of rank two: what is closest may have twice the rank."""
        output, input_ = self.output.at(places), self.input.at(places)
        table = {b: self._small([self.gains[i][b] for i in places])[:, None, None] for b in BLOCKS}
        cores = blocks_of(output, input_)
        before, closest = sum(cores.values()), sum(table[block] * core for block, core in cores.items())
        left, sigma, right = torch.linalg.svd(closest, full_matrices=False)
        right, r, whole = right.mT, self.A.shape[1], sigma.norm(dim=1)
        kept = sigma.shape[1] if rank == "expand" else min(r, sigma.shape[1])
        tail = torch.where(whole > 0, sigma[:, kept:].norm(dim=1) / whole, 0.0)  # X* = 0 fits any rank
        left, sigma, right = left[..., :kept], sigma[:, None, :kept], right[..., :kept]
        change = _norm((left * sigma) @ right.mT - before) / _norm(before)

        # What is below the rounding of the products is no direction, and would be divided by.
        rounding = 4 * torch.finfo(self.A.dtype).eps * _norm(output.root) * _norm(input_.root)
        is_there = sigma > rounding[:, None, None]
        root, scale = (torch.where(is_there, sigma, nothing) for nothing in (0.0, torch.inf))
        root, scale = root.sqrt(), scale.rsqrt()
        (in_B, out_B), (in_A, out_A) = output.roots, input_.roots
        on_B = [table["aligned"] * in_A + table["output"] * out_A, table["input"] * in_A + table["off"] * out_A]
        on_A = [table["aligned"] * in_B + table["input"] * out_B, table["output"] * in_B + table["off"] * out_B]
        # Of the parts of each factor to the new one: E_F L √Σ = F · to_B.
        to_B, to_A = (torch.cat(on, dim=-1).mT @ side * scale for on, side in ((on_B, right), (on_A, left)))
        if rank == "truncate":
            old = (in_A + out_A).mT, in_B + out_B
            gauge_A, gauge_B = closest_gauge((right * root).mT, left * root, *old)
            to_A, to_B = to_A @ gauge_A, to_B @ gauge_B
        to_A, to_B = to_A.to(self.A.dtype), to_B.to(self.A.dtype)
        along = along_pairs(to_B[:, :r].mT @ output.inner, to_A[:, :r].mT @ input_.inner)  # orthonormal: of P alone
        whole = self._small([closest_norm(self.gains[i], self.energies[i]) for i in places])
        A, B = to_A.mT @ input_.parts, to_B.mT @ output.parts
        return _Made(places, A, B, torch.stack([change, tail, whole], dim=1), along)

    def _small(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=self.output.root.dtype, device=self.A.device)


_AS_IT_IS = (1.0, 1.0), (1.0, 1.0)


def _attenuate(factor: Tensor, kept: Tensor, gains: Sequence[tuple[float, float]]) -> Tensor:
    """``(inside·P + outside·(I − P)) F`` of ``F`` and ``P F``; gains of one leave ``F`` as it is, bit for bit."""
    inside, outside = (factor.new_tensor(values)[:, None, None] for values in zip(*gains, strict=True))
    alike = [one == other for one, other in gains]
    if all(alike):
        return outside * factor
    changed = outside * factor + (inside - outside) * kept
    return torch.where(inside == outside, outside * factor, changed) if any(alike) else changed


def _norm(stack: Tensor) -> Tensor:
    return stack.flatten(1).norm(dim=1)
