"""Corrections after training: of an adapter on disk or on the Hub, without its model where weights are enough."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft.utils import CONFIG_NAME

from csulora_callback import model_card
from csulora_callback.adapter_source import RawAdapter, find_adapter_folder
from csulora_callback.corrected import CorrectedAdapter
from csulora_callback.correcting import Correcting, Rank
from csulora_callback.inspection import stored_shapes
from csulora_callback.method.penalty import Penalty
from csulora_callback.models.factors import Factors, all_finite
from csulora_callback.models.named import aligned_under
from csulora_callback.models.names import owner_of_bias
from csulora_callback.models.peft_folder import write_with_factors
from csulora_callback.models.probes import Probes, read_prompts
from csulora_callback.models.processes import Processes
from csulora_callback.models.ranks import options_for_ranks
from csulora_callback.models.saved_adapter import SavedAdapter, SavedLayer
from csulora_callback.models.slots import join_all, split_all
from csulora_callback.models.task_rows import TaskRows
from csulora_callback.models.whole_files import put_folder
from csulora_callback.presets import TARGET, Family, check_preset, check_share, check_without_strength, is_data_aware
from csulora_callback.rereading import choose_texts, load_of_subspace, read_again
from csulora_callback.searching import find_strength
from csulora_callback.sidecar import FOLDER
from csulora_callback.subspace import SafetySubspace
from csulora_callback.subspace_file import check_metadata
from csulora_callback.subspace_origin import check_origin

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CorrectedFolder:
    """What :func:`correct_adapter` wrote.

    Attributes:
        output: the folder, as an absolute path.
        metrics: the keys of :class:`~csulora_callback.SafetyDrift`, over all modules.
        record: what ``csulora/correction.json`` in it says, but for the digests of files.
        from_raw: whether the adapter was corrected before, and its raw factors were what was corrected now.
    """

    output: Path
    metrics: dict[str, float]
    record: dict = field(repr=False)  # pages of it
    from_raw: bool


def correct_adapter(
    adapter: str | os.PathLike,
    subspace: SafetySubspace | str | os.PathLike,
    output: str | os.PathLike,
    penalty: Penalty | Family,
    rank: Rank = "truncate",
    probes: Probes | None = None,
    task: TaskRows | None = None,
    aligned_model: str | os.PathLike | None = None,
    target: float | None = None,
    uncorrected: Sequence[str] = (),
) -> CorrectedFolder:
    """Correct an adapter that was trained before, and write the result as a PEFT folder of its own.

    The model under the adapter is not needed where weights alone decide: scalings follow from the adapter's config. An
    adapter that was corrected before starts from the raw factors in its ``csulora/``, and a log line says so; nothing
    is ever corrected twice, as long as that folder was kept. With the settings of a run the result is what
    :class:`~csulora_callback.CSULoRACallback` wrote there, bit for bit on the same device.

    Args:
        adapter: a folder that PEFT, a ``Trainer`` or the callback wrote; a Lightning checkpoint with its
            ``NAME.adapter``; or a Hub id, of a revision where it ends in ``@revision``. It is never written to.
        subspace: of the aligned model that the adapter was trained on, or the path of a saved one.
        output: a folder that does not exist yet, or is empty. It appears whole or not at all, with ``csulora/`` in
            it, so that the correction can be undone.
        penalty: the table of multipliers. A data-aware one has the model read, which is loaded for it. Or, for a
            ``target``, a preset without its strength, such as ``Penalty.guard``.
        rank: ``"truncate"`` keeps the adapter's rank; ``"expand"`` loses nothing of the closest safe update, and the
            adapter's rank at most doubles, its scaling stays.
        probes: prompts that are to be refused, as for the callback; only for a data-aware penalty, or a ``target``.
            By default those that the checkpoint holds, and of a run with a target those that its corrections read.
        task: what the adapter was trained on, likewise: rows of token ids, or a source with a column ``text``,
            ``messages`` or ``input_ids``. By default what the checkpoint holds. Rows of ``messages`` whose prompt, all
            that stands before the last answer, the aligned model refuses are left out, and so are those that the
            checkpoint has marked; in other columns nothing tells a prompt from its answer.
        aligned_model: the model under the adapter, where it does not lie where the adapter's config says. Where it is
            given or loaded, the subspace has to be one of it.
        target: the share of the likelihood of refusing ``probes`` that is to be kept, 0.9 by default for a preset
            without its strength: the smallest strength that keeps it is looked for, as the callback does. The model is
            loaded for that. Only with ``rank="truncate"``.
        uncorrected: names of what was trained beside LoRA and may pass as it is, as for the callback. What is
            corrected whole, such as an ``lm_head``, is compared with the checkpoint under the adapter.

    Raises:
        FileNotFoundError: if the adapter, the subspace or the model is not there.
        ValueError: if an argument is out of range; the adapter is of a kind that cannot be corrected, holds NaN or
            Inf, or stands beside a ``csulora/`` that is damaged or another's; the subspace does not fit; or the
            output is not free.

    Example:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from csulora_callback import Penalty, SafetySubspace, correct_adapter
        >>> base, aligned = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
        >>> subspace = SafetySubspace.estimate(base, aligned, rank=2, progress=False)
        >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> folder = tempfile.mkdtemp()
        >>> get_peft_model(aligned, lora).save_pretrained(f"{folder}/trained")
        >>> done = correct_adapter(f"{folder}/trained", subspace, f"{folder}/corrected", Penalty.csulora(10.0))
        >>> 0 < done.metrics["csulora/attenuation"] < 1, done.from_raw
        (True, False)
        >>> again = correct_adapter(f"{folder}/corrected", subspace, f"{folder}/other", Penalty.guard(3.0))
        >>> again.from_raw
        True
    """
    _check_arguments(penalty, rank, target, probes=probes, task=task)
    probes = None if probes is None else read_prompts(probes)
    root = find_adapter_folder(adapter)
    output = _free(output, root)
    source = RawAdapter.find(root)
    subspace = _opened(subspace)
    saved = source.read(lambda names, config: stored_shapes(subspace, names), aligned_model, uncorrected)
    if not all_finite(saved.factors):
        raise ValueError(
            f"`adapter`: expected finite factors, but those in {saved.folder} hold NaN or Inf. Take an "
            "earlier checkpoint."
        )
    if source.sidecar is not None:
        logger.info("%s was corrected before: starting from its raw factors in %s.", source.beside, source.folder)
    texts, chosen = None if source.sidecar is None else source.sidecar.texts, None
    if not isinstance(penalty, Penalty):
        share = TARGET if target is None else target
        corrector = find_strength(saved, subspace, penalty, share, texts, probes, task, aligned_model, uncorrected)
        layers, activations = corrector.adapter.layers, corrector.activations
        penalty, chosen = corrector.penalty, corrector.chosen
        texts = texts if penalty.on_probes is None else activations.texts
    elif penalty.on_probes is None:
        if aligned_model is not None or saved.beside.wholes:
            under = aligned_under(saved.config, None) if aligned_model is None else aligned_model  # of its revision
            check_origin(subspace, under, Processes())
        layers, activations = _layers(saved, subspace), None
    else:
        checkpoint = aligned_model or saved.config.base_model_name_or_path
        texts = choose_texts(saved, texts, probes, task, checkpoint)
        live = load_of_subspace(saved, subspace, aligned_model, uncorrected)
        layers, activations = live.layers, read_again(live, texts, penalty, None if task is None else checkpoint)
        texts = activations.texts
    name = "default" if source.sidecar is None else source.sidecar.record["adapter"]
    correcting = Correcting(name, layers, subspace, penalty, rank, chosen, passing=saved.beside.passing)
    done = correcting.correct(saved.factors, correcting.gains(activations, "cpu"), texts)
    done = done.held_as(split_all(saved.slots, join_all(saved.slots, done.corrected)))  # of experts all of one rank
    put_folder(output, lambda unfinished: _write(unfinished, saved, done, rank, source.card))
    return CorrectedFolder(output, done.metrics, done.record, from_raw=source.sidecar is not None)


def restore_adapter(checkpoint: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Write the raw adapter of a corrected one as a plain PEFT folder: the correction undone.

    Args:
        checkpoint: what the callback or :func:`correct_adapter` wrote, in any form that the latter takes.
        output: a folder that does not exist yet, or is empty.

    Returns:
        The folder, as an absolute path. Its model card is that of the corrected adapter without what was said there of
        the correction.

    Raises:
        FileNotFoundError: if there is no adapter, none that was corrected, or one that was published without its raw
            adapter.
        ValueError: if its ``csulora/`` is damaged or another adapter's, or the output is not free.

    Example:
        >>> import tempfile
        >>> restore_adapter(tempfile.mkdtemp(), "raw")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        FileNotFoundError: `checkpoint`: expected a folder with adapter_config.json, but ... has none.
    """
    root = find_adapter_folder(checkpoint, "checkpoint")
    output = _free(output, root)
    source = RawAdapter.find(root, "checkpoint")
    if source.sidecar is None:
        raise FileNotFoundError(
            f"`checkpoint`: expected an adapter that was corrected, but {root} has no {FOLDER}/ with its raw factors. "
            "It is raw already, or that folder was left behind when it was copied."
        )

    def make(unfinished: Path) -> None:
        shutil.copytree(source.folder, unfinished, dirs_exist_ok=True)
        _copy_card(source.card, unfinished)
        model_card.remove(unfinished)

    put_folder(output, make)
    return output


def _check_arguments(penalty: object, rank: object, target: object, **texts: object) -> None:
    check_preset(penalty)
    check_share(target)
    check_without_strength(target, penalty if isinstance(penalty, Penalty) else None)
    if rank not in ("truncate", "expand"):
        raise ValueError(f"`rank`: expected 'truncate' or 'expand', but got {rank!r}.")
    searches = not isinstance(penalty, Penalty)
    if searches and rank != "truncate":
        raise ValueError(
            f"`rank`: expected 'truncate' where a strength is looked for, as the model that is measured has the "
            f"adapter's rank, but got {rank!r}. Pass the strength that is found, in a second correction."
        )
    reads = is_data_aware(penalty)
    for name, given in texts.items():
        other = ", or a target" if name == "probes" else ""
        if given is not None and not (reads or (other and searches)):
            raise ValueError(
                f"`{name}`: expected none, as only a data-aware penalty measures by them{other}, but got some. "
                "Pass penalty=Penalty.data_aware(strength) too."
            )


def _free(output: str | os.PathLike, root: Path) -> Path:
    """The path of a folder to be written that takes nothing's place and changes nothing of the adapter's."""
    if not isinstance(output, str | os.PathLike) or not str(output):
        raise ValueError(f"`output`: expected the path of a folder, but got {output!r}.")
    path, inside = Path(output), Path(output).resolve()
    if inside == root.resolve() or root.resolve() in inside.parents:
        raise ValueError(
            f"`output`: expected a folder outside of the adapter's, {root}, as that is never written to, but got "
            f"{path}. Name another one."
        )
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"`output`: expected a folder that does not exist yet, or is empty, but {path} is there. Name another one."
        )
    return inside


def _opened(subspace: SafetySubspace | str | os.PathLike) -> SafetySubspace:
    if isinstance(subspace, SafetySubspace):
        check_metadata(subspace.metadata)
        return subspace
    if not isinstance(subspace, str | os.PathLike) or not str(subspace):
        raise ValueError(f"`subspace`: expected a SafetySubspace or the path of a saved one, but got {subspace!r}.")
    return SafetySubspace.load(subspace)


def _layers(saved: SavedAdapter, subspace: SafetySubspace) -> dict[str, SavedLayer]:
    return saved.layers(saved.stored_transposed(stored_shapes(subspace, saved.factors)))


def _write(folder: Path, saved: SavedAdapter, done: CorrectedAdapter, rank: Rank, card: Path) -> None:
    write_with_factors(saved.folder, done.corrected, folder, saved.config)
    options = {**saved.options, "inference_mode": True}
    if rank == "expand":
        options |= _options_for(done.corrected, saved)
    (folder / CONFIG_NAME).write_text(json.dumps(options, indent=2, sort_keys=True), encoding="utf-8")
    _copy_card(card, folder)
    done.sidecar.save(folder, saved.config, source=saved.folder)


def _copy_card(card: Path, folder: Path) -> None:
    if card.is_file():
        shutil.copyfile(card, folder / model_card.CARD)


def _options_for(factors: Factors, saved: SavedAdapter) -> dict[str, object]:
    names = [name for name in saved.pairs if owner_of_bias(name) is None]
    ranks = {saved.targets[name]: len(factors[name][0]) for name in names}
    scalings = {saved.targets[name]: saved.scalings[name] for name in names}
    return options_for_ranks(ranks, scalings, bool(saved.config.use_rslora))
