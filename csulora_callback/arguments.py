"""Checks of the callback's arguments: what was expected, and what came."""

from __future__ import annotations

import os


def check_source(name: str, source: object, kind: type) -> None:
    """Raise ``ValueError`` unless ``source`` is a path, a Hub id, one of ``kind``, or None."""
    fits = source is None or isinstance(source, kind) or is_path(source)
    check(name, fits, f"a path, a Hub id or a {kind.__name__}", source)


def is_path(value: object) -> bool:
    """Whether a value names a file, a folder or something on the Hub."""
    return isinstance(value, str | os.PathLike) and bool(str(value))


def check_steps(**steps: object) -> None:
    """Raise ``ValueError`` unless each is a number of steps or None."""
    for name, number in steps.items():
        whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        check(name, number is None or whole, "a number of steps ≥ 1 or None", number)


def check_flags(**flags: object) -> None:
    """Raise ``ValueError`` unless each is True or False."""
    for name, flag in flags.items():
        check(name, isinstance(flag, bool), "True or False", flag)


def check_folders(**paths: object) -> None:
    """Raise ``ValueError`` unless each is the path of a folder or None."""
    for name, path in paths.items():
        check(name, path is None or is_path(path), "the path of a folder or None", path)


def check(name: str, fits: bool, expected: str, got: object) -> None:
    """Raise ``ValueError`` that names the argument, unless it ``fits``."""
    if not fits:
        raise ValueError(f"`{name}`: expected {expected}, but got {got!r}.")
