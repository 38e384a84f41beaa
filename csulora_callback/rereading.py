"""What a data-aware penalty measures by, after training: the model of a saved adapter is loaded, and reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from peft import PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from csulora_callback.method.penalty import Penalty
from csulora_callback.models.activations import Activations, Texts, known_as_text, running_model, vocabulary_of
from csulora_callback.models.adapters import Adapter, find_adapter
from csulora_callback.models.foreign import first_line
from csulora_callback.models.probes import Probes, check_contents, check_ids, load_tokenizer, read_prompts, tokenize
from csulora_callback.models.processes import Processes
from csulora_callback.models.reading import Rows
from csulora_callback.models.saved_adapter import SavedAdapter
from csulora_callback.models.task_rows import TaskRows, read_task
from csulora_callback.refused_rows import RefusedRows
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_origin import check_under

logger = logging.getLogger(__name__)


def choose_texts(
    saved: SavedAdapter,
    kept: Texts | None,
    probes: Probes | None,
    task: TaskRows | None,
    checkpoint: str | None,
) -> Texts:
    """What the model is to read: what is given, and for the rest what the checkpoint kept of its training.

    Args:
        saved: the adapter.
        kept: out of its ``csulora/texts.json``.
        probes: prompts that are to be refused.
        task: rows of what the adapter was trained on.
        checkpoint: where a tokenizer is loaded from.

    Raises:
        ValueError: if there are no probes, or what is given cannot be read.

    Example:
        >>> texts = choose_texts(None, Texts([[5, 6]], [[7]], 3), [[8, 9]], None, None)
        >>> texts.task, texts.probes, texts.seen
        ([[5, 6]], [[8, 9]], 3)
    """
    if probes is None and kept is None:
        raise no_probes(saved, "the penalty is data-aware")
    asked = kept.probes if probes is None else tokenize(read_prompts(probes), checkpoint)
    back = kept.held_back if probes is None else ()
    return with_task(kept, asked, task, checkpoint, back)


def with_task(
    kept: Texts | None,
    probes: Rows,
    task: TaskRows | None,
    checkpoint: str | None,
    held_back: Sequence[int] = (),
) -> Texts:
    """These probes, of which those at some places are held back, with what is given or was kept of the rest.

    Raises:
        ValueError: if what is given cannot be read.

    Example:
        >>> texts = with_task(None, [[5]], [[6, 7]], None)
        >>> texts.task, texts.probes, texts.starts
        ([[6, 7]], [[5]], [0])
    """
    prompts = {"probes": probes, "held_back": list(held_back)}
    if task is not None:
        sample = read_task(task, checkpoint)
        return Texts(sample.rows, seen=sample.seen, starts=sample.starts, **prompts)
    if kept is None or not kept.task:
        logger.warning(
            "Nothing is known of the task, so the data-aware correction costs more of it. Pass task=... with rows of "
            "what the adapter was trained on, or the Trainer's checkpoint, which holds some."
        )
        return Texts([], seen=0, **prompts)
    return replace(kept, **prompts)


def no_probes(saved: SavedAdapter, why: str) -> ValueError:
    """What to raise where none are given, and none were kept.

    Example:
        >>> from types import SimpleNamespace
        >>> str(no_probes(SimpleNamespace(folder="out"), "the penalty is data-aware"))[:76]
        '`probes`: expected prompts that are to be refused, as the penalty is data-aw'
    """
    return ValueError(
        f"`probes`: expected prompts that are to be refused, as {why} and {saved.folder} has no texts.json of a run "
        "with probes beside it, but got none. Pass probes='builtin', probes='prompts.jsonl', or a list."
    )


def load_of_subspace(
    saved: SavedAdapter,
    subspace: SafetySubspace,
    aligned_model: str | os.PathLike | None,
    uncorrected: Sequence[str] = (),
) -> Adapter:
    """The adapter in its model, as :func:`load_with_adapter`; a subspace of another model is refused first."""
    adapter = load_with_adapter(saved, aligned_model, uncorrected)
    check_under(subspace, adapter, Processes())
    return adapter


def load_with_adapter(
    saved: SavedAdapter, aligned_model: str | os.PathLike | None, uncorrected: Sequence[str] = ()
) -> Adapter:
    """The adapter in its model, which is loaded, on a GPU if there is one, in the dtype that it is stored in.

    Raises:
        ValueError: if the config names no model, it cannot be loaded, or the adapter is not one of this model.
    """
    checkpoint = aligned_model or saved.config.base_model_name_or_path
    if not checkpoint:
        raise ValueError(
            "`aligned_model`: expected the model under the adapter, as a data-aware penalty or a target has it read, "
            "and the adapter's config does not say which it is, but got none. Pass its folder or Hub id."
        )
    revision = None if aligned_model else saved.config.revision
    try:
        source = {"revision": revision, "trust_remote_code": False}
        kind = type(AutoConfig.from_pretrained(checkpoint, **source))
        auto = AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
        model = auto.from_pretrained(checkpoint, dtype="auto", device_map="auto", **source)
        model = PeftModel.from_pretrained(model, saved.folder)
    except Exception as error:  # of files that are missing or broken in one of many ways
        raise ValueError(
            f"`aligned_model`: expected the model under the adapter in {os.fspath(checkpoint)!r}, as a data-aware "
            f"penalty or a target has it read, but it cannot be loaded with the adapter ({first_line(error)}). "
            "Pass the folder or Hub id of the one that the adapter was trained on."
        ) from error
    adapter = find_adapter(model, checkpoint, uncorrected)
    if adapter.layers.keys() != saved.factors.keys():
        odd = sorted(adapter.layers.keys() ^ saved.factors.keys())
        raise ValueError(
            f"`aligned_model`: expected the model under the adapter, but in {os.fspath(checkpoint)!r} it would sit on "
            f"other modules: {odd[0]!r}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}."
        )
    return adapter


def read_again(adapter: Adapter, texts: Texts, penalty: Penalty, checkpoint: str | None = None) -> Activations:
    """Have the model read them, with the raw adapter in it.

    Args:
        adapter: in its model.
        texts: whose ``refused`` rows are passed over.
        penalty: by which it is to be corrected; its strength has no say in what is read.
        checkpoint: where a tokenizer is loaded from, to find out first which rows these are; by default those that the
            checkpoint of a run has marked.

    Raises:
        ValueError: if it cannot, or what it makes of them is not finite; for a content-aware penalty if all probes
            are the same.
    """
    vocabulary = vocabulary_of(adapter)
    check_ids(texts.probes, vocabulary)
    if penalty.skips_prefix:
        check_contents(texts.probes)
    check_ids(texts.task, vocabulary, "task")
    texts = known_as_text(texts, running_model(adapter).config)
    if texts.unreadable:
        logger.warning(
            "%d of %d rows of the task came with images or audio, which are not kept with their token ids: they are "
            "not read.%s",
            len(texts.unreadable),
            len(texts.task),
            "" if texts.counted.rows else " So nothing is known of the task, and the correction costs more of it.",
        )
    if checkpoint is not None and any(texts.starts):
        texts = RefusedRows(adapter, load_tokenizer(checkpoint, "task"), Processes()).mark(texts)
    activations = Activations.read(adapter, texts, penalty.skips_prefix)
    if (unreached := activations.unreached(adapter)) is not None:
        logger.warning(unreached)
    if not activations.finite:
        raise ValueError(
            "`adapter`: expected one whose model reads the texts with finite activations, but got NaN or Inf. Use a "
            "penalty that reads weights alone."
        )
    return activations
