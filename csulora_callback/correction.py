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

A :class:`Penalty` is the table of the ``λ_b``; :func:`correct` returns ``X*`` as LoRA factors. No ``d_out × d_in`` or
``d × d`` matrix is ever formed. A data-aware penalty measures the input side by activations instead of by ``V``: see
:mod:`csulora_callback.token_space`. The split and the idea of attenuating by relative energy are those of CSULoRA
(arXiv 2605.30640, abstract); the concrete scales and the treatment of rank are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from csulora_callback.token_space import MAX_STRENGTH, InputGain

BLOCKS = ("aligned", "output", "input", "off")

# A gain table whose determinant vanishes to rounding factors over the two sides and keeps the rank.
_RANK_ONE_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Penalty:
    """The table of multipliers ``λ_b ≥ 0`` that says how much each block of an update is attenuated.

    Use one of the constructors; ``strength=0`` is always the identity, and ``math.inf`` is allowed.

    Example:
        >>> from csulora_callback import Penalty
        >>> Penalty.csulora(10.0).gain({"aligned": 0.2, "output": 0.1, "input": 0.1, "off": 0.6})
        {'aligned': 1.0, 'output': 0.3333333333333333, 'input': 0.3333333333333333, 'off': 0.14285714285714285}
        >>> Penalty.projection()
        Penalty(name='projection', parameters={})
    """

    name: str
    parameters: dict[str, float] = field(hash=False)
    _table: Callable[..., dict[str, float]] = field(repr=False, compare=False)
    on_probes: float | None = field(default=None, repr=False)  # λ of a data-aware penalty, which is not in the table

    def __str__(self) -> str:
        parameters = ", ".join(f"{name} {value:g}" for name, value in self.parameters.items())
        return f"{self.name} ({parameters})" if parameters else self.name

    @classmethod
    def csulora(cls, strength: float = 10.0) -> Penalty:
        """The paper's orientation: ``λ_partial = strength·ρ_partial``, ``λ_off = strength·ρ_off``, nothing on aligned.

        ``ρ_b`` is the block's share of ``‖Δ‖²``. The rank of the result can reach twice that of the update.
        """
        return cls("csulora", {"strength": _checked_multiplier("strength", strength)}, _csulora)

    @classmethod
    def separable(cls, strength: float = 10.0) -> Penalty:
        """Each half by its own energy, ``λ_output = strength·ρ_output`` and ``λ_input = strength·ρ_input``.

        ``1 + λ_off = (1 + λ_output)(1 + λ_input)``, so that the table of gains has rank one and the rank is kept.
        """
        return cls("separable", {"strength": _checked_multiplier("strength", strength)}, _separable)

    @classmethod
    def guard(cls, strength: float = 10.0) -> Penalty:
        """The opposite orientation: protects the subspace and lets the task live outside it. Rank is kept.

        ``λ_aligned = (1 + strength)² − 1``, ``λ_partial = strength``, ``λ_off = 0``.
        """
        return cls("guard", {"strength": _checked_multiplier("strength", strength)}, _guard)

    @classmethod
    def projection(cls) -> Penalty:
        """The hard limit: only the fully aligned block is kept. Rank is kept."""
        return cls("projection", {}, _projection)

    @classmethod
    def data_aware(cls, strength: float = 10.0) -> Penalty:
        """Measures by activations: what the update does to the task is kept, what it does to the probes attenuated.

        ``argmin_X ‖(X − Δ) C_T^½‖² + strength · ‖X C_H^½‖²``, with ``C_T`` and ``C_H`` the second moments of a
        module's inputs on the task and on prompts that are to be refused (:mod:`csulora_callback.token_space`).
        Nothing is taken from the displacement; rank is kept. ``strength`` is at most 1e6.
        """
        strength = _checked_multiplier("strength", strength)
        if strength > MAX_STRENGTH:
            raise ValueError(
                f"`strength`: expected at most {MAX_STRENGTH:g} for a data-aware penalty, but got {strength!r}."
            )
        return cls("data_aware", {"strength": strength}, _nothing, on_probes=strength)

    @classmethod
    def table(cls, aligned: float = 0.0, output: float = 0.0, input: float = 0.0, off: float = 0.0) -> Penalty:
        """A free table of constant multipliers ``λ_b``, each in ``[0, ∞]``."""
        multipliers = {"aligned": aligned, "output": output, "input": input, "off": off}
        return cls("table", {b: _checked_multiplier(b, m) for b, m in multipliers.items()}, _constant)

    def multipliers(self, relative_energy: Mapping[str, float]) -> dict[str, float]:
        """``λ_b`` by block for an update whose blocks hold the shares ``relative_energy`` of its energy."""
        return self._table(relative_energy, **self.parameters)

    def gain(self, relative_energy: Mapping[str, float]) -> dict[str, float]:
        """``g_b = 1/(1 + λ_b)`` by block, each in ``[0, 1]``."""
        return {block: 1.0 / (1.0 + m) for block, m in self.multipliers(relative_energy).items()}

    def to_json(self) -> dict:
        """``{"name": …, parameter: …}`` with infinity as the string ``"inf"``, which JSON has no number for."""
        return {"name": self.name, **{k: v if math.isfinite(v) else str(v) for k, v in self.parameters.items()}}


def _checked_multiplier(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value < 0:
        raise ValueError(f"`{name}`: expected a number ≥ 0 (math.inf is allowed), but got {value!r}.")
    return float(value)


def _scaled(strength: float, share: float) -> float:
    # ∞·0 is a block without energy under an infinite strength: nothing to attenuate, not NaN.
    return strength * share if share else 0.0


def _csulora(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    partially = _scaled(strength, relative_energy["output"] + relative_energy["input"])
    off = _scaled(strength, relative_energy["off"])
    return {"aligned": 0.0, "output": partially, "input": partially, "off": off}


def _separable(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    output = _scaled(strength, relative_energy["output"])
    input_ = _scaled(strength, relative_energy["input"])
    return {"aligned": 0.0, "output": output, "input": input_, "off": (1 + output) * (1 + input_) - 1}


def _guard(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    # A product, not a power: Python's ** raises where it overflows, and infinity is what is meant.
    return {"aligned": (1 + strength) * (1 + strength) - 1, "output": strength, "input": strength, "off": 0.0}


def _projection(relative_energy: Mapping[str, float]) -> dict[str, float]:
    return {"aligned": 0.0, "output": math.inf, "input": math.inf, "off": math.inf}


def _nothing(relative_energy: Mapping[str, float], strength: float) -> dict[str, float]:
    return dict.fromkeys(BLOCKS, 0.0)


def _constant(relative_energy: Mapping[str, float], **multipliers: float) -> dict[str, float]:
    return dict(multipliers)


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
    """

    lora_A: Tensor
    lora_B: Tensor
    energy: dict[str, float]
    relative_energy: dict[str, float]
    gain: dict[str, float]
    relative_change: float
    truncation_error: float
    closest_norm: float

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
        input_gain: what :func:`~csulora_callback.token_space.input_gain` makes of the module's activations; a
            data-aware penalty needs it, no other has it.

    Returns:
        The corrected factors, for the same ``scaling``, with energies and gains.

    Raises:
        ValueError: if shapes do not fit together, ``penalty`` or ``rank`` is of no known kind, a factor, a basis or
            ``scaling`` is NaN or Inf, or ``input_gain`` is missing or not used.

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
    energy = {block: scaling**2 * core.square().sum().item() for block, core in blocks.items()}
    total = sum(energy.values())
    relative_energy = {block: e / total if total else 0.0 for block, e in energy.items()}
    gain = penalty.gain(relative_energy)

    def result(
        new_A: Tensor, new_B: Tensor, relative_change: float, truncation_error: float, closest_norm: float
    ) -> Correction:
        new_A, new_B = new_A.to(lora_A.dtype).contiguous(), new_B.to(lora_B.dtype).contiguous()
        return Correction(new_A, new_B, energy, relative_energy, gain, relative_change, truncation_error, closest_norm)

    if total == 0.0:
        return result(A.clone(), B.clone(), relative_change=0.0, truncation_error=0.0, closest_norm=0.0)

    closest_norm = math.sqrt(sum(gain[block] ** 2 * energy[block] for block in BLOCKS))
    sides = _rank_one(gain)
    if sides is not None:
        on_output, on_input = sides
        change = math.sqrt(sum((1 - gain[block]) ** 2 * relative_energy[block] for block in BLOCKS))
        new_A, new_B = _attenuate(A.T, V, *on_input).T, _attenuate(B, U, *on_output)
        if input_gain is not None:
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
        new_A, new_B = _closest_gauge(new_A, new_B, A, B)
    return result(new_A, new_B, relative_change, truncation_error, closest_norm)


def _norm(B: Tensor, A: Tensor) -> float:
    """``‖B·A‖`` without forming it."""
    return (torch.linalg.qr(B, mode="r").R @ A).norm().item()


@dataclass(frozen=True)
class _Side:
    """One factor ``F`` (d, r) split by a subspace: ``P F = basis·inside`` and ``(I − P) F = basis·outside``."""

    basis: Tensor  # (d, m) orthonormal columns, m = min(d, 2r)
    inside: Tensor  # (m, r)
    outside: Tensor  # (m, r)


def _split(factor: Tensor, subspace: Tensor) -> _Side:
    r = factor.shape[1]
    inside = subspace @ (subspace.T @ factor)
    # One QR over both parts: were each factorized alone, the arbitrary directions that QR adds to a rank-deficient
    # part could overlap the other part, and an SVD in the joint basis would no longer be one of the update.
    basis, triangular = torch.linalg.qr(torch.cat([inside, factor - inside], dim=1))
    return _Side(basis, triangular[:, :r], triangular[:, r:])


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


def _closest_gauge(A: Tensor, B: Tensor, old_A: Tensor, old_B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of ``B A`` closest to the old ones up to rotation, sharing the norm between them as those did."""
    missing = old_A.shape[0] - A.shape[0]
    if missing:  # r exceeds a side of the matrix: the update has fewer directions than the adapter has columns
        A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
    norms = A.norm() * old_B.norm()
    if norms > 0:  # X* = 0 has no balance to keep
        balance = (old_A.norm() * B.norm() / norms).sqrt()
        if balance > 0:
            A, B = A * balance, B / balance
    left, _, right = torch.linalg.svd(B.T @ old_B + A @ old_A.T)
    rotation = left @ right
    return rotation.T @ A, B @ rotation


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
