"""What goes where in a command line: data to the standard output, everything else to the standard error."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

from rich.console import Console

from csulora_callback.reporting.terminal import make_console

FAILED, MISUSED = 1, 2
_NAMES = {
    "adapter": "ADAPTER",
    "checkpoint": "ADAPTER",
    "aligned_model": "--aligned",
    "target_modules": "--target-modules",
    **{
        name: f"--{name}"
        for name in ("energy", "output", "probes", "rank", "strength", "subspace", "target", "task", "uncorrected")
    },
}
"""What arguments of the library are called in a command line, where its errors begin with one."""


def set_up_streams() -> None:
    """What the library says while it works, and warnings of all others, go to the standard error.

    A stream whose encoding lacks a letter shows a question mark in its place.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    logging.basicConfig(format="csulora: %(message)s", level=logging.WARNING)
    logging.getLogger("csulora_callback").setLevel(logging.INFO)


def show(as_json: bool, data: Callable[[], dict], print_all: Callable[[Console], None]) -> None:
    """Print the one or the other."""
    if as_json:
        print(json.dumps(data(), indent=2, allow_nan=False))
    else:
        print_all(make_console())


@contextmanager
def working() -> Iterator[None]:
    """What libraries print inside goes to the standard error, and so does, in one line, an error that is foreseen.

    Raises:
        SystemExit: with the status 1, for such an error.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (ValueError, OSError, ImportError) as error:
        fail(str(error), FAILED)


def demand(condition: object, message: str) -> None:
    """Leave with the status 2 unless the arguments are fit to be used together."""
    if not condition:
        fail(message, MISUSED)


@contextmanager
def arguments() -> Iterator[None]:
    """A ``ValueError`` inside is one of arguments, and leaves with the status 2."""
    try:
        yield
    except ValueError as error:
        fail(str(error), MISUSED)


def fail(message: str, status: int) -> NoReturn:
    """One line on the standard error, and the end."""
    message = re.sub(r"^`(\w+)`", lambda found: f"`{_NAMES.get(found[1], found[1])}`", " ".join(message.split()))
    print(f"csulora: {message}", file=sys.stderr)
    raise SystemExit(status)
