"""Which rows of a preference trainer's batch are what is to be learned: the chosen ones, and never the rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from csulora_callback.models.training_batches import Wanted
from csulora_callback.trainers.engines import is_kind

if TYPE_CHECKING:
    from transformers import Trainer

_PAIRS = ("DPOTrainer", "ORPOTrainer", "CPOTrainer", "RewardTrainer")  # of TRL, or made of those
_TRIPLES = ("TPOTrainer",)
_SINGLE = ("KTOTrainer", "BCOTrainer")
_LABELS = ("label", "kto_tags")  # of TRL's batches, and of LLaMA-Factory's


def wanted_rows(trainer: Trainer, inputs: Mapping[str, Any]) -> Wanted | None:
    """Says of each of so many rows that the model gets in a training step whether it is to be learned.

    Of pairs all chosen rows come first, then all rejected ones, then, of triples, the best answers known. Where a
    batch cannot be that, it says so of none. ``None`` where all are to be learned.

    Args:
        trainer: a Trainer, maybe one of TRL.
        inputs: of its training step.

    Example:
        >>> DPOTrainer = type("DPOTrainer", (), {})
        >>> wanted_rows(DPOTrainer(), {})(4), wanted_rows(DPOTrainer(), {})(3)
        ([True, True, False, False], [])
        >>> wanted_rows(object(), {}) is None
        True
    """
    if is_kind(trainer, *_SINGLE):
        labels = next((inputs[name] for name in _LABELS if name in inputs), ())
        return lambda count: torch.as_tensor(labels).bool().tolist() if len(labels) == count else []
    if is_kind(trainer, *_TRIPLES) and trainer.tpo_alpha:
        return lambda count: _in_parts(count, [True, False, True])
    if is_kind(trainer, *_PAIRS, *_TRIPLES):
        return lambda count: _in_parts(count, [True, False])
    return None


def _in_parts(count: int, parts: list[bool]) -> list[bool]:
    size, rest = divmod(count, len(parts))
    return [] if rest else [is_wanted for is_wanted in parts for _ in range(size)]
