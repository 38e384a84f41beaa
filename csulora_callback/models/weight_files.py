"""The files of a checkpoint: where they lie, and a reader for each weight in them; no weight is read before that."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from csulora_callback.models.file_state import FileState
from csulora_callback.models.foreign import first_line, stays_inside
from csulora_callback.models.stored import Stored

_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


_Entries = dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]]
"""What one file holds: a reader and a shape by key, in the order in which they lie there."""


def read_folder(folder: Path, source: str) -> Stored:
    """Every ``weight`` in a folder's files by module name, and every other three-dimensional tensor by its own.

    What has three dimensions may be the weights of experts, which transformers keeps in parameters of any name.
    They come in the order in which they lie in the files. A reader opens its file anew: what a weight takes of memory,
    mapped pages included, is gone with it. (Measured on shards of 0.5 GB: opening costs 0.1 ms, and a file that stays
    open keeps every page that was read of it.)

    Raises:
        FileNotFoundError: if there are no weight files, or a shard is missing; ``source`` names the checkpoint.
        ValueError: if a file is corrupt, or an index is, names a file outside the folder, or a weight that is not in
            the file it names.
    """
    found = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None and (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{source}: expected a whole checkpoint, but {folder} holds a PEFT adapter alone, which has no weights of "
            "the model. As base pass the checkpoint from before alignment, as aligned one that under the adapter."
        )
    if found is None:
        raise FileNotFoundError(
            f"{source}: expected one of {', '.join(_WEIGHT_FILES)} as a file in {folder}, but found none."
        )
    files = _shards(found) if found.name.endswith(".index.json") else {found.name: []}

    readers, shapes, states, keys = {}, {}, {}, []
    for file, listed in files.items():
        if not os.path.isfile(folder / file):  # unlike Path.is_file, also False for names that no system takes
            raise FileNotFoundError(
                f"{source}: the shard {file!r} that {found.name} lists is missing. Fetch it again."
            )
        state = FileState.of(folder / file)  # before it is opened, so that it is not newer than what is read
        entries = (_safetensors_file if file.endswith(".safetensors") else _bin_file)(folder / file)
        for key in listed:
            if _module_of(key) is not None and key not in entries:
                raise ValueError(
                    f"{found}: expected the shard {file!r} to hold {key!r}, as the index says, but it does not. "
                    "Fetch both again."
                )
        keys += entries
        for key, (reader, shape) in entries.items():
            if (module := _module_of(key)) is not None or len(shape) == 3:
                module = key if module is None else module
                readers[module], shapes[module], states[module] = reader, shape, (state,)
    return Stored(readers, shapes, states, _packed(keys, _says_quantized(folder)))


def _packed(keys: list[str], says_quantized: bool) -> dict[str, str]:
    """Of modules whose weight is packed, what is stored instead.

    bitsandbytes keeps below the weight's name how it has to be read. Others keep it under names of their own; what has
    no weight is quantized then if the config says so of the checkpoint.
    """
    whole, parts = {_module_of(key) for key in keys}, {}
    for key in keys:
        module, is_below, part = key.partition(".weight.")
        if not is_below:
            module, _, part = key.rpartition(".")
        if is_below or (says_quantized and module not in whole):
            parts.setdefault(module, []).append(part)
    return {module: f"packed, with {', '.join(names)}" for module, names in parts.items()}


def _says_quantized(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"], dict)
    except (ValueError, KeyError, TypeError, RecursionError, OSError):  # what lies there need not be a config
        return False


def _module_of(key: str) -> str | None:
    """The module whose ``weight`` a key is, or ``None`` if it is something else."""
    module, _, kind = key.rpartition(".")
    return module if kind == "weight" else None


def _shards(index: Path) -> dict[str, list[str]]:
    """The keys that an index lists, by the file that they lie in."""
    try:
        # RecursionError: brackets nested by the thousand. The JSON errors and those of its encoding are ValueErrors.
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(
            f"{index}: expected a shard index with a weight_map, but it cannot be read. Fetch it again."
        ) from error
    files: dict[str, list[str]] = {}
    for key, file in weight_map:
        if not isinstance(file, str) or not stays_inside(file):
            raise ValueError(
                f"{index}: expected the name of a file in this folder for the weight {key!r}, but got {file!r}. "
                "Fetch it again, or do not use it: nothing outside the folder is read."
            )
        files.setdefault(file, []).append(key)
    return dict(sorted(files.items()))


def _safetensors_file(path: Path) -> _Entries:
    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with _opened(path) as file:
                return file.get_tensor(key)

        return read

    with _opened(path) as file:
        return {key: (reader(key), tuple(file.get_slice(key).get_shape())) for key in file.offset_keys()}


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # the header also names types of numbers that PyTorch may lack
        raise ValueError(
            f"{path}: expected a safetensors file, but it is corrupt ({first_line(error)}). Fetch it again."
        ) from error


def _bin_file(path: Path) -> _Entries:
    state, mapped = _load(path), zipfile.is_zipfile(path)

    def reader(key: str, value: object) -> Callable[[], Tensor]:
        # One that is mapped is loaded again for each weight, so that the pages of others need not stay in memory.
        return lambda: _dense(path, key, _load(path).get(key) if mapped else value)

    # Other entries beside the weights are let be, unless one of them is asked for.
    return {
        key: (reader(key, None if mapped else value), tuple(value.shape) if _is_dense(value) else ())
        for key, value in state.items()
        if isinstance(key, str)
    }


def _load(path: Path) -> dict:
    # mmap leaves the data on disk until a tensor is used; weights_only refuses to run pickled code.
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle is a damaged program: it may fail in any way
        raise ValueError(
            f"{path}: expected tensors written by torch.save, but it cannot be read with weights_only=True "
            f"({first_line(error)}). Fetch it again, or a checkpoint in safetensors."
        ) from error
    held = {type(value).__name__ for value in state.values()} if isinstance(state, dict) else set()
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path}: expected tensors by name, but got {type(state).__name__}"
            f"{f' of {sorted(held)}' if held else ''}. Save the model's state_dict() itself, with nothing around it."
        )
    return state


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_nested


def _dense(path: Path, key: str, value: object) -> Tensor:
    if not _is_dense(value):
        kind = "one that is sparse, nested or without data" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{path}: expected a dense tensor for {key!r}, but got {kind}. "
            "Save the checkpoint again by save_pretrained."
        )
    return value.detach()


def fetch_folder(source: str | os.PathLike, revision: str | None, *beside: str) -> Path:
    """The folder that the weight files of a Hub id were downloaded to, and files of the patterns ``beside``.

    Raises:
        FileNotFoundError: if it is no Hub id, or the Hub does not give it.
    """

    def fetch(*patterns: str) -> Path:
        return _fetch(source, revision, "checkpoint", ["config.json", "adapter_config.json", *beside, *patterns])

    folder = fetch("model*.safetensors", "model.safetensors.index.json")
    return folder if any(folder.glob("model*.safetensors")) else fetch("pytorch_model*.bin*")


def fetch_adapter(source: str | os.PathLike, revision: str | None) -> Path:
    """The folder that the adapter of a Hub id was downloaded to, with what may lie in ``csulora/`` beside it.

    Raises:
        FileNotFoundError: if it is no Hub id, or the Hub does not give it.
    """
    return _fetch(
        source, revision, "PEFT adapter", ["adapter_config.json", "adapter_model.*", "README.md", "csulora/*"]
    )


def _fetch(source: str | os.PathLike, revision: str | None, what: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{source}: expected a folder with a {what} or a Hub id, but it is neither."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        of = "" if revision is None else f" of revision {revision!r}"
        raise FileNotFoundError(
            f"{source}: not a local folder, and the Hub did not give it{of} ({type(error).__name__}). Check the path "
            "or name, log in with `hf auth login` if it is gated, and unset HF_HUB_OFFLINE if it is not in the cache."
        ) from error
