"""Which values a recipe's keys may have, beyond their types."""

from __future__ import annotations

import math
import re
from operator import attrgetter

from csulora_callback.method.token_space import MAX_STRENGTH
from recipes.files.sources import PROMPTS
from recipes.schema.recipe import Preset, Recipe, RecipeError, TrainerKind

FOLDER_NAME = re.compile(r"[\w-][\w.-]*")
DTYPES = ("auto", "float32", "bfloat16", "float16")

_AT_LEAST = {
    1: (
        "smollm2.edgy_tuning",
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
        *(f"kinds.{name}" for name in ("training", "tuning", "held_out")),
        *(f"benchmark.{name}" for name in ("hidden_size", "intermediate_size", "heads", "kv_heads", "vocabulary")),
        *(f"benchmark.{name}" for name in ("shards", "lora_rank", "batch", "length", "repeats")),
    ),
    2: ("smollm2.align_batch",),
    0: ("training.seed", "training.warmup_steps", "benchmark.layers"),
}


def check_values(path: str, recipe: Recipe) -> None:
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
    if recipe.smollm2.weights is not None and not (recipe.frontier.methods or recipe.target.found):
        refuse("smollm2.weights", "nothing without 'frontier.methods' or 'target.found'", recipe.smollm2.weights)
    if recipe.kinds.source is not None and (recipe.smollm2.weights is None or not recipe.frontier.methods):
        refuse("kinds.source", "nothing without 'smollm2.weights' and 'frontier.methods'", recipe.kinds.source)
    if recipe.model.dtype not in DTYPES:
        refuse("model.dtype", f"one of {DTYPES}", recipe.model.dtype)
    for key in PROMPTS:
        if recipe.model.base is None and getattr(recipe.data, key) is not None:
            refuse(f"data.{key}", "nothing, as the toy lab has its own", getattr(recipe.data, key))
    if recipe.calibrate.harmless is not None and not recipe.calibrate.presets:
        refuse("calibrate.harmless", "nothing without 'calibrate.presets'", recipe.calibrate.harmless)
    if recipe.data.attacks is not None and recipe.data.attacks == recipe.data.probes:
        refuse("data.attacks", "other prompts than data.probes; without it, these are divided", recipe.data.attacks)
    if not (
        isinstance(training.report_to, str)
        or (isinstance(training.report_to, list) and all(isinstance(name, str) for name in training.report_to))
    ):
        refuse("training.report_to", "the name of a tracker, or a list of them", training.report_to)
    reading = recipe.calibrate.reads_probes or any(
        correction.reads_probes for correction in recipe.corrections.values()
    )
    if reading and recipe.model.base is not None and recipe.data.probes is None:
        refuse("data.probes", "prompts that are to be refused, for a data-aware preset or a target", None)
    if recipe.frontier.methods and recipe.target.found:
        refuse("target.found", "nothing beside 'frontier.methods'", recipe.target.found)
    # What else they may say: recipes.evidence.frontier.check and recipes.evidence.target.check.
    for key, given in (("frontier.methods", recipe.frontier.methods), ("target.found", recipe.target.found)):
        if not given:
            continue
        if recipe.corrections:
            refuse("corrections", f"nothing beside {key!r}", list(recipe.corrections))
        if recipe.data.harmless is not None:
            refuse("data.harmless", f"nothing beside {key!r}", recipe.data.harmless)
        if training.max_steps < 1:
            refuse("training.max_steps", "at least 1", training.max_steps)
        return
    # recipes.calibration.calibrate.check and recipes.benchmarks.shapes.check look at the rest.
    for key, given in (("calibrate.presets", recipe.calibrate.presets), ("benchmark.layers", recipe.benchmark.layers)):
        if given:
            if recipe.corrections:
                refuse("corrections", f"nothing beside {key!r}", list(recipe.corrections))
            return
    if not recipe.corrections:
        raise RecipeError(
            f"{path}: missing value: 'corrections' needs at least one, such as mine: {{preset: csulora}}"
        )
    for name, correction in recipe.corrections.items():
        key = f"corrections.{name}"
        if not FOLDER_NAME.fullmatch(str(name)):
            refuse("corrections", "names that can be folder names", name)
        if name in ("aligned", "raw"):
            refuse("corrections", "other names than those of what they are compared with", name)
        if correction.preset is Preset.projection and correction.strength is not None:
            refuse(f"{key}.strength", "nothing, as projection has no strength", correction.strength)
        if correction.strength is not None and (correction.strength < 0 or math.isnan(correction.strength)):
            refuse(f"{key}.strength", "a number ≥ 0", correction.strength)
        if correction.reads_task and (correction.strength or 0.0) > MAX_STRENGTH:
            refuse(f"{key}.strength", f"at most {MAX_STRENGTH:g} for a data-aware preset", correction.strength)
        if correction.target is not None and not 0.0 < correction.target <= 1.0:
            refuse(f"{key}.target", "a share in (0, 1]", correction.target)
        if correction.target is not None and correction.strength is not None:
            refuse(f"{key}.strength", "nothing beside a target, which looks for it", correction.strength)
        if correction.target is not None and correction.preset is Preset.projection:
            refuse(f"{key}.target", "nothing, as projection has no strength", correction.target)
        if correction.rank is not None and correction.rank < 1:
            refuse(f"{key}.rank", "a whole number ≥ 1", correction.rank)
        if correction.every_n_steps is not None and correction.every_n_steps < 1:
            refuse(f"{key}.every_n_steps", "a whole number ≥ 1", correction.every_n_steps)
        if correction.energy is not None and not 0.0 < correction.energy <= 1.0:
            refuse(f"{key}.energy", "a share in (0, 1]", correction.energy)
        if correction.energy is not None and correction.rank is not None:
            refuse(f"{key}.energy", f"nothing beside {key}.rank", correction.energy)
