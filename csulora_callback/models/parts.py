"""What of a live model holds an adapter's factors: its LoRA layers, and where PEFT keeps what of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from csulora_callback.models import sharding
from csulora_callback.models.fused_experts import Expert, names_of_parameter
from csulora_callback.models.names import bias_name, module_name
from csulora_callback.models.quantized import layer_storage
from csulora_callback.models.slots import BiasSlot, EmbeddingSlot, Slot


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

    @property
    def storage(self) -> str | None:
        """How the weight under it is quantized, ``None`` if it is not."""
        return layer_storage(self.base_layer, (self.shape[0], self.shape[2]))


class AdaptedEmbedding(AdaptedLayer):
    """One LoRA layer on an embedding: ``Δ = s·B·A`` of the weight as ``(dim, num_embeddings)``, stored transposed."""

    @property
    def lora_A(self) -> nn.Parameter:
        """``(r, num_embeddings)``."""
        return self.module.lora_embedding_A[self.adapter]

    @property
    def lora_B(self) -> nn.Parameter:
        """``(dim, r)``."""
        return self.module.lora_embedding_B[self.adapter]

    @property
    def stored_transposed(self) -> bool:
        """See :class:`Layer`."""
        return True


@dataclass(frozen=True)
class AdaptedBias:
    """The bias of a layer, whose update is ``s·β``: that of one column, of an input that is always one.

    Attributes:
        of: the layer.
    """

    of: Layer

    @property
    def shape(self) -> tuple[int, int, int]:
        """See :class:`Layer`."""
        return self.of.shape[0], 1, 1

    @property
    def scaling(self) -> float:
        """See :class:`Layer`."""
        return self.of.scaling

    @property
    def stored_transposed(self) -> bool:
        """Of the layer's weight: from it comes the subspace on the output side."""
        return self.of.stored_transposed


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
    name = module_name(path)
    if adapter in module.lora_embedding_A:
        paths = tuple(f"lora_embedding_{factor}.{adapter}" for factor in "AB")
        yield Part(EmbeddingSlot.of(name), {name: AdaptedEmbedding(module, adapter)}, module, paths)
        return
    layer, paths = AdaptedLayer(module, adapter), tuple(f"lora_{factor}.{adapter}.weight" for factor in "AB")
    if isinstance(module, ParamWrapper):
        names = names_of_parameter(path, module)
        yield Part(Slot.of_parameter(names, path), dict.fromkeys(names, Expert(module, adapter)), module, paths)
        return
    yield Part(Slot.of_linear(name), {name: layer}, module, paths)
    if module.lora_bias.get(adapter):
        yield Part(BiasSlot.of(name), {bias_name(name): AdaptedBias(layer)}, module, (f"lora_B.{adapter}.bias",))
