r"""Where an update lies and which way it points, measured without correcting it, by :mod:`.grams`.

A share of the energy says little alone, as a random update has some of it in every block: :func:`chance_shares`. The
alignment displaced the weight by ``D``; an update undoes the share ``−⟨Δ, D⟩ / ‖D‖²`` of it, which is 1 for
``Δ = −D``, 0 for a random one, and negative where the update goes on in the direction of the alignment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csulora_callback.method.basis import Basis
from csulora_callback.method.grams import Grams
from csulora_callback.method.penalty import BLOCKS


@dataclass(frozen=True)
class Drift:
    """What is measured of one module, or of several together (:func:`total`).

    Attributes:
        energy: ``‖Π_b Δ‖²`` by block.
        by_chance: the energy that a random update of the same size would have there.
        along: ``⟨Δ, D⟩``.
        displacement: ``‖D‖²``.

    Example:
        >>> energy, chance = {"aligned": 1.0, "off": 3.0}, {"aligned": 0.4, "off": 3.6}
        >>> drift = Drift(energy, chance, along=-2.0, displacement=8.0)
        >>> drift.shares["aligned"], drift.chance["aligned"], drift.undone
        (0.25, 0.1, 0.25)
    """

    energy: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(BLOCKS, 0.0))
    by_chance: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(BLOCKS, 0.0))
    along: float = 0.0
    displacement: float = 0.0

    @property
    def total_energy(self) -> float:
        """``‖Δ‖²``."""
        return sum(self.energy.values())

    @property
    def shares(self) -> dict[str, float]:
        """``ρ_b``, the share of ``‖Δ‖²`` by block; all 0 for ``Δ = 0``."""
        return self._relative(self.energy)

    @property
    def chance(self) -> dict[str, float]:
        """What :attr:`shares` would be of a random update; all 0 for ``Δ = 0``."""
        return self._relative(self.by_chance)

    @property
    def undone(self) -> float:
        """``−⟨Δ, D⟩ / ‖D‖²``; 0 where there is no displacement."""
        return 0.0 - self.along / self.displacement if self.displacement else 0.0

    def _relative(self, energy: Mapping[str, float]) -> dict[str, float]:
        whole = self.total_energy
        return {block: part / whole if whole else 0.0 for block, part in energy.items()}


def total(drifts: Iterable[Drift]) -> Drift:
    """Of several modules together: sums, so that large updates count for more than small ones.

    Example:
        >>> total([Drift(along=-1.0, displacement=2.0), Drift(along=0.0, displacement=2.0)]).undone
        0.25
    """
    drifts = list(drifts)
    return Drift(
        {block: sum(drift.energy[block] for drift in drifts) for block in BLOCKS},
        {block: sum(drift.by_chance[block] for drift in drifts) for block in BLOCKS},
        sum(drift.along for drift in drifts),
        sum(drift.displacement for drift in drifts),
    )


def measure(
    lora_A: Tensor,
    lora_B: Tensor,
    U: Tensor,
    V: Tensor,
    along: float,
    displacement: float,
    scaling: float = 1.0,
) -> Drift:
    """The drift of one module; ``O((d_out + d_in)(k + r) r)``, in float64.

    Args:
        lora_A: ``(r, d_in)``, any floating dtype.
        lora_B: ``(d_out, r)``.
        U: ``(d_out, k)``, orthonormal columns, output side of the safety subspace.
        V: ``(d_in, k')``, orthonormal columns, input side.
        along: ``⟨Δ, D⟩``, as of :func:`along_displacement`.
        displacement: ``‖D‖²`` of the same ``D``.
        scaling: PEFT's ``scaling`` of the layer.

    Example:
        >>> import torch
        >>> A, B = torch.ones(1, 2), torch.ones(3, 1)
        >>> U, V = torch.eye(3)[:, :1], torch.eye(2)[:, :1]  # first output, first input
        >>> drift = measure(A, B, U, V, along=0.0, displacement=1.0)
        >>> {block: round(share, 3) for block, share in drift.shares.items()}
        {'aligned': 0.167, 'output': 0.167, 'input': 0.333, 'off': 0.333}
    """
    energy = block_energies(lora_A, lora_B, U, V, scaling)
    return drift_of(energy, chance_shares(U.shape, V.shape), along, displacement)


def drift_of(energy: Mapping[str, float], chance: Mapping[str, float], along: float, displacement: float) -> Drift:
    """The drift of a module whose blocks are ``chance`` of the space, as :func:`chance_shares` says.

    Example:
        >>> chance = {"aligned": 0.25, "output": 0.25, "input": 0.25, "off": 0.25}
        >>> drift_of({"aligned": 0.0, "output": 0.0, "input": 0.0, "off": 4.0}, chance, 0.0, 1.0).by_chance["aligned"]
        1.0
    """
    whole = sum(energy.values())
    return Drift(energy, {block: share * whole for block, share in chance.items()}, along, displacement)


def block_energies(lora_A: Tensor, lora_B: Tensor, U: Tensor, V: Tensor, scaling: float = 1.0) -> dict[str, float]:
    """``‖Π_b Δ‖²`` by block, from ``r × r`` products; arguments as of :func:`measure`.

    Example:
        >>> import torch
        >>> block_energies(torch.ones(1, 2), torch.ones(3, 1), torch.eye(3)[:, :1], torch.eye(2)[:, :1], scaling=2.0)
        {'aligned': 4.0, 'output': 4.0, 'input': 8.0, 'off': 8.0}
    """
    return _energies(_grams(lora_A, lora_B, U, V), scaling)


def chance_shares(output_side: tuple[int, int], input_side: tuple[int, int]) -> dict[str, float]:
    """Share of the energy of a random update by block: how much of the space each block is.

    Args:
        output_side: shape ``(d_out, k_out)`` of ``U``.
        input_side: shape ``(d_in, k_in)`` of ``V``.

    Example:
        >>> chance_shares((4, 2), (8, 2))
        {'aligned': 0.125, 'output': 0.375, 'input': 0.125, 'off': 0.375}
    """
    (d_out, k_out), (d_in, k_in) = output_side, input_side
    output, input_ = k_out / d_out, k_in / d_in
    aligned = output * input_
    return {
        "aligned": aligned,
        "output": output - aligned,
        "input": input_ - aligned,
        "off": (1 - output) * (1 - input_),
    }


def along_displacement(lora_A: Tensor, lora_B: Tensor, D: Tensor, scaling: float = 1.0) -> float:
    """``⟨Δ, D⟩ = s Σ (Bᵀ D) ∘ A`` with the whole displacement ``D (d_out, d_in)``; ``B·A`` is not formed.

    Example:
        >>> import torch
        >>> along_displacement(torch.ones(1, 2), torch.ones(3, 1), torch.ones(3, 2), scaling=2.0)
        12.0
    """
    wide = torch.promote_types(D.dtype, torch.float32)
    product = lora_B.detach().to(D.device, wide).T @ D.to(wide)
    return scaling * (product.double() * lora_A.detach().to(product.device, torch.float64)).sum().item()


def measure_kept(lora_A: Tensor, lora_B: Tensor, U: Tensor, V: Tensor, basis: Basis, scaling: float = 1.0) -> Drift:
    """:func:`measure` against the part of the displacement that a subspace keeps; ``U`` and ``V`` are its sides.

    Example:
        >>> import torch
        >>> basis = Basis(torch.eye(3)[:, :1], torch.eye(2)[:, :1], torch.tensor([5.0]), displacement=6.0)
        >>> measure_kept(torch.ones(1, 2), -torch.ones(3, 1), basis.U, basis.V, basis).undone  # 5 of 25
        0.2
    """
    grams = _grams(lora_A, lora_B, U, V, basis.singular_values)
    along, chance = scaling * grams.along().item(), chance_shares(U.shape, V.shape)
    return drift_of(_energies(grams, scaling), chance, along, kept_displacement(basis))


def kept_displacement(basis: Basis) -> float:
    """``‖D_k‖²`` of the part of the displacement that a subspace keeps.

    Example:
        >>> import torch
        >>> kept_displacement(Basis(torch.eye(2), torch.eye(2), torch.tensor([2.0, 1.0]), displacement=3.0))
        5.0
    """
    return basis.singular_values.double().square().sum().item()


def _grams(lora_A: Tensor, lora_B: Tensor, U: Tensor, V: Tensor, singular_values: Tensor | None = None) -> Grams:
    sigma = lora_A.new_zeros(0) if singular_values is None else singular_values
    return Grams.of(*(tensor[None] for tensor in (lora_A, lora_B, U, V, sigma)), torch.float64)


def _energies(grams: Grams, scaling: float) -> dict[str, float]:
    return dict(zip(BLOCKS, (scaling * scaling * grams.energies()[0]).tolist(), strict=True))
