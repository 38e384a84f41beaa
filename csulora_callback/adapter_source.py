"""Where an adapter lies, and where its raw factors do: in a folder, beside a Lightning checkpoint, or on the Hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft.utils import CONFIG_NAME

from csulora_callback.model_card import CARD
from csulora_callback.models.beside import NAMED
from csulora_callback.models.factors import Factors
from csulora_callback.models.peft_folder import adapter_beside, adapter_folder
from csulora_callback.models.saved_adapter import SavedAdapter
from csulora_callback.models.saved_names import ShapesOf
from csulora_callback.models.weight_files import fetch_adapter
from csulora_callback.sidecar import FOLDER, RAW, RECORD, NotPublishedError, Sidecar, read_record

logger = logging.getLogger(__name__)


def find_adapter_folder(adapter: str | os.PathLike, argument: str = "adapter") -> Path:
    """The local folder that is meant: itself, ``NAME.adapter`` of ``NAME.ckpt``, or what the Hub gives of an id.

    Args:
        adapter: a folder, a Lightning checkpoint, or a Hub id, of a revision where it ends in ``@revision``.
        argument: its name in messages.

    Raises:
        FileNotFoundError: if it is nothing of the kind.
        ValueError: if it is no path at all.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> find_adapter_folder(folder) == Path(folder)
        True
    """
    if not isinstance(adapter, str | os.PathLike) or not str(adapter):
        raise ValueError(f"`{argument}`: expected a folder, a Lightning checkpoint or a Hub id, but got {adapter!r}.")
    path = Path(adapter)
    if path.suffix == ".ckpt" and adapter_beside(path).is_dir():
        return adapter_beside(path)
    if os.path.isdir(path):  # unlike Path's, also False for names that no system takes
        return path
    if os.path.isfile(path):
        raise FileNotFoundError(
            f"`{argument}`: expected a folder with an adapter, or a Lightning checkpoint NAME.ckpt with NAME.adapter "
            f"beside it, which the callback writes unless export_adapter=False, but got the file {path}. Pass the "
            "folder that it lies in, or train with export_adapter=True."
        )
    source, _, revision = str(adapter).partition("@")
    try:
        return fetch_adapter(source, revision or None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{argument}`: {error}") from error


@dataclass(frozen=True, eq=False)
class RawAdapter:
    """An adapter before any correction.

    Attributes:
        folder: what holds its weights and config.
        beside: where the adapter itself lies, which is another folder if it was corrected. Beside shards there is
            nothing in it.
        sidecar: of the correction that it came out of; ``None`` if it is raw itself.
        card: the adapter's model card, if it has one.
    """

    folder: Path
    beside: Path
    sidecar: Sidecar | None
    card: Path

    @classmethod
    def find(cls, root: Path, argument: str = "adapter") -> RawAdapter:
        """In what was saved into ``root``, or, if the adapter has a name of its own, above it.

        Raises:
            FileNotFoundError: if there is no adapter; ``argument`` is the name of ``root`` in messages.
            NotPublishedError: if it was corrected, and published without its raw adapter.
            ValueError: if there is more than one, or a ``csulora/`` that is damaged or another adapter's.
        """
        try:
            place = sidecar_place(root)
            sidecar = None if place is None else Sidecar.load(place)
        except NotPublishedError as error:
            raise NotPublishedError(f"`{argument}`: {error}") from error
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"`{argument}`: expected the raw factors of {root} in its {FOLDER}/, as nothing is corrected twice, "
                f"but they cannot be had. {error} Where the adapter is raw for certain, delete the {FOLDER}/."
            ) from error
        if sidecar is None:
            folder = _only_adapter(root, argument)
            return cls(folder, folder, None, root / CARD)
        return cls(place / FOLDER / RAW, adapter_folder(place, sidecar.record["adapter"]), sidecar, place / CARD)

    def read(
        self,
        stored: ShapesOf | None = None,
        aligned: str | os.PathLike | None = None,
        uncorrected: Sequence[str] = (),
        strict: bool = True,
    ) -> SavedAdapter:
        """What lies in the folder, see :meth:`SavedAdapter.read`, which raises where it cannot be corrected."""
        names = None if self.sidecar is None else list(self.sidecar.raw)
        return SavedAdapter.read(self.folder, stored, names, aligned, uncorrected, strict)


def read_states(
    root: Path, stored: ShapesOf | None = None, aligned: str | os.PathLike | None = None
) -> tuple[SavedAdapter, dict[str, Factors], dict | None]:
    """What can be looked at of the adapter in a folder: its layers, factors by state, and its record if it has one.

    What was trained beside LoRA and cannot be measured is left out.

    The states are ``adapter`` alone, where it was never corrected; ``raw`` and ``corrected``; or, with a log line,
    ``corrected`` alone, where it was published without its raw adapter.

    Args:
        root: the folder.
        stored: see :meth:`SavedAdapter.read`.
        aligned: the checkpoint under the adapter, where it does not lie where its config says.

    Raises:
        FileNotFoundError: as :meth:`RawAdapter.find` and :meth:`SavedAdapter.read` do.
        ValueError: likewise.
    """
    try:
        source = RawAdapter.find(root)
    except NotPublishedError as error:
        logger.info("%s", error)
        place = sidecar_place(root)
        record = read_record(place)
        names = list(record["modules"])
        saved = SavedAdapter.read(
            adapter_folder(place, record["adapter"]), stored, names, aligned, _named(record), strict=False
        )
        return saved, {"corrected": saved.factors}, record
    record = None if source.sidecar is None else source.sidecar.record
    saved = source.read(stored, aligned, _named(record), strict=False)
    for name, why in saved.beside.passing.items():
        logger.info("'%s' was trained too, and is left out: %s", name, why)
    if source.sidecar is None:
        return saved, {"adapter": saved.factors}, None
    states = {"raw": saved.factors}
    if source.sidecar.corrected is not None:  # beside shards there is none
        states["corrected"] = source.sidecar.corrected
    return saved, states, record


def _named(record: dict | None) -> list[str]:
    """What was let pass knowingly when the adapter was corrected."""
    return [name for name, why in ((record or {}).get("not_corrected") or {}).items() if why == NAMED]


def sidecar_place(root: Path) -> Path | None:
    """Where ``csulora/`` lies of an adapter's folder: in it, or above it if the adapter has a name of its own."""
    if (root / FOLDER).is_dir():
        return root
    above = root.absolute().parent
    if (above / FOLDER / RECORD).is_file():
        name = read_record(above)["adapter"]
        if adapter_folder(above, name) == above / root.absolute().name:
            return above
    return None


def _only_adapter(root: Path, argument: str) -> Path:
    if (root / CONFIG_NAME).is_file():
        return root
    inside = sorted(path.parent for path in root.glob(f"*/{CONFIG_NAME}"))
    if len(inside) == 1:
        return inside[0]
    found = f"adapters in {[path.name for path in inside]}. Pass one of these" if inside else "none"
    raise FileNotFoundError(f"`{argument}`: expected a folder with {CONFIG_NAME}, but {root} has {found}.")
