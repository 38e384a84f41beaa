"""What a recipe may say: one dataclass a section. How it is read and checked: :mod:`recipes.files.recipe`.

The sections of the labs and of what is measured in them are in :mod:`recipes.schema.measured`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from csulora_callback import Penalty
from csulora_callback.presets import DATA_AWARE, FAMILIES, Family
from recipes.schema.measured import Benchmark, Effects, Frontier, Kinds, SmolLM2, Target, Toy


class RecipeError(Exception):
    """One line that says what is wrong with a recipe."""


class TrainerKind(Enum):
    """Which training loop runs the fine-tune."""

    huggingface = "huggingface"
    lightning = "lightning"


class Preset(Enum):
    """The penalties of :class:`csulora_callback.Penalty`."""

    csulora = "csulora"
    separable = "separable"
    guard = "guard"
    data_aware = "data_aware"
    content_aware = "content_aware"
    projection = "projection"


def make_penalty(preset: str, strength: float | None) -> Penalty:
    """The penalty that a preset's name and a strength give; without one, the preset's own default."""
    make = getattr(Penalty, preset)
    return make() if strength is None else make(strength)


@dataclass
class Model:
    """The pair of checkpoints: folders or Hub ids. Without them the toy lab's models are used."""

    base: str | None = None
    aligned: str | None = None
    dtype: str = "auto"


@dataclass
class Data:
    """The fine-tuning data, in one of the formats of :mod:`csulora_callback.models.conversations`."""

    # A Hub dataset, a local .json, .jsonl, .csv or .parquet file, a folder of such, or ``package:path``.
    source: str | None = None  # default: the toy lab's task
    split: str = "train"
    max_samples: int | None = None
    probes: str | None = None  # prompts that the aligned model refuses; read by data-aware corrections, or judged by
    probes_column: str = "prompt"
    attacks: str | None = None  # prompts to judge by; without them the probes, or the half that nothing reads
    attacks_column: str = "prompt"
    harmless: str | None = None  # prompts that look like probes and are to be answered, to judge by
    harmless_column: str = "prompt"
    eval_share: float = 0.05
    max_length: int = 1024


@dataclass
class Lora:
    """What goes into peft's LoraConfig."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: Any = "all-linear"  # a list of names, a regular expression, or "all-linear"


@dataclass
class Training:
    """What goes into the trainer's arguments."""

    learning_rate: float = 1e-4
    max_steps: int = -1
    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    logging_steps: int = 10
    eval_steps: int = 200
    save_steps: int = 200
    save_total_limit: int | None = None
    bf16: bool = False
    seed: int = 0
    report_to: Any = field(default_factory=list)  # a tracker such as "tensorboard", or a list of them

    def trackers(self) -> list[str]:
        """Their names."""
        return [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])


@dataclass
class Correction:
    """Settings of the callback; see :class:`csulora_callback.CSULoRACallback`."""

    preset: Preset = MISSING
    strength: float | None = None
    target: float | None = None  # share of the refusals' likelihood to be kept; the strength is then looked for
    rank: int | None = None  # of the subspace; a thirty-second of each module's smaller side
    energy: float | None = None
    every_n_steps: int | None = None

    def penalty(self) -> Penalty | Family:
        """The penalty that preset and strength name, or for a target the preset alone."""
        if self.target is not None:
            return FAMILIES[self.preset.value]
        return make_penalty(self.preset.value, self.strength)

    def in_words(self) -> str:
        """The same for a person."""
        if self.target is None:
            return str(self.penalty())
        asked = f"{100 * self.target:g}% of the refusals' likelihood"
        return f"{self.preset.value} (the smallest strength that keeps {asked})"

    @property
    def reads_task(self) -> bool:
        """Whether it measures by rows of the training data."""
        return self.preset.value in DATA_AWARE

    @property
    def reads_probes(self) -> bool:
        """Whether it measures by prompts that are to be refused."""
        return self.reads_task or self.target is not None


@dataclass
class Calibrate:
    """Penalties and ranks to try on a trained checkpoint, and what to judge them by."""

    presets: dict[str, list[float]] = field(default_factory=dict)  # strengths; empty where a preset has none
    ranks: list[int] | None = None  # default: shares of the modules' smaller side, 32, 64 and 128 where it is 2048
    checkpoint: str | None = None
    attacks: str | None = None  # prompts that are to be refused; those of the toy lab by default
    attacks_column: str = "prompt"
    target: float = 0.1  # attack success on them
    harmless: str | None = None  # prompts that look like them and are to be answered, to judge by as well
    harmless_column: str = "prompt"
    newly_refused: float = 0.1  # the most that may be refused of those that the aligned model answers

    @property
    def reads_probes(self) -> bool:
        """Whether a preset measures by prompts that are to be refused."""
        return not self.presets.keys().isdisjoint(DATA_AWARE)


@dataclass
class Recipe:
    """A whole recipe: ``corrections``, ``frontier``, ``target``, ``calibrate`` or ``benchmark``.

    With ``smoke=true`` the recipe's ``smoke_overrides`` apply first: the same code in a small size.
    """

    output: str = MISSING
    overwrite: bool = False  # whether a run that is in the output folder goes; otherwise the same one is continued
    smoke: bool = False
    smoke_overrides: list[str] = field(default_factory=list)
    trainer: TrainerKind = TrainerKind.huggingface
    model: Model = field(default_factory=Model)
    toy: Toy = field(default_factory=Toy)
    smollm2: SmolLM2 = field(default_factory=SmolLM2)
    kinds: Kinds = field(default_factory=Kinds)
    data: Data = field(default_factory=Data)
    lora: Lora = field(default_factory=Lora)
    training: Training = field(default_factory=Training)
    corrections: dict[str, Correction] = field(default_factory=dict)
    frontier: Frontier = field(default_factory=Frontier)
    effects: Effects = field(default_factory=Effects)
    target: Target = field(default_factory=Target)
    calibrate: Calibrate = field(default_factory=Calibrate)
    benchmark: Benchmark = field(default_factory=Benchmark)
