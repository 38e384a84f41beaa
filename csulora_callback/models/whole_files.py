"""Files and folders that appear whole or not at all, whoever else writes them, dies or fails in the middle.

What is to be written is made in a folder of a unique name beside its place, and renamed into it when it is whole. In
a folder, not in a file, because others leave things too: safetensors writes to a temporary file of its own next to the
one it is asked for, readable by its owner alone.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WORKPLACE = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})\.(?P<process>[0-9]+)\.[0-9a-f]{8}\.part")
_A_DAY = 24 * 60 * 60.0


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write a file elsewhere and put it at ``path``, in place of what is there; folders above are made.

    Of several that write at once, one wins whole. The mode follows the umask, whatever ``write`` gave the file. Where
    ``write`` raises, ``path`` is as it was and nothing is left.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_whole(folder / "new" / "note.txt", lambda path: path.write_text("whole"))
        >>> [path.name for path in folder.rglob("*")], (folder / "new" / "note.txt").read_text()
        (['new', 'note.txt'], 'whole')
    """
    with _workplace_beside(path) as workplace:
        new = workplace / path.name
        write(new)
        _follow_umask(workplace, [new])
        os.replace(new, path)


def put_folder(path: Path, make: Callable[[Path], object]) -> None:
    """Let ``make`` fill an empty folder elsewhere and put it at ``path``, in place of a folder that is there.

    What :func:`write_whole` says of several writers, modes and failures holds here too. While a folder is replaced
    there is an instant when neither is at ``path``: no system call of every platform exchanges two folders.

    Raises:
        NotADirectoryError: if a file is at ``path``.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "adapter"
        >>> put_folder(folder, lambda path: (path / "old.txt").write_text("old"))
        >>> put_folder(folder, lambda path: (path / "new.txt").write_text("new"))
        >>> [path.name for path in folder.iterdir()], [path.name for path in folder.parent.iterdir()]
        (['new.txt'], ['adapter'])
    """
    with _workplace_beside(path) as workplace:
        new = workplace / path.name
        new.mkdir()
        make(new)
        _follow_umask(workplace, [file for file in new.rglob("*") if file.is_file()])
        for attempt in itertools.count():
            try:
                os.rename(new, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            with suppress(FileNotFoundError):  # another process has just moved it aside
                os.rename(path, workplace / f"{attempt}.old")


def remove_abandoned(folder: Path) -> None:
    """Remove what writers that are gone left in ``folder`` when they were killed; never what a live process writes.

    A writer is gone if its process is, or, where that cannot be known because it ran on another machine, after a day.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _name_of_workplace("weights.safetensors").endswith(".part")
        True
        >>> remove_abandoned(folder)
    """
    for path in folder.glob(".*.part"):
        if _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too


@contextmanager
def _workplace_beside(path: Path) -> Iterator[Path]:
    """An empty folder on the file system of ``path``; gone afterwards, with all that is still in it."""
    workplace = path.with_name(_name_of_workplace(path.name))
    workplace.mkdir(parents=True)
    try:
        remove_abandoned(path.parent)
        yield workplace
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _name_of_workplace(name: str) -> str:
    # Unique for a thread, not only for a process. Names end at 255 bytes, and a character has up to 4.
    return f".{name[:50]}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.part"


def _is_abandoned(workplace: Path) -> bool:
    parts = _WORKPLACE.fullmatch(workplace.name)
    if parts is None:
        return False
    try:
        age = time.time() - workplace.lstat().st_mtime
    except OSError:  # gone already
        return False
    return age > _A_DAY or (parts["machine"] == _machine() and _is_gone(int(parts["process"])))


def _is_gone(process: int) -> bool:
    if os.name != "posix":  # elsewhere a signal that only asks does not exist, and 0 would end the process
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's
        return False
    return False


def _machine() -> str:
    """Where a process id means the same process: one host, and on Linux one container of it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _follow_umask(workplace: Path, files: list[Path]) -> None:
    # The folder was made with the umask, which a process cannot read without changing it for all its threads.
    mode = workplace.stat().st_mode & 0o666
    for file in files:
        file.chmod(mode)
