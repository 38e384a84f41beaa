"""Leading singular triplets of a large matrix from a block Krylov space (Musco & Musco 2015) that grows as it must.

The space is kept on the smaller side of ``D (n, m)``, ``n ≥ m``: orthonormal rows ``S (q, m)``, each block ``DᵀD``
times the one before, made orthogonal to all; ``Y = S Dᵀ`` is collected on the way. With ``Y Yᵀ = R diag(λ) Rᵀ``, one
small eigenproblem in float64, the Ritz triplets are ``σ = √λ``, ``V = SᵀR``, ``U = YᵀR/σ``. Of two spaces with as
many columns the one of narrower blocks reaches further.

How wrong the leading ``k`` of them are needs no further pass. ``DᵀD vᵢ − λᵢ vᵢ`` lies in the block that comes next;
with what couples it to the last one, ``β``, and the last entries of the Ritz vector, ``rᵢ``, its coordinates there
are ``cᵢ = β rᵢ``. Where ``DᵀD`` is at most ``μ`` in that block, as it is in the last one, to first order ``vᵢ``
lacks a part ``‖cᵢ‖/(λᵢ − μ)`` outside the space, and is turned towards ``vⱼ`` within it by ``⟨cᵢ, cⱼ⟩/((λᵢ − μ)(λᵢ −
λⱼ))``. Only what is turned out of the leading ``k`` counts. The mean square of these angles,

    ``‖(I − P̂) P‖_F² / k ≈ 1/k · Σᵢ (‖cᵢ‖²/(λᵢ − μ)² + Σ_{j>k} ⟨cᵢ, cⱼ⟩²/((λᵢ − μ)(λᵢ − λⱼ))²)``,

is what an update that lies evenly within the subspace is split wrongly by; one that lies in no special direction has
``2k/m`` of it. The error of ``X*`` is about as large, and the share of the energy that is lost about its square.
Blocks are added until the root of it is below :data:`TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from csulora_callback.method.reused import Reused

TOLERANCE = 5e-4
"""Of ``‖(I − P̂) P‖_F / √k``; what it is estimated by has been at least half of it on all spectra tried."""

_WIDTH = 32  # of a block where the rank is not known beforehand
_LEAST_WIDTH = 8
_COLUMNS = 2048
_FRESH = 8  # directions that the last test begins with
_ROUNDING = 16  # of the products, in units of the dtype's
_LEAST = 1e-5  # of the singular values, in units of the first: squares of smaller ones drown in float64
_MISSED = 1e-5  # share of the energy kept that they may add

# The products are nearly all that an estimate takes. PyTorch gives those of float32 to MKL, which is half as fast
# as it could be on processors that are not Intel's; its compiler gives them to oneDNN, by this operator. Without MKL,
# as on ARM, PyTorch's own way is the one that is made for the processor, and oneDNN may have none.
_HAS_ONEDNN = (
    torch.backends.mkl.is_available()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)

Cut = Callable[[Tensor], int | None]
"""How many of the singular values ``(q,)`` found so far are to be kept; None where more have to be found first."""


def krylov_triplets(
    D: Tensor, cut: Cut, generator: torch.Generator, rank: int | None = None, memory: Reused | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(U, σ, V)`` of the leading part of ``D``.

    ``None`` where half of all directions do not suffice, or where singular values are to be kept that a Gram matrix
    cannot tell beside the first.

    Args:
        D: ``(rows, columns)``, float32 or float64, of norm about one.
        cut: the rank rule.
        generator: of the random start; on the CPU, so that devices agree.
        rank: what the rule asks for, where that is known.
        memory: to be used again for the next matrix.

    Example:
        >>> D = torch.diag(0.5 ** torch.arange(64.0))
        >>> U, sigma, V = krylov_triplets(D, lambda sigma: 2, torch.Generator().manual_seed(0), rank=2)
        >>> U.shape, [round(value, 3) for value in sigma.tolist()]
        (torch.Size([64, 2]), [1.0, 0.5])
    """
    if D.shape[0] < D.shape[1]:
        found = krylov_triplets(D.T, cut, generator, rank, memory)
        return None if found is None else (found[2], found[1], found[0])
    space = _Space(D, max(_LEAST_WIDTH, rank // 2) if rank else _WIDTH, generator, memory)
    check = 3 * (rank or 0)  # hardly a spectrum is done before
    while space.size <= space.limit:
        space.grow()
        if space.size < check and not space.is_all:
            continue
        sigma, vectors = space.ritz()
        k = cut(sigma)
        error = float("inf") if k is None else space.error(sigma, vectors, k)
        if error <= TOLERANCE:
            break
        # Far from the goal there is no need to look after every block, nor where looking is what takes the time.
        check = space.size + max(space.size // 16, (2 if error > 30 * TOLERANCE else 1) * space.width)
    else:
        return None
    if sigma[k - 1] < _LEAST * sigma[0]:
        return None
    U, sigma, V = space.triplets(sigma, vectors, k)
    return None if space.misses(U, sigma, generator) else (U, sigma, V)


class _Space:
    """Orthonormal rows ``S (q, m)``, ``Y = S Dᵀ (q, n)``, their Gram matrix, and the block that comes next."""

    def __init__(self, D: Tensor, width: int, generator: torch.Generator, memory: Reused | None = None) -> None:
        self.D, self.width, self.size = D, width, 0
        self.limit = D.shape[1] // 2 - width
        most, memory = max(self.limit + width, 0), memory or Reused()
        self._S = memory.matrix("S", (most, D.shape[1]), D.dtype, D.device)
        self._Y = memory.matrix("Y", (most, D.shape[0]), D.dtype, D.device)
        self._gram = D.new_empty(0, 0, dtype=torch.float64)
        self._next, self._coupling = _orthonormal(self._random(width, generator))

    def grow(self) -> None:
        """Take the next block in."""
        block, before, after = self._next, self.size, self.size + self.width
        self._S[before:after] = block
        self._Y[before:after], back = _both_ways(self.D, block)
        rows = _inner_products(self._Y[before:after], self._Y[:after])
        self._gram = torch.cat([torch.cat([self._gram, rows[:, :before]]), rows.T], dim=1)
        self.size = after
        # Twice: once the iteration has converged, what is left of a block is mostly rounding noise within the space.
        once, first = _orthonormal(self._outside(back))
        self._next, second = _orthonormal(self._outside(once))
        self._coupling = second @ first

    @property
    def is_all(self) -> bool:
        """Whether what comes next is rounding, as of a low rank. Grown by that, the space is orthonormal no more."""
        return bool(self._coupling.norm() <= _ROUNDING * torch.finfo(self.D.dtype).eps * self._gram.trace())

    def ritz(self) -> tuple[Tensor, Tensor]:
        """All Ritz values as singular values ``(q,)``, descending, and their vectors ``(q, q)``; float64."""
        eigenvalues, vectors = torch.linalg.eigh(self._gram)
        return eigenvalues.flip(0).clamp_min(0.0).sqrt(), vectors.flip(1)

    def error(self, sigma: Tensor, vectors: Tensor, k: int) -> float:
        """``‖(I − P̂) P‖_F / √k`` of the first ``k`` Ritz vectors, about; see the module's docstring."""
        if k >= self.size:
            return float("inf")
        values, last = sigma.square(), slice(self.size - self.width, self.size)
        coupled = self._coupling.double() @ vectors[last]
        beyond = torch.linalg.eigvalsh(self._gram[last, last])[-1].clamp_max(values[k])
        smallest = torch.finfo(torch.float64).tiny
        distance = (values[:k] - beyond).clamp_min(smallest)
        outside = torch.linalg.vector_norm(coupled[:, :k], dim=0) / distance
        gaps = (values[:k, None] - values[None, k:]).clamp_min(smallest)
        inside = torch.linalg.vector_norm(coupled[:, :k].T @ coupled[:, k:] / distance[:, None] / gaps, dim=1)
        angles = outside.clamp_max(1.0).square().sum() + inside.clamp_max(1.0).square().sum()
        return (angles / max(k, 1)).sqrt().item()

    def triplets(self, sigma: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(U, σ, V)`` of the first ``k`` Ritz values."""
        sigma, vectors = sigma[:k], vectors[:, :k]
        of_rows = (vectors / sigma).T.to(self.D), vectors.T.to(self.D)
        U, V = (
            (coefficients @ rows[: self.size]).T
            for coefficients, rows in zip(of_rows, (self._Y, self._S), strict=True)
        )
        return U, sigma.to(self.D), V

    def misses(self, U: Tensor, sigma: Tensor, generator: torch.Generator) -> bool:
        """Whether there is more outside the space than it knows of.

        A space that grows from one block holds no more copies of an equal singular value than the block is wide, and
        cannot tell. Directions that it has never seen can, drawn towards large singular values by one power step.
        """
        fresh, _ = _orthonormal(self._outside(self._random(_FRESH, generator)))
        fresh, _ = _orthonormal(self._outside(_both_ways(self.D, fresh)[1]))
        fresh, _ = _orthonormal(self._outside(fresh))  # twice, as in growing: of a low rank nothing else is left
        seen, sigma = _product(fresh, self.D), sigma.double()
        across = sigma[:, None] * _inner_products(U.T, seen)  # what D makes of V is Uσ, and orthogonal
        known = torch.cat([sigma.square().diag(), across], dim=1)
        both = torch.cat([known, torch.cat([across.T, _inner_products(seen, seen)], dim=1)])
        kept, might_be = sigma.square().sum(), torch.linalg.eigvalsh(both)[len(seen) :].sum()
        return bool(might_be - kept > _MISSED * kept)

    def _outside(self, rows: Tensor) -> Tensor:
        S = self._S[: self.size]
        return rows - (rows @ S.T) @ S

    def _random(self, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn(width, self.D.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(self.D)


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows ``Q``, and ``R`` with ``rows = RᵀQ``."""
    Q, R = torch.linalg.qr(rows.T)
    return Q.T.contiguous(), R


def _both_ways(D: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """``block Dᵀ`` and ``block DᵀD``."""
    forth = _product(block, D)
    return forth, _product(forth, D.T)


def _inner_products(left: Tensor, right: Tensor) -> Tensor:
    """``left rightᵀ`` in float64, or what is small beside ``σ₁²`` drowns; some columns at a time, to save memory."""
    columns = zip(left.split(_COLUMNS, dim=1), right.split(_COLUMNS, dim=1), strict=True)
    return sum(some.double() @ others.double().T for some, others in columns)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left rightᵀ``."""
    if _HAS_ONEDNN and left.device.type == "cpu" and left.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return left @ right.T
