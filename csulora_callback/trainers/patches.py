"""Methods of single objects that are replaced while a run lasts, and put back when it is over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

T = TypeVar("T")


class Patches:
    """The replaced methods of one run.

    A run that an exception ended cannot put back what it replaced: the next one that replaces one of the methods does.

    Attributes:
        run: whose they are.
        in_place: whether they are replaced at the moment.

    Example:
        >>> class Door:
        ...     def open(self):
        ...         return "open"
        >>> door, patches = Door(), Patches()
        >>> patches.replace(door, "open", lambda original: lambda: original().upper())
        >>> door.open(), patches.undo(), door.open()
        ('OPEN', None, 'open')
    """

    def __init__(self, run: object = None) -> None:
        self.run = run
        self._undo = ExitStack()
        self.in_place = False

    def replace(self, owner: object, name: str, wrap: Callable[[Callable], Callable]) -> None:
        """``owner.name`` is from now on what ``wrap`` makes of it."""
        _release(owner, name)
        earlier = vars(owner).get(name)
        wrapped = wrap(getattr(owner, name))
        # A bound method takes attributes through its function.
        getattr(wrapped, "__func__", wrapped).replaced_by = self, owner
        setattr(owner, name, wrapped)
        self.in_place = True

        def undo() -> None:
            if vars(owner).get(name) is not wrapped:  # someone else has wrapped it since, and keeps it
                return
            if earlier is None:
                delattr(owner, name)
            else:
                setattr(owner, name, earlier)

        self._undo.callback(undo)

    def undo(self) -> None:
        """Put back all that was replaced."""
        self._undo.close()
        self.in_place = False


def surrounded(call: Callable, applies: Callable[[], bool]) -> Callable[[Callable], Callable]:
    """What :meth:`Patches.replace` makes of a method that ``call`` is to run, as its first argument, while it applies.

    Example:
        >>> wrap = surrounded(lambda original, word: original(word) + "!", lambda: True)
        >>> wrap(str.upper)("open")
        'OPEN!'
    """

    def wrap(original: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            return call(original, *args, **kwargs) if applies() else original(*args, **kwargs)

        return wrapped

    return wrap


def _release(owner: object, name: str) -> None:
    """Undo an earlier run's replacement of a method."""
    replaced_by = getattr(vars(owner).get(name), "replaced_by", None)
    if replaced_by is not None:
        patches, of = replaced_by
        if of is owner:
            patches.undo()
        else:  # a copy took the attribute along
            delattr(owner, name)


def run_of(owner: object, name: str) -> object:
    """The run that has replaced a method, if one has and did not end.

    Example:
        >>> run_of(Patches(), "undo") is None
        True
    """
    patches, of = getattr(vars(owner).get(name), "replaced_by", (None, None))
    return patches.run if of is owner else None


def calling(kind: type[T]) -> T | None:
    """The innermost object of this kind whose method is running in this thread: events get no reference to it.

    Example:
        >>> calling(Patches) is None
        True
    """
    return next((found for found, _ in _running(threading.get_ident()) if isinstance(found, kind)), None)


def is_running(instance: object, thread: int, method: str | None = None) -> bool:
    """Whether a method of the object, maybe the one of this name, is running in a thread.

    Example:
        >>> is_running(Patches(), threading.get_ident())
        False
    """
    return any(found is instance and method in (None, name) for found, name in _running(thread))


def _running(thread: int) -> Iterator[tuple[object, str]]:
    """Whose methods are running in a thread and what they are called, innermost first."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame.f_locals.get("self"), frame.f_code.co_name
        frame = frame.f_back
