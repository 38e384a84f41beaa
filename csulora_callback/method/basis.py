"""The safety subspace of one module: leading singular vectors of ``D = W_aligned − W_base``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from csulora_callback.method.precision import full_width
from csulora_callback.method.reused import Reused
from csulora_callback.method.singular import leading_singular_triplets

# The singular vectors of a float32 SVD are orthonormal to 1e-6, and a correction is wrong by about as much as they are
# not: what is off by more than this was not rounded but changed.
_TOLERANCE = 1e-3

# The relative rank: on a toy model 4 of 128 did better than 16; on a small real one 16 of 576 is all that was tried.
_SIDES_PER_RANK, LEAST_RANK = 32, 4
RELATIVE_RANK = "a thirty-second of each module's smaller side"
"""In words."""

_ROWS = 128
_SAFE = (1e-12, 1e15)  # norms whose squares float32 holds

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by; see SafetySubspace.fingerprint
class Basis:
    """The safety subspace of one module, in the orientation in which its weight is stored.

    Attributes:
        U: ``(rows, k)`` float32, orthonormal columns; the output side of an ``nn.Linear``.
        V: ``(columns, k)`` float32, orthonormal columns; the input side of an ``nn.Linear``.
        singular_values: ``(k,)`` float32, descending.
        displacement: ``‖D‖``, Frobenius norm of the whole displacement; 0 where alignment left the module alone.

    Example:
        >>> import torch
        >>> U, V = torch.eye(3)[:, :1], torch.eye(4)[:, :1]
        >>> basis = Basis(U, V, singular_values=torch.ones(1), displacement=2.0)
        >>> basis.energy
        0.25
    """

    U: Tensor
    V: Tensor
    singular_values: Tensor
    displacement: float

    @property
    def energy(self) -> float:
        """Share of ``‖D‖²`` that the subspace keeps, in ``[0, 1]``; 1 for a displacement of zero."""
        if self.displacement == 0.0:
            return 1.0
        return min(1.0, self.singular_values.double().square().sum().item() / self.displacement**2)

    def rank_of(self, rank: int | None) -> int:
        """What :func:`rank_of` says of this module."""
        return rank_of((len(self.U), len(self.V)), rank)

    def truncated(self, rank: int) -> Basis:
        """The first ``rank`` singular vectors on each side, or all where there are fewer."""
        return Basis(self.U[:, :rank], self.V[:, :rank], self.singular_values[:rank], self.displacement)

    def oriented(self, stored_transposed: bool) -> Basis:
        """As of ``y = W·x``: of a weight that is stored transposed ``V`` is on the output side.

        Example:
            >>> import torch
            >>> basis = Basis(torch.zeros(4, 1), torch.zeros(3, 1), torch.ones(1), displacement=1.0)
            >>> basis.oriented(stored_transposed=True).U.shape
            torch.Size([3, 1])
        """
        return replace(self, U=self.V, V=self.U) if stored_transposed else self

    def first_rows(self, rows: int) -> Basis:
        """Of what the subspace keeps of ``D``, in the first rows alone: fewer of ``U``'s would not be orthonormal.

        Example:
            >>> import torch
            >>> basis = Basis(torch.full((4, 1), 0.5), torch.eye(3)[:, :1], torch.ones(1), displacement=1.0)
            >>> cut = basis.first_rows(1)
            >>> cut.U.abs(), cut.singular_values
            (tensor([[1.]]), tensor([0.5000]))
        """
        cut = self.U[:rows].double() * self.singular_values.double()
        U, sigma, turnedh = torch.linalg.svd(cut, full_matrices=False)
        kept = sigma > torch.finfo(torch.float32).eps * self.singular_values[:1]  # of others U is arbitrary
        U, sigma, V = U[:, kept], sigma[kept], self.V.double() @ turnedh[kept].T
        return Basis(U.float(), V.float(), sigma.float(), self.displacement)


def basis_of(
    name: str,
    weights: Iterable[Tensor],
    rule: dict,
    device: torch.device | str | None = None,
    space: Reused | None = None,
) -> Basis:
    """The basis of one module from its weights ``(rows, columns)``, of any floating dtypes.

    Args:
        name: of the module; with ``rule["seed"]`` it fixes the random start.
        weights: the one before alignment and the one after it, finite. The second is asked for when the first is not
            needed any more.
        rule: ``rank``, ``energy``, ``method`` and ``seed``, see :meth:`csulora_callback.SafetySubspace.estimate`. With
            neither a rank nor an energy the rank is :func:`rank_of` this module.
        device: where to compute; by default where the weights are.
        space: memory that is used again for the next module.

    Raises:
        ValueError: if the displacement is not zero and its size is none that float32 holds to full precision.

    Example:
        >>> rule = {"rank": 1, "energy": None, "method": "exact", "seed": 0}
        >>> basis = basis_of("q_proj", (torch.zeros(2, 3), torch.ones(2, 3)), rule)
        >>> basis.U.shape, basis.V.shape, round(basis.displacement**2, 3)
        (torch.Size([2, 1]), torch.Size([3, 1]), 6.0)
    """
    space = space or Reused()
    D = displacement(weights, device, space)
    norms = _row_norms(D)
    unit = _unit(name, D, norms)
    if unit == 0.0:
        return Basis(*(torch.zeros(size, device="cpu") for size in ((D.shape[0], 0), (D.shape[1], 0), (0,))), 0.0)
    if unit != 1.0:
        norms = _row_norms(D.div_(unit))
    scaled_norm = norms.norm().item()
    norm = scaled_norm * unit
    _check_size(name, norm)
    if rule["energy"] is None:
        rule = {**rule, "rank": rank_of(D.shape, rule["rank"])}
    with full_width(D.device):
        U, sigma, V = leading_singular_triplets(name, D.div_(scaled_norm), rule, space)
    return Basis(U.float().cpu().contiguous(), V.float().cpu().contiguous(), (sigma * norm).float().cpu(), norm)


def displacement(
    weights: Iterable[Tensor], device: torch.device | str | None = None, space: Reused | None = None
) -> Tensor:
    """``W_aligned − W_base (rows, columns)``, in float32 or, of float64 weights, float64; arguments as of `basis_of`.

    Example:
        >>> displacement((torch.zeros(1, 2).bfloat16(), torch.ones(1, 2).bfloat16()))
        tensor([[1., 1.]])
    """
    weights = iter(weights)
    base = _widened(next(weights), device, space or Reused())
    return _minus(next(weights), base)


def _widened(base: Tensor, device: torch.device | str | None, space: Reused) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    return space.matrix("D", base.shape, wide, base.device if device is None else device).copy_(base)


def _minus(aligned: Tensor, base: Tensor) -> Tensor:
    """In the place of ``base``, some rows at a time: a whole one of ``aligned`` in float32 takes memory and time."""
    base = base.to(torch.promote_types(base.dtype, aligned.dtype))
    for rows, after in zip(base.split(_ROWS), aligned.split(_ROWS), strict=True):
        torch.sub(after.to(rows), rows, out=rows)
    return base


def _unit(name: str, D: Tensor, norms: Tensor) -> float:
    """A power of two to divide by, which rounds nothing: squares of 1e30 overflow, of 1e-30 vanish. 0 for zero."""
    if len(norms) and _SAFE[0] < norms.max() < _SAFE[1]:
        return 1.0
    largest = torch.linalg.vector_norm(D, torch.inf).item() if D.numel() else 0.0
    if largest == 0.0:
        return 0.0
    _check_size(name, largest)
    return 2.0 ** (math.frexp(largest)[1] - 1)


def _row_norms(D: Tensor) -> Tensor:
    """On the CPU in float64: one float32 sum over 4096 × 4096 squares is wrong by 1e-3, and with it every energy."""
    return torch.linalg.vector_norm(D, dim=1).cpu().double()


def _check_size(name: str, size: float) -> None:
    if not _SMALLEST <= size <= _LARGEST:
        raise ValueError(
            f"`base`: expected a displacement W_aligned − W_base of module '{name}' from {_SMALLEST:.1g} to "
            f"{_LARGEST:.1g}, which float32 can hold, but got one of size {size:.1g}. No alignment is that small or "
            "large: check both checkpoints."
        )


def check_basis(name: str, basis: Basis) -> None:
    """Refuse a basis that is none, with a ValueError that names the module; costs ``O((rows + columns) k²)``.

    Example:
        >>> U, V = torch.eye(3)[:, :1], torch.eye(4)[:, :1]
        >>> check_basis("q_proj", Basis(U, V, torch.ones(1), 2.0))
        >>> check_basis("q_proj", Basis(U * 1000, V, torch.ones(1), 2.0))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `subspace`: module 'q_proj': expected orthonormal columns in U, but got an entry of 1e+06 in ...
    """

    def refuse(expected: str, got: object) -> None:
        raise ValueError(f"`subspace`: module '{name}': expected {expected}, but got {got}. Estimate it again.")

    if not isinstance(basis, Basis):
        refuse("a Basis", f"{type(basis).__name__}")
    for part, ndim in (("U", 2), ("V", 2), ("singular_values", 1)):
        tensor = getattr(basis, part)
        if not isinstance(tensor, Tensor):
            refuse(f"{part} to be a tensor", f"{type(tensor).__name__}")
        if tensor.dtype != torch.float32 or tensor.ndim != ndim:
            refuse(f"{part} in float32 with {ndim} axes", f"{tensor.dtype} of shape {tuple(tensor.shape)}")
    sigma = basis.singular_values.detach().cpu().double()
    if not basis.U.shape[1] == basis.V.shape[1] == len(sigma):
        got = f"{basis.U.shape[1]}, {basis.V.shape[1]} and {len(sigma)}"
        refuse("as many columns in U and in V as singular values", got)
    norm = basis.displacement
    if not isinstance(norm, int | float) or isinstance(norm, bool) or not 0 <= norm <= _LARGEST:
        refuse("a finite displacement ≥ 0", repr(norm))
    if not torch.isfinite(sigma).all():
        refuse("finite values in singular_values", "NaN or Inf")
    if (sigma < 0).any() or (sigma[1:] > sigma[:-1]).any():
        refuse("singular values ≥ 0 in descending order", "other ones")
    if sigma.norm() > norm * (1 + _TOLERANCE):
        refuse(f"singular values of norm ‖D‖ = {norm:.6g} at most", f"{sigma.norm():.6g}")
    for part, side in (("U", basis.U), ("V", basis.V)):
        side = side.detach().cpu()
        # In float32 wrong by 1e-6, a thousandth of what is looked for, in a third of the time; NaN and Inf show in it.
        with full_width(side.device):
            inner = side.T @ side - torch.eye(len(sigma), device=side.device)
        error = inner.abs().max().item() if len(sigma) else 0.0
        if not error <= _TOLERANCE:
            if not torch.isfinite(side).all():
                refuse(f"finite values in {part}", "NaN or Inf")
            refuse(f"orthonormal columns in {part}", f"an entry of {error:.1g} in {part}ᵀ{part} − I")


def rank_of(shape: Sequence[int], rank: int | None = None) -> int:
    """The rank that is asked for in a module of this ``shape``: ``rank``, or where that is None a relative one.

    The relative one is a thirty-second of the smaller side, rounded down, and at least 4. Neither exceeds that side.

    Example:
        >>> rank_of((2048, 2048)), rank_of((512, 2048)), rank_of((128, 64)), rank_of((3, 64))
        (64, 16, 4, 3)
        >>> rank_of((512, 2048), rank=64)
        64
    """
    smaller = min(shape)
    return min(max(LEAST_RANK, smaller // _SIDES_PER_RANK) if rank is None else rank, smaller)


def check_rank_rule(rank: int | None, energy: float | None) -> None:
    """Refuse a rank that is no whole number ≥ 1, an energy outside ``(0, 1]``, and both, with a ValueError.

    Both may be None.

    Example:
        >>> check_rank_rule(64, 1.5)
        Traceback (most recent call last):
        ValueError: `energy`: expected a share in (0, 1] or None, but got 1.5.
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"`rank`: expected a whole number ≥ 1 or None, but got {rank!r}.")
    if energy is not None and not (isinstance(energy, (int, float)) and 0.0 < energy <= 1.0):
        raise ValueError(f"`energy`: expected a share in (0, 1] or None, but got {energy!r}.")
    if rank is not None and energy is not None:
        raise ValueError(
            f"`energy`: expected None beside `rank`, as either says how many vectors are kept, but got {energy!r} and "
            f"{rank!r}. Pass one of them."
        )
