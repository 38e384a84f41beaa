"""Every method that a frontier compares: a function from a raw LoRA update to new factors, a few lines each.

All work on factors, ``A (r, d_in)`` and ``B (d_out, r)`` by module, and keep their shapes, dtype and scaling, so that
any result can be written into the live model. No ``d × d`` matrix is formed. ``strength`` grows with the correction in
every method but the two thresholds of Safe LoRA, where it selects modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_callback import Correction, Penalty, correct
from csulora_callback.method.token_space import RIDGE, input_gains
from csulora_callback.models.activations import Activations
from csulora_callback.models.factors import Factors
from csulora_callback.models.listening import TokenVectors

Bases = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Update:
    """The raw update of one adapter, and what the methods may know about the pair of models; all by module name.

    Attributes:
        factors: ``(A, B)``, shapes ``(r, d_in)`` and ``(d_out, r)``.
        scaling: PEFT's ``s`` in ``Δ = s·B·A``.
        bases: ``(U, V)``, leading singular vectors ``(d_out, K)`` and ``(d_in, K)`` of the displacement; rank ``k``
            takes the first ``k`` columns.
        displacement: gives ``D = W_aligned − W_base``, ``(d_out, d_in)``, of one module.
        activations: of the model with this update, on the task's training data and on prompts to be refused.
    """

    factors: Factors
    scaling: Mapping[str, float]
    bases: Bases
    displacement: Callable[[str], Tensor]
    activations: Activations

    def at_rank(self, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The bases cut to the subspace of rank ``rank``."""
        return {name: (U[:, :rank], V[:, :rank]) for name, (U, V) in self.bases.items()}


def corrections(update: Update, penalty: Penalty, bases: Bases) -> dict[str, Correction]:
    """The library's correction of every module."""
    return {
        name: correct(A, B, *bases[name], penalty, update.scaling[name]) for name, (A, B) in update.factors.items()
    }


def corrected(update: Update, penalty: Penalty, bases: Bases) -> Factors:
    """The factors of :func:`corrections`."""
    return _factors(corrections(update, penalty, bases))


def data_aware(
    update: Update, strength: float, task: TokenVectors, probes: TokenVectors, ridge: float = RIDGE
) -> Factors:
    """The data-aware correction of every module, by these activations; without any of the task, ``C_T = I``."""
    penalty, gains = Penalty.data_aware(strength), input_gains(task, probes, strength, ridge)
    return _factors(
        {
            name: correct(A, B, *update.bases[name], penalty, update.scaling[name], input_gain=gains[name])
            for name, (A, B) in update.factors.items()
        }
    )


def everywhere(vectors: TokenVectors) -> TokenVectors:
    """Vectors whose second moments are the identity: they say nothing about where the probes are."""
    sizes = {kept.shape[1] for kept in vectors.values()}
    identity = {size: torch.eye(size) for size in sizes}
    return {name: identity[kept.shape[1]].clone() for name, kept in vectors.items()}


def shuffled_vectors(vectors: TokenVectors, generator: torch.Generator) -> TokenVectors:
    """The vectors moved between inputs of equal size along a random cycle, so that none keeps its own."""
    inputs = {id(kept): kept for kept in vectors.values()}
    other = _shuffled({key: kept.shape[1] for key, kept in inputs.items()}, generator)
    return {name: inputs[other[id(kept)]] for name, kept in vectors.items()}


def _factors(done: Mapping[str, Correction]) -> Factors:
    return {name: (correction.lora_A, correction.lora_B) for name, correction in done.items()}


def scaled(update: Update, gain: Mapping[str, float]) -> Factors:
    """Each module's update times its gain, carried by ``B``."""
    return {name: (A.clone(), B * gain[name]) for name, (A, B) in update.factors.items()}


def uniformly_scaled(update: Update, strength: float) -> Factors:
    """``Δ / strength``; infinity gives the aligned model back."""
    return scaled(update, dict.fromkeys(update.factors, 1.0 / strength))


def scaled_to_norm(update: Update, done: Mapping[str, Correction]) -> Factors:
    """One factor for all modules, such that the whole update has the norm of the corrected one."""
    before = sum(correction.update_norm**2 for correction in done.values())
    after = sum(correction.corrected_norm**2 for correction in done.values())
    return scaled(update, dict.fromkeys(update.factors, math.sqrt(after / before) if before else 1.0))


def scaled_by_module(update: Update, done: Mapping[str, Correction]) -> Factors:
    """Gains without directions: each module times the factor ``‖X‖ / ‖Δ‖`` that the correction gave it."""
    return scaled(
        update, {name: c.corrected_norm / c.update_norm if c.update_norm else 1.0 for name, c in done.items()}
    )


def with_noise(update: Update, done: Mapping[str, Correction], generator: torch.Generator) -> Factors:
    """Random noise of the same size: ``Δ + s·E·A`` with ``‖s·E·A‖ = ‖X − Δ‖`` in every module.

    ``E (d_out, r)`` is Gaussian, so that the noise reaches every output direction and the rank is kept.
    """
    noisy = {}
    for name, (A, B) in update.factors.items():
        E = torch.randn(B.shape, generator=generator, dtype=torch.float64)
        wide_A, wide_B = A.double(), B.double()
        size = _product_norm(wide_B, wide_A) / _product_norm(E, wide_A).clamp_min(1e-300)
        noisy[name] = (A.clone(), (wide_B + done[name].relative_change * size * E).to(B.dtype))
    return noisy


def random_bases(bases: Bases, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Uniformly random subspaces of the same shapes, orthonormal columns."""
    return {
        name: tuple(
            torch.linalg.qr(torch.randn(side.shape, generator=generator, dtype=torch.float64))[0] for side in pair
        )
        for name, pair in bases.items()
    }


def shuffled_bases(bases: Bases, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """The bases moved between modules of equal shape along a random cycle, so that none keeps its own."""
    other = _shuffled({name: (U.shape[0], V.shape[0]) for name, (U, V) in bases.items()}, generator)
    return {name: bases[other[name]] for name in bases}


def _shuffled(shapes: Mapping[Hashable, object], generator: torch.Generator) -> dict[Hashable, Hashable]:
    """For each key another one of the same shape, along a random cycle."""
    groups: dict[object, list] = {}
    for key, shape in shapes.items():
        groups.setdefault(shape, []).append(key)
    other = {}
    for shape, keys in groups.items():
        if len(keys) == 1:
            raise ValueError(
                f"expected at least two modules of every shape to shuffle between, but '{keys[0]}' is the only one of "
                f"shape {shape}."
            )
        cycle = [keys[i] for i in torch.randperm(len(keys), generator=generator)]
        other.update({key: cycle[i - 1] for i, key in enumerate(cycle)})
    return other


def safe_lora(update: Update, threshold: float | None = None, number: int | None = None) -> Factors:
    """The published Safe LoRA (arXiv 2405.16833): ``B ← C·B`` with ``C = D·Dᵀ / ‖D‖`` in some of the modules.

    Those are the modules whose update is least similar to its image, by the cosine of ``C·B·A`` and ``B·A``: at most
    ``threshold``, or the ``number`` smallest. ``C`` is no projector: its eigenvalues are ``σ²/‖D‖``, so that it also
    shrinks or stretches what it keeps, by the size of the displacement. Computed as ``D·(Dᵀ·B)``.
    """
    mapped, cosine = {}, {}
    for name, (A, B) in update.factors.items():
        wide_A, wide_B, D = A.double(), B.double(), update.displacement(name).double()
        image = D @ (D.T @ wide_B) / D.norm().clamp_min(1e-300)
        norms = _product_norm(image, wide_A) * _product_norm(wide_B, wide_A)
        inner = ((image.T @ wide_B) * (wide_A @ wide_A.T)).sum()
        mapped[name], cosine[name] = image.to(B.dtype), (inner / norms.clamp_min(1e-300)).item()
    if number is not None:
        threshold = sorted(cosine.values())[min(number, len(cosine)) - 1]
    return {
        name: (A.clone(), mapped[name] if cosine[name] <= threshold else B.clone())
        for name, (A, B) in update.factors.items()
    }


def relative_change(update: Update, factors: Factors) -> float:
    """``‖X − Δ‖ / ‖Δ‖`` over all modules."""
    changed = raw = 0.0
    for name, (A, B) in update.factors.items():
        new_A, new_B = factors[name]
        weight = update.scaling[name] ** 2
        both = torch.cat([new_B, -B], dim=1).double(), torch.cat([new_A, A]).double()
        changed += weight * _product_norm(*both).item() ** 2
        raw += weight * _product_norm(B.double(), A.double()).item() ** 2
    return math.sqrt(changed / raw) if raw else 0.0


def _product_norm(B: Tensor, A: Tensor) -> Tensor:
    """``‖B·A‖`` from products of ``r × r``."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0.0).sqrt()
