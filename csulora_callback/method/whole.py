r"""The closest safe update of a weight that is trained whole, and not as two factors: ``Δ = W − W_aligned``.

The same closed form, ``Π_b X* = g_b Π_b Δ``, with the blocks of :mod:`csulora_callback.method.correction`. What is
returned is the weight ``W_aligned + X*``, computed as ``W − (Δ − X*)``, so that gains of one leave it as it is. With
``R`` and ``C`` the sides of the subspace on the weight's rows and on its columns,

    ``X* = g_off Δ + (g_R − g_off) P_R Δ + (g_C − g_off) Δ P_C + (g_aligned − g_R − g_C + g_off) P_R Δ P_C``

takes two looks at ``Δ``, some rows at a time: one for ``RᵀΔ (k, columns)``, ``Δ C (rows, k)`` and ``‖Δ‖²``, and one to
write. Products are with ``R`` and ``C`` alone, in ``O(rows · columns · k)``; beside weight and result nothing of their
size is in memory. Nothing is truncated: a whole weight holds any rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_callback.method.blocks import shares_of
from csulora_callback.method.gauge import CorrectionOverflowError
from csulora_callback.method.outcome import Outcome, closest_norm, relative_change
from csulora_callback.method.penalty import Penalty
from csulora_callback.method.precision import as_given, small_on, width_on
from csulora_callback.method.token_space import InputGain

_ENTRIES = 2**22  # of Δ at a time


@dataclass(frozen=True)
class WholeCorrection(Outcome):
    """A corrected weight and what the correction did.

    Attributes:
        weight: shape, dtype and device of the one that was trained; ``None`` where it was only measured.
    """

    weight: Tensor | None

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """``(weight,)``, as an adapter's factors are kept by module."""
        return (self.weight,)


def correct_whole(
    weight: Tensor,
    aligned: Tensor,
    U: Tensor,
    V: Tensor,
    penalty: Penalty,
    transposed: bool = False,
    input_gain: InputGain | None = None,
    name: str | None = None,
    measure_only: bool = False,
) -> WholeCorrection:
    """The closest safe weight to one that was trained whole, whose arguments are taken as checked.

    Where the subspace has fewer rows than the weight, as of a vocabulary that has grown since, the rows after those
    stay as they are, and nothing is measured of them.

    Args:
        weight: as trained and as stored, any floating dtype.
        aligned: before training, with the same columns, and the same rows as far as the subspace has them.
        U: output side of the subspace; its rows are those of the weight, or of a ``transposed`` one the columns.
        V: input side.
        penalty: the table of ``λ_b``.
        transposed: whether the weight is stored as ``(d_in, d_out)``, as an embedding's is and that of Conv1D.
        input_gain: of a data-aware penalty; only where the weight is not ``transposed``.
        name: of the module, for errors.
        measure_only: make no weight.

    Raises:
        CorrectionOverflowError: if the corrected weight has entries that its dtype cannot hold.

    Example:
        >>> U, V = torch.eye(3)[:, :1], torch.eye(2)[:, :1]
        >>> done = correct_whole(torch.ones(3, 2), torch.zeros(3, 2), U, V, Penalty.projection())
        >>> done.weight
        tensor([[1., 0.],
                [0., 0.],
                [0., 0.]])
        >>> done.energy
        {'aligned': 1.0, 'output': 1.0, 'input': 2.0, 'off': 2.0}
    """
    with as_given(weight.device):
        return _Whole(weight, aligned, U, V, transposed, name).correct(penalty, input_gain, measure_only)


class _Whole:
    """What the first look at ``Δ`` finds."""

    def __init__(
        self, weight: Tensor, aligned: Tensor, U: Tensor, V: Tensor, transposed: bool, name: str | None
    ) -> None:
        device = weight.device
        self.weight, self.aligned, self.transposed, self.name = weight.detach(), aligned.detach(), transposed, name
        self.wide, self.small = width_on(device), small_on(device)
        R, C = (side.to(device, self.wide) for side in ((V, U) if transposed else (U, V)))
        self.count = min(len(weight), len(R))
        self.R, self.C = R[: self.count], C
        self.on_rows = self.R.new_zeros(R.shape[1], len(C))  # RᵀΔ
        self.on_columns = self.R.new_zeros(self.count, C.shape[1])  # Δ C
        square = torch.zeros((), dtype=self.small, device=device)
        for place, part in self._parts():
            self.on_rows += self.R[place].T @ part
            self.on_columns[place] = part @ C
            square += part.square().sum(dtype=self.small)
        self.core = self.on_rows @ C
        self.energy = self._energies(square)

    def correct(self, penalty: Penalty, input_gain: InputGain | None, measure_only: bool) -> WholeCorrection:
        shares = shares_of(self.energy)
        gain, moved = penalty.gain(shares), input_gain is not None and any(self.energy.values())
        along = torch.diagonal(self.core).double().cpu()
        if moved:
            weight, (change, norm, corrected_along) = self._moved(input_gain, measure_only)
        else:
            change, norm = relative_change(gain, shares), closest_norm(gain, self.energy)
            corrected_along = gain["aligned"] * along
            weight = None if measure_only else self._attenuated(gain)
        return WholeCorrection(
            weight,
            energy=self.energy,
            relative_energy=shares,
            gain=gain,
            relative_change=change,
            truncation_error=0.0,
            closest_norm=norm,
            along=along,
            corrected_along=corrected_along,
        )

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """``Δ``, some rows at a time; the aligned weight as what was trained began with it, in its dtype."""
        rows = max(1, _ENTRIES // max(1, self.weight.shape[1]))
        for start in range(0, self.count, rows):
            place = slice(start, min(start + rows, self.count))
            before = self.aligned[place].to(self.weight.device, self.weight.dtype)
            yield place, self.weight[place].to(self.wide) - before.to(self.wide)

    def _energies(self, square: Tensor) -> dict[str, float]:
        halves = self.on_rows - self.core @ self.C.T, self.on_columns - self.R @ self.core
        both, on_rows, on_columns = (part.to(self.small).square().sum() for part in (self.core, *halves))
        off = (square - both - on_rows - on_columns).clamp(min=0.0)
        both, on_rows, on_columns, off = torch.stack([both, on_rows, on_columns, off]).tolist()
        if not math.isfinite(both + on_rows + on_columns + off):
            raise self._overflow("whose energy ‖Δ‖² is finite")
        output, input_ = (on_columns, on_rows) if self.transposed else (on_rows, on_columns)
        return {"aligned": both, "output": output, "input": input_, "off": off}

    def _attenuated(self, gain: dict[str, float]) -> Tensor:
        corrected = self.weight.clone(memory_format=torch.contiguous_format)
        if all(one == 1.0 for one in gain.values()):
            return corrected
        g_rows, g_columns = (gain[half] for half in (("input", "output") if self.transposed else ("output", "input")))
        off = gain["off"]
        mixed = gain["aligned"] - g_rows - g_columns + off
        right = torch.cat([(g_rows - off) * self.on_rows + mixed * self.core @ self.C.T, (g_columns - off) * self.C.T])
        for place, part in self._parts():
            left = torch.cat([self.R[place], self.on_columns[place]], dim=1)
            corrected[place] = (self.weight[place].to(self.wide) + (off - 1.0) * part + left @ right).to(corrected)
        return self._checked(corrected)

    def _moved(self, input_gain: InputGain, measure_only: bool) -> tuple[Tensor | None, tuple[float, float, Tensor]]:
        """By activations: each row is moved by itself."""
        corrected = None if measure_only else self.weight.clone(memory_format=torch.contiguous_format)
        squares, core = torch.zeros(2, dtype=self.small, device=self.weight.device), torch.zeros_like(self.core)
        for place, part in self._parts():
            moved = input_gain(part)
            change = moved - part
            squares += torch.stack([each.square().sum(dtype=self.small) for each in (change, moved)])
            core += self.R[place].T @ (moved @ self.C)
            if corrected is not None:
                corrected[place] = (self.weight[place].to(self.wide) + change).to(corrected)
        change, norm = squares.sqrt().tolist()
        numbers = change / math.sqrt(sum(self.energy.values())), norm, torch.diagonal(core).double().cpu()
        return None if corrected is None else self._checked(corrected), numbers

    def _checked(self, corrected: Tensor) -> Tensor:
        if corrected.numel() and not torch.stack(torch.aminmax(corrected)).isfinite().all():
            raise self._overflow(f"whose correction {str(corrected.dtype).removeprefix('torch.')} can hold")
        return corrected

    def _overflow(self, what: str) -> CorrectionOverflowError:
        module = "" if self.name is None else f"module '{self.name}': "
        return CorrectionOverflowError(f"{module}`weight`: expected one {what}. Train with a smaller learning rate.")
