"""The files of a checkpoint: where they lie, and a reader for each weight in them; no weight is read before that."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


Readers = dict[str, Callable[[], Tensor]]
Shapes = dict[str, tuple[int, ...]]


def read_folder(folder: Path, source: str) -> tuple[Readers, Shapes]:
    """A reader and the shape of every ``weight`` in a folder's files, by module name.

    Raises:
        FileNotFoundError: if there are no weight files, or a shard is missing; ``source`` names the checkpoint.
        ValueError: if a file is corrupt.
    """
    found = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{source}: expected one of {', '.join(_WEIGHT_FILES)} in {folder}, but found none.")
    if found.name.endswith(".index.json"):
        try:
            files = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{found}: expected a shard index with a weight_map, but it cannot be read. Fetch it again."
            ) from error
    else:
        files = [found.name]

    readers, shapes = {}, {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{source}: the shard {file} that {found.name} lists is missing. Fetch it again.")
        opened = _safetensors_file if file.endswith(".safetensors") else _bin_file
        for key, (reader, shape) in opened(folder / file).items():
            prefix, _, kind = key.rpartition(".")
            if kind == "weight":
                readers[prefix], shapes[prefix] = reader, shape
    return readers, shapes


def _safetensors_file(path: Path) -> dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]]:
    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

        return read

    try:
        with safe_open(path, framework="pt") as file:
            return {key: (reader(key), tuple(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, but it is corrupt ({error}). Fetch it again."
        ) from error


def _bin_file(path: Path) -> dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]]:
    # mmap leaves the data on disk until a tensor is used; weights_only refuses to run pickled code.
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError) as error:
        raise ValueError(
            f"{path}: expected tensors written by torch.save, but it cannot be read with weights_only=True "
            f"({str(error).splitlines()[0]}). Fetch it again, or a checkpoint in safetensors."
        ) from error
    return {key: (lambda tensor=tensor: tensor, tuple(tensor.shape)) for key, tensor in state.items()}


def fetch_folder(source: str | os.PathLike, revision: str | None) -> Path:
    """The folder that the weight files of a Hub id were downloaded to.

    Raises:
        FileNotFoundError: if it is no Hub id, or the Hub does not give it.
    """

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=["config.json", *patterns]))

    try:
        folder = fetch("model*.safetensors", "model.safetensors.index.json")
        return folder if any(folder.glob("model*.safetensors")) else fetch("pytorch_model*.bin*")
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{source}: expected a folder with a checkpoint or a Hub id, but it is neither."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{source}: not a local folder, and the Hub did not give it ({type(error).__name__}). Check the name, "
            "log in with `hf auth login` if it is gated, and unset HF_HUB_OFFLINE if it is not in the cache."
        ) from error
