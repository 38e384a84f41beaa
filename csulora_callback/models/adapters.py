"""Which LoRA layers a model has, and how their factors are read and written. Knows nothing of safety.

What cannot be corrected is refused, by module and kind: an update that the correction does not see would pass into the
checkpoint untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from csulora_callback.models import sharding
from csulora_callback.models.factors import Factors
from csulora_callback.models.names import module_name
from csulora_callback.models.supported import (
    check_config,
    check_kind,
    check_layer,
    check_nothing_else_trains,
    check_tuner,
)


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
        """``(d_out, r, d_in)``, also where this process holds only a part of the factors."""
        return sharding.full_shape(self.lora_B)[0], *sharding.full_shape(self.lora_A)

    @property
    def scaling(self) -> float:
        """PEFT's factor ``s`` in ``Δ = s·B·A``, with rsLoRA and per-module patterns already in it."""
        return self.module.scaling[self.adapter]

    @property
    def stored_transposed(self) -> bool:
        """Whether checkpoints store the wrapped weight as ``(d_in, d_out)``, as transformers' Conv1D does."""
        layer = self.module.get_base_layer()
        return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)  # what transformers quantized it from


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapter of a model that is being trained: its layers by the module's name in the model without PEFT.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
        >>> adapter = find_adapter(model)
        >>> adapter.name, list(adapter.layers)
        ('default', ['model.layers.0.self_attn.q_proj'])
        >>> lora_A, lora_B = adapter.read()["model.layers.0.self_attn.q_proj"]
        >>> tuple(lora_A.shape), tuple(lora_B.shape)
        ((2, 8), (8, 2))
    """

    name: str
    layers: dict[str, AdaptedLayer]
    config: PeftConfig
    model: nn.Module
    holder: nn.Module  # in `model`: what the adapter was put into, and where the layers have their names

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the factors."""
        return any(sharding.is_sharded(layer.lora_A) for layer in self.layers.values())

    def read(self) -> Factors:
        """Copies of the factors, in the parameters' dtype and on their device.

        This and the methods below are collective where the parameters are sharded.
        """
        return _in_pairs(self.layers, sharding.gather(self._parameters()))

    def read_trained(self) -> Factors:
        """Like :meth:`read`, of what the optimizer steps: under DeepSpeed that is a float32 copy."""
        return _in_pairs(self.layers, sharding.gather_trained(self._parameters()))

    def write(self, factors: Factors) -> None:
        """Copy ``factors`` into the live parameters in place: optimizers keep their references and moments."""
        sharding.write(self._parameters(), _flat(self.layers, factors))

    def write_trained(self, factors: Factors) -> None:
        """Like :meth:`write`, so that training goes on from there: into the optimizer's copies as well."""
        sharding.write_trained(self._parameters(), _flat(self.layers, factors))

    def held(self) -> list[Tensor]:
        """What this process holds of the factors, sharing their memory, see :func:`sharding.held`."""
        return sharding.held(self._parameters())

    def as_held(self, factors: Factors) -> list[Tensor]:
        """What this process would hold of ``factors``, see :func:`sharding.as_held`."""
        return sharding.as_held(self._parameters(), _flat(self.layers, factors))

    def hold(self, values: list[Tensor]) -> None:
        """Write what :meth:`held` or :meth:`as_held` returned, see :func:`sharding.hold`."""
        sharding.hold(self._parameters(), values)

    def whole(self, held: list[Tensor]) -> Factors:
        """The factors of which this process holds ``held``, without a copy if it holds them all. Collective if not."""
        return self.read() if self.is_sharded else _in_pairs(self.layers, held)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is the one without the adapter inside. No weight is touched: the update is scaled by 0."""
        scalings = [layer.module.scaling for layer in self.layers.values()]
        kept = [scaling[self.name] for scaling in scalings]
        for scaling in scalings:
            scaling[self.name] = 0.0
        try:
            yield
        finally:
            for scaling, value in zip(scalings, kept, strict=True):
                scaling[self.name] = value

    def factors_in(self, state_dict: Mapping[str, Tensor], module: nn.Module) -> Factors | None:
        """The factors out of a state dict of ``module``, which holds the model, if they are all there.

        Not collective.
        """
        keys = self._keys(module)
        if any(key not in state_dict for pair in keys.values() for key in pair):
            return None
        return {name: (state_dict[keys[name][0]], state_dict[keys[name][1]]) for name in self.layers}

    def to_state_dict(self, factors: Factors, module: nn.Module) -> dict[str, Tensor]:
        """Copies of ``factors`` under the names that they have in a state dict of ``module``."""
        keys = self._keys(module)
        return {key: factor.clone() for name in factors for key, factor in zip(keys[name], factors[name], strict=True)}

    def _keys(self, module: nn.Module) -> dict[str, tuple[str, str]]:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        return {name: (names[id(layer.lora_A)], names[id(layer.lora_B)]) for name, layer in self.layers.items()}

    def _parameters(self) -> list[nn.Parameter]:
        sharding.reshard(sharding.fsdp_modules(self.model))
        return [factor for layer in self.layers.values() for factor in (layer.lora_A, layer.lora_B)]


def find_adapter(model: nn.Module) -> Adapter:
    """The active LoRA adapter of a model: the trainable one, or the only active one when nothing is trainable.

    Args:
        model: a ``PeftModel``, or a transformers model with an adapter added by ``add_adapter``.

    Raises:
        ValueError: if the model has no LoRA layer, if more than one adapter qualifies, if the adapter is merged, or if
            any part of what is trained is of a kind that the correction cannot see (the message names module and
            kind).
    """
    holder = holder_of(model)
    configs = holder.peft_config if hasattr(holder, "peft_config") else {}
    for config in configs.values():
        check_tuner(config)
    layers = {n: m for n, m in holder.named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers:
        raise ValueError(
            "`model`: expected a model with LoRA layers, but found none. Wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)) or pass peft_config to the trainer before adding the callback."
        )
    for name, module in layers.items():
        check_kind(name, module)
    adapter = _active_adapter(layers)
    check_config(configs[adapter])

    adapted = {}
    for name, module in layers.items():
        if not _has_adapter(module, adapter):
            continue
        check_layer(name, module, adapter)
        adapted[module_name(name)] = AdaptedLayer(module, adapter)
    check_nothing_else_trains(model, {id(p) for layer in adapted.values() for p in (layer.lora_A, layer.lora_B)})
    return Adapter(adapter, adapted, configs[adapter], model, holder)


def holder_of(model: nn.Module) -> nn.Module:
    """The outermost module in ``model`` that has adapters; of several, as a teacher and a student, the trained one.

    Where none has any it is the model.

    Raises:
        ValueError: if of several not exactly one trains.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> holder_of(model) is model
        True
    """
    found = []
    for module in model.modules():
        if hasattr(module, "peft_config") and not any(module is inner for outer in found for inner in outer.modules()):
            found.append(module)
    trained = [module for module in found if any(parameter.requires_grad for parameter in module.parameters())]
    if len(found) > 1 and len(trained) != 1:
        raise ValueError(
            f"`model`: expected one model with adapters that trains, but got {len(trained)} of {len(found)}. Freeze "
            "the others with requires_grad_(False)."
        )
    return next(iter(trained if len(found) > 1 else found), model)


def _in_pairs(names: Iterable[str], tensors: list[Tensor]) -> Factors:
    return dict(zip(names, zip(tensors[::2], tensors[1::2], strict=True), strict=True))


def _flat(names: Iterable[str], factors: Factors) -> list[Tensor]:
    return [factor for name in names for factor in factors[name]]


def _has_adapter(module: LoraLayer, adapter: str) -> bool:
    return adapter in module.scaling


def _active_adapter(layers: dict[str, LoraLayer]) -> str:
    active = {
        adapter for module in layers.values() for adapter in module.active_adapters if _has_adapter(module, adapter)
    }
    trainable = {
        adapter
        for adapter in active
        for module in layers.values()
        if _has_adapter(module, adapter)
        and any(p.requires_grad for n, p in module.named_parameters() if adapter in n.split("."))
    }
    candidates = sorted(trainable or active)
    if len(candidates) != 1:
        raise ValueError(
            f"`model`: expected one active trainable LoRA adapter, but got {candidates}. "
            "Select it with model.set_adapter(name)."
        )
    return candidates[0]
