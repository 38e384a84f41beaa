"""What draws and writes pages is an extra: where it is missing, the error names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def report_extra(what: str) -> Iterator[None]:
    """Import in here what needs the extra ``report``.

    Args:
        what: it is for.

    Raises:
        ImportError: if it is not installed.

    Example:
        >>> with report_extra("a report"):
        ...     raise ModuleNotFoundError(name="matplotlib.figure")
        Traceback (most recent call last):
        ImportError: a report needs matplotlib, which is not installed: pip install 'csulora-callback[report]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        if package not in ("jinja2", "matplotlib"):
            raise
        raise ImportError(
            f"{what} needs {package}, which is not installed: pip install 'csulora-callback[report]'"
        ) from error
