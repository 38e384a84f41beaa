"""What a person reads: the table printed when the callback starts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from csulora_callback.corrector import SafetyCorrector

IN_WORDS = {
    "csulora": "keeps the fully aligned part, attenuates the rest by its share",
    "separable": "keeps the fully aligned part, attenuates each side of the rest by its share",
    "guard": "attenuates what lies in the safety subspace, keeps the rest",
    "projection": "keeps the fully aligned part and nothing else",
    "data_aware": "keeps what the update does on the task, attenuates what it does on the probes",
    "table": "attenuates each block by the constant given for it",
}
"""By the name of a penalty: what of an update it keeps."""


def start_table(corrector: SafetyCorrector, seconds: float) -> Table:
    """One compact table of what will be corrected, and how."""
    subspace, layers = corrector.subspace, corrector.adapter.layers
    lora_ranks = [layer.shape[1] for layer in layers.values()]
    ranks = [subspace[name].U.shape[1] for name in layers]
    rows = {
        "adapter": f"{corrector.adapter.name}, {len(layers)} modules, LoRA rank {_range(lora_ranks)}",
        "base model": subspace.metadata["base"]["source"],
        "aligned model": _aligned(corrector),
        "safety subspace": f"rank {_range(ranks)}, {subspace.energy_kept:.1%} of the displacement's energy",
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


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"
