"""What a recipe leaves behind: the table, results.json and metrics.jsonl; the picture is drift_picture's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recipes.files.points import plain
from recipes.training.task import Score


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
