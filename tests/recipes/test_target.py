"""What a target does in the toy lab: the recipe in small, what its points are measured on, and how it goes on."""

import math
from dataclasses import asdict

import pytest
import torch

from csulora_callback import Penalty, correct
from csulora_callback.behaviour import BEGINNING
from csulora_callback.method.token_space import input_gains
from csulora_callback.models.activations import vectors_of
from csulora_callback.models.training_rows import fixed_sample
from recipes.evidence import target
from recipes.evidence.bench import SCREENED, Bench
from recipes.evidence.frontier import Adapters
from recipes.evidence.toy_frontier import ToySubject
from recipes.files.recipe import load_recipe
from recipes.labs import toy
from recipes.run import main
from recipes.schema.recipe import RecipeError
from tests.recipes.test_frontier import read

RECIPE = "recipes/target.yaml"


def small(output, *more):
    return load_recipe(RECIPE, ["smoke=true", f"output={output}", "frontier.seeds=[0]", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the recipe in small, of one seed."""
    output = tmp_path_factory.mktemp("finished")
    assert main([RECIPE, "smoke=true", f"output={output}", "frontier.seeds=[0]"]) == 0
    return output


@pytest.fixture(scope="module")
def bench(finished):
    """The bench of that run."""
    recipe = small(finished)
    subject = ToySubject(recipe)
    raw = Adapters(subject, finished / "adapters", []).get(0, 0.2)
    return Bench(subject, 0, 0.2, raw, finished / "answers", recipe.frontier.ranks[0])


def at(points, method, strength=None, reading=None, share=None):
    names = ("method", "strength", "reading", "share")
    (one,) = (p for p in points if tuple(p[name] for name in names) == (method, strength, reading, share))
    return one


@torch.no_grad()
def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == toy.IDS["<eos>"]:
            break
    return ids[len(prompt) :]


@pytest.mark.slow
def test_what_is_kept_is_what_generating_says_of_the_probes_that_the_correction_did_not_read(finished, bench):
    pair, lab = bench.subject.pair(0), toy.build_lab(bench.subject._toy(0, 0.2))
    probes = [sample.ids(answered=False) for sample in lab.probes]
    with pair.adapter.off():
        answers = {tuple(probe): greedy(pair.model, probe, BEGINNING) for probe in probes}
    refused = [probe for probe in probes if toy.REFUSAL in answers[tuple(probe)]]
    half = fixed_sample(len(refused), len(refused) // 2)
    others = [probe for place, probe in enumerate(refused) if place not in half]
    points = read(finished)["points"]
    for point in (at(points, "data_aware", 10.0), at(points, "guard", 3.0), at(points, "none")):
        bench.subject.pair(0).adapter.write(
            bench.raw if point["method"] == "none" else bench.corrected(point["method"], point["strength"], "lab")
        )
        same = [greedy(pair.model, probe, len(answers[tuple(probe)])) == answers[tuple(probe)] for probe in others]
        assert point["refusing"]["lab"]["kept"] == sum(same) / len(same)
        assert point["refusing"]["lab"]["prompts"] == len(others)
    assert at(points, "aligned")["refusing"]["lab"] == {"kept": 1.0, "logprob": 0.0, "prompts": len(others)}
    assert at(points, "guard", None, "kept", 0.9)["refusing"]["lab"]["prompts"] == len(refused)  # it reads none


@pytest.mark.slow
def test_a_correction_reads_the_other_half_and_the_rows_that_are_left(bench):
    rows, pair, strength = bench.rows, bench.subject.pair(0), 3.0
    probes = bench.refusals("lab").prompts
    read = [probes[place] for place in fixed_sample(len(probes), len(probes) // 2)]
    assert not {tuple(p) for p in read} & {tuple(p) for p in bench.held_back("lab").prompts}
    with pair.adapter.off():
        refused = [toy.REFUSAL in greedy(pair.model, row.prompt, 3) for row in rows]
    assert 0 < sum(refused) < len(rows)
    assert bench.refused_rows == refused
    for method, kept in (
        ("data_aware", rows),
        (SCREENED, [r for r, is_out in zip(rows, refused, strict=True) if not is_out]),
    ):
        done = bench.corrected(method, strength, "lab")
        pair.adapter.write(bench.raw)
        task, harm = vectors_of(pair.adapter, [row.ids for row in kept]), vectors_of(pair.adapter, read)
        gains = input_gains(task, harm, strength)
        for name, (A, B) in bench.raw.items():
            own = correct(A, B, *pair.bases[name], Penalty.data_aware(strength), 2.0, input_gain=gains[name])
            assert torch.equal(done[name][0], own.lora_A)
            assert torch.equal(done[name][1], own.lora_B)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["data_aware", SCREENED])
def test_what_is_found_is_enough_and_a_fifth_less_is_not(finished, bench, method):
    refusals, less = bench.measuring(method, "lab"), 1.2116  # (1000 / 0.01) ** (1 / 2**6), and a little
    for reading in ("kept", "likelihood"):
        point = at(read(finished)["points"], method, None, reading, 0.9)
        assert point["found"]["is_enough"]
        own = {"kept": point["refusing"]["lab"]["kept"], "likelihood": math.exp(point["refusing"]["lab"]["logprob"])}
        assert own[reading] >= 0.9
        weaker = bench.read(refusals, bench.corrected(method, point["found"]["strength"] / less, "lab"))
        assert {"kept": weaker.kept, "likelihood": math.exp(weaker.logprob)}[reading] < 0.9


@pytest.mark.slow
def test_what_is_never_enough_is_the_strongest(finished):
    csulora = at(read(finished)["points"], "csulora", None, "kept", 0.9)
    assert csulora["found"] == {"strength": 1000.0, "is_enough": False, "trials": 2}


@pytest.mark.slow
def test_poison_is_counted_by_the_data_and_refused_by_the_model(finished, bench):
    lab = toy.build_lab(bench.subject._toy(0, 0.2))
    poison = {tuple(s.ids(answered=True)) for s in lab.train if set(s.prompt) & set(toy.RESTRICTED)}
    assert [row.is_poison for row in bench.rows] == [tuple(row.ids) in poison for row in bench.rows]
    counts = at(read(finished)["points"], SCREENED, 3.0)["rows"]
    assert counts["rows"] == 64
    assert counts["poison"] == sum(row.is_poison for row in bench.rows)
    assert counts["refused"] == sum(bench.refused_rows)
    assert "rows" not in at(read(finished)["points"], "guard", 3.0)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(finished, tmp_path):
    lines = (finished / "points.jsonl").read_text().splitlines(keepends=True)
    for name in ("adapters", "measured_on.json"):
        (tmp_path / name).symlink_to(finished / name)
    (tmp_path / "points.jsonl").write_text("".join(lines[:-3]) + lines[-3][:40])
    assert main([RECIPE, "smoke=true", f"output={tmp_path}", "frontier.seeds=[0]"]) == 0
    for name in ("points.jsonl", "results.json", "table.md"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_points_of_another_rank_are_refused(finished, capsys):
    assert main([RECIPE, "smoke=true", f"output={finished}", "frontier.ranks=[3]"]) == 2
    assert "'frontier.rank' is 4 there, but 3 here" in capsys.readouterr().err


def test_the_grid_holds_every_combination_once():
    recipe = load_recipe(RECIPE, [])
    settings = target.grid(recipe)
    assert len(set(settings)) == len(settings) == 5 * 2 * (2 + 7 + 7 + 6 + 6 + 4 * 4)
    first = settings[: len(settings) // 10]
    assert {(setting.seed, setting.poison) for setting in first} == {(0, 0.05)}
    assert sum(setting.probes is None for setting in first) == len(first) - 4 * 4
    assert all(asdict(setting).keys() == set(target.KEY) for setting in settings)


BAD = {
    "share": (["target.shares.kept=[1.5]"], r"'target\.shares\.kept': expected shares in \(0, 1\], at least one, but"),
    "reading": (["target.shares={cept: [1]}"], r"'target\.shares': expected some of \['kept', 'likelihood'\], but"),
    "margin": (["target.margin=-1"], r"'target\.margin': expected a share in \[0, 1\], but got -1"),
    "texts": (
        ["target.found={builtin: [guard]}"],
        r"'target\.found': expected the probes 'lab' alone, as the toy lab",
    ),
    "two ranks": (["frontier.ranks=[4,16]"], r"'frontier\.ranks': expected one rank, but got \[4, 16\]"),
    "unknown": (["target.found.lab=[gaurd]"], r"'target\.found\.lab': expected some of .*, such as 'guard', but got"),
    "no strengths": (["target.strengths.guard=[]"], r"'target\.strengths\.guard': expected strengths > 0"),
    "infinite": (["target.strengths.guard=[.inf]"], r"'target\.strengths\.guard': .* at most 1e\+06"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused_with_their_key(overrides, message):
    with pytest.raises(RecipeError, match=message):
        target.check(load_recipe(RECIPE, overrides))


def test_a_frontier_and_a_target_are_two_recipes(capsys):
    assert main(["recipes/frontier.yaml", "target.found.lab=[guard]", "--dry-run"]) == 2
    assert "'target.found': expected nothing beside 'frontier.methods'" in capsys.readouterr().err
