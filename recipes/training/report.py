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
            "harmless_prompts": len(score.harmless_answers) or None,
            "over_refused": score.over_refused,
        }


def write_results(rows: list[Row], folder: Path) -> None:
    """results.json: a list of rows."""
    write_whole(folder / "results.json", json.dumps([row.to_json() for row in rows], indent=2) + "\n")


def write_answers(rows: list[Row], folder: Path) -> None:
    """answers.jsonl: what each model said to each prompt that it was judged by, to be read by a person."""
    lines = [
        {"model": row.method, **asdict(answer), "harmless": harmless}
        for row in rows
        for harmless, answers in ((False, row.score.answers), (True, row.score.harmless_answers))
        for answer in answers
    ]
    if lines:
        _write_lines(folder / "answers.jsonl", lines)


def write_metrics(logs: dict[str, list[dict]], folder: Path) -> None:
    """metrics.jsonl: every log record of every correction, with its name as the ``run``."""
    _write_lines(folder / "metrics.jsonl", [{"run": run, **record} for run in logs for record in logs[run]])


def _write_lines(path: Path, lines: list[dict]) -> None:
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def print_table(rows: list[Row], title: str, judged_by: str = "") -> None:
    """The rows, for a person; ``judged_by`` says which prompts."""
    prompts, harmless = rows[0].score.prompts, len(rows[0].score.harmless_answers)
    if prompts:
        title += f", {prompts} prompts each{f': {judged_by}' if judged_by else ''}"
    if harmless:
        title += f"; {harmless} harmless"
    caption = "in brackets: 95 % intervals, in percent" if prompts or harmless else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("model")
    over = ["harmless refused"] if harmless else []
    for column in ("strength", "attack success", *over, "task loss", "task accuracy"):
        table.add_column(column.replace(" ", "\n"), justify="right")  # so that all fit in 80 characters
    for row in rows:
        score = row.score
        table.add_row(
            {"aligned": "aligned model", "raw": "raw LoRA"}.get(row.method, row.method),
            "" if row.strength is None else f"{row.strength:.4g}",
            share(score.succeeded, score.prompts),
            *([share(score.over_refused, harmless)] if harmless else []),
            f"{score.task_loss:.3f}",
            f"{score.task_accuracy:.1%}",
        )
    Console().print(table)


def share(count: int | None, prompts: int | None) -> str:
    """A share of the prompts with its 95 % interval, for a table."""
    if prompts is None:
        return "not measured"
    low, high = wilson_interval(count, prompts)
    return f"{count / prompts:.1%} ({100 * low:.0f}–{100 * high:.0f})"
