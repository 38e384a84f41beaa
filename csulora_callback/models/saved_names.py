"""Which modules the factors in an adapter's file are of, where its keys do not say: those of parameters.

PEFT stores the factors of a parameter under the name of its module. Where several parameters of one have some, it
wraps the module once for each, the last one outermost, and which one that is only the module knows. Ranks and shapes
tell; what they do not tell is not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import permutations

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from csulora_callback.models.fused_experts import parameter_name
from csulora_callback.models.names import expert_name, module_name

ShapesOf = Callable[[Collection[str], LoraConfig], Mapping[str, tuple[int, ...]]]
"""Gives the shapes in which weights are stored, of those of some modules that there are, for an adapter's config."""


def targets_in(
    state: Mapping[str, Tensor],
    config: LoraConfig,
    rank_of: Callable[[LoraConfig, str], int],
    stored: ShapesOf | None = None,
    names: Collection[str] | None = None,
) -> dict[str, str]:
    """What PEFT calls each module whose factors a file holds, in the model's order; of experts their parameter.

    Args:
        state: PEFT's state dict.
        config: of the adapter.
        rank_of: what PEFT takes as the rank of what it calls so.
        stored: asked where ranks do not tell.
        names: of its modules in the model's order, where a record knows them.

    Raises:
        ValueError: if it cannot be told which of a module's parameters the factors are of.

    Example:
        >>> import torch
        >>> config = LoraConfig(r=1, target_modules=[], target_parameters=["experts.up"])
        >>> state = {"base_model.model.experts.lora_A.weight": torch.ones(2, 4)}
        >>> state["base_model.model.experts.lora_B.weight"] = torch.ones(5, 2)
        >>> targets_in(state, config, lambda config, name: config.r)
        {'experts.up[0]': 'experts.up', 'experts.up[1]': 'experts.up'}
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        for factor in "AB":
            if key.endswith(end := f".lora_{factor}.weight"):
                factors.setdefault(key.removesuffix(end), {})[factor] = tensor
    wrapped: dict[str, list[dict[str, Tensor]]] = {}
    for prefix in sorted(factors, key=lambda prefix: prefix.count(".base_layer")):  # the outermost first
        wrapped.setdefault(module_name(prefix), []).append(factors[prefix])
    found: dict[str, str] = {}
    for path, wrappers in wrapped.items():
        is_module = not config.target_parameters or (
            len(wrappers) == 1 and bool(check_target_module_exists(config, path))
        )
        if is_module or any(len(pair) < 2 for pair in wrappers):  # what is missing is for others to say
            found[path] = path
        else:
            found |= _parameters_at(path, wrappers, config, rank_of, stored, names)
    return found


def _parameters_at(
    path: str,
    wrappers: Sequence[Mapping[str, Tensor]],
    config: LoraConfig,
    rank_of: Callable[[LoraConfig, str], int],
    stored: ShapesOf | None,
    names: Collection[str] | None,
) -> dict[str, str]:
    """The modules of a path's parameters, of which each wrapper holds one's factors."""
    targeted = {
        target.rpartition(".")[2]
        for target in config.target_parameters
        if f".{path}.{target.rpartition('.')[2]}".endswith(f".{target}")
    }
    readings = []
    for chosen in permutations(sorted(targeted), len(wrappers)):
        counts = [
            _experts(pair, rank_of(config, f"{path}.{kind}")) for pair, kind in zip(wrappers, chosen, strict=True)
        ]
        experts = {count for kind, count in zip(chosen, counts, strict=True) if kind != "weight"}
        if None not in counts and len(experts) <= 1 and 1 not in experts:  # a module has as many of each
            readings.append([_modules(path, kind, count) for kind, count in zip(chosen, counts, strict=True)])
    if names is not None:
        order = [name for name in names if any(name in own for reading in readings for own in reading)]
        readings = [reading for reading in readings if [name for own in reading for name in own] == order]
    elif len(readings) > 1 and stored is not None:
        there = stored({name for reading in readings for own in reading for name in own}, config)
        readings = [
            reading
            for reading in readings
            if all(_fits(pair, own, there) for pair, own in zip(wrappers, reading, strict=True))
        ]
    if len(readings) != 1:
        of = " or ".join(map(repr, sorted(targeted))) or "none in target_parameters"
        raise ValueError(
            f"`adapter`: the factors of '{path}' are of parameters of it ({of}), and which are whose cannot be told "
            "from the adapter's files. Pass a subspace or checkpoints with experts of the shapes that the model has, "
            "or load the model with the adapter, and correct it by SafetyCorrector(model, subspace, penalty).apply()."
        )
    return {name: own[name] for own in readings[0] for name in own}


def _experts(pair: Mapping[str, Tensor], rank: int) -> int | None:
    """How many share these factors, if each has this rank."""
    rows = len(pair["A"])
    return rows // rank if rank > 0 and rows and rows % rank == 0 and pair["B"].shape[1] == rows else None


def _modules(path: str, kind: str, count: int) -> dict[str, str]:
    if kind == "weight" and count == 1:
        return {path: f"{path}.{kind}"}
    return {expert_name(parameter_name(path, kind), number): f"{path}.{kind}" for number in range(count)}


def _fits(pair: Mapping[str, Tensor], names: Collection[str], there: Mapping[str, tuple[int, ...]]) -> bool:
    sides = sorted((len(pair["B"]), pair["A"].shape[1]))
    return all(name in there and sorted(there[name]) == sides for name in names)
