"""What a person reads of a safety subspace; and the same for machines."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from csulora_callback.method.basis import RELATIVE_RANK
from csulora_callback.models.names import layer_and_kind
from csulora_callback.reporting.inspection import short_kinds
from csulora_callback.reporting.terminal import facts, make_table, percent, print_section, span
from csulora_callback.subspace import SafetySubspace


def print_subspace(console: Console, subspace: SafetySubspace) -> None:
    """Where it came from, and how much of the displacement it keeps in each kind of module."""
    origin = subspace.metadata
    ranks = [len(basis.singular_values) for basis in subspace.values()]
    rows = {side: f"{origin[side]['source']} ({'/'.join(origin[side]['dtypes'])})" for side in ("base", "aligned")}
    rows |= {
        "modules": str(len(subspace)),
        "rank": f"{span(ranks)} (asked for: {rank_rule(origin)})",
        "energy kept": f"{percent(subspace.energy_kept)} %",
        "displacement": f"{'?' if subspace.displaced is None else percent(subspace.displaced)} % of the weights' size",
        "fingerprint": subspace.fingerprint,
    }
    print_section(console, "Safety subspace", facts(console, rows))
    kinds: dict[str, list] = {}
    for name, basis in subspace.items():
        kinds.setdefault(layer_and_kind(name)[1], []).append(basis)
    table = make_table(console, ["kind", "modules", "shape", "rank", "‖D‖", "energy kept, %"])
    for kind, short in short_kinds(kinds).items():
        bases = kinds[kind]
        shapes = {f"{len(basis.U)} × {len(basis.V)}" for basis in bases}
        rank = span([len(basis.singular_values) for basis in bases])
        norm = sum(basis.displacement**2 for basis in bases) ** 0.5
        kept = SafetySubspace(dict(enumerate(bases)), {}).energy_kept
        table.add_row(short, str(len(bases)), ", ".join(sorted(shapes)), rank, f"{norm:.4g}", percent(kept))
    print_section(console, "By kind of module", table)


def subspace_json(subspace: SafetySubspace) -> dict:
    """The metadata, and of every module its shape, rank, displacement and the share of it that is kept."""
    return {
        "metadata": subspace.metadata,
        "fingerprint": subspace.fingerprint,
        "energy_kept": subspace.energy_kept,
        "modules": {
            name: {
                "shape": [len(basis.U), len(basis.V)],
                "rank": len(basis.singular_values),
                "displacement_norm": basis.displacement,
                "energy_kept": basis.energy,
            }
            for name, basis in subspace.items()
        },
    }


def rank_rule(rule: Mapping) -> str:
    """What was asked for by ``rank`` and ``energy``, of a subspace's metadata or of whatever else has the two.

    Example:
        >>> rank_rule({"rank": None, "energy": None})
        "a thirty-second of each module's smaller side"
        >>> rank_rule({"rank": 64, "energy": None}), rank_rule({"rank": None, "energy": 0.9})
        ('64', '90.0 % of the energy')
    """
    if rule["energy"] is not None:
        return f"{percent(rule['energy'])} % of the energy"
    return RELATIVE_RANK if rule["rank"] is None else str(rule["rank"])


def displacement_in_words(subspace: SafetySubspace) -> str:
    """How much of the displacement a subspace keeps, and how large that is beside the weights, where that is known."""
    of = "the displacement"
    if subspace.displaced is not None:
        of = f"a displacement of {percent(subspace.displaced)}% of the weights' size"
    return f"{subspace.energy_kept:.1%} of the energy of {of}"
