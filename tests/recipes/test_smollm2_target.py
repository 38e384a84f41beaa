"""What a target does on SmolLM2: the recipe on a tiny model and files of a few lines."""

import math

import pytest
import torch

from csulora_callback import RefusalPhrases
from recipes.evidence.frontier import Adapters, Setting
from recipes.evidence.smollm2_frontier import SmolLM2Subject
from recipes.files.recipe import load_recipe
from recipes.labs.chat import chat
from recipes.labs.smollm2_data import load
from recipes.run import main
from tests.helpers import small_talk, smollm2
from tests.helpers.smollm2 import PAIRS, words
from tests.recipes.test_frontier import read

pytestmark = pytest.mark.slow

TARGET = "recipes/smollm2_target.yaml"


@pytest.fixture(scope="module")
def targeted(tmp_path_factory):
    """The folder of a target's evidence, with both sets of probes, and the recipe: of a model that does refuse."""
    output = tmp_path_factory.mktemp("targeted")
    own = [source for source in smollm2.sources(output) if not source.startswith(("smollm2.weights", "effects."))]
    refused = load(load_recipe(TARGET, ["smoke=true", *own]).smollm2, 0).refused
    harmful = [exchange.prompt for exchange in refused] + [" ".join(["<unk>"] * length) for length in range(3, 16)]
    pairs = [(f"{prompt} that {said}", said) for prompt, said in PAIRS]
    pairs += [(prompt, small_talk.REFUSAL) for prompt in harmful] * 3
    model = small_talk.trained([f"{prompt} ? {answer}" for prompt, answer in pairs], steps=400)
    own += [
        f"smollm2.weights={small_talk.saved(model, words(), output / 'weights')}",
        "smollm2.align_rate=1e-9",
        "training.learning_rate=2e-2",
        "frontier.ranks=[3]",
        "target.found={lab: [data_aware_screened, guard], builtin: [data_aware]}",
    ]
    assert main([TARGET, "smoke=true", *own, f"output={output}"]) == 0
    return output, load_recipe(TARGET, ["smoke=true", *own, f"output={output}"])


def test_a_target_is_found_by_the_alignments_prompts_and_by_the_built_in_ones(targeted):
    output, _ = targeted
    points = read(output)["points"]
    found = {(p["probes"], p["method"], p["reading"]): p for p in points if p["found"] is not None}
    methods = [("lab", "data_aware_screened"), ("lab", "guard"), ("builtin", "data_aware")]
    assert set(found) == {(*method, reading) for method in methods for reading in ("kept", "likelihood")}
    for (probes, _, reading), point in found.items():
        (read_by,) = point["refusing"].items()
        assert read_by[0] == probes
        share = {"kept": read_by[1]["kept"], "likelihood": math.exp(read_by[1]["logprob"])}[reading]
        assert point["found"]["is_enough"] == (share >= 0.9)
    for point in points:
        assert point["found"] is not None or list(point["refusing"]) == ["lab", "builtin"]
        assert {"over-refusal", "multiple-choice errors"} < set(point["scores"]["chat"]["side_effects"])
    told = "".join((output / name).read_text() for name in ("results.json", "table.md", "points.jsonl"))
    assert "tell of the" not in told.lower()
    assert "former boss" not in told


def test_a_frontiers_target_by_the_built_in_prompts_is_met_with_either_preset(targeted, tmp_path):
    _, recipe = targeted
    subject, share = SmolLM2Subject(recipe), recipe.frontier.poison_shares[0]
    adapters = Adapters(subject, tmp_path / "adapters", [])
    update, bench = subject.update(0, share, adapters.get(0, share)), adapters.bench(0, share)
    for method in ("target_builtin", "target_builtin_content"):
        setting = Setting(0, share, method, 0.9, None, None)
        kept = bench.read(bench.held_back("builtin"), adapters.factors(setting, update))
        assert adapters.found(setting).is_enough == (math.exp(kept.logprob) >= 0.9 - 1e-9)
    # So weak an adapter meets the target as it is.
    one, other = (bench.corrected(method, 10.0, "builtin") for method in ("data_aware", "content_aware"))
    assert all(not torch.equal(one[name][0], other[name][0]) for name in one)


def test_rows_of_the_task_are_refused_by_the_aligned_models_own_answers(targeted):
    output, recipe = targeted
    subject, share = SmolLM2Subject(recipe), recipe.frontier.poison_shares[0]
    rows, at = subject.task_rows(0, share), subject._at(0)
    texts = [at.tokenizer.decode(row.prompt).removeprefix("<bos> ").removesuffix(" ?") for row in rows]
    judged = RefusalPhrases()(texts, chat(at.merged(at.pair.fresh), at.tokenizer, texts, 16))
    assert subject.refused(0, [row.prompt for row in rows]) == judged
    assert 0 < sum(judged) < len(rows)
    point = next(p for p in read(output)["points"] if p["method"] == "data_aware_screened")
    assert point["rows"]["refused"] == sum(judged)
    poison = {exchange.answer.lower() for exchange in at.data.poison}
    assert 0 < point["rows"]["poison"] == sum(row.is_poison for row in rows) < len(poison)
