"""The folder ``csulora/`` beside every corrected adapter: the raw adapter and a record of what was done.

Nothing is lost by a correction: ``raw/`` is the adapter as it would have been saved without one, a folder that
``PeftModel.from_pretrained`` loads, and ``correction.json`` says which subspace and penalty were used and what they
did to each module. With probes, ``texts.json`` holds what the model read and was measured by: some rows of the
training data and the probes, as token ids.

The folder appears as a whole, after the adapter that it describes, and an older one goes before anything new is
written. The record holds digests of itself, of the other files and of the adapter beside it: a folder that was
damaged, or that stands beside another adapter than its own, is not believed. ``raw/`` as a whole and ``texts.json``
may be missing, as on the Hub they are: the record is as good without. With it comes its section in the model card.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig

from csulora_callback import model_card
from csulora_callback.models.activations import Texts
from csulora_callback.models.factors import Factors, digest, from_peft_state_dict
from csulora_callback.models.peft_folder import WEIGHTS, adapter_folder, read_adapter, write_with_factors
from csulora_callback.models.slots import Slot, slots_in
from csulora_callback.models.whole_files import discard_folder, put_folder
from csulora_callback.pushing import card_of_push, uploads_all
from csulora_callback.record import checked, seal

logger = logging.getLogger(__name__)

FOLDER = "csulora"
RAW = "raw"
TEXTS = "texts.json"
RECORD = "correction.json"


class NotPublishedError(FileNotFoundError):
    """There is the record of a correction, and the raw adapter was left out when it was uploaded or copied."""


@dataclass(frozen=True)
class Sidecar:
    """Raw factors, the JSON record of their correction, and the texts that a data-aware penalty measured by.

    ``corrected`` are the factors of the adapter beside it, where there is one: beside shards there is none.
    """

    raw: Factors
    record: dict
    texts: Texts | None = None
    corrected: Factors | None = None

    def save(
        self,
        folder: str | os.PathLike,
        config: PeftConfig,
        source: Path | None = None,
        slots: Sequence[Slot] | None = None,
    ) -> None:
        """Write ``folder/csulora/`` beside the adapter that was just saved into ``folder``.

        Where that is not the one that the record describes, because someone else has written there meanwhile, nothing
        is written but a warning.

        Args:
            folder: what the adapter was saved into.
            config: the adapter's, for where no config lies beside.
            source: the folder that the raw adapter's config and whatever else it holds are copied from, where they
                are not those of the adapter beside it: one that was expanded has other ranks.
            slots: of the adapter, for where none lies beside.
        """
        folder = Path(folder)
        beside = adapter_folder(folder, self.record["adapter"])
        found = _factors_beside(beside, list(self.raw))
        if found is not None and digest(found) != self.record["corrected_digest"]:
            logger.warning(
                "%s holds another adapter than the one that was just saved there: someone else writes into the same "
                "folder, and no %s/ was written beside it.",
                beside,
                FOLDER,
            )
            model_card.renew(folder, None, beside)
            return
        put_folder(folder / FOLDER, lambda target: self._write(source or beside, target, config, slots))
        if found is not None:
            model_card.renew(folder, self.record, beside)
            if (pushed := card_of_push()) is not None:
                model_card.renew_pushed(pushed, self.record, beside)
        if uploads_all():
            logger.warning(
                "What is pushed now has the record of the correction, and not the raw adapter. Save the model into a "
                "folder of yours too, or keep a checkpoint: the correction can be undone with these only."
            )

    def _write(self, source: Path, target: Path, config: PeftConfig, slots: Sequence[Slot] | None) -> None:
        write_with_factors(source, self.raw, target / RAW, config, slots)
        if self.texts is not None:
            (target / TEXTS).write_text(json.dumps(self.texts.to_json()), encoding="utf-8")
        (target / RECORD).write_text(seal(self.record, _files_in(target)), encoding="utf-8")
        if uploads_all():
            shutil.rmtree(target / RAW)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Sidecar:
        """Read ``folder/csulora/``.

        Raises:
            FileNotFoundError: if ``folder`` was not written with the callback.
            NotPublishedError: if the record is there and the raw adapter is not.
            ValueError: if one of the files is corrupt, or they do not belong together or to the adapter beside them.
        """
        folder = Path(folder)
        record, place = read_record(folder), folder / FOLDER
        found = _files_in(place)
        left_out = record["files"].keys() - found.keys()
        raw_is_left_out = not any(map(_is_raw, found)) and any(map(_is_raw, left_out))
        if found != {file: record["files"].get(file) for file in found} or not all(
            file == TEXTS or (raw_is_left_out and _is_raw(file)) for file in left_out
        ):
            raise ValueError(
                f"{place}: expected the files that {RECORD} there records, but one of them was changed or is missing. "
                "Take the folder from a copy of the checkpoint."
            )
        names = list(record["modules"])
        corrected = _corrected_beside(folder, record)
        if raw_is_left_out:
            raise NotPublishedError(
                f"{folder} holds a corrected adapter whose raw one was not published with it. That lies where the "
                f"adapter was trained or corrected, in {FOLDER}/{RAW}: use that folder."
            )
        raw = from_peft_state_dict(read_adapter(place / RAW), names, str(place / RAW / WEIGHTS))
        return cls(raw, record, _read_texts(place / TEXTS), corrected)


def places_below(root: str | os.PathLike) -> Iterator[Path]:
    """The folders at and below ``root`` that hold a ``csulora/``, in no order.

    What vanishes meanwhile is passed over: a run may be writing there, or renaming what it wrote.

    Example:
        >>> list(places_below("no such folder"))
        []
    """
    return (Path(folder) for folder, inside, _ in os.walk(root) if FOLDER in inside)


def discard(folder: str | os.PathLike) -> None:
    """Remove ``folder/csulora/``, if there is one: what it says is about to become wrong, and so is the model card."""
    discard_folder(Path(folder) / FOLDER)
    model_card.renew(Path(folder), None, Path(folder))


def renew_card(folder: str | os.PathLike) -> None:
    """Have the model card say what the record beside the adapter says, after someone else has written the card."""
    try:
        record = read_record(folder)
        found = _corrected_beside(Path(folder), record)
    except (FileNotFoundError, ValueError):  # nothing that could be believed
        return
    if found is not None:
        model_card.renew(Path(folder), record, adapter_folder(folder, record["adapter"]))


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy the sidecar of one folder, if it has one, into another, without the texts; where no card is, that too."""
    place = Path(source) / FOLDER
    if not (place / RECORD).is_file():
        return discard(target)
    record = read_record(source)

    def make(unfinished: Path) -> None:
        shutil.copytree(place / RAW, unfinished / RAW)
        (unfinished / RECORD).write_text(seal(record, _files_in(unfinished)), encoding="utf-8")

    put_folder(Path(target) / FOLDER, make)
    card = Path(source) / model_card.CARD
    if card.is_file() and not (Path(target) / model_card.CARD).exists():
        shutil.copyfile(card, Path(target) / model_card.CARD)
    model_card.renew(Path(target), record, adapter_folder(source, record["adapter"]))


def read_record(folder: str | os.PathLike) -> dict:
    """The record ``correction.json`` of a checkpoint folder.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it is not what :meth:`Sidecar.save` wrote.
    """
    path = Path(folder) / FOLDER / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; expected a checkpoint folder written with CSULoRACallback.")
    return checked(path.read_bytes(), str(path))


def read_own_record(folder: str | os.PathLike) -> dict:
    """The record of a checkpoint folder, if the adapter that lies there is the one that it describes.

    The raw factors are not read, and need not be there.

    Raises:
        FileNotFoundError: if the folder has no record.
        ValueError: if the record is damaged, or is another adapter's.
    """
    record = read_record(folder)
    _corrected_beside(Path(folder), record)
    return record


def _corrected_beside(folder: Path, record: dict) -> Factors | None:
    beside = adapter_folder(folder, record["adapter"])
    corrected = _factors_beside(beside, list(record["modules"]))
    if corrected is not None and digest(corrected) != record["corrected_digest"]:
        raise ValueError(
            f"{folder / FOLDER}: expected the record of the adapter in {beside}, but that is another one: it was "
            "saved later, without the callback or by someone else. Delete the folder, or take both from a copy."
        )
    return corrected


def _files_in(place: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder by its path there, except the record and what file browsers leave."""
    digests = {}
    for path in sorted(place.rglob("*")):
        inside = path.relative_to(place)
        if path.is_file() and path != place / RECORD and not any(part.startswith(".") for part in inside.parts):
            digests[inside.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _is_raw(file: str) -> bool:
    return file.startswith(f"{RAW}/")


def _factors_beside(folder: Path, names: list[str]) -> Factors | None:
    """The factors in the adapter that lies in a folder; ``None`` where it holds none."""
    state = read_adapter(folder)
    return from_peft_state_dict(state, names, str(folder)) if slots_in(state) else None


def _read_texts(path: Path) -> Texts | None:
    return Texts.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
