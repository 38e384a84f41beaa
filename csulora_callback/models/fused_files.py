"""Where the experts of a model's fused weights lie in files: each in tensors of its own, or all in one.

transformers joins on load what files hold expert by expert, by operations that it keeps for each architecture. The
same operations make one expert's weight of that expert's tensors alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from csulora_callback.models.fused_experts import holds_experts

Shapes = Mapping[str, tuple[int, ...]]
"""Of what files hold, by the name of the module whose weight it is, or of the parameter itself."""


@dataclass(frozen=True, eq=False)
class Fused:
    """A fused parameter of a model as files hold it.

    Attributes:
        parameter: its name in the model.
        sources: what it is made of, as in :data:`Shapes`; by the pattern that transformers knows it by, one for each
            expert, or one for all.
        model: an instance without weights.
        converter: how it is made; ``None`` where it is stored as it is.
        first: the name of the first parameter that is made along with it.
    """

    parameter: str
    sources: Mapping[str, Sequence[str]]
    model: PreTrainedModel
    converter: WeightConverter | None
    first: str

    @property
    def experts(self) -> int:
        """How many."""
        return self.model.get_parameter(self.parameter).shape[0]

    def of_expert(self, number: int) -> list[tuple[str, int | None]]:
        """What one expert is made of: in files, and where that holds them all, its place there."""
        return [(held[number], None) if self._stacks else (held[0], number) for held in self.sources.values()]

    def convert(self, tensors: Sequence[Tensor]) -> Tensor:
        """One expert's weight out of what :meth:`of_expert` names, as transformers would make it."""
        if self.converter is None:
            return tensors[0]
        one = copy.deepcopy(self.converter)  # it collects what it is to convert
        for pattern, tensor in zip(self.sources, tensors, strict=True):
            one.add_tensor(self.first, pattern, pattern, tensor if self._stacks else tensor[None])
        made = one.convert(self.first, model=_OfOneExpert(self.model), config=self.model.config)[self.parameter]
        return (made[0] if isinstance(made, list) else made)[0]

    def shape(self, shapes: Shapes) -> tuple[int, int]:
        """Of one expert's weight, if :meth:`convert` makes it of tensors of these shapes."""
        stored = [shapes[key] if place is None else shapes[key][1:] for key, place in self.of_expert(0)]
        return tuple(self.convert([torch.empty(shape, device="meta") for shape in stored]).shape)

    @property
    def _stacks(self) -> bool:
        return self.converter is not None and isinstance(self.converter.operations[0], MergeModulelist)


class _OfOneExpert:
    """What operations ask of a model, whose parameters are to be as if it had one expert."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> Tensor:
        return self._model.get_parameter(name)[:1]


def fused_parameters(model: PreTrainedModel, shapes: Shapes) -> dict[str, Fused | None]:
    """The fused parameters that transformers makes of what files hold; ``None`` where only loading tells how.

    They are named as modules are: without ``.weight``.

    Args:
        model: an instance without weights.
        shapes: of what the files hold.

    Example:
        >>> from accelerate import init_empty_weights
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> with init_empty_weights():
        ...     sizes = {"hidden_size": 8, "intermediate_size": 16, "num_local_experts": 2, "num_hidden_layers": 1}
        ...     model = MixtralForCausalLM(MixtralConfig(vocab_size=8, num_attention_heads=2, **sizes))
        >>> experts = [f"model.layers.0.block_sparse_moe.experts.{number}" for number in range(2)]
        >>> shapes = {f"{expert}.{kind}": (16, 8) for expert in experts for kind in ("w1", "w3")}
        >>> fused = fused_parameters(model, shapes)["model.layers.0.mlp.experts.gate_up_proj"]
        >>> fused.of_expert(1)[0], fused.shape(shapes)
        (('model.layers.0.block_sparse_moe.experts.1.w1', None), (32, 8))
    """
    there = {name: parameter for name, parameter in model.named_parameters() if holds_experts(model, name, parameter)}
    if not there:
        return {}
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, dict[str | None, list[str]]] = {}
    for stored, key in sorted(_stored(shapes), key=lambda pair: dot_natural_key(pair[0])):  # as experts are numbered
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, there)
        if name not in there and stored in there:
            name, pattern = stored, None
        if name in there:
            sources.setdefault(name, {}).setdefault(pattern, []).append(key)
    found: dict[str, Fused | None] = {}
    for first, held in sources.items():
        own = {id(by_pattern[pattern]): by_pattern[pattern] for pattern in held if pattern is not None}
        converter = next(iter(own.values()), None)
        for parameter in _made_of(first, converter):
            if parameter in there:
                one = Fused(parameter, held, model, converter, first)
                alone = len(own) <= 1 and (converter is None or None not in held) and _is_by_expert(one, shapes)
                found[parameter.removesuffix(".weight")] = one if alone else None
    return found


def _stored(shapes: Shapes) -> Iterable[tuple[str, str]]:
    """Keys that may lie in the files, each with its name here."""
    for key, shape in shapes.items():
        if len(shape) in (2, 3):
            yield f"{key}.weight", key
        if len(shape) == 3:
            yield key, key


def _made_of(first: str, converter: WeightConverter | None) -> list[str]:
    if converter is None:
        return [first]
    return [first.replace(converter.target_patterns[0], pattern) for pattern in converter.target_patterns]


def _is_by_expert(fused: Fused, shapes: Shapes) -> bool:
    """Whether it can be made expert by expert: each operation does to one what it does to all of them."""
    many = fused.experts if fused._stacks else 1
    if any(len(held) != many or len({shapes[key] for key in held}) > 1 for held in fused.sources.values()):
        return False
    if not fused._stacks and any(shapes[held[0]][0] != fused.experts for held in fused.sources.values()):
        return False
    operations = [] if fused.converter is None else fused.converter.operations
    if not all(map(_is_within_experts, operations[1:] if fused._stacks else operations)):
        return False
    if fused._stacks and (operations[0].dim != 0 or any(len(shapes[held[0]]) != 2 for held in fused.sources.values())):
        return False
    return fused.shape(shapes) == tuple(fused.model.get_parameter(fused.parameter).shape[1:])


def _is_within_experts(operation: ConversionOps) -> bool:
    """Whether it leaves the first axis, that of the experts, alone."""
    within = (1, 2, -1, -2)
    if isinstance(operation, Transpose):
        return operation.dim0 in within and operation.dim1 in within
    return isinstance(operation, Chunk | Concatenate | Interleave) and operation.dim in within
