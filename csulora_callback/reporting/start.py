"""What a person reads: the table printed when the callback starts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from csulora_callback.corrector import SafetyCorrector
from csulora_callback.reporting.subspace import rank_rule
from csulora_callback.reporting.terminal import span


def start_table(corrector: SafetyCorrector, seconds: float) -> Table:
    """One compact table of what will be corrected, and how."""
    subspace, layers = corrector.subspace, corrector.adapter.layers
    lora_ranks = [layer.shape[1] for layer in layers.values()]
    ranks = [subspace[name].U.shape[1] for name in layers]
    table = Table(title="CSULoRA", title_justify="left", show_header=False)
    table.add_row("adapter", f"{corrector.adapter.name}, {len(layers)} modules, LoRA rank {span(lora_ranks)}")
    table.add_row("safety subspace", f"rank {span(ranks)}, {subspace.energy_kept:.1%} of the displacement's energy")
    table.add_row("rank asked for", rank_rule(subspace.metadata))
    table.add_row("penalty", str(corrector.penalty))
    if corrector.activations is not None:
        table.add_row("probes", f"{len(corrector.activations.texts.probes)} prompts to be refused")
    table.add_row("ready in", f"{seconds:.1f} s{' (subspace from cache)' if subspace.from_cache else ''}")
    return table


def print_start(corrector: SafetyCorrector, seconds: float) -> None:
    """Print :func:`start_table`."""
    Console().print(start_table(corrector, seconds))
