"""One callback class for two trainers: Lightning's base class joins it where Lightning is in use."""

from __future__ import annotations

import sys
from functools import cache
from typing import TypeVar

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")  # one project, two import names
_Made = TypeVar("_Made")


def also_lightnings(kind: type[_Made]) -> type[_Made]:
    """``kind``, or where Lightning is in use a subclass that is one of its callbacks too.

    Lightning asks its callbacks for some forty hooks. Inheriting them here, and not in the class statement, spares
    everyone else the import.

    Example:
        >>> issubclass(also_lightnings(dict), dict)
        True
    """
    bases = tuple(sys.modules[package].Callback for package in _LIGHTNING if package in sys.modules)
    return _mixed(kind, bases) if bases and not issubclass(kind, bases) else kind


def importable(kind: type) -> type:
    """The class that a mixed one was made from, which has a name that a pickle can hold.

    Example:
        >>> importable(also_lightnings(dict)) is dict
        True
    """
    return next(each for each in kind.__mro__ if each.__dict__.get("_made_from") is None)


def bare(kind: type[_Made]) -> _Made:
    """An instance that a pickle then fills.

    Example:
        >>> bare(dict)
        {}
    """
    made = also_lightnings(kind)
    return made.__new__(made)


@cache
def _mixed(kind: type, bases: tuple[type, ...]) -> type:
    return type(kind.__name__, (kind, *bases), {"_made_from": kind, "__doc__": kind.__doc__})
