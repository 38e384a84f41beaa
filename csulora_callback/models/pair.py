"""A base and an aligned checkpoint side by side: the modules to compare, and their weights two at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from csulora_callback.models.checkpoint import Checkpoint, Source, open_checkpoint
from csulora_callback.models.names import fused_parameter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointPair:
    """Both checkpoints, and the full names of the modules that they are compared in, sorted.

    Example:
        >>> from torch import nn
        >>> pair = CheckpointPair.open(nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2)))
        >>> pair.names, [tuple(weight.shape) for weight in pair.weights_for("0", ["0"])]
        (['0'], [(2, 3), (2, 3)])
    """

    base: Checkpoint
    aligned: Checkpoint
    names: list[str]

    @classmethod
    def open(cls, base: Source, aligned: Source, target_modules: str | Sequence[str] | None = None) -> CheckpointPair:
        """Find the target modules in both checkpoints, without reading weights.

        Raises:
            ValueError: if a target is missing (nearest names are given), shapes differ (the first differing tensor is
                named), or a weight is not two-dimensional.
            FileNotFoundError: if a checkpoint is not there.
        """
        base, aligned = open_checkpoint(base), open_checkpoint(aligned)
        full = isinstance(target_modules, Sequence) and set(target_modules) <= set(aligned.names())
        if not full:  # what they are looked for among
            base, aligned = base.with_all_experts(), aligned.with_all_experts()
        if target_modules is None and aligned.layout is not None:
            base = base.named_as(aligned.names(), aligned.layout)
        return cls.of_modules(base, aligned, _targets(base, aligned, target_modules))

    @classmethod
    def of_modules(cls, base: Checkpoint, aligned: Checkpoint, names: list[str]) -> CheckpointPair:
        """Of these modules, by their full names in a model that is trained or an adapter.

        Raises:
            ValueError: as :meth:`open` does.
        """
        base, aligned = base.require(names, aligned.layout), aligned.require(names, base.layout)
        base, aligned = _with_common_rows(base, aligned, names)
        for name in names:
            if base.shape(name) != aligned.shape(name):
                base.weight(name), aligned.weight(name)  # packed quantized weights: refused here, as what they are
                raise ValueError(
                    f"`base`: expected the shapes of the aligned model, but '{name}.weight' is {base.shape(name)} in "
                    f"{base.source} and {aligned.shape(name)} in {aligned.source}. They are different architectures."
                )
            if len(base.shape(name)) != 2:
                raise ValueError(
                    f"`target_modules`: expected two-dimensional weights, but that of '{name}' has the shape "
                    f"{base.shape(name)}. Leave it out."
                )
        return cls(base, aligned, names)

    @property
    def sides(self) -> dict[str, Checkpoint]:
        """Both checkpoints by side, ``"base"`` and ``"aligned"``."""
        return {"base": self.base, "aligned": self.aligned}

    def named_in(self, metadata: Mapping[str, dict]) -> dict:
        """What is known of the same weights, under the names of these: who kept it may have called them otherwise."""
        named = {side: {**metadata[side], "source": checkpoint.source} for side, checkpoint in self.sides.items()}
        return {**metadata, **named}

    @property
    def collective(self) -> bool:
        """Whether reading takes all processes."""
        return self.base.collective or self.aligned.collective

    def in_order(self) -> list[str]:
        """The names in the order in which their weights are read fastest: that of the aligned files, if it has any."""
        return (self.aligned if self.aligned.files(self.names) else self.base).in_order(self.names)

    def check_unwritten(self, names: Sequence[str]) -> None:
        """See :meth:`Checkpoint.check_unwritten`."""
        for checkpoint in self.sides.values():
            checkpoint.check_unwritten(names)

    def weights_for(self, own: str | None, turn: list[str]) -> tuple[Tensor | None, Tensor | None]:
        """Base and aligned weight of the module that this process takes, see :meth:`Checkpoint.weight_for`."""
        return self.base.weight_for(own, turn), self.aligned.weight_for(own, turn)


def _with_common_rows(base: Checkpoint, aligned: Checkpoint, names: Sequence[str]) -> tuple[Checkpoint, Checkpoint]:
    """Both with the rows that both have of an embedding or head, outside of all numbered layers: tokens were added."""
    rows = {}
    for name in names:
        shapes = base.shape(name), aligned.shape(name)
        outside = not any(part.isdigit() for part in name.split("."))
        if outside and len(shapes[0]) == 2 and shapes[0] != shapes[1] and shapes[0][1:] == shapes[1][1:]:
            rows[name] = min(shapes[0][0], shapes[1][0])
            logger.warning(
                "'%s' has %d rows in %s and %d in %s: the first %d are compared.",
                *(name, shapes[0][0], base.source, shapes[1][0], aligned.source, rows[name]),
            )
    return base.first_rows(rows), aligned.first_rows(rows)


def _targets(base: Checkpoint, aligned: Checkpoint, target_modules: str | Sequence[str] | None) -> list[str]:
    """Full names of the target modules, sorted: a fingerprint must not depend on the order of files."""
    there = aligned.names()
    known = set(there)
    if target_modules is None:
        names = set(there) & set(base.names())
        wanted = "a two-dimensional weight that both checkpoints have"
    elif isinstance(target_modules, str):
        names = {name for name in there if re.fullmatch(target_modules, name)}
        wanted = f"a module whose name matches {target_modules!r}"
    else:
        # Names that are not in the files stay: they may be names that transformers gives on loading.
        matches = {
            target: [target] if target in known else [name for name in there if _ends_in(name, target)]
            for target in target_modules
        }
        names = {name for target, found in matches.items() for name in found or [target]}
        wanted = "at least one name"
    if not names:
        raise ValueError(f"`target_modules`: expected {wanted}, but found none. Names are like {there[:3]}.")
    return sorted(names)


def _ends_in(name: str, target: str) -> bool:
    """Whether a target is the last parts of a module's name; of an expert the number may be left out."""
    return name.endswith(f".{target}") or fused_parameter(name)[0].endswith(f".{target}")
