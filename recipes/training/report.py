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

from csulora_callback import wilson_interval
from recipes.files.points import plain, write_whole
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
            "" if row.strength is None else f"{row.strength:g}",
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
