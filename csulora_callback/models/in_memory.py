"""The weights of a module in memory, by the names of the modules in it without what these are wrapped in."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from csulora_callback.models.fused_experts import holds_experts, parameter_name
from csulora_callback.models.names import expert_name, module_name
from csulora_callback.models.quantized import storage
from csulora_callback.models.sharding import full_shape, gather, is_sharded
from csulora_callback.models.stored import Reader, Stored


def weights_in(module: nn.Module, invented: Collection[str] = ()) -> Stored:
    """Every ``weight`` by its module's name, and the experts of three-dimensional parameters, of whatever name.

    Args:
        module: may hold adapters, which are passed over.
        invented: names of parameters that do not count.

    Example:
        >>> import torch
        >>> module = nn.Linear(3, 2)
        >>> module.experts = nn.Parameter(torch.ones(2, 5, 4))
        >>> weights_in(nn.Sequential(module)).shapes
        {'0': (2, 3), '0.experts[0]': (5, 4), '0.experts[1]': (5, 4)}
    """
    stored = Stored({}, {})
    for raw, parameter in module.named_parameters(remove_duplicate=False):  # tied weights count under both names
        if _is_trained(raw) or raw in invented:
            continue
        prefix, _, kind = raw.rpartition(".")
        shape, name = full_shape(parameter), parameter_name(module_name(prefix), kind)
        places: dict[str, int | None] = {name: None} if kind == "weight" else {}
        if holds_experts(module, raw, parameter):
            places |= {expert_name(name, number): number for number in range(shape[0])}
        how = storage(parameter) if places else None
        for own, place in places.items():
            stored.readers[own], stored.shapes[own] = _reader(parameter, place), shape if place is None else shape[1:]
            if how is not None:
                stored.quantized[own] = how
    return stored


def is_divided(module: nn.Module) -> bool:
    """Whether processes hold parts of its parameters, so that reading takes all of them.

    Example:
        >>> is_divided(nn.Linear(2, 2))
        False
    """
    return any(is_sharded(parameter) for name, parameter in module.named_parameters() if not _is_trained(name))


def _is_trained(name: str) -> bool:
    """Whether a parameter is PEFT's: what it trains in the place of a module is none of the module's weights."""
    return ".lora_" in name or ".modules_to_save." in name


def _reader(parameter: nn.Parameter, place: int | None) -> Reader:
    def read() -> Tensor:
        whole = gather([parameter])[0] if is_sharded(parameter) else parameter.detach()
        return whole if place is None else whole[place]

    return read
