r"""The mathematics of the correction, as pure functions on tensors.

A LoRA update ``Δ = s·B·A`` is split by a safety subspace with output side ``U`` and input side ``V`` into four
orthogonal blocks,

====================  =================  ============================
name                  block              meaning
====================  =================  ============================
``aligned``           ``P_U Δ P_V``      fully aligned
``output``            ``P_U Δ Q_V``      partially aligned, output half
``input``             ``Q_U Δ P_V``      partially aligned, input half
``off``               ``Q_U Δ Q_V``      off-subspace
====================  =================  ============================

with ``P = basis·basisᵀ`` and ``Q = I − P``. The closest safe update is

    ``X* = argmin_X ‖X − Δ‖² + Σ_b λ_b ‖Π_b X‖²``,  hence  ``Π_b X* = g_b Π_b Δ``  with  ``g_b = 1/(1 + λ_b)``.

A :class:`~csulora_callback.Penalty` is the table of the ``λ_b``; :func:`correct` returns ``X*`` as LoRA factors.
No ``d_out × d_in`` or ``d × d`` matrix is ever formed. A data-aware penalty measures the input side by activations
instead of by ``V``: see :mod:`csulora_callback.method.token_space`. The split and the idea of attenuating by relative
energy are those of CSULoRA (arXiv 2605.30640, abstract); the concrete scales and the treatment of rank are this
project's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from csulora_callback.method.gauge import CorrectionOverflowError, closest_gauge, narrowed
from csulora_callback.method.measure import along_pairs
from csulora_callback.method.penalty import BLOCKS, Penalty
from csulora_callback.method.token_space import InputGain

# A gain table whose determinant vanishes to rounding factors over the two sides and keeps the rank.
_RANK_ONE_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Correction:
    """A corrected LoRA update and what the correction did. Shares, gains and errors are dimensionless.

    Attributes:
        lora_A: ``(r', d_in)``, dtype and device of the input factor; ``r' = r`` unless ``rank="expand"``.
        lora_B: ``(d_out, r')``.
        energy: ``‖Π_b Δ‖²`` by block, scaling included.
        relative_energy: ``ρ_b = ‖Π_b Δ‖² / ‖Δ‖²`` by block; all zero for ``Δ = 0``.
        gain: ``g_b`` by block, of the penalty's table.
        relative_change: ``‖X − Δ‖ / ‖Δ‖`` of the returned update ``X``; 0 for ``Δ = 0``. At most 1, unless the penalty
            is data-aware.
        truncation_error: ``‖X* − X‖ / ‖X*‖``, the part of the closest safe update that rank ``r`` cannot hold.
        closest_norm: ``‖X*‖``, the norm of the closest safe update before any truncation.
        along: ``uᵢᵀ Δ vᵢ`` of each pair of columns of ``U`` and ``V``, ``(min(k, k'),)``, in the dtype computed in:
            which way the update points. With singular values ``σ``, ``Σᵢ σᵢ · along[i] = ⟨Δ, U S Vᵀ⟩``.
        corrected_along: the same of the returned update.
    """

    lora_A: Tensor
    lora_B: Tensor
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


def correct(
    lora_A: Tensor,
    lora_B: Tensor,
    U: Tensor,
    V: Tensor,
    penalty: Penalty,
    scaling: float = 1.0,
    rank: Literal["truncate", "expand"] = "truncate",
    input_gain: InputGain | None = None,
) -> Correction:
    r"""Closest safe update of ``Δ = scaling · lora_B · lora_A``, again as LoRA factors.

    With the gains in a table ``G = [[g_aligned, g_output], [g_input, g_off]]``, a table of rank one is written into
    the factors exactly, in the gauge they came in. Otherwise ``X*`` can have rank ``2r``: ``"truncate"`` keeps its
    best rank-``r`` approximation (Eckart–Young), in the gauge closest to the old factors (orthogonal Procrustes) so
    that optimizer moments keep their meaning; ``"expand"`` keeps all of it, at rank ``min(2r, d_out, d_in)``.

    Computes in float64 (float32 on devices without it) whatever the factors' dtype; costs
    ``O((d_out + d_in)(k + r) r)`` time.

    Args:
        lora_A: ``(r, d_in)``, any floating dtype.
        lora_B: ``(d_out, r)``.
        U: ``(d_out, k)`` orthonormal columns, output side of the safety subspace; ``k = 0`` means no subspace.
        V: ``(d_in, k')`` orthonormal columns, input side.
        penalty: the table of ``λ_b``.
        scaling: PEFT's ``scaling`` of the layer.
        rank: what to do when ``X*`` does not fit rank ``r``.
        input_gain: what :func:`~csulora_callback.method.token_space.input_gain` makes of the module's activations; a
            data-aware penalty needs it, no other has it.

    Returns:
        The corrected factors, for the same ``scaling``, with energies and gains.

    Raises:
        ValueError: if shapes do not fit together, ``penalty`` or ``rank`` is of no known kind, a factor, a basis or
            ``scaling`` is NaN or Inf, or ``input_gain`` is missing or not used.
        CorrectionOverflowError: a ``ValueError`` of its own, if the corrected update has entries that the factors'
            dtype cannot hold, however its size is shared between them, or if its energy overflows.

    Example:
        >>> import torch
        >>> from csulora_callback import Penalty, correct
        >>> A, B = torch.ones(1, 2), torch.ones(3, 1)
        >>> U, V = torch.eye(3)[:, :1], torch.eye(2)[:, :1]  # first output, first input
        >>> result = correct(A, B, U, V, Penalty.projection())
        >>> result.lora_B @ result.lora_A
        tensor([[1., 0.],
                [0., 0.],
                [0., 0.]])
        >>> {block: round(share, 3) for block, share in result.relative_energy.items()}
        {'aligned': 0.167, 'output': 0.167, 'input': 0.333, 'off': 0.333}
    """
    _check_arguments(lora_A, lora_B, U, V, penalty, scaling, rank, input_gain)
    wide = torch.float32 if lora_A.device.type == "mps" else torch.float64
    A, B, U, V = (tensor.detach().to(lora_A.device, wide) for tensor in (lora_A, lora_B, U, V))

    output_side, input_side = _split(B, U), _split(A.T, V)
    blocks = {
        "aligned": output_side.inside @ input_side.inside.T,
        "output": output_side.inside @ input_side.outside.T,
        "input": output_side.outside @ input_side.inside.T,
        "off": output_side.outside @ input_side.outside.T,
    }
    energy = {block: scaling * scaling * core.square().sum().item() for block, core in blocks.items()}
    total = sum(energy.values())
    if not math.isfinite(total):
        raise CorrectionOverflowError(
            f"`lora_A`, `lora_B`: expected an update whose energy ‖Δ‖² is finite in {wide}, but got {total}, with "
            f"scaling {scaling:g}. Train with a smaller learning rate."
        )
    relative_energy = {block: e / total if total else 0.0 for block, e in energy.items()}
    gain = penalty.gain(relative_energy)
    along = along_pairs(output_side.inner, input_side.inner, scaling)

    def result(
        new_A: Tensor,
        new_B: Tensor,
        relative_change: float,
        truncation_error: float,
        closest_norm: float,
        aligned_gain: float | None = None,
    ) -> Correction:
        # Where the gain of the aligned block says it all, the products are spared.
        after = along_pairs(U.T @ new_B, V.T @ new_A.T, scaling) if aligned_gain is None else aligned_gain * along
        measured = (relative_change, truncation_error, closest_norm, along, after)
        new_A, new_B = narrowed(new_A, new_B, lora_A.dtype, lora_B.dtype)
        return Correction(new_A, new_B, energy, relative_energy, gain, *measured)

    if total == 0.0:
        return result(A.clone(), B.clone(), 0.0, truncation_error=0.0, closest_norm=0.0, aligned_gain=1.0)

    closest_norm = math.sqrt(sum(gain[block] ** 2 * energy[block] for block in BLOCKS))
    sides = _rank_one(gain)
    if sides is not None:
        on_output, on_input = sides
        change = math.sqrt(sum((1 - gain[block]) ** 2 * relative_energy[block] for block in BLOCKS))
        new_A, new_B = _attenuate(A.T, V, *on_input).T, _attenuate(B, U, *on_output)
        if input_gain is None:
            return result(new_A, new_B, change, 0.0, closest_norm, gain["aligned"])
        new_A = input_gain(new_A)
        closest_norm = abs(scaling) * _norm(new_B, new_A)
        change = _norm(torch.cat([new_B, -B], dim=1), torch.cat([new_A, A])) * abs(scaling) / math.sqrt(total)
        return result(new_A, new_B, relative_change=change, truncation_error=0.0, closest_norm=closest_norm)

    before = sum(blocks.values())
    closest = sum(gain[block] * core for block, core in blocks.items())
    left, sigma, right = torch.linalg.svd(closest, full_matrices=False)
    kept = sigma.numel() if rank == "expand" else min(A.shape[0], sigma.numel())
    whole = sigma.norm()
    truncation_error = (sigma[kept:].norm() / whole).item() if whole > 0 else 0.0  # X* = 0 fits any rank
    left, sigma, right = left[:, :kept], sigma[:kept], right[:kept]
    relative_change = (((left * sigma) @ right - before).norm() / before.norm()).item()

    root = sigma.sqrt()
    new_B, new_A = output_side.basis @ (left * root), (root[:, None] * right) @ input_side.basis.T
    if rank == "truncate":
        new_A, new_B = closest_gauge(new_A, new_B, A, B)
    return result(new_A, new_B, relative_change, truncation_error, closest_norm)


def _norm(B: Tensor, A: Tensor) -> float:
    """``‖B·A‖`` without forming it."""
    return (torch.linalg.qr(B, mode="r").R @ A).norm().item()


@dataclass(frozen=True)
class _Side:
    """One factor ``F`` (d, r) split by a subspace: ``P F = basis·inside`` and ``(I − P) F = basis·outside``."""

    inner: Tensor  # (k, r), the products of the subspace's columns with F
    basis: Tensor  # (d, m) orthonormal columns, m = min(d, 2r)
    inside: Tensor  # (m, r)
    outside: Tensor  # (m, r)


def _split(factor: Tensor, subspace: Tensor) -> _Side:
    r = factor.shape[1]
    inner = subspace.T @ factor
    inside = subspace @ inner
    # One QR over both parts: were each factorized alone, the arbitrary directions that QR adds to a rank-deficient
    # part could overlap the other part, and an SVD in the joint basis would no longer be one of the update.
    basis, triangular = torch.linalg.qr(torch.cat([inside, factor - inside], dim=1))
    return _Side(inner, basis, triangular[:, :r], triangular[:, r:])


def _rank_one(gain: Mapping[str, float]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Gains of the two sides, each ``(inside, outside)``, if the table of block gains is their outer product."""
    table = [[gain["aligned"], gain["output"]], [gain["input"], gain["off"]]]
    largest = max(gain.values())
    if largest == 0.0:
        return (0.0, 0.0), (1.0, 1.0)
    if abs(gain["aligned"] * gain["off"] - gain["output"] * gain["input"]) > _RANK_ONE_TOLERANCE * largest**2:
        return None
    i, j = next((i, j) for i in (0, 1) for j in (0, 1) if table[i][j] == largest)
    root = math.sqrt(largest)  # shared between the sides, so that neither factor shrinks alone
    return (table[0][j] / root, table[1][j] / root), (table[i][0] / root, table[i][1] / root)


def _attenuate(factor: Tensor, subspace: Tensor, inside: float, outside: float) -> Tensor:
    """``(inside·P + outside·(I − P)) F``; equal gains of one leave ``F`` as it is, bit for bit."""
    if inside == outside:
        return outside * factor
    return outside * factor + (inside - outside) * (subspace @ (subspace.T @ factor))


def _check_arguments(
    lora_A: Tensor,
    lora_B: Tensor,
    U: Tensor,
    V: Tensor,
    penalty: Penalty,
    scaling: float,
    rank: str,
    input_gain: InputGain | None,
) -> None:
    for name, tensor, axes in (
        ("lora_A", lora_A, "(r, d_in)"),
        ("lora_B", lora_B, "(d_out, r)"),
        ("U", U, "(d_out, k)"),
        ("V", V, "(d_in, k)"),
    ):
        if tensor.ndim != 2:
            raise ValueError(f"`{name}`: expected a matrix {axes}, but got shape {tuple(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}`: expected a floating-point matrix, but got {tensor.dtype}.")
    (r, d_in), (d_out, _) = lora_A.shape, lora_B.shape
    for name, tensor, axis, expected, source in (
        ("lora_B", lora_B, 1, r, "the rank r of `lora_A`"),
        ("U", U, 0, d_out, "d_out of `lora_B`"),
        ("V", V, 0, d_in, "d_in of `lora_A`"),
    ):
        if tensor.shape[axis] != expected:
            rows = ("rows", "columns")[axis]
            raise ValueError(f"`{name}`: expected {expected} {rows}, {source}, but got shape {tuple(tensor.shape)}.")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("U", U), ("V", V)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}`: expected finite values, but got NaN or Inf.")
    if not isinstance(penalty, Penalty):
        raise ValueError(f"`penalty`: expected a Penalty such as Penalty.guard(3.0), but got {penalty!r}.")
    if (penalty.on_probes is None) != (input_gain is None):
        raise ValueError(
            f"`input_gain`: expected {'one' if input_gain is None else 'none'} for the penalty {penalty}, but got "
            f"{'none' if input_gain is None else 'one'}. A data-aware penalty needs token_space.input_gain(task, "
            "probes, strength) of the module's activations, and no other can use it."
        )
    if input_gain is not None and input_gain.probes.shape[1] != d_in:
        raise ValueError(
            f"`input_gain`: expected one of {d_in} inputs, d_in of `lora_A`, but got {input_gain.probes.shape[1]}."
        )
    if not math.isfinite(scaling):
        raise ValueError(f"`scaling`: expected a finite number, but got {scaling!r}.")
    if rank not in ("truncate", "expand"):
        raise ValueError(f"`rank`: expected 'truncate' or 'expand', but got {rank!r}.")
