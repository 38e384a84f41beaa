"""What a person reads of an adapter's drift: tables, heat maps, the worst modules; and the same for machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter

from rich.console import Console
from rich.table import Table

from csulora_callback.inspection import Inspection
from csulora_callback.method.measure import Drift
from csulora_callback.method.penalty import BLOCKS
from csulora_callback.reporting.terminal import heat_map, make_table, percent, print_section, signed
from csulora_callback.subspace import SafetySubspace

WORST = 10
BLOCK_NAMES = {
    "aligned": "aligned",
    "output": "partial, output half",
    "input": "partial, input half",
    "off": "off-subspace",
}


def print_inspection(
    console: Console,
    adapter: str,
    states: Mapping[str, Inspection],
    record: Mapping | None,
    subspace: SafetySubspace,
    kept: bool,
) -> None:
    """Of all states their sums; of the first one, which is the raw one where there is one, everything.

    Args:
        console: where to.
        adapter: its name.
        states: inspections by the state's name.
        record: of its correction, if there was one.
        subspace: what it was measured by.
        kept: whether ``⟨Δ, D⟩`` is that of the part of the displacement that the subspace keeps.
    """
    state, inspection = next(iter(states.items()))
    where = "lies in csulora/ beside it" if "raw" in states else "was not published with it"
    console.print(_about(adapter, inspection, record, where, subspace, kept), soft_wrap=True)
    of = f", {state} update" if len(states) > 1 else ""
    layers, kinds = inspection.by_layer(), inspection.by_kind()
    numbers, short = short_layers(layers), short_kinds(kinds)
    units = "energy shares in %, in brackets what chance gives"
    print_section(console, f"All modules ({units})", together_table(console, states))
    if len(kinds) > 1:
        groups = {short[kind]: drift for kind, drift in kinds.items()}
        print_section(console, f"By kind of module{of} ({units})", group_table(console, "kind", groups))
    if len(layers) > 1:
        groups = {numbers[layer]: drift for layer, drift in layers.items()}
        print_section(console, f"By layer{of} ({units})", group_table(console, "layer", groups))
    cells = {(numbers[layer], short[kind]): d for (layer, kind), d in inspection.by_layer_and_kind().items()}
    for title, value in (
        ("Alignment undone", attrgetter("undone")),
        ("Energy in the fully aligned block above what chance gives", _above_chance),
    ):
        shown = {cell: value(drift) for cell, drift in cells.items()}
        table = heat_map(console, list(numbers.values()), list(short.values()), shown)
        print_section(console, f"{title}, by layer and kind{of} (%)", table)
    print_section(console, f"Modules that undo most of the alignment{of} ({units})", worst_table(console, inspection))


def together_table(console: Console, states: Mapping[str, Inspection]) -> Table:
    """Over all modules, each state in a column."""
    drifts = [inspection.together for inspection in states.values()]
    table = make_table(console, ["", *(states if len(states) > 1 else ["update"])])

    def add(name: str, value: Callable[[Drift], str]) -> None:
        table.add_row(name, *map(value, drifts))

    add("norm of the update ‖Δ‖", lambda drift: f"{drift.total_energy**0.5:.4g}")
    for block, name in BLOCK_NAMES.items():
        add(name, partial(_share, block))
    add("alignment undone −⟨Δ, D⟩/‖D‖² (%)", lambda drift: signed(drift.undone))
    return table


def group_table(console: Console, what: str, groups: Mapping[str, Drift]) -> Table:
    """One row for each group of modules, shares with what chance gives behind them."""
    table = make_table(console, [what, "‖Δ‖", *BLOCKS, "undone"])
    for name, drift in groups.items():
        shares = (_share(block, drift) for block in BLOCKS)
        table.add_row(name, f"{drift.total_energy**0.5:.3g}", *shares, signed(drift.undone))
    return table


def worst_table(console: Console, inspection: Inspection) -> Table:
    """The modules that contribute most to what is undone of the whole alignment."""
    whole = inspection.together.displacement
    table = make_table(console, ["module", "‖Δ‖", "aligned", "undone", "of the whole"])
    for name in inspection.worst(WORST):
        drift = inspection.modules[name]
        numbers = (_share("aligned", drift), signed(drift.undone), signed(-drift.along / whole))
        table.add_row(name, f"{drift.total_energy**0.5:.3g}", *numbers)
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


def _about(
    adapter: str, inspection: Inspection, record: Mapping | None, where: str, subspace: SafetySubspace, kept: bool
) -> str:
    lines = [f"{adapter}: {len(inspection.modules)} modules."]
    if record is not None:
        how = " ".join(map(str, record["penalty"].values()))
        lines.append(f"It is {record['status']} ({how}); its raw update {where}.")
    energy = f"{subspace.energy_kept:.1%} of the displacement's energy"
    lines.append(
        f"The alignment D is the part that the subspace keeps: {energy}."
        if kept
        else f"The alignment D is the whole displacement; the subspace keeps {energy}."
    )
    return "\n".join(lines)


def _above_chance(drift: Drift) -> float:
    return drift.shares["aligned"] - drift.chance["aligned"]


def _share(block: str, drift: Drift) -> str:
    return f"{percent(drift.shares[block])} ({percent(drift.chance[block])})"


def _json(drift: Drift) -> dict:
    return {
        "update_norm": drift.total_energy**0.5,
        "shares": drift.shares,
        "chance": drift.chance,
        "displacement_norm": drift.displacement**0.5,
        "undone": drift.undone,
    }
