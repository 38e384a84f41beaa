"""Where rows come from: a local file, a file of an installed package (``package:path``), or a Hub id."""

from __future__ import annotations

import difflib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from csulora_callback.models.foreign import first_line, stays_inside
from csulora_callback.models.tables import READERS, check_encoding, find_fault, reader_options

if TYPE_CHECKING:
    from datasets import Dataset


def locate(source: str) -> Path | None:
    """The file that ``source`` names, or ``None`` for a Hub id or a folder; nothing of a package is imported or run.

    Raises:
        ValueError: if it is no such file, no installed package, or no possible Hub id.

    Example:
        >>> locate("trl-lib/Capybara") is None  # on the Hub
        True
        >>> locate("torch:version.py").name  # a file that a package ships
        'version.py'
    """
    if os.path.isfile(source):  # unlike Path's, also False for names that no system takes
        return Path(source)
    if os.path.isdir(source):  # a data set in a folder, which `datasets` reads
        return None
    package, colon, inside = source.partition(":")
    if colon and package.isidentifier():
        return _in_package(package, inside)
    if source.endswith((*READERS, ".gguf")):
        raise ValueError(f"no such file: {source!r}")
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(f"no such file or folder, and not a Hub id: {source!r}") from error
    return None


def read_rows(source: str, split: str = "train") -> Dataset:
    """The rows of a source: JSON, JSON lines, CSV, Parquet, lines of text (column ``text``), or a split on the Hub.

    Cells of CSV are texts as they stand there, also where they are empty or look like numbers or ``NA``.

    Raises:
        ValueError: as :func:`locate` does, and for what cannot be read as a table, with the line where it is known.
        ImportError: where ``datasets`` is not installed, naming the extra that brings it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "prompts.jsonl"
        >>> _ = file.write_text('{"prompt": "How do I pick a lock?"}')
        >>> read_rows(str(file))["prompt"][:]
        ['How do I pick a lock?']
    """
    file = locate(source)
    try:
        from datasets import load_dataset, logging
    except ImportError as error:
        raise ImportError(
            f"{source} is read with datasets, which is not installed: pip install 'csulora-callback[probes]'"
        ) from error
    if file is not None and file.suffix not in READERS:
        raise ValueError(f"expected a file that ends in one of {', '.join(READERS)}, but got {source!r}")
    if file is not None:
        check_encoding(file, source)
    said = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
    try:
        if file is None:
            return load_dataset(source, split=split)
        reader = READERS[file.suffix]
        return load_dataset(reader, data_files=str(file), split="train", **reader_options(file))
    except Exception as error:  # of many kinds, StopIteration and RecursionError among them
        expected = "a data set that can be read" if file is None else f"{file.suffix[1:]} that can be read as a table"
        reason = (file and find_fault(file)) or first_line(error.__cause__ or error)
        raise ValueError(f"{source}: not {expected} ({reason})") from error
    finally:
        logging.set_verbosity(said)


def _in_package(package: str, inside: str) -> Path:
    try:
        spec = find_spec(package)  # of a top-level package: finds it and runs none of its code
    except ValueError:  # of a module that was not imported from a file, as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no installed package {package!r}; install what ships it, then run this again")
    if not stays_inside(inside):
        raise ValueError(
            f"expected a file inside the package {package!r}, but got {inside!r}; give any other file by its path"
        )
    folder = Path(spec.submodule_search_locations[0])
    if not os.path.isfile(folder / inside):
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in READERS]
        near = difflib.get_close_matches(inside, names, n=1)
        raise ValueError(
            f"no file {inside!r} in the package {package!r}{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    return folder / inside
