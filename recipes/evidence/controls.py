"""What a user would do instead while training, with the same refused prompts or the same pair of models.

Each is a training of its own: it has the data, the seed and the steps of the plain one, and changes its rate or its
loss. Refused prompts are the probes that a data-aware correction reads, answered as the aligned model answers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]
"""The loss of a step, of the plain one and its batch."""

REFUSALS_PER_STEP = 8  # of the penalty that reads some at every step
_IGNORED = -100


@dataclass(frozen=True)
class Control:
    """One training.

    Attributes:
        kind: ``"plain"``, ``"lower_rate"``, ``"mixing"``, ``"kl"``, ``"asft"`` or ``"one_shot"``.
        amount: the divisor of the learning rate; the share of a batch that are refusals; the weight of a penalty; the
            number of steps on one refusal that follow the plain training.
    """

    kind: str = "plain"
    amount: float = 0.0

    @property
    def slowdown(self) -> float:
        """What the learning rate is divided by."""
        return self.amount if self.kind == "lower_rate" else 1.0

    def __str__(self) -> str:
        return self.kind if self.kind == "plain" else f"{self.kind}{self.amount:g}"


PLAIN = Control()


def mixed_in(model: nn.Module, refusals: Callable[[int], Batch], share: float, batch_size: int) -> Loss:
    """The mean over the answers of a batch to which refusals are added, so many that they are ``share`` of it."""
    count = max(1, round(share / (1.0 - share) * batch_size))

    def loss(own: Tensor, batch: Batch) -> Tensor:
        more = refusals(count)
        here, there = (_answered(part).sum() for part in (batch, more))
        return (here * own + there * model(**more).loss) / (here + there)

    return loss


def near_aligned(model: nn.Module, off: Callable, refusals: Callable[[int], Batch], weight: float) -> Loss:
    """A penalty: ``weight`` times KL(aligned ‖ trained) a token (nats) of refusals; ``off`` takes the adapter off."""

    def loss(own: Tensor, batch: Batch) -> Tensor:
        more = refusals(REFUSALS_PER_STEP)
        counts = _answered(more)
        with torch.no_grad(), off():
            aligned = model(**more).logits[:, :-1][counts].float().log_softmax(-1)
        trained = model(**more).logits[:, :-1][counts].float().log_softmax(-1)
        divergence = nn.functional.kl_div(trained, aligned, reduction="batchmean", log_target=True)
        return own + weight * divergence

    return loss


def along_displacement(
    factors: Callable[[], Mapping[str, tuple[Tensor, Tensor, float]]],
    displacement: Callable[[str], Tensor],
    weight: float,
) -> Loss:
    """AsFT's penalty (arXiv 2506.08473): ``weight · Σ ‖(I − Ĉ)·ΔW‖²`` with ``Ĉ = D·Dᵀ / ‖D‖``, as Safe LoRA's.

    ``factors`` gives the live ``(A, B, s)`` by module. From products of ``r × r``.
    """
    maps = {name: displacement(name).float() for name in factors()}
    sizes = {name: D.norm().clamp_min(1e-30) for name, D in maps.items()}

    def loss(own: Tensor, batch: Batch) -> Tensor:
        penalty = own.new_zeros(())
        for name, (A, B, s) in factors().items():
            D = maps[name]
            left = B - D @ (D.T @ B) / sizes[name]
            penalty = penalty + s * s * ((left.T @ left) * (A @ A.T)).sum()
        return own + weight * penalty

    return loss


def _answered(batch: Batch) -> Tensor:
    """Which tokens a loss counts, by the place of the logits that say them."""
    return batch["labels"][:, 1:] != _IGNORED
