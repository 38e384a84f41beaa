"""The folder ``csulora/`` beside every corrected adapter: the raw factors and a record of what was done.

Nothing is lost by a correction: ``raw_adapter.safetensors`` has the keys of a PEFT adapter file, so that it can take
its place, and ``correction.json`` says which subspace and penalty were used and what they did to each module. Where
the penalty is data-aware, ``texts.json`` holds what the model read for it: some rows of the training data, and the
probes, as token ids.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from csulora_callback.models.activations import Texts
from csulora_callback.models.factors import Factors, digest, from_peft_state_dict, to_peft_state_dict

FOLDER = "csulora"
RAW_ADAPTER = "raw_adapter.safetensors"
TEXTS = "texts.json"
RECORD = "correction.json"


@dataclass(frozen=True)
class Sidecar:
    """Raw factors, the JSON record of their correction, and the texts that a data-aware penalty measured by."""

    raw: Factors
    record: dict
    texts: Texts | None = None

    def save(self, folder: str | os.PathLike) -> None:
        """Write into ``folder/csulora/``; each file appears whole or not at all.

        The record goes last: a folder that has it also has the factors it describes.
        """
        target = Path(folder) / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        state = to_peft_state_dict(self.raw)
        _write_whole(target / RAW_ADAPTER, lambda path: save_file(state, path, metadata={"format": "pt"}))
        (target / TEXTS).unlink(missing_ok=True)  # of an earlier checkpoint in this folder
        if self.texts is not None:
            texts = json.dumps(asdict(self.texts))
            _write_whole(target / TEXTS, lambda path: path.write_text(texts, encoding="utf-8"))
        text = json.dumps(self.record, indent=2, allow_nan=False)
        _write_whole(target / RECORD, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Sidecar:
        """Read ``folder/csulora/``.

        Raises:
            FileNotFoundError: if ``folder`` was not written with the callback.
            ValueError: if one of the files is corrupt, or they do not belong together.
        """
        record, raw_file = read_record(folder), Path(folder) / FOLDER / RAW_ADAPTER
        try:
            state = load_file(raw_file)
        except SafetensorError as error:
            raise ValueError(f"{raw_file}: expected a safetensors file, but it cannot be read ({error}).") from error
        raw = from_peft_state_dict(state, list(record["modules"]), str(raw_file))
        if digest(raw) != record["raw_digest"]:
            raise ValueError(
                f"{raw_file}: expected the factors that {RECORD} beside it records, but their digest is another. "
                "The file was changed; take both from a copy of the checkpoint."
            )
        return cls(raw, record, _read_texts(Path(folder) / FOLDER / TEXTS))


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy the sidecar of one folder, if it has one, into another; nothing but its two files, and not the texts."""
    for name in (RAW_ADAPTER, RECORD):
        file = Path(source) / FOLDER / name
        if file.is_file():
            (Path(target) / FOLDER).mkdir(parents=True, exist_ok=True)
            _write_whole(Path(target) / FOLDER / name, lambda path, file=file: shutil.copyfile(file, path))


def read_record(folder: str | os.PathLike) -> dict:
    """The record ``correction.json`` of a checkpoint folder.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it is not JSON.
    """
    path = Path(folder) / FOLDER / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; expected a checkpoint folder written with CSULoRACallback.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, but it cannot be read ({error}).") from error


def _read_texts(path: Path) -> Texts | None:
    if not path.is_file():
        return None
    try:
        return Texts(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path}: expected texts as JSON, but it cannot be read ({error}).") from error


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    write(temporary)
    os.replace(temporary, path)
