"""What a command line names: a folder, or a Hub id that may have a revision, ``org/model@v1``."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME

from csulora_callback.models.checkpoint import Checkpoint, open_checkpoint


def split_revision(source: str) -> tuple[str, str | None]:
    """A Hub id and its revision; a folder is what it is called.

    Example:
        >>> split_revision("org/model@v1"), split_revision("org/model")
        (('org/model', 'v1'), ('org/model', None))
    """
    name, at, revision = source.rpartition("@")
    if not at or not name or not revision or os.path.exists(source) or "/" in revision:
        return source, None
    return name, revision


def checkpoint_named(source: str) -> Checkpoint:
    """The checkpoint in a folder or on the Hub, see :func:`~csulora_callback.models.checkpoint.open_checkpoint`.

    Raises:
        FileNotFoundError: if it cannot be had, or holds no weights.
        ValueError: if a file of it is corrupt.
    """
    name, revision = split_revision(source)
    return open_checkpoint(name, revision=revision)


def adapter_named(source: str) -> Path:
    """The folder of an adapter, which is fetched if it is one on the Hub, with what lies in ``csulora/`` beside it.

    Raises:
        FileNotFoundError: if it cannot be had, or is no adapter.

    Example:
        >>> adapter_named("no/such/adapter")
        Traceback (most recent call last):
        FileNotFoundError: no/such/adapter: expected a folder with a PEFT adapter or a Hub id, but it is neither.
    """
    folder = Path(source) if os.path.isdir(source) else _fetch(*split_revision(source), source)
    inside = [place.parent.name for place in folder.glob(f"*/{CONFIG_NAME}")]
    if not (folder / CONFIG_NAME).is_file() and not inside:
        raise FileNotFoundError(
            f"{source}: expected a folder with a PEFT adapter, but there is no {CONFIG_NAME} in it. Pass the folder "
            "that save_pretrained or the Trainer wrote, such as out/checkpoint-100."
        )
    return folder


def _fetch(name: str, revision: str | None, source: str) -> Path:
    patterns = ["adapter_*", "*/adapter_*", "csulora/*"]  # names of one's own have a folder each
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{source}: expected a folder with a PEFT adapter or a Hub id, but it is neither."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{source}: not a local folder, and the Hub did not give it ({type(error).__name__}). Check the name, "
            "log in with `hf auth login` if it is gated, and unset HF_HUB_OFFLINE if it is not in the cache."
        ) from error
