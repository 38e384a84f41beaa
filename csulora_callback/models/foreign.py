"""Checks on what comes from other people: names of files that they list, and the errors that reading theirs gives."""

from __future__ import annotations

from pathlib import PureWindowsPath


def stays_inside(file: str) -> bool:
    """Whether a name leads to something below the folder that it is joined to, on any system.

    What a link of that name points to does not count: in the Hub's cache every file is a link that leads out.

    Example:
        >>> stays_inside("data/rows.csv"), stays_inside("../rows.csv"), stays_inside("/rows.csv")
        (True, False, False)
    """
    parts = file.replace("\\", "/").split("/")
    return not (parts[0] == "" or ".." in parts or PureWindowsPath(file).drive)


def first_line(error: Exception) -> str:
    """What an error of a library is and says, short enough to stand in another message.

    Example:
        >>> first_line(RuntimeError("no such tensor" + 2 * chr(10) + "Much more"))
        'RuntimeError: no such tensor'
    """
    return f"{type(error).__name__}: {error}".splitlines()[0]
