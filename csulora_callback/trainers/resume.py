"""Finding the raw factors of a corrected checkpoint that ``transformers.Trainer`` resumes from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from transformers import TrainerState

from csulora_callback import sidecar
from csulora_callback.models.factors import Factors, digest, from_peft_state_dict, is_cast
from csulora_callback.models.peft_folder import adapter_folder, read_adapter
from csulora_callback.sidecar import NotPublishedError, Sidecar

logger = logging.getLogger(__name__)


def raw_of_resumed(
    live: Factors, state: TrainerState, own: Path, output: Path, resume_from: str | os.PathLike | None
) -> Sidecar | None:
    """The sidecar of the adapter that was loaded; ``None`` where it was saved without the callback, and is raw.

    Args:
        live: the factors in the model.
        state: as loaded.
        own: the folder of the step that training resumes at.
        output: the Trainer's output folder, all of which is searched: the checkpoint may have been fetched from the
            Hub as ``last-checkpoint``.
        resume_from: the only folder to look at, if given.

    Raises:
        ValueError: if the factors are corrected ones, and no sidecar fits them.
        NotPublishedError: if one does, and the raw factors were left out where it comes from.
    """
    if resume_from is not None:
        place, folders = Path(resume_from), [Path(resume_from)]
    else:
        place, folders = output, chain([own], sidecar.places_below(output))
    try:
        found = find_sidecar(live, folders)
    except NotPublishedError as error:
        raise NotPublishedError(
            f"`resume_from`: {error} A run with CSULoRACallback(push_raw=True) publishes what can be resumed."
        ) from error
    if found is None and (resume_from is not None or _was_corrected(state)):
        raise ValueError(
            f"`resume_from`: expected the raw factors of the corrected checkpoint that training resumes from, at step "
            f"{state.global_step}, but no {sidecar.FOLDER}/{sidecar.RECORD} in {place} belongs to the adapter in the "
            "model. Pass CSULoRACallback(resume_from=...) with the folder that trainer.train() got, or leave it out "
            "for a checkpoint that was written without the callback."
        )
    return found


def find_sidecar(live: Factors, folders: Iterable[Path]) -> Sidecar | None:
    """The first sidecar that belongs to the factors, corrected or raw, also where they were loaded in another dtype.

    Raises:
        ValueError: if the one that belongs to them is damaged.
        NotPublishedError: if none of those that belong to them has the raw adapter.
    """
    left_out = None
    for folder in folders:
        if not (folder / sidecar.FOLDER / sidecar.RECORD).is_file():
            continue
        try:
            record = sidecar.read_record(folder)
            beside = _factors(read_adapter(adapter_folder(folder, record["adapter"])), live)
            if beside is not None and digest(beside) != record["corrected_digest"]:
                if is_cast(live, beside):
                    logger.warning("%s was saved over without the callback: its record is not believed.", folder)
                continue
            if digest(live) == record["raw_digest"]:  # nothing has to be put back
                return Sidecar.load(folder)
        except NotPublishedError as error:
            left_out = error
            continue
        except ValueError as error:  # some other run's broken file is no reason not to resume this one
            logger.warning("Passed over while looking for raw factors: %s", error)
            continue
        if digest(live) == record["corrected_digest"] or (beside is not None and is_cast(live, beside)):
            try:
                return Sidecar.load(folder)
            except NotPublishedError as error:  # the same checkpoint may lie elsewhere, as it was trained
                left_out = error
    if left_out is not None:
        raise left_out
    return None


def _factors(state: dict, live: Factors) -> Factors | None:
    """The factors of the same modules in an adapter's state dict, if it holds them."""
    try:
        return from_peft_state_dict(state, list(live), "")
    except ValueError:  # it is no adapter, or one of other modules
        return None


def _was_corrected(state: TrainerState) -> bool:
    return any("csulora/update_norm" in record for record in state.log_history)
