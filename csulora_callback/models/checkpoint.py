"""Lazy reading of a checkpoint, one tensor at a time: a local folder, a Hub id, or a module in memory.

Weights are given as stored: ``(d_out, d_in)`` for ``nn.Linear``, ``(d_in, d_out)`` for transformers' ``Conv1D``.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from csulora_callback.models.checksum import digest, fingerprint
from csulora_callback.models.file_state import FileState
from csulora_callback.models.foreign import first_line
from csulora_callback.models.fused_reading import with_all_experts, with_experts
from csulora_callback.models.in_memory import is_divided, weights_in
from csulora_callback.models.layout import Layout, by_stored_name
from csulora_callback.models.processes import Processes
from csulora_callback.models.quantized import storage
from csulora_callback.models.stored import Reader, Stored, lacking
from csulora_callback.models.through_transformers import load_through_transformers, stored_names
from csulora_callback.models.weight_files import fetch_folder, read_folder

logger = logging.getLogger(__name__)


class Checkpoint:
    """The two-dimensional floating-point weights of a checkpoint, by module name, each read when asked for.

    Experts of a three-dimensional weight are modules of their own, as ``experts.up_proj[7]``. See `open_checkpoint`.

    Attributes:
        source: where the weights come from, for messages.
        collective: whether reading a weight takes all processes, as it does from a sharded model in memory.
        layout: where transformers' models sit in a module in memory; None for files.
        folder: where the files lie; None in memory.

    Example:
        >>> from torch import nn
        >>> checkpoint = open_checkpoint(nn.Sequential(nn.Linear(3, 2)))
        >>> checkpoint.source, checkpoint.weight("0").shape
        ('Sequential in memory', torch.Size([2, 3]))
        >>> len(checkpoint.fingerprint(["0"]))
        64
    """

    def __init__(
        self,
        source: str,
        stored: Stored,
        folder: Path | None = None,
        collective: bool = False,
        layout: Layout | None = None,
    ) -> None:
        self.source, self.collective, self.layout = source, collective, layout
        self._stored, self._shapes, self.folder = stored, stored.shapes, folder

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """Names of the modules that have a two-dimensional ``weight``, in the checkpoint's order."""
        return [name for name, shape in self._shapes.items() if len(shape) == 2]

    def require(self, names: Iterable[str], trained: Layout | None = None) -> Checkpoint:
        """This checkpoint if it has all these modules, or the same one under the names that are asked for.

        Where :meth:`named_as` finds none, since weights are joined or split on load, the whole checkpoint is loaded
        through transformers on the CPU, and a warning says so.

        Args:
            names: of modules.
            trained: where they are, if in a module in memory: names are mapped and weights loaded through its classes.

        Raises:
            ValueError: if a module is missing even then, the nearest names are given; or several may be meant.
        """
        found = self.named_as(names := list(names), trained)
        missing = [name for name in names if name not in found._shapes]
        if missing and self.folder is not None:
            self._refuse(missing[0], self._stored.packed(missing[0]))  # loading would not give it, either
            why = f"{self.source}: no names tell which weight in the files is that of '{missing[0]}'"
            logger.warning("%s, so the checkpoint is loaded through transformers, all of it in memory.", why)
            return self._through_transformers(missing[0], trained).require(names, trained)
        if missing:
            raise ValueError(self._lacks(missing[0], none_of=len(names) if len(missing) == len(names) else 1))
        return found

    def named_as(self, names: Iterable[str], trained: Layout | None = None) -> Checkpoint:
        """This checkpoint with modules that are called otherwise here under these names; no weight is read.

        Names differ where transformers renames on load, and where a side holds more or less than the other: a head, a
        vision model, whatever the transformer sits in.

        Raises:
            ValueError: if several modules may be meant by a name; two of them are given.
        """
        asked, here = set(names), self
        if self.folder is not None:
            others = asked - self._shapes.keys()
            here = self._holding(with_experts(self._stored, self.folder, others, trained, self.source))
        called = by_stored_name(here._candidates(sorted(asked - here._shapes.keys()), trained), asked, self.source)
        return here._holding(here._stored.renamed(called)) if called else here

    def with_all_experts(self) -> Checkpoint:
        """This checkpoint with all experts that transformers fuses on load, in place of what they are made of."""
        return self if self.folder is None else self._holding(with_all_experts(self._stored, self.folder))

    def first_rows(self, rows: Mapping[str, int]) -> Checkpoint:
        """This checkpoint with no more than so many rows of some modules' weights: a vocabulary may have grown."""
        return self._holding(self._stored.first_rows(rows))

    def _holding(self, stored: Stored) -> Checkpoint:
        found = self if stored is self._stored else copy.copy(self)
        found._stored, found._shapes = stored, stored.shapes
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a module's weight as stored.

        Raises:
            ValueError: if the checkpoint has no such module; the nearest names are given.
        """
        if name not in self._shapes:
            raise ValueError(self._lacks(name))
        return self._shapes[name]

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes as stored, of those of these modules that there are."""
        return {name: self._shapes[name] for name in names if name in self._shapes}

    def dtype(self, name: str) -> torch.dtype:
        """Of a module's weight; its bytes are not read. Raises as :meth:`weight` does."""
        self._refuse(name, self.storage(name))
        return reduce(torch.promote_types, (part().dtype for part in self.parts(name)))

    def parts(self, name: str) -> list[Reader]:
        """Readers of the tensors that a module's weight is made of. Raises as :meth:`shape` does."""
        self.shape(name)  # is known, or the name refused
        return self._stored.parts.get(name) or [self._stored.readers[name]]

    def files(self, names: Iterable[str]) -> dict[FileState, list[str]]:
        """The files that these modules' weights are read from, as when opened, with names that say which rows are."""
        return self._stored.files_of(names)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Names in the order in which their weights are read fastest: by file, and by place in it."""
        place = {name: number for number, name in enumerate(self._shapes)}
        return sorted(names, key=place.__getitem__)

    def weight(self, name: str) -> Tensor:
        """A module's weight as stored: not upcast, on the CPU or where the module in memory holds it.

        Raises:
            ValueError: if there is no such module, if its weight is quantized, or if it holds NaN or Inf.
        """
        weight = self.stored(name)
        # NaN goes through both; isfinite is slower than reading the weight from disk.
        if weight.numel() and not torch.stack([weight.min(), weight.max()]).isfinite().all():
            raise ValueError(f"{self.source}: the weight of '{name}' holds NaN or Inf, expected finite values.")
        return weight

    def stored(self, name: str) -> Tensor:
        """As :meth:`weight`, with any values in it: of one in a file nothing is read until it is used."""
        self.shape(name)  # is known, or the name refused
        weight = self._stored.readers[name]()
        self._refuse(name, self._stored.quantized.get(name) or storage(weight))
        return weight

    def storage(self, name: str) -> str | None:
        """How a module's weight is quantized; ``None`` if it is not, or not there."""
        return self._stored.quantized.get(name) or next(
            filter(None, (storage(part()) for part in (self.parts(name) if name in self._shapes else ()))), None
        )

    def fingerprint(self, names: Iterable[str], processes: Processes | None = None) -> str:
        """Of name, dtype, shape and bytes of these modules' weights.

        Equal weights give equal fingerprints wherever they are stored. ``processes`` divide the work; all of them
        have to call, and get the same answer.
        """
        processes, digests = processes or Processes(), {}
        order = processes.from_first(self.in_order(names))  # another process may have other files of the same weights

        def work(own: str | None, turn: list[str]) -> str | None:
            weight = self.weight_for(own, turn)
            return None if weight is None else digest(weight)

        for part in processes.divide(order, work):
            digests |= part
        return fingerprint(digests)

    def check_unwritten(self, names: Iterable[str]) -> None:
        """Refuse, with a ValueError, what was read of files that were written to meanwhile."""
        for state in self.files(names):
            if not state.unwritten():
                raise ValueError(
                    f"{self.source}: expected files that stay as they are while they are read, but {state.path} was "
                    "written or replaced since it was opened. Wait until it is whole, and begin again."
                )

    def weight_for(self, own: str | None, turn: list[str]) -> Tensor | None:
        """The :meth:`weight` that this process takes (if any) while others take other ones of ``turn``."""
        if not self.collective:
            return None if own is None else self.weight(own)
        taken = None
        for name in turn:
            weight = self.weight(name)
            if name == own:
                taken = weight
        return taken

    def _refuse(self, name: str, stored: str | None) -> None:
        if stored is not None:
            raise ValueError(
                f"{self.source}: the weight of '{name}' is quantized ({stored}), expected floating point. "
                "Pass the path or Hub id of the unquantized checkpoint instead."
            )

    def _lacks(self, name: str, none_of: int = 1) -> str:
        return lacking(self.source, name, self._shapes, none_of)

    def _candidates(self, names: list[str], trained: Layout | None) -> dict[str, set[str]]:
        """Of each what it may be called here."""
        if self.layout is not None:
            return self.layout.meant(names, self._shapes, trained)
        try:
            return stored_names(self.folder, names, self._shapes, trained) if names and self.folder else {}
        except Exception:  # of a config that is missing or broken in one of many ways: loading it says how
            return {}

    def _through_transformers(self, missing: str, trained: Layout | None) -> Checkpoint:
        """Of the same files, with the names that transformers gives on loading."""
        try:
            model, invented = load_through_transformers(self.folder, trained)
        except Exception as error:  # of a config or weights that are broken in one of many ways
            raise ValueError(
                f"{self._lacks(missing)} Nor can transformers, which renames on load, load it ({first_line(error)}). "
                "Code that lies beside the weights is never run."
            ) from error
        return _from_module(model, invented, self.source)


Source = str | os.PathLike | nn.Module | Checkpoint


def open_checkpoint(
    source: Source,
    required: Iterable[str] = (),
    *,
    revision: str | None = None,
    trained: Layout | None = None,
) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        source: a folder with safetensors (single or sharded) or ``pytorch_model.bin`` files, a Hub id, or a module in
            memory (a ``PeftModel`` counts as the model below its adapters).
        required: module names that must be found, see :meth:`Checkpoint.require`.
        revision: branch, tag or commit of a Hub id; nothing else has one.
        trained: where these modules are.

    Raises:
        FileNotFoundError: if the folder or the Hub id cannot be had, or holds no weights.
        ValueError: if a file is corrupt, a required module is missing even after loading through transformers, or
            ``revision`` is given with something that is not a Hub id.

    Example:
        >>> from torch import nn
        >>> checkpoint = open_checkpoint(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        >>> checkpoint.names(), checkpoint.shape("0")
        (['0'], (2, 3))
    """
    if revision is not None and (isinstance(source, Checkpoint | nn.Module) or os.path.isdir(source)):
        raise ValueError(
            f"`revision`: expected None, since only a Hub id has revisions, but got {revision!r}. Leave it out."
        )
    if isinstance(source, Checkpoint):
        return source.require(required, trained)
    if isinstance(source, nn.Module):
        return _from_module(source, set(), f"{type(source).__name__} in memory").require(required, trained)
    # os.path's is also False for names that no system takes, where Path's raises.
    folder = Path(source) if os.path.isdir(source) else fetch_folder(source, revision)
    name = str(source) if revision is None else f"{source}@{revision}"
    return Checkpoint(name, read_folder(folder, name), folder).require(required, trained)


def _from_module(module: nn.Module, invented: set[str], source: str) -> Checkpoint:
    return Checkpoint(source, weights_in(module, invented), None, is_divided(module), Layout.of(module))
