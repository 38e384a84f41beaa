"""Which weights checkpoints hold, without reading files that look as they did when they were last read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from csulora_callback.kept_json import KeptJson
from csulora_callback.models.checkpoint import Checkpoint
from csulora_callback.models.checksum import combine
from csulora_callback.models.file_state import FileState
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.processes import Processes

_FORMAT = 1
_UNUSABLE = "What is known of the files of a checkpoint is unusable, and they are read again: %s"
_LOST = "What the files of a checkpoint hold could not be kept in the cache, and they will be read again: %s"


class Fingerprints:
    """Content fingerprints, see :meth:`~csulora_callback.models.checkpoint.Checkpoint.fingerprint`, of some modules.

    A cache folder holds a small file for each checkpoint and choice of modules: how the weight files looked
    (:class:`~csulora_callback.models.file_state.FileState`), and the fingerprint of what was read of them then. One
    for each, and not one index of all: runs at the same time then replace such a file whole, and lose nothing of the
    others'. Weights in memory are not in it.

    All methods are collective: the first process's cache counts, and its files.

    Args:
        cache_dir: where they are kept; ``None``: nowhere, and nothing is known.
        processes: which divide the reading.

    Example:
        >>> from torch import nn
        >>> from csulora_callback.models.checkpoint import open_checkpoint
        >>> checkpoint = open_checkpoint(nn.Sequential(nn.Linear(3, 2)))
        >>> fingerprints = Fingerprints(None, Processes())
        >>> fingerprints.known(checkpoint, ["0"]) is None, len(fingerprints.of(checkpoint, ["0"]))
        (True, 64)
    """

    def __init__(self, cache_dir: str | os.PathLike | None, processes: Processes) -> None:
        self._cache_dir, self._processes = cache_dir, processes

    def known(self, checkpoint: Checkpoint, names: Sequence[str]) -> str | None:
        """The fingerprint, if all files look as they did when it was found."""
        return self._processes.from_first(self._find(checkpoint.files(names)))

    def of(self, checkpoint: Checkpoint, names: Sequence[str]) -> str:
        """The fingerprint, if need be by reading the weights."""
        return self.known(checkpoint, names) or self.read(checkpoint, names)

    def of_both(
        self, pair: CheckpointPair, holds: Callable[[Mapping[str, str]], bool] | None, verify: bool = False
    ) -> dict[str, str] | None:
        """Of both sides of a pair, to look up by them; ``None`` as soon as that is found to be of no use.

        Reading a side for its fingerprint alone costs a good part of an estimate, which finds the fingerprint as well.
        So it is done only where something may come of it.

        Args:
            pair: the checkpoints, and the modules.
            holds: on the first process, whether anything is kept of the sides that are known so far.
            verify: read the files although they look unchanged.
        """
        found = {} if verify else {side: self.known(checkpoint, pair.names) for side, checkpoint in pair.sides.items()}
        found = {side: fingerprint for side, fingerprint in found.items() if fingerprint is not None}
        in_memory_first = sorted(pair.sides, key=lambda side: bool(pair.sides[side].files(pair.names)))
        for side in self._processes.from_first(in_memory_first):  # others may have loaded what it has as files
            if not self._processes.from_first(holds is not None and holds(found)):
                return None
            if side not in found:
                found[side] = self.read(pair.sides[side], pair.names)
        return found

    def read(self, checkpoint: Checkpoint, names: Sequence[str]) -> str:
        """The fingerprint, by reading the weights."""
        found = checkpoint.fingerprint(names, self._processes)
        self.remember(checkpoint, names, found)
        return found

    def remember(self, checkpoint: Checkpoint, names: Sequence[str], fingerprint: str) -> None:
        """Keep what was found by reading the weights of a checkpoint since it was opened.

        Not of files that changed meanwhile, or so shortly before that a second change would not show; nor where
        processes, which each read a share, have other files than the first one.
        """
        files = checkpoint.files(names)
        copies = self._processes.gather([(state.where, state.seen) for state in files])
        believed = all(copy == copies[0] for copy in copies) and all(state.settled for state in files)
        if files and believed and self._writes and all(state.unchanged() for state in files):
            seen = [list(state.seen) for state in files]
            self._place(files).write({"seen": seen, "fingerprint": fingerprint}, _LOST)

    @property
    def _writes(self) -> bool:
        return self._cache_dir is not None and self._processes.rank == 0

    def _find(self, files: dict[FileState, list[str]]) -> str | None:
        kept = self._place(files).read(_UNUSABLE) if files and self._writes else None
        return kept["fingerprint"] if kept and kept["seen"] == [list(state.seen) for state in files] else None

    def _place(self, files: dict[FileState, list[str]]) -> KeptJson:
        held = [[state.where, combine(dict.fromkeys(names, ""))] for state, names in files.items()]
        return KeptJson(self._cache_dir, "fingerprint", {"format": _FORMAT, "files": held})
