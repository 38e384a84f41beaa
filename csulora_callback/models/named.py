"""Checkpoints as a command line names them: a folder, or a Hub id with its revision."""

from __future__ import annotations

import os

from peft import PeftConfig

from csulora_callback.models.checkpoint import Checkpoint, open_checkpoint
from csulora_callback.models.weight_files import fetch_folder


def checkpoint_named(name: str) -> Checkpoint:
    """Of what stands in a command line: a folder, or a Hub id that may end in ``@revision``.

    Raises:
        FileNotFoundError: as :func:`open_checkpoint` does.
        ValueError: likewise.

    Example:
        >>> checkpoint_named("no/such/model@v1")
        Traceback (most recent call last):
        FileNotFoundError: no/such/model: expected a folder with a checkpoint or a Hub id, but it is neither.
    """
    source, revision = _split(name)
    return open_checkpoint(source, revision=revision)


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
    return checkpoint_named(aligned or (f"{name}@{revision}" if revision and not os.path.isdir(name) else name))


def _split(name: str) -> tuple[str, str | None]:
    source, at, revision = name.rpartition("@")
    return (source, revision) if at and not os.path.isdir(name) else (name, None)
