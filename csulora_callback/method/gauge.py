"""Which factors stand for an update: ``(B, A)`` and ``(B G, G⁻¹ A)`` are the same one for every invertible ``G``."""

from __future__ import annotations

import torch
from torch import Tensor


class CorrectionOverflowError(ValueError):
    """A corrected update that its factors' dtype cannot hold, however its size is shared between the two."""


def closest_gauge(A: Tensor, B: Tensor, old_A: Tensor, old_B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of ``B A`` closest to the old ones up to rotation, sharing the norm between them as those did.

    Example:
        >>> A, B = torch.ones(1, 2), torch.ones(3, 1)
        >>> new_A, new_B = closest_gauge(-4.0 * A, -B, A, B)
        >>> new_A.tolist(), new_B.flatten().tolist()
        ([[2.0, 2.0]], [2.0, 2.0, 2.0])
    """
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


def narrowed(A: Tensor, B: Tensor, dtype_A: torch.dtype, dtype_B: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors in the dtypes that they came in, contiguous.

    A correction can concentrate an update in few entries, of up to ``√d`` times the size. Where a row of ``A`` would
    overflow, a power of two moves from it into its column of ``B``, and the other way round; nothing else changes.

    Args:
        A: ``(r, d_in)``, of a wide dtype.
        B: ``(d_out, r)``.
        dtype_A: of the result.
        dtype_B: likewise.

    Raises:
        CorrectionOverflowError: if a row of ``A`` and its column of ``B`` are too large together.

    Example:
        >>> A, B = torch.tensor([[80000.0, 2.0]]), torch.tensor([[3.0]])
        >>> narrowed(A, B, torch.float16, torch.float16)
        (tensor([[4.0000e+04, 1.0000e+00]], dtype=torch.float16), tensor([[6.]], dtype=torch.float16))
    """
    shift = _excess(A.abs().amax(dim=1), dtype_A) - _excess(B.abs().amax(dim=0), dtype_B)
    if shift.any():
        A, B = A * (2.0**-shift)[:, None], B * 2.0**shift
    narrow_A, narrow_B = A.to(dtype_A).contiguous(), B.to(dtype_B).contiguous()
    if not (torch.isfinite(narrow_A).all() and torch.isfinite(narrow_B).all()):
        kind, largest = str(dtype_B).removeprefix("torch."), torch.finfo(dtype_B).max
        raise CorrectionOverflowError(
            f"`lora_A`, `lora_B`: expected an update whose correction {kind} can hold, but got entries beyond "
            f"{largest:.3g} in both factors. Train with a smaller learning rate, and not in float16."
        )
    return narrow_A, narrow_B


def _excess(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """By how many powers of two each of the ``largest`` entries is too large for the ``dtype``; 0 where it is not."""
    return (largest / torch.finfo(dtype).max).log2().ceil().clamp(min=0.0)
