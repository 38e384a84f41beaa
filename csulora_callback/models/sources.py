"""Where rows come from: a local file, a file of an installed package (``package:path``), or a Hub id."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

if TYPE_CHECKING:
    from datasets import Dataset

# What `datasets` calls them.
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


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
    if Path(source).is_file():
        return Path(source)
    if Path(source).is_dir():  # a data set in a folder, which `datasets` reads
        return None
    package, colon, inside = source.partition(":")
    if colon and package.isidentifier():
        return _in_package(package, inside)
    if source.endswith((*_READERS, ".gguf")):
        raise ValueError(f"no such file: {source!r}")
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ValueError(f"no such file or folder, and not a Hub id: {source!r}") from error
    return None


def read_rows(source: str, split: str = "train") -> Dataset:
    """The rows of a source: JSON, JSON lines, CSV, lines of text (column ``text``), or a split of a Hub dataset.

    Raises:
        ValueError: as :func:`locate` does, and for what cannot be read as a table.
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
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
    except ImportError as error:
        raise ImportError(
            f"{source} is read with datasets, which is not installed: pip install 'csulora-callback[probes]'"
        ) from error
    if file is None:
        try:
            return load_dataset(source, split=split)
        except OSError as error:  # not there, or not reached
            raise ValueError(f"{source} cannot be read from the Hub: {error}") from error
    if file.suffix not in _READERS:
        raise ValueError(f"expected a file that ends in one of {', '.join(_READERS)}, but got {source!r}")
    try:
        return load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    except DatasetGenerationError as error:
        raise ValueError(f"{source}: not {file.suffix[1:]} that can be read as a table") from error


def _in_package(package: str, inside: str) -> Path:
    spec = find_spec(package)  # of a top-level package: finds it and runs none of its code
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no installed package {package!r}; install what ships it, then run this again")
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / inside).is_file():
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in _READERS]
        near = difflib.get_close_matches(inside, names, n=1)
        raise ValueError(
            f"no file {inside!r} in the package {package!r}{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    return folder / inside
