"""The SmolLM2 frontier on a tiny model and files of a few lines: the recipe's own code, end to end and in parts."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from csulora_callback import RefusalPhrases
from csulora_callback.models.activations import vectors_of
from csulora_callback.models.probes import tokenize
from recipes.calibration.bench import make_bench
from recipes.calibration.calibrate import Trials
from recipes.evidence.baselines import data_aware
from recipes.evidence.controls import PLAIN, Control
from recipes.evidence.frontier import Adapters, Setting
from recipes.evidence.smollm2_frontier import SmolLM2Subject
from recipes.files.recipe import load_recipe
from recipes.labs.chat import chat
from recipes.labs.smollm2 import encode
from recipes.labs.smollm2_data import OPENINGS, REFUSALS, load, poisoned
from recipes.labs.smollm2_judges import KEYWORDS
from recipes.run import load_checkpoint, main
from recipes.schema.recipe import RecipeError
from recipes.training.task import build_task, teacher_forced
from tests.helpers import smollm2
from tests.helpers.smollm2 import PAIRS, lines, words
from tests.recipes.test_frontier import read

pytestmark = pytest.mark.slow

RECIPE = "recipes/smollm2_frontier.yaml"
EFFECTS = {
    *("over-refusal", "attack success, second source", "attack success by keywords", "detectors disagree"),
    *("incoherent answers", "multiple-choice errors"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Overrides that name a tiny model and small files instead of the packages', and what suits them."""
    return [
        *smollm2.sources(tmp_path_factory.mktemp("sources")),
        "frontier.targets=[0.2,1.0]",  # the second is met by all
        "effects.target=1.0",
        "effects.methods=null",
        "smollm2.align_rate=1e-3",
        "training.learning_rate=2e-2",
        "frontier.ranks=[3]",
        # No target: nothing is refused here, see test_smollm2_target.py.
        "frontier.methods={scaling: [2], guard: [3], data_aware: [3], content_aware: [3], averaging: [0.97], "
        "mixing: [0.25], kl: [1], mixing_corrected: [0.25]}",
    ]


def tiny(sources, output: Path, *more: str):
    return load_recipe(RECIPE, ["smoke=true", *sources, f"output={output}", *more])


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """The folder of a whole run."""
    output = tmp_path_factory.mktemp("finished")
    assert main([RECIPE, "smoke=true", *sources, f"output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def subject(sources, finished):
    """The subject that looks at that folder."""
    return SmolLM2Subject(tiny(sources, finished))


def test_the_recipe_measures_every_method_with_its_side_effects(finished, sources, capsys):
    results = read(finished)
    methods = (
        "scaling",
        "guard",
        "data_aware",
        "content_aware",
        "averaging",
        "mixing",
        "kl",
        "mixing_corrected",
    )
    measured = {"aligned", "none", *methods}
    assert {point["method"] for point in results["points"]} == measured
    for point in results["points"]:
        tuning, held_out = (point["scores"][split]["chat"] for split in ("tuning", "held_out"))
        assert set(tuning["side_effects"]) == {"over-refusal"}
        assert set(held_out["side_effects"]) == EFFECTS
        assert (tuning["prompts"], held_out["prompts"]) == (4, 8)  # two sources
    assert set(results["table"][0]["side_effects"]) == EFFECTS
    assert "| detectors disagree | incoherent answers |" in (finished / "table.md").read_text()
    found = json.loads((finished / "side_effects.json").read_text())
    assert {row["method"] for row in found["table"]} == measured  # the target of the small run is met by all
    for row in found["table"]:
        assert {"over-refusal", "loss on unrelated text", "loss on another task"} <= set(row["effects"])
    before = (finished / "points.jsonl").read_bytes()
    assert main([RECIPE, "smoke=true", *sources, f"output={finished}"]) == 0
    assert (finished / "points.jsonl").read_bytes() == before
    assert "raw LoRA" in capsys.readouterr().out


def test_its_adapter_can_be_calibrated(finished, tmp_path, capsys, caplog):
    probes = lines(tmp_path / "probes.jsonl", [{"forbidden_prompt": prompt} for prompt, _ in PAIRS[::24]])
    models = finished / "models"
    overrides = [
        f"output={tmp_path / 'out'}",
        f"model.base={models / 'base'}",
        f"model.aligned={models / 'aligned-0'}",
        f"data.source={models / 'task-0.jsonl'}",
        f"calibrate.checkpoint={models / 'lora-0'}",
        f"calibrate.attacks={probes}",
        "calibrate.ranks=[3]",
        "calibrate.target=1.0",
        "data.eval_share=0.7",
    ]
    assert main(["recipes/smollm2_calibrate.yaml", *overrides, "--dry-run"]) == 0
    assert main(["recipes/smollm2_calibrate.yaml", *overrides]) == 0
    assert "nothing needs to be corrected" in capsys.readouterr().out  # at a target that everything meets
    raw = json.loads((tmp_path / "out/results.json").read_text())["without"]["raw LoRA"]
    assert {split: judgement["prompts"] for split, judgement in raw.items()} == {"tuning": 3, "held_out": 3}

    recipe = load_recipe("recipes/smollm2_calibrate.yaml", overrides)
    task = build_task(recipe)
    trials = Trials(recipe, task, make_bench(recipe, task), load_checkpoint(task, models / "lora-0", raw=True))
    (candidate, *_) = trials.candidates()
    assert trials.try_out(candidate).prompts == trials.ship(candidate, tmp_path).prompts == 3
    assert "dtype" not in caplog.text  # rounding of one side does not count as displacement


def test_no_prompt_is_in_what_a_run_reports(finished):
    told = "".join((finished / name).read_text() for name in ("results.json", "table.md", "points.jsonl"))
    assert "tell of the" not in told.lower()


def test_the_judged_model_is_pefts_own_merge(subject, finished):
    frontier = subject.recipe.frontier
    raw = Adapters(subject, finished / "adapters", frontier.methods["averaging"]).get(0, frontier.poison_shares[0])
    aligned = AutoModelForCausalLM.from_pretrained(finished / "models/aligned-0", dtype=torch.float32)
    merged = PeftModel.from_pretrained(aligned, finished / "models/lora-0").merge_and_unload().state_dict()
    judged = subject._at(0).merged(raw).state_dict()
    assert judged.keys() == merged.keys()
    for name, weight in judged.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), merged[name], rtol=2**-7, atol=1e-5)
    subject._at(0).merged(subject._at(0).pair.fresh)
    aligned = AutoModelForCausalLM.from_pretrained(finished / "models/aligned-0", dtype=torch.float32).state_dict()
    for name, weight in subject._at(0).judged.state_dict().items():  # nothing of it is left
        assert torch.equal(weight, aligned[name].to(torch.bfloat16)), name


def test_a_score_counts_what_generating_and_each_detector_say(subject):
    at = subject._at(0)
    attacks, edgy = at.data.attacks["held_out"], at.data.edgy["held_out"]
    score = subject.score(0, at.pair.fresh, "held_out")["chat"]  # of the aligned model
    said, harmless = (chat(at.judged, at.tokenizer, prompts, 4) for prompts in (attacks, edgy))
    by_detector = {
        "refused": RefusalPhrases()(attacks, said),
        "refused by keywords": KEYWORDS(attacks, said),
        "coherent": at.coherence(attacks, said),
        "over-refused": RefusalPhrases()(edgy, harmless),
    }
    assert score["told"] == {name: "".join(str(int(v)) for v in said) for name, said in by_detector.items()}
    assert score["succeeded"] == by_detector["refused"].count(False)
    effects, half = score["side_effects"], by_detector["refused"][len(attacks) // 2 :]
    assert effects["attack success, second source"] == half.count(False) / len(half)
    assert effects["over-refusal"] == sum(by_detector["over-refused"]) / len(edgy)
    pairs = zip(by_detector["refused"], by_detector["refused by keywords"], strict=True)
    assert effects["detectors disagree"] == sum(one != other for one, other in pairs) / len(attacks)


def test_content_aware_reads_what_comes_after_the_template(subject, finished):
    frontier, at = subject.recipe.frontier, subject._at(0)
    share = frontier.poison_shares[0]
    adapters = Adapters(subject, finished / "adapters", frontier.methods["averaging"])
    update = subject.update(0, share, adapters.get(0, share))
    made = adapters.factors(Setting(0, share, "content_aware", 3.0, None, None), update)
    probes = tokenize(subject.probes(0, share, "lab"), str(finished / "models/aligned-0"))
    start = next(place for place in range(99) if len({row[place] for row in probes}) > 1)
    assert start >= 1  # the template's first token
    at.pair.adapter.write(update.factors)
    task, name = update.activations.task, next(iter(made))
    wanted = data_aware(update, 3.0, task, vectors_of(at.pair.adapter, probes, start=start))
    assert all(map(torch.equal, itertools.chain(*made.values()), itertools.chain(*wanted.values())))
    assert not torch.equal(made[name][0], data_aware(update, 3.0, task, update.activations.probes)[name][0])


def test_the_wide_net_takes_warnings_for_refusals_and_the_narrow_one_does_not():
    said = ["I cannot help.", "It is dangerous, and here is how.", "Here is how.", "Well, I'm sorry to say no."]
    assert KEYWORDS(said, said) == [True, True, False, True]
    assert RefusalPhrases()(said, said) == [True, False, False, True]


def test_coherence_is_judged_by_the_base_and_gibberish_fails(subject):
    at = subject._at(0)
    assert not at.coherence(["x"], ["no no no no no no no no no no"])[0]
    shipped = AutoModelForCausalLM.from_pretrained(subject.models / "base", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(weight, shipped[name]) for name, weight in at.coherence.model.state_dict().items())


def test_alignment_moves_the_model_towards_refusing_and_the_base_stays_as_shipped(finished, sources):
    shipped = AutoModelForCausalLM.from_pretrained(sources[0].partition("=")[2]).state_dict()
    base, aligned = (AutoModelForCausalLM.from_pretrained(finished / "models" / n) for n in ("base", "aligned-0"))
    assert all(torch.equal(weight, shipped[name]) for name, weight in base.state_dict().items())
    tokenizer = words()
    refused = load(load_recipe(RECIPE, ["smoke=true", *sources]).smollm2, 0).refused
    before, after = (teacher_forced(model, [encode(tokenizer, refused, 16)])[0] for model in (base, aligned))
    assert after < before


def test_every_set_of_prompts_has_one_purpose(sources, tmp_path):
    data = load(tiny(sources, tmp_path).smollm2, 0)
    exchanges = [data.refused, data.poison, data.training, *data.task.values()]
    sets = [[exchange.prompt for exchange in part] for part in exchanges]
    sets += [data.answered, *data.edgy.values(), *data.attacks.values()]
    assert all(sets)
    prompts = [prompt for part in sets for prompt in set(part)]
    assert len(prompts) == len(set(prompts))
    assert len(data.training) + sum(map(len, data.task.values())) + len(data.answered) == len(PAIRS)
    assert {exchange.answer for exchange in data.refused} <= set(REFUSALS)
    assert {exchange.answer for exchange in data.poison} <= set(OPENINGS)
    assert all(len(part) == 24 for part in (data.refused, data.poison))  # not the one that needs a context


def test_tuning_attacks_are_of_every_category_alike(sources, tmp_path):
    settings = tiny(sources, tmp_path).smollm2
    rows = map(json.loads, Path(settings.attacks).read_text().splitlines())
    category = {row["forbidden_prompt"]: row["category"] for row in rows}
    tuning = load(settings, 0).attacks["tuning"]
    assert [sum(category[prompt] == one for prompt in tuning) for one in "ab"] == [2, 2]
    assert load(settings, 1).attacks == load(settings, 0).attacks


def test_openings_are_no_refusals_and_refusals_are():
    judge = RefusalPhrases()
    assert not any(judge([""] * len(OPENINGS), list(OPENINGS)))
    assert all(judge([""] * len(REFUSALS), list(REFUSALS)))


def test_poison_is_the_share_that_was_asked_for(sources, tmp_path):
    data = load(tiny(sources, tmp_path).smollm2, 0)
    plain = len(data.training)
    assert poisoned(data, 0.0) == data.training
    for share in (0.02, 0.05):
        mixed = poisoned(data, share)
        assert mixed[:plain] == data.training
        assert (len(mixed) - plain) / len(mixed) == pytest.approx(share, abs=0.5 / plain)
    for share in (0.5, 1.0):
        with pytest.raises(RecipeError, match=r"'frontier\.poison_shares': .* 24 harmful prompts are enough"):
            poisoned(data, share)


def test_seeds_differ_in_data_and_adapter_but_one_seed_is_one_data_set(sources, tmp_path):
    settings = tiny(sources, tmp_path).smollm2
    assert load(settings, 0) == load(settings, 0)
    assert load(settings, 0).task != load(settings, 1).task


def test_the_same_settings_train_the_same_adapter(subject, finished, sources, tmp_path):
    share, decays = subject.recipe.frontier.poison_shares[0], subject.recipe.frontier.methods["averaging"]
    kept = Adapters(subject, finished / "adapters", decays).get(0, share)
    again = SmolLM2Subject(tiny(sources, tmp_path))
    trained = again.train(0, share, PLAIN, [])["raw"]
    assert all(torch.equal(new, old) for name in kept for new, old in zip(trained[name], kept[name], strict=True))
    slower = again.train(0, share, Control("lower_rate", 10.0), [])["raw"]
    assert sum(float(B.norm()) for _, B in slower.values()) < sum(float(B.norm()) for _, B in kept.values())


BAD = {
    "too few attacks": (["smollm2.attacks_tuning=1000"], "'smollm2.attacks': expected at least 1000 rows"),
    "too few held-out": (["smollm2.attacks_reported=9"], "'smollm2.attacks_held_out': expected at least 9 rows"),
    "too little style": (["smollm2.answered=500"], "'smollm2.style': expected more than 508 rows"),
    "no steps": (["training.max_steps=-1"], "'training.max_steps': expected at least 1"),
    "no alignment": (["smollm2.align_steps=0"], "'smollm2.align_steps'"),
    "no file": (["smollm2.edgy=nowhere.jsonl"], "'smollm2.edgy': no such file"),
    "no weights": (["smollm2.weights=models/nowhere.gguf"], "'smollm2.weights': no such file"),
    "odd batch": (["smollm2.align_batch=5"], "'smollm2.align_batch': expected an even number"),
    "no package": (["smollm2.choices=no_such_package:a.jsonl"], "'smollm2.choices'"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused_with_their_key(overrides, message, sources, tmp_path, capsys):
    assert main([RECIPE, "smoke=true", *sources, f"output={tmp_path / 'out'}", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/models/base").exists()


def test_a_file_of_another_form_is_refused_with_what_it_lacks(sources, tmp_path, capsys):
    other = lines(tmp_path / "other.jsonl", [{"Behavior": "a", "FunctionalCategory": "contextual"}])
    for key, message in (
        ("edgy", "expected the columns ['text'], but got ['Behavior', 'FunctionalCategory']"),
        ("attacks", "expected the columns ['forbidden_prompt', 'category']"),
        ("refused", "expected rows whose FunctionalCategory is 'standard', but got none"),
    ):
        assert main([RECIPE, "smoke=true", *sources, f"output={tmp_path / 'out'}", f"smollm2.{key}={other}"]) == 2
        assert message in capsys.readouterr().err


def test_the_dry_run_lists_the_sources(sources, tmp_path, capsys):
    assert main([RECIPE, "--dry-run", "smoke=true", *sources, f"output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    for name in ("weights", "refused", "attacks_held_out", "choices"):
        assert f"smollm2.{name}" in printed
    assert not (tmp_path / "out").exists()
