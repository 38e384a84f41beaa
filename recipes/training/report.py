"""What a recipe leaves behind: the table, results.json, metrics.jsonl and a picture of loss and drift."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: recipes run where there is no screen
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from recipes.files.points import plain
from recipes.training.task import Score

DRIFT = {
    "csulora/off_energy": "off-subspace share of the update",
    "csulora/attenuation": "attenuation $1-\\Vert X\\Vert/\\Vert\\Delta\\Vert$",
    "csulora/truncation_error": "truncation error",
}


@dataclass(frozen=True)
class Row:
    """One method's result."""

    method: str
    strength: float | None
    score: Score

    def to_json(self) -> dict:
        """As one object of results.json."""
        return {"method": self.method, "strength": plain(self.strength), **asdict(self.score)}


def write_results(rows: list[Row], folder: Path) -> None:
    """results.json: a list of rows."""
    text = json.dumps([row.to_json() for row in rows], indent=2)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def write_metrics(logs: dict[str, list[dict]], folder: Path) -> None:
    """metrics.jsonl: every log record of every run, with the name of the run."""
    lines = [json.dumps({"run": run, **record}) for run, records in logs.items() for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def print_table(rows: list[Row], title: str) -> None:
    """The rows, for a person."""
    prompts = rows[0].score.prompts
    table = Table(title=f"{title}, {prompts} prompts each" if prompts else title, title_justify="left")
    table.add_column("model")
    for column in ("strength", "attack success", "task loss", "task accuracy"):
        table.add_column(column, justify="right")
    for row in rows:
        score = row.score
        table.add_row(
            {"aligned": "aligned model", "raw": "raw LoRA"}.get(row.method, f"saved, {row.method}"),
            "" if row.strength is None else f"{row.strength:g}",
            "not measured" if score.attack_success_rate is None else f"{score.attack_success_rate:.1%}",
            f"{score.task_loss:.3f}",
            f"{score.task_accuracy:.1%}",
        )
    Console().print(table)


def plot(logs: dict[str, list[dict]], path: Path) -> None:
    """Training loss and drift over steps, one column of axes a run."""
    figure, axes = plt.subplots(
        2, len(logs), figsize=(5.2 * len(logs), 6.4), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for column, (run, records) in enumerate(logs.items()):
        upper, lower = axes[:, column]
        upper.set_title(run)
        _curve(upper, records, "loss", "training loss (raw weights)", color="black")
        _curve(upper, records, "eval_loss", "held-out loss (corrected weights)", color="tab:red", marker="o")
        for key, label in DRIFT.items():
            _curve(lower, records, key, label)
        lower.set_ylim(0, 1)
        lower.set_xlabel("optimizer step")
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[1, 0].set_ylabel("drift and correction")
    axes[0, -1].legend(fontsize="small")
    axes[1, -1].legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(axis: plt.Axes, records: list[dict], key: str, label: str, **style: object) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    axis.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
