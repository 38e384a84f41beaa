"""Modules that are trained whole beside LoRA, such as an ``lm_head`` in PEFT's ``modules_to_save``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from csulora_callback.models import sharding
from csulora_callback.models.parts import Layer, Part
from csulora_callback.models.quantized import layer_storage
from csulora_callback.models.whole_slots import WholeSlot


class Whole(ABC):
    """A :class:`~.parts.Layer` whose update is not ``s·B·A`` but its weight minus the one that it began with.

    Of the factors of a correction it has one, the weight as it is stored; ``r`` of its shape is what that can hold.
    """

    scaling = 1.0
    stored: tuple[int, int]
    stored_transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """See :class:`~.parts.Layer`."""
        d_out, d_in = self.stored[::-1] if self.stored_transposed else self.stored
        return d_out, min(self.stored), d_in

    def with_rows(self, count: int) -> SavedWhole:
        """The same as if its weight had so many rows."""
        return SavedWhole((count, self.stored[1]), self.stored_transposed, self.aligned)

    @abstractmethod
    def aligned(self) -> Tensor:
        """The weight that training began with, as stored, with all its rows or fewer; not collective."""


@dataclass(frozen=True)
class WholeLayer(Whole):
    """One in a live model, seen through one of its adapters. Made by all processes at once where it is sharded."""

    module: ModulesToSaveWrapper
    adapter: str

    def __post_init__(self) -> None:
        if sharding.is_sharded(self._original):
            self.__dict__["_gathered"] = sharding.gather([self._original])[0].cpu()  # saves may be of one process

    @property
    def base_layer(self) -> nn.Module:
        """The module as it was before training."""
        return self.module.original_module

    @property
    def storage(self) -> str | None:
        """How the weight under it is quantized, ``None`` if it is not."""
        return layer_storage(self.base_layer, (self.shape[0], self.shape[2]))

    @cached_property
    def stored(self) -> tuple[int, int]:
        """Shape of its weight."""
        return sharding.full_shape(self.module.modules_to_save[self.adapter].weight)

    @property
    def stored_transposed(self) -> bool:
        """See :class:`~.parts.Layer`. An embedding gives out what it stores in rows, one for each input."""
        return isinstance(self.base_layer, (Conv1D, nn.Embedding))

    def aligned(self) -> Tensor:
        """See :class:`Whole`."""
        return self.__dict__["_gathered"] if "_gathered" in self.__dict__ else self._original.detach()

    @property
    def _original(self) -> nn.Parameter:
        return self.base_layer.weight


@dataclass(frozen=True)
class SavedWhole(Whole):
    """One of an adapter on disk, with the way to its weight in the aligned checkpoint."""

    stored: tuple[int, int]
    stored_transposed: bool
    read: Callable[[], Tensor]

    def aligned(self) -> Tensor:
        """See :class:`Whole`."""
        return self.read()


def check_reads_vectors(layers: Mapping[str, Layer]) -> None:
    """Refuse, with a ValueError, a module that is trained whole and stored by its inputs, as embeddings are.

    What enters it is a number for each token, and no vector to measure by.
    """
    for name, layer in layers.items():
        if isinstance(layer, Whole) and layer.stored_transposed:
            raise ValueError(
                f"module '{name}': a data-aware penalty cannot measure an embedding that is trained whole, as no "
                "vectors enter it. Leave it out of modules_to_save, pass uncorrected=[...] with its name, or take "
                "another penalty, such as Penalty.guard(10.0)."
            )


def whole_part(name: str, module: ModulesToSaveWrapper, adapter: str, tied: tuple[str, ...] = ()) -> Part:
    """The part of an adapter that is a module trained whole; ``tied`` are names of others that have its weight."""
    paths = (f"modules_to_save.{adapter}.weight",) * (1 + len(tied))
    return Part(WholeSlot.of(name, *tied), {name: WholeLayer(module, adapter)}, module, paths)
