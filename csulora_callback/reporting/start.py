"""What a person reads: the table printed when the callback starts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from csulora_callback.checked_probes import CheckedProbes
from csulora_callback.corrector import SafetyCorrector


def start_table(corrector: SafetyCorrector, seconds: float, probes: CheckedProbes | None = None) -> Table:
    """One compact table of what will be corrected, and how."""
    subspace, layers = corrector.subspace, corrector.adapter.layers
    lora_ranks = [layer.shape[1] for layer in layers.values()]
    ranks = [subspace[name].U.shape[1] for name in layers]
    table = Table(title="CSULoRA", title_justify="left", show_header=False)
    table.add_row("adapter", f"{corrector.adapter.name}, {len(layers)} modules, LoRA rank {_range(lora_ranks)}")
    table.add_row("safety subspace", f"rank {_range(ranks)}, {subspace.energy_kept:.1%} of the displacement's energy")
    table.add_row("penalty", str(corrector.penalty))
    if probes is not None:
        table.add_row("probes", _probes(probes))
    table.add_row("ready in", f"{seconds:.1f} s{' (subspace from cache)' if subspace.from_cache else ''}")
    return table


def print_start(corrector: SafetyCorrector, seconds: float, probes: CheckedProbes | None = None) -> None:
    """Print :func:`start_table`."""
    Console().print(start_table(corrector, seconds, probes))


def _probes(probes: CheckedProbes) -> str:
    refused, total = len(probes.prompts), len(probes.prompts) + len(probes.left_out)
    if not probes.is_checked:
        return f"{refused} prompts to be refused; not checked, as they are token ids"
    return f"{refused} of {total} prompts are refused by the aligned model{' (cached)' if probes.from_cache else ''}"


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"
