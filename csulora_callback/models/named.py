"""Checkpoints as a person names them: a folder, or a Hub id, in a command line with its revision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftConfig

from csulora_callback.models.checkpoint import Checkpoint, open_checkpoint
from csulora_callback.models.weight_files import fetch_folder


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """What goes wrong inside with a checkpoint is said of the argument that named it.

    Example:
        >>> with naming("base_model"):
        ...     open_checkpoint("no/such/model")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: `base_model`: no/such/model: expected a folder with a checkpoint or a Hub id, ...
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{argument}`: {error}") from error
    except ValueError as error:
        raise ValueError(f"`{argument}`: {error}") from error


def checkpoint_named(name: str, argument: str) -> Checkpoint:
    """Of what stands in a command line as an argument: a folder, or a Hub id that may end in ``@revision``.

    Raises:
        FileNotFoundError: as :func:`open_checkpoint` does.
        ValueError: likewise.

    Example:
        >>> checkpoint_named("no/such/model@v1", "--base")
        Traceback (most recent call last):
        FileNotFoundError: `--base`: no/such/model: expected a folder with a checkpoint or a Hub id, but it is neither.
    """
    with naming(argument):
        return _open(name)


def model_named(name: str) -> str:
    """What transformers loads of what :func:`checkpoint_named` takes: of a revision the folder it was downloaded to.

    Raises:
        FileNotFoundError: if the Hub does not give the revision.

    Example:
        >>> model_named("org/model")
        'org/model'
    """
    source, revision = _split(name)
    return source if revision is None else str(fetch_folder(source, revision, "*.json", "*.jinja", "*.model", "*.txt"))


def aligned_under(config: PeftConfig, aligned: str | None) -> Checkpoint:
    """The checkpoint under an adapter, by its config where no other is named.

    Raises:
        ValueError: if the config names none; and as :func:`open_checkpoint` does.
        FileNotFoundError: likewise.

    Example:
        >>> from peft import LoraConfig
        >>> aligned_under(LoraConfig(), None)
        Traceback (most recent call last):
        ValueError: `--aligned`: expected the aligned checkpoint, as the adapter's config names none. Pass it.
    """
    name, revision = config.base_model_name_or_path, config.revision
    if not aligned and not name:
        raise ValueError("`--aligned`: expected the aligned checkpoint, as the adapter's config names none. Pass it.")
    return _open(aligned or (f"{name}@{revision}" if revision and not os.path.isdir(name) else name))


def _open(name: str) -> Checkpoint:
    source, revision = _split(name)
    return open_checkpoint(source, revision=revision)


def _split(name: str) -> tuple[str, str | None]:
    source, at, revision = name.rpartition("@")
    return (source, revision) if at and not os.path.isdir(name) else (name, None)
