"""What a checkpoint holds, by name: how each weight is read, its shape, its files, and whether it is quantized."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from csulora_callback.models.file_state import FileState
from csulora_callback.models.names import fused_parameter

T = TypeVar("T")
Reader = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Stored:
    """Entries by the name of the module whose weight it is; in files, of what is no module's weight, of the tensor.

    Attributes:
        readers: of each weight; none is read before.
        shapes: as stored, in the order in which they lie there.
        files: those that it is read from, as they were when they were opened; none of what is in memory.
        quantized: how weights are stored that are quantized, where the tensor alone does not tell.
        parts: readers of what it is made of, where that are several tensors, or a part of one.
        cut: how many rows are left of weights that had more.

    Example:
        >>> import torch
        >>> stored = Stored({"up": lambda: torch.ones(2, 3)}, {"up": (2, 3)})
        >>> stored.renamed({"up": ["layers.0.up"]}).shapes
        {'layers.0.up': (2, 3)}
    """

    readers: dict[str, Reader]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, tuple[FileState, ...]] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[Reader]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    def packed(self, name: str) -> str | None:
        """How a weight that is not there is stored instead: of an expert, in its parameter's place or its module's."""
        parameter, number = fused_parameter(name)
        module = parameter if number is None else parameter.rpartition(".")[0]
        return self.quantized.get(parameter) or self.quantized.get(module)

    def files_of(self, names: Iterable[str]) -> dict[FileState, list[str]]:
        """The files that these weights are read from, with names that say which rows are."""
        found: dict[FileState, list[str]] = {}
        for name in sorted(names):
            cut = self.cut.get(name)
            for state in self.files.get(name, ()):
                found.setdefault(state, []).append(name if cut is None else f"{name}[:{cut}]")
        return found

    def renamed(self, called: Mapping[str, Collection[str]]) -> Stored:
        """The same with other names of some, of which an entry may have several, or none, and then is left out."""

        def renamed(entries: dict[str, T]) -> dict[str, T]:
            return {name: entry for key, entry in entries.items() for name in called.get(key, [key])}

        return Stored(*map(renamed, (self.readers, self.shapes, self.files, self.quantized, self.parts, self.cut)))

    def first_rows(self, rows: Mapping[str, int]) -> Stored:
        """The same with no more than so many rows of some weights."""
        cut = {name: count for name, count in rows.items() if count < self.shapes[name][0]}
        whole = self.readers
        if not cut:
            return self
        return replace(
            self,
            readers=whole | {name: lambda name=name: whole[name]()[: cut[name]] for name in cut},
            shapes=self.shapes | {name: (count, *self.shapes[name][1:]) for name, count in cut.items()},
            parts={name: parts for name, parts in self.parts.items() if name not in cut},
            cut=self.cut | cut,
        )

    def with_others(self, others: Stored, after: Mapping[str, Collection[str]]) -> Stored:
        """These and others, which are read fastest just after some of these."""
        shapes: dict[str, tuple[int, ...]] = {}
        for key, shape in self.shapes.items():
            shapes[key] = shape
            shapes.update((name, others.shapes[name]) for name in after.get(key, ()))
        return Stored(
            self.readers | others.readers,
            shapes,
            self.files | others.files,
            self.quantized | others.quantized,
            self.parts | others.parts,
            self.cut | others.cut,
        )


def lacking(source: str, name: str, there: Iterable[str], none_of: int = 1) -> str:
    """What to say of a checkpoint without a module, or with none of so many.

    Example:
        >>> lacking("org/base", "q_projj", ["q_proj", "embed"])  # doctest: +ELLIPSIS
        "org/base: expected a weight for the module 'q_projj', but the checkpoint has none; nearest names: ...
        >>> lacking("org/other", "q_proj", ["c_attn"], none_of=4)  # doctest: +ELLIPSIS
        "org/other: expected weights for 4 modules, but the checkpoint has none of them, such as 'q_proj'. ...
    """
    nearest = difflib.get_close_matches(name, there, n=3, cutoff=0.3)
    near = f"; nearest names: {nearest}" if nearest else ""
    if none_of > 1:
        return (
            f"{source}: expected weights for {none_of} modules, but the checkpoint has none of them, such as '{name}'"
            f"{near}. Is it of the architecture of the other one?"
        )
    return (
        f"{source}: expected a weight for the module '{name}', but the checkpoint has none{near}. Leave layers of a "
        "new head out of target_modules, or mend the name."
    )
