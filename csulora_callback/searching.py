"""A target after training: the model of a saved adapter is loaded and measured, and a strength is looked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from csulora_callback.behaviour import Refusals
from csulora_callback.checked_probes import check_probes
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.method.search import STRONGEST
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.probes import Probes, read_prompts
from csulora_callback.models.saved_adapter import SavedAdapter
from csulora_callback.models.task_rows import TaskRows
from csulora_callback.presets import Family
from csulora_callback.rereading import load_of_subspace, no_probes, read_again, with_task
from csulora_callback.subspace import SafetySubspace
from csulora_callback.target import Target, fewest_probes, held_back


def find_strength(
    saved: SavedAdapter,
    subspace: SafetySubspace,
    family: Family,
    share: float,
    kept: Texts | None,
    probes: Probes | None,
    task: TaskRows | None,
    aligned_model: str | os.PathLike | None,
    uncorrected: Sequence[str] = (),
) -> SafetyCorrector:
    """A corrector of the saved adapter in its model, with the smallest strength that keeps the share, as in a run.

    Args:
        saved: the raw adapter.
        subspace: of the model under it.
        family: the preset whose strength is looked for.
        share: of the likelihood of refusals that is to be kept.
        kept: what the checkpoint kept of the run's texts, which counts where others are not given.
        probes: prompts that are to be refused.
        task: rows of what the adapter was trained on, for a data-aware preset.
        aligned_model: the model under the adapter, where it does not lie where the adapter's config says.
        uncorrected: names of what was trained beside LoRA, and passes.

    Raises:
        ValueError: if there are no probes or too few are refused, something cannot be read, the model cannot be
            loaded, or the subspace is not of it.
    """
    if probes is None and kept is None:
        raise no_probes(saved, "the strength is looked for by how many are still refused")
    strongest, checkpoint = family(STRONGEST), aligned_model or saved.config.base_model_name_or_path
    adapter = load_of_subspace(saved, subspace, aligned_model, uncorrected)
    asked = kept.probes if probes is None else read_prompts(probes)
    fewest = fewest_probes(strongest.on_probes is not None)
    checked = check_probes(adapter, asked, progress=True, checkpoint=checkpoint, fewest=fewest)
    refusals = Refusals(adapter, checked.prompts, checked.beginnings)
    back = held_back(len(refusals), strongest.on_probes is not None)
    if strongest.on_probes is not None:
        texts = with_task(kept, checked.prompts, task, checkpoint, back)
        activations = read_again(adapter, texts, strongest, None if task is None else checkpoint)
    else:
        activations = Activations({}, {}, Texts([], checked.prompts, 0))
    corrector = SafetyCorrector(adapter, subspace, strongest, activations)
    Target(share, family, refusals.of(back) if back else refusals).choose(corrector)
    return corrector
