"""What a person reads of an adapter's drift: tables, heat maps, the worst modules; and the same for machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from csulora_callback.inspection import Inspection
from csulora_callback.method.measure import Drift
from csulora_callback.method.penalty import BLOCKS
from csulora_callback.reporting.terminal import heat_map, make_table, percent, signed

WORST = 10
BLOCK_NAMES = {
    "aligned": "aligned",
    "output": "partial, output half",
    "input": "partial, input half",
    "off": "off-subspace",
}
_COLUMNS = ["‖Δ‖", *(f"{block} (chance)" for block in BLOCKS), "undone"]


def print_inspection(console: Console, states: Mapping[str, Inspection]) -> None:
    """Of all states their sums; of the first one, which is the raw one where there is one, everything."""
    state, inspection = next(iter(states.items()))
    of = f" of the {state} update" if len(states) > 1 else ""
    layers, kinds = inspection.by_layer(), inspection.by_kind()
    numbers, short = short_layers(layers), short_kinds(kinds)
    console.print(together_table(console, states))
    if len(kinds) > 1:
        groups = {short[kind]: drift for kind, drift in kinds.items()}
        console.print(group_table(console, f"By kind of module{of}", "kind", groups))
    if len(layers) > 1:
        groups = {numbers[layer]: drift for layer, drift in layers.items()}
        console.print(group_table(console, f"By layer{of}", "layer", groups))
    cells = {(numbers[layer], short[kind]): d for (layer, kind), d in inspection.by_layer_and_kind().items()}
    for title, value in (
        ("Share of the alignment that is undone", lambda drift: drift.undone),
        ("Share in the fully aligned block, above chance", lambda d: d.shares["aligned"] - d.chance["aligned"]),
    ):
        shown = {cell: value(drift) for cell, drift in cells.items()}
        console.print(heat_map(console, f"{title}{of}", list(numbers.values()), list(short.values()), shown))
    console.print(worst_table(console, f"Modules that undo most of the alignment{of}", inspection))


def together_table(console: Console, states: Mapping[str, Inspection]) -> Table:
    """Over all modules, each state in a column."""
    drifts = [inspection.together for inspection in states.values()]
    many = len(states) > 1
    columns = [f"{state} {what}".strip() for state in (states if many else [""]) for what in ("update", "chance")]
    table = make_table(console, "All modules", ["", *columns])

    def add(name: str, values: Iterable[tuple[str, str]]) -> None:
        table.add_row(name, *(text for pair in values for text in pair))

    add("norm of the update ‖Δ‖", ((f"{drift.total_energy**0.5:.4g}", "") for drift in drifts))
    for block, name in BLOCK_NAMES.items():
        add(name, ((percent(drift.shares[block]), percent(drift.chance[block])) for drift in drifts))
    add("alignment undone −⟨Δ, D⟩/‖D‖²", ((signed(drift.undone), percent(0.0)) for drift in drifts))
    return table


def group_table(console: Console, title: str, what: str, groups: Mapping[str, Drift]) -> Table:
    """One row for each group of modules, shares with what chance gives behind them."""
    table = make_table(console, title, [what, *_COLUMNS])
    for name, drift in groups.items():
        table.add_row(name, *_row(drift))
    return table


def worst_table(console: Console, title: str, inspection: Inspection) -> Table:
    """The modules that contribute most to what is undone of the whole alignment."""
    whole = inspection.together.displacement
    table = make_table(console, title, ["module", *_COLUMNS, "of the whole"])
    for name in inspection.worst(WORST):
        drift = inspection.modules[name]
        table.add_row(name, *_row(drift), signed(-drift.along / whole))
    if not table.row_count:
        table.add_row("none: no module's update points against the alignment")
    return table


def inspection_json(inspection: Inspection) -> dict:
    """All numbers of one state."""
    return {
        "together": _json(inspection.together),
        "layers": {layer: _json(drift) for layer, drift in inspection.by_layer().items()},
        "kinds": {kind: _json(drift) for kind, drift in inspection.by_kind().items()},
        "modules": {name: _json(drift) for name, drift in inspection.modules.items()},
        "worst": inspection.worst(WORST),
    }


def short_layers(layers: Iterable[str]) -> dict[str, str]:
    """A short name for each layer: its number, where all lie in one list of layers.

    Example:
        >>> short_layers(["model.layers.0", "model.layers.1", ""])
        {'model.layers.0': '0', 'model.layers.1': '1', '': '-'}
    """
    layers = list(layers)
    lists = {layer.rpartition(".")[0] for layer in layers if layer}
    return {layer: (layer.rpartition(".")[2] if len(lists) == 1 else layer) or "-" for layer in layers}


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """The last part of each kind's name, where no two share it.

    Example:
        >>> list(short_kinds(["self_attn.q_proj", "mlp.up_proj"]).values())
        ['q_proj', 'up_proj']
        >>> list(short_kinds(["attn.c_proj", "mlp.c_proj"]).values())
        ['attn.c_proj', 'mlp.c_proj']
    """
    kinds = list(kinds)
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: end if last.count(end) == 1 else kind for kind, end in zip(kinds, last, strict=True)}


def _row(drift: Drift) -> list[str]:
    shares = [f"{percent(drift.shares[block])} ({percent(drift.chance[block])})" for block in BLOCKS]
    return [f"{drift.total_energy**0.5:.4g}", *shares, signed(drift.undone)]


def _json(drift: Drift) -> dict:
    return {
        "update_norm": drift.total_energy**0.5,
        "shares": drift.shares,
        "chance": drift.chance,
        "displacement_norm": drift.displacement**0.5,
        "undone": drift.undone,
    }
