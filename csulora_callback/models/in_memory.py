"""The weights of a module in memory, by the names of its modules without wrappers and adapters."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from csulora_callback.models.names import module_name
from csulora_callback.models.quantized import storage
from csulora_callback.models.sharding import full_shape, gather, is_sharded
from csulora_callback.models.weight_files import Quantized, Readers, Shapes


def read_module(module: nn.Module, invented: Collection[str]) -> tuple[Readers, Shapes, Quantized, bool]:
    """What gives each weight, its shape, how it is quantized if it is, and whether reading takes all processes.

    What PEFT trains in the place of a module is none of its weights: the one that it had is.

    Args:
        module: any.
        invented: names of parameters that are nobody's weights.

    Example:
        >>> readers, shapes, quantized, collective = read_module(nn.Sequential(nn.Linear(3, 2)), [])
        >>> shapes, quantized, collective
        ({'0': (2, 3)}, {}, False)
    """
    readers, shapes, quantized, collective = {}, {}, {}, False
    for raw, parameter in module.named_parameters(remove_duplicate=False):  # tied weights count under both names
        prefix, _, kind = raw.rpartition(".")
        trained = ".lora_" in raw or ".modules_to_save." in raw
        if kind == "weight" and not trained and raw not in invented:
            name = module_name(prefix)
            readers[name] = lambda parameter=parameter: (
                gather([parameter])[0] if is_sharded(parameter) else parameter.detach()
            )
            shapes[name] = full_shape(parameter)
            collective |= is_sharded(parameter)
            if (found := storage(parameter)) is not None:
                quantized[name] = found
    return readers, shapes, quantized, collective
