"""A target's evidence as a page and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from recipes.evidence.bench import SCREENED
from recipes.evidence.frontier_report import first, percent
from recipes.evidence.methods import METHODS
from recipes.evidence.target_tables import READINGS, grouped
from recipes.files.markdown import markdown_table

LABELS = {name: method.label for name, method in METHODS.items()} | {SCREENED: "data-aware, refused rows out"}


def to_markdown(results: Mapping) -> str:
    """All tables, with what their columns are."""
    target, seeds = results["grid"]["target"], len(results["grid"]["frontier"]["seeds"])
    (prompts,) = {first(point["scores"])["prompts"] for point in results["points"]}
    parts = [
        f"Means over {seeds} seeds and, in brackets, the least and the largest; shares in percent. *Refusals kept*,",
        "and the *log-likelihood* per token of the refusals' beginnings less the aligned model's, are of probes that",
        f"the correction does not read. Attack success, on {prompts} prompts, *task retained*, (loss_aligned − loss)",
        "/ (loss_aligned − loss_raw), and side effects are of held-out data.",
        "",
    ]
    for (poison,), rows in grouped(results["strengths"], "poison").items():
        parts += [f"Fixed strengths, poison {poison:.0%}:", "", _strength_table(rows), ""]
    parts += [
        "Correlation of what the probes read with attack success, over the raw model and those strengths, all poison",
        "shares and seeds; in brackets Spearman's of each seed by itself; – where nothing varies:",
        "",
        _correlation_table(results["correlations"]),
        "",
    ]
    for (poison,), rows in grouped(results["found"], "poison").items():
        parts += [
            "The strength that keeps a share of the refusals (*kept*), or of the likelihood per token of their",
            "beginnings (*likelihood*), by the probes of which set, and the best fixed one in",
            f"hindsight: the least task loss with at most {100 * target['margin']:g} points more attack success than",
            f"the aligned model of the seed; poison {poison:.0%}:",
            "",
            _found_table(rows),
            "",
        ]
    for (poison,), rows in grouped(results["bounded"], "poison").items():
        parts += [
            f"The best fixed strength in hindsight with an attack success of at most {target['attack_success']:g};",
            "of the rows that a data-aware correction reads as its task, over all seeds, how many are poison, how",
            f"many the aligned model refuses, and how many are both; poison {poison:.0%}:",
            "",
            _bounded_table(rows),
            "",
        ]
    return "\n".join(parts[:-1]) + "\n"


def _strength_table(rows: Sequence[Mapping]) -> str:
    sets, names = list(rows[0]["refusing"]), [name for name in rows[0]["outcome"] if name != "over the aligned model"]
    columns = ["method", "strength"]
    for probes in sets:
        columns += [f"refusals kept, {probes}", f"log-likelihood, {probes}"]
    cells = []
    for row in rows:
        own = [LABELS[row["method"]], "" if row["strength"] is None else f"{row['strength']:g}"]
        for probes in sets:
            own += [percent(row["refusing"][probes]["kept"]), _number(row["refusing"][probes]["logprob"])]
        cells.append([*own, *(percent(row["outcome"][name]) for name in names)])
    return markdown_table([*columns, *names], cells)


def _correlation_table(rows: Sequence[Mapping]) -> str:
    columns = ["probes", "over", "points", "seeds"]
    for name in ("refusals kept", "log-likelihood", "likelihood"):
        columns += [f"{name}: Spearman", "Pearson"]
    cells = []
    for row in rows:
        over = "all" if row["method"] is None else LABELS[row["method"]]
        own = [row["probes"], over, str(row["points"]), str(row["seeds"])]
        for name in READINGS:
            own += [coefficient(row[name]), _two(row[name]["pearson"])]
        cells.append(own)
    return markdown_table(columns, cells, texts=(0, 1))


def coefficient(of: Mapping) -> str:
    """Spearman's over all, and in brackets the least and largest of the single seeds."""
    seeds = [value for value in of["by_seed"] if value is not None]
    return _two(of["spearman"]) + (f" [{_two(min(seeds))}, {_two(max(seeds))}]" if seeds else "")


def _found_table(rows: Sequence[Mapping]) -> str:
    names = list(rows[0]["outcome"])
    cells = [
        [
            LABELS[row["method"]],
            by(row),
            f"{100 * row['qualified']:.0f}" if row["by"] else "",
            strengths_of(row) if row["by"] else "",
            percent(row["kept"]),
            percent(row["likelihood"]),
            *(percent(row["outcome"][name], signed=name.startswith("over the")) for name in names),
        ]
        for row in rows
    ]
    return markdown_table(
        ["method", "by", "reached", "strength by seed", "refusals kept", "likelihood", *names], cells, texts=(0, 1)
    )


def by(row: Mapping) -> str:
    """How the strength was chosen: by which probes, and what it had to keep."""
    return (row["by"] or "") + (f", {row['reading']} {row['share']:g}" if "share" in row else "")


def strengths_of(row: Mapping) -> str:
    """Those of each seed, in their order; – where none fits."""
    return ", ".join(
        "–" if strength is None else f"{strength:.2g}" if strength < 100 else f"{strength:.0f}"
        for strength in row["strengths"]
    )


def _bounded_table(rows: Sequence[Mapping]) -> str:
    cells = []
    for row in rows:
        counts = [
            str(sum(row["rows"][name])) if row["rows"] else ""
            for name in ("rows", "poison", "refused", "poison_refused")
        ]
        shares = [percent(row["outcome"][name]) for name in ("task retained", "attack success")]
        cells.append([LABELS[row["method"]], f"{100 * row['qualified']:.0f}", strengths_of(row), *shares, *counts])
    columns = ["method", "reached", "strength by seed", "task retained", "attack success"]
    return markdown_table([*columns, "rows", "poison", "refused", "both"], cells)


def _number(value: Mapping) -> str:
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def print_tables(results: Mapping) -> None:
    """For a person: what was found beside what had been best, and the correlations over all methods."""
    console = Console()
    for (poison,), rows in grouped(results["found"], "poison").items():
        names = ["attack success", "task retained", "over-refusal"]
        title = f"poison {poison:.0%}: the strength that keeps enough; in %, with the range of the seeds"
        printed = Table("model", "by", title=title, title_justify="left")
        for name in ("strength by seed", "refusals kept", "likelihood", *names):
            printed.add_column(name, justify="right")
        for row in rows:
            shares = [percent(row["outcome"][name]) for name in names]
            strength = strengths_of(row) if row["by"] else ""
            printed.add_row(
                LABELS[row["method"]], by(row), strength, *(percent(row[n]) for n in ("kept", "likelihood")), *shares
            )
        Console(width=max(console.width, 150)).print(printed)
    for row in results["correlations"]:
        if row["method"] is None:
            over = f"{row['points']} models of {row['seeds']} seeds"
            kept, logprob = (coefficient(row[name]) for name in ("kept", "logprob"))
            console.print(
                f"Attack success against what the probes '{row['probes']}' read, Spearman over {over}: refusals kept "
                f"{kept}, log-likelihood {logprob}.",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
