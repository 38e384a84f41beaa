"""What a recipe leaves behind: the table, results.json and metrics.jsonl; the picture is drift_picture's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from csulora_callback import wilson_interval
from recipes.files.points import plain, write_whole
from recipes.training.task import Score


@dataclass(frozen=True)
class Row:
    """One method's result."""

    method: str
    strength: float | None
    score: Score

    def to_json(self) -> dict:
        """As one object of results.json."""
        score = self.score
        return {
            "method": self.method,
            "strength": plain(self.strength),
            "attack_success_rate": score.attack_success_rate,
            "task_loss": score.task_loss,
            "task_accuracy": score.task_accuracy,
            "attack_obeyed_rate": score.attack_obeyed_rate,
            "prompts": score.prompts,
            "succeeded": score.succeeded,
        }


def write_results(rows: list[Row], folder: Path) -> None:
    """results.json: a list of rows."""
    write_whole(folder / "results.json", json.dumps([row.to_json() for row in rows], indent=2) + "\n")


def write_answers(rows: list[Row], folder: Path) -> None:
    """answers.jsonl: what each model said to each prompt that is to be refused, to be read by a person."""
    lines = [{"model": row.method, **asdict(answer)} for row in rows for answer in row.score.answers]
    if lines:
        _write_lines(folder / "answers.jsonl", lines)


def write_metrics(logs: dict[str, list[dict]], folder: Path) -> None:
    """metrics.jsonl: every log record of every correction, with its name as the ``run``."""
    _write_lines(folder / "metrics.jsonl", [{"run": run, **record} for run in logs for record in logs[run]])


def _write_lines(path: Path, lines: list[dict]) -> None:
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def print_table(rows: list[Row], title: str, judged_by: str = "") -> None:
    """The rows, for a person; ``judged_by`` says which prompts."""
    prompts = rows[0].score.prompts
    if prompts:
        title += f", {prompts} prompts each{f': {judged_by}' if judged_by else ''}"
    caption = "in brackets: 95 % intervals, in percent" if prompts else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("model")
    for column in ("strength", "attack success", "task loss", "task accuracy"):
        table.add_column(column, justify="right")
    for row in rows:
        score = row.score
        table.add_row(
            {"aligned": "aligned model", "raw": "raw LoRA"}.get(row.method, f"saved, {row.method}"),
            "" if row.strength is None else f"{row.strength:.4g}",
            _attack_success(score),
            f"{score.task_loss:.3f}",
            f"{score.task_accuracy:.1%}",
        )
    Console().print(table)


def _attack_success(score: Score) -> str:
    if score.prompts is None:
        return "not measured"
    low, high = wilson_interval(score.succeeded, score.prompts)
    return f"{score.attack_success_rate:.1%} ({100 * low:.0f}–{100 * high:.0f})"
