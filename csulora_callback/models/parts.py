"""What of a live model holds an adapter's factors: its LoRA layers, and where PEFT keeps what of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from csulora_callback.models import sharding
from csulora_callback.models.names import module_name
from csulora_callback.models.slots import Slot


class Layer(Protocol):
    """What a correction has to know of a module whose factors it corrects.

    Attributes:
        shape: ``(d_out, r, d_in)``, also where this process holds only a part of the factors.
        scaling: PEFT's factor ``s`` in ``Δ = s·B·A``, with rsLoRA and per-module patterns already in it.
        stored_transposed: whether checkpoints store its weight as ``(d_in, d_out)``, as transformers' Conv1D does.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def scaling(self) -> float: ...

    @property
    def stored_transposed(self) -> bool: ...


@dataclass(frozen=True)
class AdaptedLayer:
    """One LoRA layer of a live model, seen through one of its adapters."""

    module: LoraLayer
    adapter: str

    @property
    def lora_A(self) -> nn.Parameter:
        """``(r, d_in)``."""
        return self.module.lora_A[self.adapter].weight

    @property
    def lora_B(self) -> nn.Parameter:
        """``(d_out, r)``."""
        return self.module.lora_B[self.adapter].weight

    @property
    def shape(self) -> tuple[int, int, int]:
        """See :class:`Layer`."""
        return sharding.full_shape(self.lora_B)[0], *sharding.full_shape(self.lora_A)

    @property
    def scaling(self) -> float:
        """See :class:`Layer`."""
        return self.module.scaling[self.adapter]

    @property
    def base_layer(self) -> nn.Module:
        """The layer without its adapters."""
        return self.module.get_base_layer()

    @property
    def stored_transposed(self) -> bool:
        """See :class:`Layer`."""
        layer = self.base_layer
        return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)  # what transformers quantized it from


@dataclass(frozen=True)
class Part:
    """One slot of a live adapter.

    Attributes:
        slot: which factors it holds, and how.
        layers: by name, what has these factors.
        module: the layer of PEFT whose parameters they are.
        paths: of its tensors in that layer, in the slot's order.
    """

    slot: Slot
    layers: Mapping[str, Layer]
    module: nn.Module
    paths: tuple[str, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """As they are in the model at the moment: engines put others there."""
        return [self.module.get_parameter(path) for path in self.paths]


def parts_of(path: str, module: LoraLayer, adapter: str) -> Iterator[Part]:
    """The parts of an adapter that one LoRA layer holds; ``path`` is its name in the model.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> [part.slot.names for part in parts_of("base_model.model.0", model.base_model.model[0], "default")]
        [('0',)]
    """
    name, paths = module_name(path), tuple(f"lora_{factor}.{adapter}.weight" for factor in "AB")
    yield Part(Slot.of_linear(name), {name: AdaptedLayer(module, adapter)}, module, paths)
