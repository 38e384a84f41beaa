"""Corrected factors in the place of others for the time of a block of code, and back, whoever writes in between."""

from __future__ import annotations

from dataclasses import dataclass
from threading import RLock

from torch import Tensor

from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.models.activations import Activations
from csulora_callback.models.adapters import Adapter
from csulora_callback.models.factors import equal_each

# Others may save from a thread while corrected factors come and go. One for all: one of its own could not be pickled.
LOCK = RLock()


@dataclass(eq=False)
class Swap:
    """Corrected factors and what they stand in the place of; nothing is ``put`` where those were corrected already.

    Attributes:
        adapter: the correction.
        before: what this process held, in the order of the adapter's parameters.
        put: what it holds instead.
        activations: what a data-aware penalty measured by.
    """

    adapter: CorrectedAdapter
    before: list[Tensor]
    put: list[Tensor]
    activations: Activations | None = None

    def fits(self, held: list[Tensor], activations: Activations | None) -> bool:
        """Whether it is the correction of what this process holds now."""
        alike = [(x.shape, x.dtype) for x in held] == [(y.shape, y.dtype) for y in self.before]
        return alike and activations is self.activations and all(equal_each(held, self.before))


class Swaps:
    """The swaps that stand in an adapter at the moment, the innermost last."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._open: list[Swap] = []

    @property
    def inside(self) -> list[CorrectedAdapter]:
        """The corrections that stand in the model, the innermost last."""
        return [swap.adapter for swap in self._open]

    def innermost(self) -> Swap | None:
        """The swap that was begun last and has not ended."""
        return self._open[-1] if self._open else None

    def begin(self, swap: Swap) -> None:
        """Put the corrected factors in."""
        if swap.put:
            with LOCK:
                self._open.append(swap)
                self.adapter.hold(swap.put)

    def end(self, swap: Swap) -> None:
        """Put back what was there before, except where someone else has written since."""
        if swap.put:
            with LOCK:
                self.lift(swap)
                self._open.remove(swap)

    def lift(self, swap: Swap) -> None:
        """Have what was there before live again, except where someone else has written since."""
        found = self.adapter.held()
        ours = equal_each(found, swap.put)
        self.adapter.hold([old if own else new for old, new, own in zip(swap.before, found, ours, strict=True)])

    def lower(self, swap: Swap, renewed: Swap) -> None:
        """Put a lifted swap in again, as the correction of what is live now."""
        swap.adapter, swap.before, swap.activations = renewed.adapter, renewed.before, renewed.activations
        swap.put = renewed.put or renewed.before  # what cannot be corrected stands for itself
        self.adapter.hold(swap.put)
