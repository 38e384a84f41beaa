"""Which LoRA layers a model has, and how their factors are read and written. Knows nothing of safety.

What cannot be corrected is refused, by module and kind: an update that the correction does not see would pass into the
checkpoint untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from csulora_callback.models import sharding
from csulora_callback.models.beside import Beside, find_beside
from csulora_callback.models.checkpoint import Source
from csulora_callback.models.names import owner_of_bias
from csulora_callback.models.parts import Layer, Part, parts_of
from csulora_callback.models.slots import Factors, Slot, join_all, split_all
from csulora_callback.models.supported import (
    check_config,
    check_kind,
    check_layer,
    check_nothing_else_trains,
    check_tuner,
)
from csulora_callback.models.wholes import Whole


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapter of a model that is being trained.

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
    parts: tuple[Part, ...]
    config: PeftConfig
    model: nn.Module
    holder: nn.Module  # in `model`: what the adapter was put into, and where the layers have their names
    beside: Beside = field(default_factory=lambda: Beside((), {}, set(), ()))

    @property
    def wholes(self) -> list[str]:
        """Names of the layers that are trained whole."""
        return [name for name, layer in self.layers.items() if isinstance(layer, Whole)]

    @property
    def passing(self) -> Mapping[str, str]:
        """What is trained beside the layers and not corrected, by name, and why."""
        return self.beside.passing

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """What has factors, by the module's name in the model without PEFT."""
        return {name: layer for part in self.parts for name, layer in part.layers.items()}

    @cached_property
    def matrices(self) -> dict[str, Layer]:
        """Of these the layers whose weights changed in alignment: all but biases, which belong to one of them."""
        return {name: layer for name, layer in self.layers.items() if owner_of_bias(name) is None}

    @cached_property
    def slots(self) -> list[Slot]:
        """Where PEFT keeps the factors."""
        return [part.slot for part in self.parts]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What holds the factors, slot by slot."""
        return [parameter for part in self.parts for parameter in part.parameters]

    @property
    def device(self) -> torch.device:
        """Where the first factor lies."""
        return self.parameters[0].device

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the factors."""
        return any(map(sharding.is_sharded, self.parameters))

    def read(self) -> Factors:
        """Copies of the factors, in the parameters' dtype and on their device.

        This and the methods below are collective where the parameters are sharded.
        """
        return split_all(self.slots, sharding.gather(self._in_place()))

    def read_trained(self) -> Factors:
        """Like :meth:`read`, of what the optimizer steps: under DeepSpeed that is a float32 copy."""
        return split_all(self.slots, sharding.gather_trained(self._in_place()))

    def write(self, factors: Factors) -> None:
        """Copy ``factors`` into the live parameters in place: optimizers keep their references and moments."""
        sharding.write(self._in_place(), join_all(self.slots, factors))

    def write_trained(self, factors: Factors) -> None:
        """Like :meth:`write`, so that training goes on from there: into the optimizer's copies as well."""
        sharding.write_trained(self._in_place(), join_all(self.slots, factors))

    def held(self) -> list[Tensor]:
        """What this process holds of the factors, sharing their memory, see :func:`sharding.held`."""
        return sharding.held(self._in_place())

    def as_held(self, factors: Factors) -> list[Tensor]:
        """What this process would hold of ``factors``, see :func:`sharding.as_held`."""
        return sharding.as_held(self._in_place(), join_all(self.slots, factors))

    def hold(self, values: list[Tensor]) -> None:
        """Write what :meth:`held` or :meth:`as_held` returned, see :func:`sharding.hold`."""
        sharding.hold(self._in_place(), values)

    def whole(self, held: list[Tensor]) -> Factors:
        """The factors of which this process holds ``held``, without a copy if it holds them all. Collective if not."""
        return self.read() if self.is_sharded else split_all(self.slots, held)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is the one without the adapter inside. No weight is touched: the update is scaled by 0.

        Raises:
            ValueError: as :meth:`.Beside.check_off`.
        """
        self.beside.check_off()
        scalings = [part.module.scaling for part in self.parts if isinstance(part.module, LoraLayer)]
        kept = [scaling[self.name] for scaling in scalings]
        for scaling in scalings:
            scaling[self.name] = 0.0
        try:
            with ExitStack() as disabled:
                for wrapper in self.beside.wrappers:
                    disabled.enter_context(_disabled(wrapper))
                yield
        finally:
            for scaling, value in zip(scalings, kept, strict=True):
                scaling[self.name] = value

    def factors_in(self, state_dict: Mapping[str, Tensor], module: nn.Module) -> Factors | None:
        """The factors out of a state dict of ``module``, which holds the model, if they are all there.

        Not collective.
        """
        keys = self._keys(module)
        if any(key not in state_dict for key in keys):
            return None
        return split_all(self.slots, [state_dict[key] for key in keys])

    def to_state_dict(self, factors: Factors, module: nn.Module) -> dict[str, Tensor]:
        """Copies of ``factors`` under the names that they have in a state dict of ``module``."""
        joined = join_all(self.slots, factors)
        return {key: tensor.clone() for key, tensor in zip(self._keys(module), joined, strict=True)}

    def _keys(self, module: nn.Module) -> list[str]:
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):  # a tied one has several
            names.setdefault(id(parameter), []).append(name)
        iterators = {own: iter(given) for own, given in names.items()}
        return [next(iterators[id(parameter)]) for parameter in self.parameters]

    def _in_place(self) -> list[nn.Parameter]:
        """The parameters, brought back into the model where the engine had put whole ones there."""
        sharding.reshard(sharding.fsdp_modules(self.model))
        return self.parameters


def find_adapter(model: nn.Module, aligned: Source | None = None, uncorrected: Sequence[str] = ()) -> Adapter:
    """The active LoRA adapter of a model: the trainable one, or the only active one when nothing is trainable.

    Args:
        model: a ``PeftModel``, or a transformers model with an adapter added by ``add_adapter``.
        aligned: the checkpoint that tells what of the trained is new; by default the one that the adapter's config
            names, or where that cannot be had the model itself. Looked at only where something is trained beside LoRA.
        uncorrected: names of what is trained beside LoRA, and may pass as it is.

    Raises:
        ValueError: if the model has no LoRA layer, if more than one adapter qualifies, if the adapter is merged, or if
            any part of what is trained is of a kind that the correction cannot see (the message names module and
            kind).
    """
    holder = holder_of(model)
    configs = holder.peft_config if hasattr(holder, "peft_config") else {}
    for config in configs.values():
        check_tuner(config)
    layers = {
        name: module
        for name, module in holder.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)
    }
    if not layers:
        raise ValueError(
            "`model`: expected a model with LoRA layers, but found none. Wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)) or pass peft_config to the trainer before adding the callback."
        )
    for name, module in layers.items():
        check_kind(name, module)
    adapter = _active_adapter(layers)
    check_config(configs[adapter])

    parts: list[Part] = []
    for name, module in layers.items():
        if not _has_adapter(module, adapter):
            continue
        check_layer(name, module, adapter)
        parts += parts_of(name, module, adapter)
    config = configs[adapter]
    factors = {name: part.parameters for part in parts for name in part.slot.names}
    source = (config.base_model_name_or_path, config.revision) if aligned is None else (aligned, None)
    beside = find_beside(model, holder, adapter, source, factors, uncorrected)
    parts += beside.parts
    check_nothing_else_trains(model, beside.parameters | {id(each) for part in parts for each in part.parameters})
    return Adapter(adapter, tuple(parts), config, model, holder, beside)


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


@contextmanager
def _disabled(wrapper: AuxiliaryTrainingWrapper) -> Iterator[None]:
    """PEFT's switch, which also sets what trains."""
    trained = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
    wrapper.enable_adapters(False)
    try:
        yield
    finally:
        wrapper.enable_adapters(True)
        wrapper.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


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
