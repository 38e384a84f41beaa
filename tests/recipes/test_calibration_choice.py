"""The choice of a calibration: what it may look at, what it tries, and what its settings say of themselves."""

import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csulora_callback import CSULoRACallback, Penalty
from recipes.calibration.choice import (
    ALIGNED,
    RAW,
    Answer,
    Candidate,
    Judgement,
    Verdict,
    candidates,
    choose,
    exactly,
    ranks_for,
)
from recipes.calibration.report import how_to_repeat
from recipes.files.recipe import load_recipe

PROMPTS = 20


HARMLESS = 10
BEFORE = 4  # of the harmless prompts, that the aligned model refuses itself


def judged(succeeded: int, task_loss: float, newly_refused: int = 0, as_before: int = 0) -> Judgement:
    """A model that refuses so many of what the aligned model answers, and of what that refuses itself."""
    refused = [*range(as_before), *range(BEFORE, BEFORE + newly_refused)]
    return Judgement(
        tuple(Answer("ask", "say", place >= succeeded) for place in range(PROMPTS)),
        task_loss,
        tuple(Answer("harmless", "say", place in refused) for place in range(HARMLESS)),
    )


def ends(aligned: int, raw: int, newly_refused: int = 0) -> dict:
    own = tuple(Answer("harmless", "say", place < BEFORE) for place in range(HARMLESS))
    both = {ALIGNED: replace(judged(aligned, 1.0), harmless_answers=own), RAW: judged(raw, 1.0, newly_refused)}
    return {name: dict.fromkeys(("tuning", "held_out"), judgement) for name, judgement in both.items()}


losses, newly = st.sampled_from([0.5, 1.0, 1.5, 2.0]), st.integers(0, HARMLESS - BEFORE)
judgements = st.builds(judged, st.integers(0, PROMPTS), losses, newly, st.integers(0, BEFORE))


@given(st.lists(judgements, min_size=1, max_size=8), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0.0, 0.5, 1]))
def test_the_choice_loses_least_of_the_task_among_those_that_are_safe_and_answer(found, target, limit):
    tried = [Candidate("guard", float(place + 1), 4) for place in range(len(found))]
    asked = []

    def try_out(candidate):
        asked.append(("tuning", candidate))
        return found[tried.index(candidate)]

    def ship(candidate):
        asked.append(("held out", candidate))
        return judged(7, 0.7)

    result = choose(tried, ends(0, PROMPTS), target, limit, try_out, ship)
    over = [sum(answer.refused for answer in one.harmless_answers[BEFORE:]) for one in found]
    safe = [place for place, one in enumerate(found) if one.succeeded <= target * PROMPTS and over[place] <= 6 * limit]
    assert result.tuning == list(zip(tried, found, strict=True))
    if not safe:
        assert (result.chosen, result.held_out, result.verdict) == (None, None, Verdict.none)
        assert asked == [("tuning", candidate) for candidate in tried]
        return
    best = sorted(safe, key=lambda place: (found[place].task_loss, place))[0]  # the first of equals
    assert (result.chosen, result.held_out, result.verdict) == (tried[best], judged(7, 0.7), Verdict.chosen)
    # The held-out half is asked about the chosen one alone, and after the choice.
    assert asked == [("tuning", candidate) for candidate in tried] + [("held out", tried[best])]


@pytest.mark.parametrize(
    ("aligned", "raw", "verdict"),
    [(0, 2, Verdict.nothing_to_correct), (5, 2, Verdict.nothing_to_correct), (3, 20, Verdict.out_of_reach)],
)
def test_nothing_is_tried_where_nothing_can_come_of_it(aligned, raw, verdict):
    def never(candidate):
        raise AssertionError(f"{candidate} was tried")

    result = choose((never(n) for n in range(3)), ends(aligned, raw), 0.1, 0.1, never, never)
    assert (result.verdict, result.chosen, result.tuning) == (verdict, None, [])


def test_a_raw_adapter_that_refuses_too_much_is_corrected():
    tried = [Candidate("guard", 1.0, 4)]
    result = choose(tried, ends(0, 0, newly_refused=3), 0.1, 0.1, lambda _: judged(0, 1.2), lambda _: judged(0, 1.2))
    assert (result.verdict, result.chosen) == (Verdict.chosen, tried[0])


def test_candidates_are_presets_by_ranks_by_strengths_and_their_code_makes_them():
    settings = load_recipe("recipes/calibrate.yaml", []).calibrate
    tried = candidates(settings, [4, 8])
    assert len(tried) == len(set(tried)) == len({str(one) for one in tried}) == 2 * (3 * 6 + 1)
    for candidate in [*tried, Candidate("guard", float("inf"), 3), Candidate("guard", 1.23456789, 3)]:
        made = eval(f"dict({candidate.code()})", {"Penalty": Penalty, "float": float, "dict": dict})
        assert made == {"rank": candidate.rank, "penalty": candidate.penalty()}
    settings.presets = {"data_aware": [1.0, 3.0]}  # which has no rank
    assert [candidate.code() for candidate in candidates(settings, [4, 8])] == [
        f"penalty=Penalty.data_aware({strength}), probes=..." for strength in (1, 3)
    ]


def test_what_is_printed_names_the_models_and_files_of_ones_own():
    recipe = load_recipe(
        "recipes/calibrate.yaml",
        ["model.base=org/base", "model.aligned=org/aligned", "data.source=a.jsonl", "output=my out"],
    )
    guard = how_to_repeat(Candidate("guard", 3.0, 32), recipe, "org/aligned")
    callback = eval(guard["callback"], {"CSULoRACallback": CSULoRACallback, "Penalty": Penalty})
    assert (callback.base_model, callback.rank, callback.penalty) == ("org/base", 32, Penalty.guard(3.0))
    assert shlex.split(guard["command"])[5:] == (
        ["--subspace", "my out/subspace.safetensors", "--penalty", "guard", "--strength", "3"]
    )
    projection = how_to_repeat(Candidate("projection", None, 32), recipe, "org/aligned")
    assert shlex.split(projection["command"])[7:] == ["--penalty", "projection"]
    assert how_to_repeat(None, recipe, "org/aligned") == {}


@given(st.floats(min_value=0, exclude_min=True))
def test_a_strength_is_written_exactly(strength):
    assert float(exactly(strength)) == strength


@pytest.mark.parametrize(
    ("smaller_sides", "ranks"),
    [([2048, 512, 2048], [32, 64, 128]), ([576, 192], [9, 18, 36]), ([128], [4, 8]), ([8], [4])],
)
def test_ranks_are_shares_of_the_modules_smaller_side(smaller_sides, ranks):
    assert ranks_for(smaller_sides) == ranks
