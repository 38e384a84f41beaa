"""Leading singular triplets of a matrix: a randomized block Krylov iteration where it is large, an SVD where small."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_EXACT_UP_TO = 512  # smaller side of a matrix whose full SVD is as fast as an approximate one
_EXTRA_BLOCKS = 6  # Krylov blocks beyond the first: what turns the right rank into the right subspace
_OVERSAMPLING = 8
_FIRST_RANK = 64  # first guess when the rank is to be found from an energy


def leading_singular_triplets(name: str, D: Tensor, rule: dict) -> tuple[Tensor, Tensor, Tensor]:
    """``(U, σ, V)`` of a displacement of norm one, cut by the rank rule."""
    smaller = min(D.shape)
    # In float32 a GPU is not exact enough: the vectors of cuSOLVER's SVD are orthonormal to 2e-4, and products in TF32
    # may be allowed.
    wide = D.double() if D.device.type not in ("cpu", "mps") else D
    guess = rule["rank"] or _FIRST_RANK
    while True:
        few = (guess + _OVERSAMPLING) * (1 + _EXTRA_BLOCKS) < smaller
        if rule["method"] == "exact" or not few or (rule["method"] == "auto" and smaller <= _EXACT_UP_TO):
            U, sigma, Vh = torch.linalg.svd(wide, full_matrices=False)
            V, complete = Vh.T, True
        else:
            U, sigma, V = _block_krylov(wide, guess, _generator(name, rule["seed"]))
            complete = False
        k = _cut(sigma, D, rule, complete)
        if k is not None:
            return _with_fixed_signs(U[:, :k], sigma[:k], V[:, :k])
        guess *= 2


def _cut(sigma: Tensor, D: Tensor, rule: dict, complete: bool) -> int | None:
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


def _block_krylov(D: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``rank`` singular triplets from the Krylov space of ``D Dᵀ`` over a random block."""
    if D.shape[0] > D.shape[1]:
        V, sigma, U = _block_krylov(D.T, rank, generator)
        return U, sigma, V
    start = torch.randn(D.shape[1], rank + _OVERSAMPLING, generator=generator, dtype=torch.float32, device="cpu")
    block = torch.linalg.qr(D @ start.to(D))[0]
    space = block
    for _ in range(_EXTRA_BLOCKS):
        block = D @ (D.T @ block)
        block = torch.linalg.qr(block - space @ (space.T @ block))[0]
        space = torch.cat([space, block], dim=1)
    # Once the iteration has converged its last blocks are rounding noise, partly within the space before them.
    space = torch.linalg.qr(space)[0]
    left, sigma, Vh = torch.linalg.svd(space.T @ D, full_matrices=False)
    return (space @ left)[:, :rank], sigma[:rank], Vh[:rank].T


def _generator(name: str, seed: int) -> torch.Generator:
    # A generator of our own, on the CPU: the global one must not move, and devices must agree.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _with_fixed_signs(U: Tensor, sigma: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors are defined up to a common sign: make the largest entry of each left one positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U)
    return U * sign, sigma, V * sign
