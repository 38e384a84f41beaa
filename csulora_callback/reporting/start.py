"""What a person reads: the table printed when the callback starts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from csulora_callback.budget import NOTE, REFUSAL
from csulora_callback.card_section import passing_in_words
from csulora_callback.checked_probes import CheckedProbes
from csulora_callback.corrector import SafetyCorrector
from csulora_callback.models.names import fused_parameter
from csulora_callback.reporting.penalties import IN_WORDS, note_on
from csulora_callback.reporting.subspace import displacement_in_words, rank_rule
from csulora_callback.reporting.terminal import span

logger = logging.getLogger(__name__)


def start_table(
    corrector: SafetyCorrector,
    seconds: float,
    probes: CheckedProbes | None = None,
    target: float | None = None,
    evaluate_corrected: bool = True,
) -> Table:
    """One compact table of what will be corrected, and how.

    Args:
        corrector: what will correct.
        seconds: how long it took to make it.
        probes: that are measured by.
        target: the share of their refusals for which the penalty's strength is looked for.
        evaluate_corrected: whether the trainer's evaluations see the corrected weights.
    """
    subspace, layers, matrices = corrector.subspace, corrector.adapter.layers, corrector.adapter.matrices
    wholes, biases = corrector.adapter.wholes, " with their biases" if len(layers) > len(matrices) else ""
    pairs = {name: layer for name, layer in matrices.items() if name not in wholes}
    lora_ranks = [layer.shape[1] for layer in pairs.values()]
    ranks = [subspace[name].U.shape[1] for name in matrices]
    rows = {
        "adapter": f"{corrector.adapter.name}, {_modules(pairs)}{biases}, LoRA rank {span(lora_ranks)}",
        **({"trained whole": ", ".join(wholes)} if wholes else {}),
        **({"not corrected": passing_in_words(corrector.passing)} if corrector.passing else {}),
        "base model": subspace.metadata["base"]["source"],
        "aligned model": _aligned(corrector),
        "safety subspace": f"rank {span(ranks)}, {displacement_in_words(subspace)}",
        "rank asked for": rank_rule(subspace.metadata),
        "penalty": f"{corrector.penalty if target is None else corrector.penalty.name}: "
        f"{IN_WORDS[corrector.penalty.name]}",
        **note_on(corrector.penalty.to_json()),
    }
    if target is not None:
        rows["strength"] = (
            f"the smallest that keeps {100 * target:g}% of the refusals' likelihood, found anew when it is saved"
        )
    if probes is not None:
        divided = target is not None and corrector.penalty.on_probes is not None
        rows["probes"] = f"{_probes(probes)}{'; one half is read, the other measured by' if divided else ''}"
    rows["evaluations"] = "of the corrected weights, which ship" if evaluate_corrected else "of the raw weights"
    if NOTE in corrector.notes:
        rows["drift budget"] = _budget(corrector.notes[NOTE])
    rows["ready in"] = f"{seconds:.1f} s{' (subspace from cache)' if subspace.from_cache else ''}"
    table = Table(title="CSULoRA", title_justify="left", show_header=False)
    for name, said in rows.items():
        table.add_row(name, Text(said, overflow="fold"))  # paths may hold brackets, and are longer than a line
    return table


def print_start(corrector: SafetyCorrector, table: Table) -> None:
    """Print its :func:`start_table`, and warn of modules that have no safety subspace."""
    Console().print(table)
    layers = corrector.adapter.matrices
    still = [name for name in layers if corrector.subspace[name].U.shape[1] == 0]
    if still:
        logger.warning(
            "%d of %d adapted modules did not change between base and aligned model, so their whole update "
            "counts as off-subspace: %s%s",
            len(still),
            len(layers),
            ", ".join(still[:3]),
            ", …" if len(still) > 3 else "",
        )


def _modules(names: Collection[str]) -> str:
    experts = sum(fused_parameter(name)[1] is not None for name in names)
    return f"{len(names)} modules{f' ({experts} of them weights of experts)' if experts else ''}"


def _budget(budget: Mapping) -> str:
    limits = [f"{key} ≤ {most:g}" for key, most in budget["max_drift"].items()]
    if budget["min_refusal"] is not None:
        limits.append(f"{REFUSAL} ≥ {budget['min_refusal']:g}")
    return f"{', '.join(limits)}; {'stop' if budget['on_exceed'] == 'stop' else 'warn'} where it is exceeded"


def _probes(probes: CheckedProbes) -> str:
    refused, total = len(probes.prompts), len(probes.prompts) + len(probes.left_out)
    if not probes.is_checked:
        return f"{refused} prompts to be refused; not checked, as they are token ids"
    return f"{refused} of {total} prompts are refused by the aligned model{' (cached)' if probes.from_cache else ''}"


def _aligned(corrector: SafetyCorrector) -> str:
    """The checkpoint's name also where its weights were read from the model in memory, if the adapter knows it."""
    source, name = corrector.subspace.metadata["aligned"]["source"], corrector.adapter.config.base_model_name_or_path
    return f"{name} (in memory)" if name and source.endswith(" in memory") else source
