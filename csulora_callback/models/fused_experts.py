"""Experts that a model keeps in one three-dimensional weight, each a module of its own; knows nothing of files.

PEFT's ``target_parameters`` puts one pair of factors on all experts of such a weight: ``lora_A (E·r, d_in)``, expert
after expert, and ``lora_B (d_out, r·E)``, in whose columns the experts take turns. Each expert's update is its own
``s·B·A``, so that each has a displacement, a basis and a correction of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd

from csulora_callback.models import sharding
from csulora_callback.models.names import expert_name, fused_parameter, module_name
from csulora_callback.models.quantized import storage


def split_experts(lora_A: Tensor, lora_B: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """The factors of each expert, sharing the memory of those of all.

    Args:
        lora_A: ``(E·r, d_in)``.
        lora_B: ``(d_out, r·E)``.
        experts: ``E``.

    Returns:
        Of each expert ``(r, d_in)`` and ``(d_out, r)``.

    Example:
        >>> [(tuple(A.shape), tuple(B.shape)) for A, B in split_experts(torch.ones(6, 4), torch.ones(5, 6), experts=3)]
        [((2, 4), (5, 2)), ((2, 4), (5, 2)), ((2, 4), (5, 2))]
    """
    As = lora_A.unflatten(0, (experts, -1)).unbind(0)
    Bs = lora_B.unflatten(1, (-1, experts)).unbind(2)
    return list(zip(As, Bs, strict=True))


def join_experts(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What :func:`split_experts` splits; factors of a smaller rank than others get directions of zeros.

    Example:
        >>> A, B = join_experts([(torch.ones(1, 4), torch.ones(5, 1)), (torch.ones(2, 4), torch.ones(5, 2))])
        >>> A.shape, B.shape, A.any(dim=1)
        (torch.Size([4, 4]), torch.Size([5, 4]), tensor([ True, False,  True,  True]))
    """
    rank = max(len(A) for A, _ in factors)
    As = torch.cat([A if len(A) == rank else pad(A, (0, 0, 0, rank - len(A))) for A, _ in factors])
    Bs = torch.stack([B if len(A) == rank else pad(B, (0, rank - len(A))) for A, B in factors], dim=2)
    return As, Bs.flatten(1)


@dataclass(frozen=True)
class Expert:
    """One expert of a fused weight of a live model, seen through one adapter, see :class:`~.parts.Layer`.

    PEFT calls the side of the weight that is stored last its input, unless the module says ``is_transposed``: in Llama
    4, whose module says nothing, ``lora_A`` lies on what is the output of the projection.
    """

    module: ParamWrapper
    adapter: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(d_out, r, d_in)``."""
        rows, d_in = sharding.full_shape(self.module.lora_A[self.adapter].weight)
        return sharding.full_shape(self.module.lora_B[self.adapter].weight)[0], rows // self.module.num_experts, d_in

    @property
    def scaling(self) -> float:
        """PEFT's ``s``, the same for all experts."""
        return self.module.scaling[self.adapter]

    @property
    def stored_transposed(self) -> bool:
        """Whether the weight is stored as ``(E, d_in, d_out)``; of one expert alone PEFT adds the update as it is."""
        return self.module.num_experts > 1 and getattr(self.module.get_base_layer(), "is_transposed", False)

    @property
    def storage(self) -> str | None:
        """How the weight under it is quantized, ``None`` if it is not."""
        return storage(self.module.get_param())


def names_of_parameter(path: str, module: ParamWrapper) -> list[str]:
    """What one adapted parameter's modules are called: its experts, or, where it is a matrix, the module it is of.

    Args:
        path: of the wrapper in the model; those of several parameters of one module wrap each other.
        module: the wrapper.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> experts = nn.Module()
        >>> experts.up = nn.Parameter(torch.ones(2, 5, 4))
        >>> lora = LoraConfig(r=1, target_modules=[], target_parameters=["experts.up"])
        >>> model = get_peft_model(nn.ModuleDict({"experts": experts}), lora)
        >>> names_of_parameter("base_model.model.experts", model.base_model.model["experts"])
        ['experts.up[0]', 'experts.up[1]']
    """
    name = module_name(path)
    if len(sharding.full_shape(module.get_param())) == 2:
        return [name]
    name = parameter_name(name, module.parameter_name)
    return [expert_name(name, number) for number in range(module.num_experts)]


def parameter_name(module: str, parameter: str) -> str:
    """The full name of a parameter without ``.weight``, as modules are called by.

    Example:
        >>> parameter_name("mlp.experts", "down_proj"), parameter_name("mlp.input_linear", "weight")
        ('mlp.experts.down_proj', 'mlp.input_linear')
    """
    return module if parameter == "weight" else f"{module}.{parameter}"


def holds_experts(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter of a model may hold the weights of several experts: all of three dimensions but kernels.

    Example:
        >>> convolution = nn.Sequential(nn.Conv1d(3, 2, 1))
        >>> holds_experts(convolution, "0.weight", convolution[0].weight)
        False
    """
    shape = sharding.full_shape(parameter)
    return len(shape) == 3 and shape[0] > 1 and not isinstance(model.get_submodule(name.rpartition(".")[0]), _ConvNd)


def by_parameter(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Modules by the parameter that holds them; experts in the order of their numbers.

    Example:
        >>> by_parameter(["q_proj", "experts.up[0]", "experts.up[1]"])
        {'q_proj': ('q_proj',), 'experts.up': ('experts.up[0]', 'experts.up[1]')}
    """
    found: dict[str, list[tuple[int | None, str]]] = {}
    for name in names:
        parameter, number = fused_parameter(name)
        found.setdefault(parameter, []).append((number, name))
    return {
        parameter: tuple(name for _, name in (sorted(held) if len(held) > 1 else held))
        for parameter, held in found.items()
    }


def check_inputs(layers: Mapping[str, object]) -> None:
    """Raise ``ValueError`` if the inputs of a module cannot be read: those of an expert show in no module's forward.

    Args:
        layers: of an adapter, by the module's name.

    Example:
        >>> check_inputs({"experts.up[0]": Expert(None, "default")})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: `penalty`: a data-aware one, which is the default with `probes`, measures by ...
    """
    of_parameters = [name for name, layer in layers.items() if isinstance(layer, Expert)]
    if of_parameters:
        name = max(of_parameters, key=lambda name: fused_parameter(name)[1] is not None)  # an expert, if there is one
        raise ValueError(
            "`penalty`: a data-aware one, which is the default with `probes`, measures by what each module reads, but "
            f"what '{name}' reads is known only inside of its layer: it is not a module but a parameter "
            "(target_parameters; PEFT makes them of target_modules='all-linear' and of the names of MLP modules). "
            "Pass penalty=Penalty.guard(10.0), or penalty=Penalty.guard for a target; `probes` can stay."
        )
