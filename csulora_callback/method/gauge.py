"""Which factors stand for an update: ``(B, A)`` and ``(B G, G⁻¹ A)`` are the same one for every invertible ``G``."""

from __future__ import annotations

import torch
from torch import Tensor


class CorrectionOverflowError(ValueError):
    """A corrected update that its factors' dtype cannot hold, however its size is shared between the two."""


def closest_gauge(A: Tensor, B: Tensor, old_A: Tensor, old_B: Tensor) -> tuple[Tensor, Tensor]:
    """What makes of the factors of ``B A`` those closest to the old ones, up to rotation, that share the norm alike.

    It is the same in any orthonormal bases of ``d_out`` and ``d_in``.

    Args:
        A: ``(…, r', d_in)`` with ``r' ≤ r``.
        B: ``(…, d_out, r')``.
        old_A: ``(…, r, d_in)``.
        old_B: ``(…, d_out, r)``.

    Returns:
        ``(…, r', r)`` each: ``gauge_Aᵀ A`` and ``B gauge_B`` are the closest factors, with ``r`` columns again.

    Example:
        >>> A, B = torch.ones(1, 2), torch.ones(3, 1)
        >>> gauge_A, gauge_B = closest_gauge(-4.0 * A, -B, A, B)
        >>> (gauge_A.T @ (-4.0 * A)).tolist(), (-B @ gauge_B).flatten().tolist()
        ([[2.0, 2.0]], [2.0, 2.0, 2.0])
    """
    size_A, size_B, old_size_A, old_size_B = (side.flatten(-2).norm(dim=-1) for side in (A, B, old_A, old_B))
    balance = (old_size_A * size_B / (size_A * old_size_B)).sqrt()
    usable = (balance > 0) & torch.isfinite(balance)  # X* = 0 has no balance to keep
    balance = torch.where(usable, balance, 1.0)[..., None, None]
    overlap = balance.reciprocal() * (B.mT @ old_B) + balance * (A @ old_A.mT)
    # Where r exceeds a side of the matrix the update has fewer directions than the adapter has columns.
    kept, r = overlap.shape[-2:]
    left, _, right = torch.linalg.svd(torch.nn.functional.pad(overlap, (0, 0, 0, r - kept)))
    rotation = (left @ right)[..., :kept, :]
    return rotation * balance, rotation / balance


def narrowed(A: Tensor, B: Tensor, dtype_A: torch.dtype, dtype_B: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The factors in the dtypes that they came in, and whether these can hold them.

    A correction can concentrate an update in few entries, of up to ``√d`` times the size. Where a row of ``A`` would
    overflow, a power of two moves from it into its column of ``B``, and the other way round; nothing else changes.

    Args:
        A: ``(…, r, d_in)``, of a wide dtype.
        B: ``(…, d_out, r)``.
        dtype_A: of the result.
        dtype_B: likewise.

    Returns:
        Both, and ``(…)`` flags that are false where a row of ``A`` and its column of ``B`` are too large together.

    Example:
        >>> A, B = torch.tensor([[80000.0, 2.0]]), torch.tensor([[3.0]])
        >>> narrowed(A, B, torch.float16, torch.float16)[:2]
        (tensor([[4.0000e+04, 1.0000e+00]], dtype=torch.float16), tensor([[6.]], dtype=torch.float16))
    """
    largest_A, largest_B = A.abs().amax(dim=-1), B.abs().amax(dim=-2)
    shift = _excess(largest_A, dtype_A) - _excess(largest_B, dtype_B)
    down, up = 2.0**-shift, 2.0**shift
    # Rounding keeps the order, so that what holds the largest entries holds all.
    held_A, held_B = (largest_A * down).to(dtype_A), (largest_B * up).to(dtype_B)
    fits = torch.isfinite(held_A).all(dim=-1) & torch.isfinite(held_B).all(dim=-1)
    return (A * down[..., None]).to(dtype_A), (B * up[..., None, :]).to(dtype_B), fits


def _excess(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """By how many powers of two each of the ``largest`` entries is too large for the ``dtype``; 0 where it is not."""
    return (largest / torch.finfo(dtype).max).log2().ceil().clamp(min=0.0)
