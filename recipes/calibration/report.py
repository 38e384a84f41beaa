"""What a calibration leaves behind and prints: results, answers to read, and how to get the same correction again."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from csulora_callback import sidecar, wilson_interval
from csulora_callback.reporting.terminal import make_console, make_table, print_section
from recipes.calibration.choice import ALIGNED, RAW, Calibration, Candidate, Judgement, Verdict, exactly
from recipes.files.points import plain
from recipes.schema.recipe import Recipe

RESULTS, ANSWERS, RECIPE, ADAPTER = "results.json", "answers.jsonl", "recipe.yaml", "adapter"
SUBSPACE, TASK, PROBES = "subspace.safetensors", "task.jsonl", "probes.jsonl"
FILES = {  # all that a calibration may leave in its folder
    ADAPTER: "the corrected adapter",
    ANSWERS: "every answer that was judged; read some",
    SUBSPACE: "for the command above",
    TASK: "likewise, rows of the training data",
    PROBES: "likewise, prompts that the correction has read",
    RESULTS: "the numbers",
    RECIPE: "what was asked for",
}


def write(result: Calibration, folder: Path, again: Mapping[str, str]) -> None:
    """results.json, with everything that was measured and ``again``, and answers.jsonl, with all that was said."""
    results = {
        "verdict": result.verdict.value,
        "target": result.target,
        "newly_refused_limit": result.limit if result.has_harmless else None,
        "without": {
            name: {split: _numbers(own[split], split, result) for split in own} for name, own in result.ends.items()
        },
        "tuning": [
            {**asdict(candidate), **_numbers(judgement, "tuning", result)} for candidate, judgement in result.tuning
        ],
        "chosen": None if result.chosen is None else asdict(result.chosen),
        "held_out": None if result.held_out is None else _numbers(result.held_out, "held_out", result),
        **again,
    }
    (folder / RESULTS).write_text(json.dumps(plain(results), indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps(line, ensure_ascii=False) for line in _answers(result)]
    (folder / ANSWERS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _numbers(judgement: Judgement, split: str, result: Calibration) -> dict:
    numbers = {"prompts": judgement.prompts, "succeeded": judgement.succeeded, "task_loss": judgement.task_loss}
    if not judgement.harmless_answers:
        return numbers
    refused, answered = judgement.newly_refused(result.ends[ALIGNED][split])
    return {**numbers, "harmless_answered_by_aligned": answered, "newly_refused": refused}


def _answers(result: Calibration) -> Iterator[dict]:
    judged = [(name, split, own[split]) for name, own in result.ends.items() for split in own]
    judged += [(str(candidate), "tuning", judgement) for candidate, judgement in result.tuning]
    if result.held_out is not None:
        judged.append((str(result.chosen), "held_out", result.held_out))
    for setting, split, judgement in judged:
        for harmless, answers in ((False, judgement.answers), (True, judgement.harmless_answers)):
            for answer in answers:
                yield {"setting": setting, "split": split, **asdict(answer), "harmless": harmless}


def how_to_repeat(chosen: Candidate | None, recipe: Recipe, aligned: str) -> dict[str, str]:
    """The line of code and the command that correct as the chosen candidate does; nothing where there is none."""
    if chosen is None:
        return {}
    output, base = Path(recipe.output), recipe.model.base
    base = "..." if base is None else f"base_model={json.dumps(base)}"
    command = ["csulora", "correct", recipe.calibrate.checkpoint, "-o", "corrected", "--subspace", output / SUBSPACE]
    command += ["--penalty", chosen.preset]
    if chosen.strength is not None:
        command += ["--strength", exactly(chosen.strength)]
    if chosen.penalty().on_probes is not None:
        command += ["--task", output / TASK, "--aligned", aligned, "--probes", output / PROBES]
    return {
        "callback": f"CSULoRACallback({base}, {chosen.code(f'probes={json.dumps(str(output / PROBES))}')})",
        "command": shlex.join(map(str, command)),
    }


def print_result(result: Calibration, recipe: Recipe, again: Mapping[str, str]) -> None:
    """What was measured, what follows from it, and what to do with it."""
    console = make_console()
    _print_tables(console, result)
    say = {
        Verdict.nothing_to_correct: _nothing_to_correct,
        Verdict.out_of_reach: _out_of_reach,
        Verdict.none: _none,
        Verdict.chosen: _chosen,
    }
    console.print()
    for line in say[result.verdict](result, recipe):
        console.print(line, soft_wrap=True)
    if again:
        console.print(f"\nTo train with it:     {again['callback']}", soft_wrap=True)
        console.print(f"To correct with it:   {again['command']}", soft_wrap=True)
    console.print(f"\nWritten to {recipe.output}:")
    for name, what in FILES.items():
        if (Path(recipe.output) / name).exists():
            console.print(f"  {name:21} {what}")


def _print_tables(console: Console, result: Calibration) -> None:
    tried, target, aligned = len(result.tuning), _limits(result), result.ends[ALIGNED]["tuning"]
    ends = [(name, "", "", own["tuning"]) for name, own in result.ends.items()]
    title = (
        f"Without a correction, on the {aligned.prompts} prompts of the tuning half; attack success is the share not "
        "refused"
    )
    if result.has_harmless:
        _, answered = aligned.newly_refused(aligned)
        title += (
            f", newly refused that of the harmless prompts which the aligned model answers, {answered} of "
            f"{len(aligned.harmless_answers)}"
        )
    _print_table(console, title, ends, result)
    met = [pair for pair in result.tuning if result.meets(pair[1])]
    missed = [pair for pair in result.tuning if not result.meets(pair[1])]
    met.sort(key=lambda pair: pair[1].task_loss)  # the first is the one that is chosen
    missed.sort(key=lambda pair: (pair[1].attack_success, pair[1].task_loss))
    if met:
        title = f"{len(met)} of {tried} settings meet the target, {target}; what keeps most of the task first"
        _print_table(console, title, map(_row, met), result)
    if missed:
        title = f"{len(missed)} of {tried} do not; the lowest attack success first"
        _print_table(console, title, map(_row, missed), result)


def _row(pair: tuple[Candidate, Judgement]) -> tuple[str, str, str, Judgement]:
    candidate, judgement = pair
    rank = str(candidate.rank) if candidate.has_rank else ""
    return candidate.preset, rank, "" if candidate.strength is None else exactly(candidate.strength), judgement


def _print_table(
    console: Console, title: str, rows: Sequence[tuple[str, str, str, Judgement]], result: Calibration
) -> None:
    aligned = result.ends[ALIGNED]["tuning"]
    new = ["newly refused"] if result.has_harmless else []
    table = make_table(console, ["", "rank", "strength", "attack success (95 %)", *new, "task loss", "task retained"])
    table.columns[0].min_width = len(ALIGNED)  # so that all tables line up
    for name, rank, strength, judgement in rows:
        low, high = judgement.interval()
        loss, kept = f"{judgement.task_loss:.3f}", _retained(judgement, result, "tuning")
        success = f"{judgement.attack_success:.1%} ({100 * low:.1f} to {100 * high:.1f})"
        refused, answered = judgement.newly_refused(aligned)
        table.add_row(name, rank, strength, success, *([f"{refused / answered:.1%}"] if new else []), loss, kept)
    print_section(console, title, table)


def _limits(result: Calibration) -> str:
    """What a setting has to meet, for a person."""
    limits = f"attack success of at most {result.target:.1%}"
    return f"{limits} and at most {result.limit:.1%} newly refused" if result.has_harmless else limits


def _retained(judgement: Judgement, result: Calibration, split: str) -> str:
    aligned, raw = result.ends[ALIGNED][split].task_loss, result.ends[RAW][split].task_loss
    return f"{(aligned - judgement.task_loss) / (aligned - raw):.1%}" if aligned > raw else "nothing learned"


def _nothing_to_correct(result: Calibration, recipe: Recipe) -> Iterator[str]:
    raw, checkpoint = result.ends[RAW], Path(recipe.calibrate.checkpoint)
    yield (
        f"The raw adapter is at {raw['tuning'].attack_success:.1%} already on the tuning half, and the target is at "
        f"most {result.target:.1%}: nothing needs to be corrected, and nothing was tried."
    )
    yield _on_held_out(raw["held_out"], result)
    yield from _harmless_on_held_out(raw["held_out"], result)
    inside = checkpoint / sidecar.FOLDER / sidecar.RAW
    yield f"It is the one in {inside if inside.is_dir() else checkpoint}."


def _out_of_reach(result: Calibration, recipe: Recipe) -> Iterator[str]:
    aligned = result.ends[ALIGNED]["tuning"]
    low, high = aligned.interval()
    yield (
        f"The aligned model itself, without any adapter, is at {aligned.attack_success:.1%} on the tuning half (95 % "
        f"interval {low:.1%} to {high:.1%}), and the target is at most {result.target:.1%}."
    )
    yield (
        "A correction falls back to the aligned model and cannot be asked to go below it, so nothing was tried. Set "
        f"calibrate.target={math.ceil(100 * aligned.attack_success) / 100:g} or more, or judge by prompts that the "
        f"aligned model refuses: what it said to these is in {ANSWERS}."
    )


def _none(result: Calibration, recipe: Recipe) -> Iterator[str]:
    tuning, aligned = result.tuning, result.ends[ALIGNED]["tuning"]
    withstand = [pair for pair in tuning if result.withstands(pair[1])]
    if withstand:
        best, judgement = min(withstand, key=lambda pair: (pair[1].newly_refused(aligned), pair[1].task_loss))
        refused, answered = judgement.newly_refused(aligned)
        yield (
            f"{len(withstand)} of {len(tuning)} settings keep attack success at {result.target:.1%} or below on the "
            f"tuning half, and none of them newly refuses at most {result.limit:.1%} of the harmless prompts; the "
            f"least does {best} with {refused / answered:.1%}."
        )
        yield (
            "Try the preset content_aware, which refuses fewer of them, other strengths, or a higher "
            "calibrate.newly_refused."
        )
        return
    best, judgement = min(tuning, key=lambda pair: (pair[1].attack_success, pair[1].task_loss))
    yield (
        f"None of {len(tuning)} settings keeps attack success at {result.target:.1%} or below on the tuning half; the "
        f"lowest is {best} with {judgement.attack_success:.1%}, and the aligned model is at "
        f"{aligned.attack_success:.1%}."
    )
    yield "Try greater strengths, the preset data_aware, or a higher calibrate.target."


def _chosen(result: Calibration, recipe: Recipe) -> Iterator[str]:
    yield (
        f"Chosen for {recipe.calibrate.checkpoint}: {result.chosen}. It keeps most of the task of those that meet the "
        "target."
    )
    yield _on_held_out(result.held_out, result)
    yield (
        f"There its task loss is {result.held_out.task_loss:.3f}, {_retained(result.held_out, result, 'held_out')} of "
        f"the task retained (100 % is the raw adapter's {result.ends[RAW]['held_out'].task_loss:.3f}, 0 % the aligned "
        f"model's {result.ends[ALIGNED]['held_out'].task_loss:.3f})."
    )
    yield from _harmless_on_held_out(result.held_out, result)


def _on_held_out(judgement: Judgement, result: Calibration) -> str:
    low, high = judgement.interval()
    meaning = _meaning(low, high, result.target, "target", judgement.prompts)
    return (
        f"On the {judgement.prompts} prompts of the held-out half, which had no part in this: attack success "
        f"{judgement.attack_success:.1%} (95 % interval {low:.1%} to {high:.1%}), {meaning}"
    )


def _harmless_on_held_out(judgement: Judgement, result: Calibration) -> Iterator[str]:
    if not result.has_harmless:
        return
    refused, answered = judgement.newly_refused(result.ends[ALIGNED]["held_out"])
    low, high = wilson_interval(refused, answered)
    yield (
        f"Of the {answered} harmless prompts there that the aligned model answers {refused / answered:.1%} are "
        f"refused (95 % interval {low:.1%} to {high:.1%}), {_meaning(low, high, result.limit, 'limit', answered)}"
    )


def _meaning(low: float, high: float, bound: float, name: str, prompts: int) -> str:
    if high <= bound:
        return f"all of which is within the {name}."
    if low > bound:
        return f"which is above the {name}: the tuning prompts were too few, or too unlike these."
    return f"so that {prompts} prompts cannot tell whether it meets the {name}."
