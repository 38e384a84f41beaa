"""Bounded samples, the same ones every time: of the rows that a model is trained on, and of anything given whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from csulora_callback.models.reading import Inputs

ROWS = 64
"""How many rows of the training data are kept."""

LENGTH = 512
"""How many tokens of a row are kept, where no image stands further on."""


@dataclass(frozen=True)
class TrainedRow:
    """A row of training data.

    Attributes:
        ids: token ids without padding.
        start: how many of them stand before the first that the loss counts; 0 where there are no labels.
        inputs: what else the model gets with them.
    """

    ids: list[int]
    start: int = 0
    inputs: Inputs = field(default_factory=dict)


@dataclass
class TrainingRows:
    """A uniform sample of the rows that the model is trained on, of bounded size; the same one for the same rows.

    It draws from a generator of its own, whose state follows from how many rows it has seen, so that nothing else has
    to be kept to go on with it.

    Attributes:
        rows: token ids without padding.
        seen: how many rows have come by, without those that were left out.
        starts: of each row, how many tokens stand before the first that the loss counts; 0 where it got no labels.
        inputs: what else the model got with some of the rows, by place; ``None`` where it did and that is not known.
        left_out: how many rows could not be told apart within their batch.

    Example:
        >>> sample = TrainingRows()
        >>> sample.offer([TrainedRow([5, 6, 7], start=1), TrainedRow([8, 9])])
        >>> sample.rows, sample.seen, sample.starts
        ([[5, 6, 7], [8, 9]], 2, [1, 0])
    """

    rows: list[list[int]] = field(default_factory=list)
    seen: int = 0
    starts: list[int] = field(default_factory=list)
    inputs: dict[int, Inputs | None] = field(default_factory=dict)
    left_out: int = 0

    def __post_init__(self) -> None:
        self.starts = self.starts or [0] * len(self.rows)

    def offer(self, batch: Sequence[TrainedRow]) -> None:
        """Rows come by; only those that are kept are asked for."""
        generator = torch.Generator().manual_seed(self.seen)
        for i in range(len(batch)):  # algorithm R
            place = self.seen
            if self.seen >= ROWS:
                place = int(torch.randint(self.seen + 1, (), generator=generator, device="cpu"))
            self.seen += 1
            if place < ROWS:
                row = batch[i]
                self.rows[place : place + 1] = [row.ids]
                self.starts[place : place + 1] = [row.start]
                self.inputs.pop(place, None)
                if row.inputs:
                    self.inputs[place] = row.inputs


def fixed_sample(total: int, most: int) -> list[int]:
    """Places of at most ``most`` out of ``total``, drawn uniformly and in order; always the same ones.

    Example:
        >>> fixed_sample(3, most=64), len(fixed_sample(1000, most=64))
        ([0, 1, 2], 64)
    """
    # On the CPU even where the default device is another one, which its generator could not serve.
    places = torch.randperm(total, generator=torch.Generator().manual_seed(0), device="cpu")
    return sorted(places[:most].tolist())
