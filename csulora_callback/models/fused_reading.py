"""Experts of fused weights out of files, each read alone: its own tensors, or its place in one that holds all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from csulora_callback.models.fused_experts import by_parameter
from csulora_callback.models.fused_files import Fused
from csulora_callback.models.layout import Layout, by_stored_name
from csulora_callback.models.names import expert_name, fused_parameter
from csulora_callback.models.stored import Reader, Stored
from csulora_callback.models.through_transformers import all_experts, stored_experts


@dataclass(frozen=True)
class _Expert:
    """The weight of one: what of the files it is made of, with its place where that holds all; its shape; and how."""

    sources: Sequence[tuple[str, int | None]]
    shape: tuple[int, ...]
    fused: Fused | None = None

    def parts(self, stored: Stored) -> list[Reader]:
        return [
            stored.readers[key] if place is None else partial(_at, stored.readers[key], place)
            for key, place in self.sources
        ]

    def reader(self, parts: Sequence[Reader]) -> Reader:
        return parts[0] if self.fused is None else lambda: self.fused.convert([part() for part in parts])


def with_experts(stored: Stored, folder: Path, names: Iterable[str], trained: Layout | None, source: str) -> Stored:
    """What a folder holds with those of these experts of which names tell how its files hold them.

    Args:
        stored: what it holds.
        folder: the folder.
        names: of modules; those that are no experts are passed over.
        trained: where they are, if in a module in memory.
        source: the checkpoint's name, for the error.

    Raises:
        ValueError: if several may be meant by a name.
    """
    wanted = by_parameter(name for name in names if fused_parameter(name)[1] is not None)
    if not wanted:
        return stored
    try:
        found = stored_experts(folder, wanted, stored.shapes, trained)
    except Exception:  # of a config that is missing or broken in one of many ways
        found = {}
    experts: dict[str, _Expert] = {}
    for parameter, own in wanted.items():
        numbers = [fused_parameter(name)[1] for name in own]
        if parameter in found:
            fused = _only(parameter, found[parameter], source)
            experts |= {} if fused is None else _experts(fused, parameter, numbers, stored)
        elif len(stored.shapes.get(parameter, ())) == 3:  # of no model of transformers, which might convert it
            held, *shape = stored.shapes[parameter]
            made = {number: _Expert([(parameter, number)], tuple(shape)) for number in numbers if number < held}
            experts |= {expert_name(parameter, number): expert for number, expert in made.items()}
    return _with(stored, experts)


def with_all_experts(stored: Stored, folder: Path) -> Stored:
    """What a folder holds with all experts that its model has, in place of what they are made of.

    Where there are some, other modules have the names that transformers loads them under, too.
    """
    # Modules that are numbered within a layer, or three-dimensional tensors: others are no experts.
    if not any(
        len(shape) == 3 or sum(part.isdigit() for part in name.split(".")) > 1 for name, shape in stored.shapes.items()
    ):
        return stored
    try:
        found, loaded = all_experts(folder, stored.shapes)
    except Exception:  # of a config that is missing or broken in one of many ways
        return stored
    told = {parameter: fused for parameter, fused in found.items() if fused is not None}
    experts: dict[str, _Expert] = {}
    for parameter, fused in told.items():
        experts |= _experts(fused, parameter, range(fused.experts), stored)
    called: dict[str, Collection[str]] = {
        key: [name] for name, keys in loaded.items() if len(keys) == 1 for key in keys
    }
    sources = {key for fused in told.values() for held in fused.sources.values() for key in held}
    return _with(stored, experts).renamed(called | dict.fromkeys(sources, ()))


def _only(parameter: str, candidates: list[Fused | None], source: str) -> Fused | None:
    """The one that is meant; ``None`` if only loading tells."""
    if None in candidates:
        return None
    first, *others = ({key for held in fused.sources.values() for key in held} for fused in candidates)
    for other in others:
        if other != first:
            by_stored_name({parameter: {min(first), min(other)}}, set(), source)
    return candidates[0]


def _experts(fused: Fused, parameter: str, numbers: Iterable[int], stored: Stored) -> dict[str, _Expert]:
    shape = fused.shape(stored.shapes)
    return {
        expert_name(parameter, number): _Expert(fused.of_expert(number), shape, fused)
        for number in numbers
        if number < fused.experts
    }


def _with(stored: Stored, experts: Mapping[str, _Expert]) -> Stored:
    after: dict[str, list[str]] = {}
    for name, expert in experts.items():
        after.setdefault(expert.sources[0][0], []).append(name)
    parts = {name: expert.parts(stored) for name, expert in experts.items()}
    keys = {name: [key for key, _ in expert.sources] for name, expert in experts.items()}
    packed = {name: [stored.quantized[key] for key in own if key in stored.quantized] for name, own in keys.items()}
    others = Stored(
        {name: expert.reader(parts[name]) for name, expert in experts.items()},
        {name: expert.shape for name, expert in experts.items()},
        {
            name: tuple(dict.fromkeys(state for key in own for state in stored.files.get(key, ())))
            for name, own in keys.items()
        },
        {name: how[0] for name, how in packed.items() if how},
        parts,
    )
    return stored.with_others(others, after)


def _at(reader: Reader, place: int) -> Tensor:
    return reader()[place]
