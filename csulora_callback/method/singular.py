"""Leading singular triplets of a matrix: a block Krylov space where it is large, an SVD where it is small."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from csulora_callback.method.krylov import krylov_triplets
from csulora_callback.method.reused import Reused

_EXACT_UP_TO = 256  # smaller side of a matrix whose full SVD is as fast as an approximate one
_SIDES_PER_RANK = 8  # of the smaller side; a larger rank leaves an approximation nothing to save


def leading_singular_triplets(
    name: str, D: Tensor, rule: dict, space: Reused | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, σ, V)`` of a displacement of norm one, cut by the rank rule."""
    if D.device.type == "mps":  # has no float64, which the small dense algebra needs
        D = D.cpu()
    # In float32 a GPU is not exact enough: the vectors of cuSOLVER's SVD are orthonormal to 2e-4, and products in TF32
    # may be allowed.
    wide = D if D.device.type == "cpu" else D.double()
    found, rank = None, rule["rank"]
    large = min(D.shape) > _EXACT_UP_TO and _SIDES_PER_RANK * (rank or 1) <= min(D.shape)
    if rule["method"] == "krylov" or (rule["method"] == "auto" and large):
        found = krylov_triplets(wide, lambda sigma: _cut(sigma, D, rule), _generator(name, rule["seed"]), rank, space)
    if found is None:
        U, sigma, Vh = torch.linalg.svd(wide, full_matrices=False)
        k = _cut(sigma, D, rule, complete=True)
        found = U[:, :k], sigma[:k], Vh[:k].T
    return _with_fixed_signs(*found)


def _cut(sigma: Tensor, D: Tensor, rule: dict, complete: bool = False) -> int | None:
    """How many singular values the rule keeps; ``None`` where an energy needs more than the ones found so far."""
    noise = max(D.shape) * torch.finfo(D.dtype).eps * sigma[0]
    numerical_rank = int((sigma > noise).sum())
    if rule["rank"] is not None:
        return min(rule["rank"], numerical_rank)
    share = sigma.double().square().cumsum(0)  # of a displacement of norm one
    enough = torch.nonzero(share >= rule["energy"] - torch.finfo(D.dtype).eps)
    if len(enough):
        return min(int(enough[0]) + 1, numerical_rank)
    return numerical_rank if complete else None  # rounding can leave the sum just short of a whole


def _generator(name: str, seed: int) -> torch.Generator:
    # A generator of our own, on the CPU: the global one must not move, and devices must agree.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _with_fixed_signs(U: Tensor, sigma: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors are defined up to a common sign: make the largest entry of each left one positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U)
    return U * sign, sigma, V * sign
