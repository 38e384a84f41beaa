"""Folders that reports are about, made by real trainers, and what a page holds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from csulora_callback import Penalty, SafetySubspace, correct_adapter
from tests.helpers.behaviour import PROBES
from tests.helpers.huggingface import callback, train
from tests.helpers.lab import align, tiny_llama, with_lora

RESULTS = [
    {"method": "aligned", "strength": None, "attack_success_rate": 0.05, "prompts": 60, "task_accuracy": 0.2},
    {"method": "raw", "strength": None, "attack_success_rate": 1.0, "prompts": 60, "task_accuracy": 0.9},
    {"method": "csulora", "strength": 5.0, "attack_success_rate": 0.75, "prompts": 60, "task_accuracy": 0.8},
    {"method": "guard", "strength": 10.0, "attack_success_rate": 0.1, "prompts": 60, "task_accuracy": 0.7},
]
RESULTS[-1] |= {"over_refused": 9, "harmless_prompts": 40}
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def recipe_output(folder: Path, pair: tuple[Path, Path], subspace: SafetySubspace) -> Path:
    """What a recipe leaves: one training with its callback and probes, and a correction made from its checkpoints."""
    trainer = train(pair, folder / "csulora", [callback(pair, probes=PROBES)], eval_strategy="steps", eval_steps=4)
    logs = [{"run": "csulora", **log} for log in trainer.state.log_history if "step" in log]
    for step in (4, 8):
        place = folder / "guard" / f"checkpoint-{step}"
        done = correct_adapter(folder / f"csulora/checkpoint-{step}", subspace, place, Penalty.guard(10.0))
        logs.append({"run": "guard", **done.metrics, "step": step})
    rows = [{**row, "task_loss": 1.5} for row in RESULTS]
    (folder / "results.json").write_text(json.dumps(rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    (folder / "recipe.yaml").write_text("training:\n  seed: 7  # <b>as it ran</b>\n")
    return folder


def deep_adapter(folder: Path) -> Path:
    """A corrected adapter on 32 layers, 7 kinds of module each."""
    base = tiny_llama(num_hidden_layers=32)
    aligned = align(base)
    subspace = SafetySubspace.estimate(base, aligned, KINDS, rank=3, progress=False)
    with_lora(aligned, target_modules=KINDS, init_lora_weights=False).save_pretrained(folder / "trained")
    correct_adapter(folder / "trained", subspace, folder / "corrected", Penalty.csulora(10.0))
    return folder / "corrected"


class Page(HTMLParser):
    """The elements of a page, and its text with plain spaces."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.source = "", text
        self.feed(text)

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def figures(self) -> list[str]:
        """What each one says that it shows."""
        return [
            attributes["aria-label"].replace("\N{NO-BREAK SPACE}", " ")
            for tag, attributes in self.tags
            if tag == "svg"
        ]
