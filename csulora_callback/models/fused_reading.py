"""How one expert of a fused weight is read out of files: its own tensors, or its place in that of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from csulora_callback.models.fused_files import Fused, Shapes
from csulora_callback.models.names import expert_name

T = TypeVar("T")
Reader = Callable[[], Tensor]


@dataclass(frozen=True)
class ExpertInFiles:
    """One expert's weight.

    Attributes:
        sources: the names of the tensors in files that it is made of, and its place in those that hold all experts.
        shape: as transformers holds it.
        fused: how it is made of several; by default it is the only one.

    Example:
        >>> import torch
        >>> expert = ExpertInFiles([("experts.up", 1)], (2,))
        >>> expert.reader(expert.parts({"experts.up": lambda: torch.arange(4).view(2, 2)}))()
        tensor([2, 3])
    """

    sources: Sequence[tuple[str, int | None]]
    shape: tuple[int, ...]
    fused: Fused | None = None

    def parts(self, readers: Mapping[str, Reader]) -> list[Reader]:
        """Readers of its own tensors."""
        return [readers[key] if place is None else partial(_at, readers[key], place) for key, place in self.sources]

    def reader(self, parts: Sequence[Reader]) -> Reader:
        """The reader of its weight, by those of its parts."""
        if self.fused is None:
            return parts[0]
        return lambda: self.fused.convert([part() for part in parts])

    def of_sources(self, entries: Mapping[str, T]) -> list[T]:
        """What is known of each tensor that it is made of."""
        return [entries[key] for key, _ in self.sources if key in entries]


def experts_in_files(
    fused: Fused, parameter: str, numbers: Iterable[int], shapes: Shapes
) -> dict[str, ExpertInFiles]:
    """Those of a fused parameter that there are, by name.

    Args:
        fused: how files hold them.
        parameter: what it is to be called.
        numbers: of the experts.
        shapes: of what the files hold.
    """
    shape = fused.shape(shapes)
    return {
        expert_name(parameter, number): ExpertInFiles(fused.of_expert(number), shape, fused)
        for number in numbers
        if number < fused.experts
    }


def _at(reader: Reader, place: int) -> Tensor:
    return reader()[place]
