"""Bounded samples, the same ones every time: of the rows that a model is trained on, and of anything given whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS = 64
"""How many rows of the training data are kept."""

LENGTH = 512
"""How many tokens of a row are kept."""

_IGNORED = -100  # torch's mark for labels that a loss does not count


@dataclass
class TrainingRows:
    """A uniform sample of the rows that the model is trained on, of bounded size; the same one for the same rows.

    It draws from a generator of its own, whose state follows from how many rows it has seen, so that nothing else has
    to be kept to go on with it.

    Attributes:
        rows: token ids without padding.
        seen: how many rows have come by.
        starts: of each row, how many tokens stand before the first that the loss counts; 0 where it got no labels.

    Example:
        >>> sample = TrainingRows()
        >>> labels = torch.tensor([[-100, 6, 7], [-100, 9, -100]])
        >>> sample.offer(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), labels)
        >>> sample.rows, sample.seen, sample.starts
        ([[5, 6, 7], [8, 9]], 2, [1, 1])
    """

    rows: list[list[int]] = field(default_factory=list)
    seen: int = 0
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts = self.starts or [0] * len(self.rows)

    def offer(self, ids: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> None:
        """Rows (b, length) come by; where ``mask`` is 0, there is padding, and the loss counts ``labels`` but -100."""
        generator = torch.Generator().manual_seed(self.seen)
        for i in range(len(ids)):  # algorithm R
            place = self.seen
            if self.seen >= ROWS:
                place = int(torch.randint(self.seen + 1, (), generator=generator, device="cpu"))
            self.seen += 1
            if place < ROWS:
                is_text = slice(None) if mask is None or mask.ndim != 2 else mask[i] != 0
                row = ids[i][is_text][:LENGTH].tolist()
                self.rows[place : place + 1] = [row]
                known = labels is not None and labels.shape == ids.shape
                self.starts[place : place + 1] = [_before(labels[i][is_text][:LENGTH].tolist()) if known else 0]


def _before(labels: list[int]) -> int:
    """How many labels the loss passes over before the first that it counts."""
    return next((place for place, label in enumerate(labels) if label != _IGNORED), len(labels))


def fixed_sample(total: int, most: int) -> list[int]:
    """Places of at most ``most`` out of ``total``, drawn uniformly and in order; always the same ones.

    Example:
        >>> fixed_sample(3, most=64), len(fixed_sample(1000, most=64))
        ([0, 1, 2], 64)
    """
    # On the CPU even where the default device is another one, which its generator could not serve.
    places = torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")
    return sorted(places[:most].tolist())
