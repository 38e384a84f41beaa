"""What a person reads: the table printed when the callback starts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from csulora_callback.corrector import SafetyCorrector
from csulora_callback.reporting.penalties import IN_WORDS
from csulora_callback.reporting.subspace import rank_rule
from csulora_callback.reporting.terminal import span


def start_table(corrector: SafetyCorrector, seconds: float) -> Table:
    """One compact table of what will be corrected, and how."""
    subspace, layers = corrector.subspace, corrector.adapter.layers
    lora_ranks = [layer.shape[1] for layer in layers.values()]
    ranks = [subspace[name].U.shape[1] for name in layers]
    rows = {
        "adapter": f"{corrector.adapter.name}, {len(layers)} modules, LoRA rank {span(lora_ranks)}",
        "base model": subspace.metadata["base"]["source"],
        "aligned model": _aligned(corrector),
        "safety subspace": f"rank {span(ranks)}, {subspace.energy_kept:.1%} of the displacement's energy",
        "rank asked for": rank_rule(subspace.metadata),
        "penalty": f"{corrector.penalty}: {IN_WORDS[corrector.penalty.name]}",
    }
    if corrector.activations is not None:
        rows["probes"] = f"{len(corrector.activations.texts.probes)} prompts to be refused"
    rows["ready in"] = f"{seconds:.1f} s{' (subspace from cache)' if subspace.from_cache else ''}"
    table = Table(title="CSULoRA", title_justify="left", show_header=False)
    for name, said in rows.items():
        table.add_row(name, Text(said, overflow="fold"))  # paths may hold brackets, and are longer than a line
    return table


def print_start(corrector: SafetyCorrector, seconds: float) -> None:
    """Print :func:`start_table`."""
    Console().print(start_table(corrector, seconds))


def _aligned(corrector: SafetyCorrector) -> str:
    """The checkpoint's name also where its weights were read from the model in memory, if the adapter knows it."""
    source, name = corrector.subspace.metadata["aligned"]["source"], corrector.adapter.config.base_model_name_or_path
    return f"{name} (in memory)" if name and source.endswith(" in memory") else source
