"""LoRA updates and penalties for hypothesis, and what a correction makes of them, dense and in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from csulora_callback import Correction, Penalty, correct

BLOCKS = ("aligned", "output", "input", "off")
KINDS = ["gaussian", "gaussian", "gaussian", "unbalanced", "dead columns", "repeated columns", "inside U"]
FINITE = st.one_of(st.floats(0.5, 100.0), st.floats(0.01, 1.0), st.just(0.0))
ANY = st.one_of(FINITE, FINITE, st.just(math.inf))
SINGLE, DOUBLE = (torch.float32, torch.float32), (torch.float64, torch.float64)
Preset = tuple[str, tuple[float, ...]]  # a constructor of Penalty and its arguments


class Update(NamedTuple):
    A: Tensor
    B: Tensor
    U: Tensor
    V: Tensor
    scaling: float = 1.0

    @property
    def delta(self) -> Tensor:
        return self.scaling * self.B.double() @ self.A.double()

    def correct(self, preset: Preset, rank: str = "truncate") -> Correction:
        return correct(self.A, self.B, self.U, self.V, penalty_of(preset), self.scaling, rank)

    def of(self, result: Correction) -> Tensor:
        """The update that a result stands for, dense."""
        return self._replace(A=result.lora_A, B=result.lora_B).delta


def make_update(d_out, d_in, r, k_out, k_in, kind="gaussian", scaling=1.0, seed=0, dtypes=SINGLE) -> Update:
    """Factors in the first dtype, bases in the second."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((r, d_in), (d_out, r), (d_out, d_out), (d_in, d_in))
    A, B, U, V = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    U, V = torch.linalg.qr(U)[0][:, :k_out], torch.linalg.qr(V)[0][:, :k_in]
    if kind == "unbalanced":
        A, B = A * 100, B * 1e-3
    elif kind == "dead columns":
        B[:, (r + 1) // 2 :] = 0
    elif kind == "repeated columns":
        B = B[:, :1].repeat(1, r)
    elif kind == "inside U":
        B = U @ U.T @ B
    return Update(A.to(dtypes[0]), B.to(dtypes[0]), U.to(dtypes[1]), V.to(dtypes[1]), scaling)


@st.composite
def updates(draw, dtypes=SINGLE, largest=24):
    """Half of them of any shape, ``k`` from 0 to full and ``r`` above the dimensions; half such that ``2r`` fits."""
    any_shape = draw(st.booleans())
    d_out, d_in = (draw(st.integers(1 if any_shape else largest // 3, largest)) for _ in range(2))
    r = draw(st.integers(1, largest + 4)) if any_shape else draw(st.integers(1, 3))
    k_out, k_in = (draw(st.integers(0, d) if any_shape else st.integers(1, d - 1)) for d in (d_out, d_in))
    if any_shape:
        k_out, k_in = (draw(st.sampled_from([k, k, 0, d])) for k, d in ((k_out, d_out), (k_in, d_in)))
    kind, scaling = draw(st.sampled_from(KINDS)), draw(st.sampled_from([1.0, 0.25, 16.0, -2.0]))
    return make_update(d_out, d_in, r, k_out, k_in, kind, scaling, draw(st.integers(0, 2**31)), dtypes)


@st.composite
def presets(draw, strengths=ANY):
    name = draw(st.sampled_from(["csulora", "csulora", "separable", "guard", "projection", "table", "table"]))
    return name, tuple(draw(strengths) for _ in range({"projection": 0, "table": 4}.get(name, 1)))


def penalty_of(preset: Preset) -> Penalty:
    return getattr(Penalty, preset[0])(*preset[1])


def projectors(update: Update) -> list[tuple[Tensor, Tensor]]:
    """``(L, R)`` by block, in the order of ``BLOCKS``: the block of ``X`` is ``L X R``."""
    P_U, P_V = (basis.double() @ basis.double().T for basis in (update.U, update.V))
    Q_U, Q_V = torch.eye(len(P_U)) - P_U, torch.eye(len(P_V)) - P_V
    return [(P_U, P_V), (P_U, Q_V), (Q_U, P_V), (Q_U, Q_V)]


def multipliers(preset: Preset, rho: list[float]) -> tuple[float, ...]:
    """``λ`` in the order of ``BLOCKS``, from the table of the design; infinity times an empty block is nothing."""
    name, arguments = preset
    if name in ("projection", "table"):
        return arguments or (0.0, math.inf, math.inf, math.inf)
    (s,) = arguments
    if name == "guard":
        return (2 * s + s * s, s, s, 0.0)
    output, input_, both, off = (s * x if x else 0.0 for x in (rho[1], rho[2], rho[1] + rho[2], rho[3]))
    return (0.0, both, both, off) if name == "csulora" else (0.0, output, input_, (1 + output) * (1 + input_) - 1)


class Reference(NamedTuple):
    energy: list[float]
    rho: list[float]
    lambdas: tuple[float, ...]
    closest: Tensor


def reference(update: Update, preset: Preset) -> Reference:
    parts = [left @ update.delta @ right for left, right in projectors(update)]
    energy = [part.square().sum().item() for part in parts]
    rho = [e / (sum(energy) or 1.0) for e in energy]
    lambdas = multipliers(preset, rho)
    return Reference(energy, rho, lambdas, sum(part / (1 + x) for part, x in zip(parts, lambdas, strict=True)))


def allowance(expected: Tensor, delta: Tensor, tolerance: float = 1e-5) -> float:
    """Relative to ``‖X*‖``, which is what ships, as long as the inputs define it.

    A float32 basis is orthonormal to 1e-7 only, so ``P Δ`` leaks that much of ``‖Δ‖`` into the other blocks, and an
    ``X*`` below it is nothing but the leak (full ``k`` under ``guard(inf)``). There ``‖Δ‖`` sets the scale.
    """
    return tolerance * max(expected.norm().item(), 1e-6 * delta.norm().item())
