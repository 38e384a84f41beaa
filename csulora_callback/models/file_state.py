"""What tells a file from others, and from itself after a change, without reading it: as git's index does."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TICK = 2 * 10**9  # nanoseconds: the coarsest clock of a file system in use, FAT's


@dataclass(frozen=True)
class FileState:
    """A file as it looked at one moment. Equal states are the same content, if the earlier one was settled.

    A file in the Hub's cache is known by the name of its blob, which is the Hub's own digest of the content, wherever
    the cache lies; its size and time of modification say that nobody wrote into it since. Any other one is known by
    its real path, size, times of modification and of change, and inode: one that was written to, replaced, or had its
    time put back is another. (The number of the device is left out: network file systems give new ones.)

    Attributes:
        path: where it was looked at.
        where: what it is known by.
        seen: what has to be the same.
        written: what changes when it is written to or replaced, and not by a change of its mode, say.
        settled: whether its last modification was long enough before. A clock has ticks, and of two changes within
            one the second cannot be seen.

    Example:
        >>> state = FileState.of(Path(os.__file__))
        >>> state == FileState.of(Path(os.__file__)), state.unchanged()
        (True, True)
    """

    path: Path = field(compare=False)
    where: str
    seen: tuple[int, ...]
    written: tuple[int, ...] = field(compare=False)
    settled: bool = field(compare=False)

    @classmethod
    def of(cls, path: Path) -> FileState:
        """As it is now.

        Raises:
            OSError: if it is not there.
        """
        now = time.time_ns()  # before the look: what changes after it shall count as recent
        real = Path(os.path.realpath(path))
        stat = real.stat()
        size, modified = stat.st_size, stat.st_mtime_ns
        written, settled = (size, modified, stat.st_ino), now - modified > _TICK
        if _is_blob(real):
            return cls(path, f"blob:{real.name}", (size, modified), written, settled)
        return cls(path, str(real), (*written, stat.st_ctime_ns), written, settled)

    def unchanged(self) -> bool:
        """Whether the file still looks the same."""
        return self._now() == self

    def unwritten(self) -> bool:
        """Whether nobody seems to have written to the file since, or replaced it."""
        now = self._now()
        return now is not None and now.written == self.written

    def _now(self) -> FileState | None:
        try:
            return FileState.of(self.path)
        except OSError:
            return None


def _is_blob(real: Path) -> bool:
    """Whether it is ``models--org--name/blobs/SHA256``, which large files in the Hub's cache are links to."""
    return bool(_SHA256.fullmatch(real.name)) and real.parent.name == "blobs" and "--" in real.parent.parent.name
