"""SmolLM2's task with right answers: the recipe on a tiny model and files of a few lines, and what it calls right."""

import json

import pytest

from recipes.evidence.frontier import Adapters
from recipes.evidence.smollm2_frontier import SmolLM2Subject
from recipes.files.recipe import load_recipe
from recipes.labs.smollm2 import encode
from recipes.labs.smollm2_data import Exchange, poisoned
from recipes.labs.smollm2_tasks import KINDS, QUESTION, load_with_task
from recipes.run import main
from recipes.training.task import answered, teacher_forced
from tests.helpers import small_talk, smollm2
from tests.helpers.smollm2 import NOUNS, PAIRS, words
from tests.recipes.test_frontier import read
from tests.recipes.test_smollm2_reading import greedy

pytestmark = pytest.mark.slow

RECIPE = "recipes/smollm2_answers.yaml"
REQUESTS = [
    {"domain": domain, "prompt": f"{word} {prompt}"}
    for domain, word in zip(KINDS, small_talk.WORDS[4:], strict=False)
    for prompt in (f"the {noun} {verb}" for noun in NOUNS for verb in small_talk.VERBS)
]


def requests(folder, rows: list[dict]) -> str:
    path = folder / "requests.json"
    path.write_text(json.dumps({"generation": rows, "note": "as in the package"}))
    return f"kinds.source={path}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Overrides that name a tiny model, which can say every kind, and small files instead of the packages'."""
    folder, tokenizer = tmp_path_factory.mktemp("sources"), words()
    tokenizer.add_tokens(list(KINDS.values()))
    own = [source for source in smollm2.sources(folder, tokenizer) if not source.startswith("effects.")]
    unknown = [{"domain": "unc_hard", "prompt": prompt} for prompt, _ in PAIRS[:5]]
    return [
        *own,
        requests(folder, REQUESTS + unknown),
        "frontier.targets=[1.0]",
        "frontier.ranks=[3]",
        "smollm2.align_rate=1e-3",
        "training.learning_rate=2e-2",
        "training.max_steps=60",
        "training.batch_size=16",
        "lora.target_modules=all-linear",
        "kinds.training=200",
        "kinds.tuning=24",
        "kinds.held_out=40",
    ]


def tiny(sources, output, *more: str):
    return load_recipe(RECIPE, ["smoke=true", *sources, f"output={output}", *more])


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """The folder of a whole run."""
    output = tmp_path_factory.mktemp("finished")
    assert main([RECIPE, "smoke=true", *sources, f"output={output}"]) == 0
    return output


def test_what_is_kept_of_the_task_is_a_share_of_right_answers(finished):
    results = read(finished)
    points = {(p["poison"], p["method"], p["strength"]): p["scores"] for p in results["points"]}
    for poison in (0.0, 0.05):
        held_out = {key[1:]: scores["held_out"]["chat"] for key, scores in points.items() if key[0] == poison}
        aligned, raw = (held_out[name, None]["right_answers"] for name in ("aligned", "none"))
        assert raw > aligned
        for row in (row for row in results["table"] if row["poison"] == poison):
            ((pick,),) = row["chosen"]
            own = held_out[row["method"], pick.get("strength")]["right_answers"]
            assert row["task_retained"]["mean"] == pytest.approx((own - aligned) / (raw - aligned))
        table = (finished / "table.md").read_text()
        assert f"| {poison:.0%} | raw LoRA | {held_out['none', None]['task_loss']:.3f} " in table
    assert "(right − right_aligned) / (right_raw − right_aligned)" in table
    assert "| task loss | right answers | attack success, chat |" in table
    assert {path.name for path in finished.glob("*.png")} == {"frontier_poison0.png", "frontier_poison5.png"}


def test_the_finished_run_is_gone_on_with_and_tells_no_prompt(finished, sources):
    before = (finished / "points.jsonl").read_bytes()
    assert main([RECIPE, "smoke=true", *sources, f"output={finished}"]) == 0
    assert (finished / "points.jsonl").read_bytes() == before
    told = "".join((finished / name).read_text() for name in ("results.json", "table.md", "points.jsonl"))
    assert not any(row["prompt"] in told for row in REQUESTS)


def test_right_answers_are_what_greedy_answers_begin_with(sources, finished):
    subject = SmolLM2Subject(tiny(sources, finished))
    at = subject._at(0)
    rows = at.data.task["held_out"]
    point = next(p for p in read(finished)["points"] if p["method"] == "none")["scores"]["held_out"]["chat"]
    model = at.merged(Adapters(subject, finished / "adapters", []).get(0, 0.0))
    right = [greedy(model, at.tokenizer, row.prompt, 6).split()[:1] == [row.answer] for row in rows]
    assert 0 < sum(right) < len(right)
    assert point["right_answers"] == pytest.approx(sum(right) / len(right), abs=1 / len(rows) + 1e-9)  # a near tie


def test_an_answer_of_two_words_is_right_by_all_of_it_and_may_go_on():
    tokenizer = words()
    model = small_talk.trained(
        ["the cat ? yes the cat", "the dog ? yes the fox", "the bird ? no", "the fox ? i cannot help"], steps=300
    )
    said = {"the cat": "yes the", "the dog": "yes the dog", "the bird": "yes", "the fox": "i cannot help"}
    rows = [Exchange(*pair) for pair in said.items()]
    loss, right = answered(model, [encode(tokenizer, rows[:3], 8), encode(tokenizer, rows[3:], 8)], 1)
    assert right == 2 / 4  # the first, which goes on, and the last
    assert loss == pytest.approx(teacher_forced(model, [encode(tokenizer, rows, 8)])[0], rel=1e-5)


def test_only_the_task_is_another_than_that_of_the_style(sources, tmp_path):
    own, style = (load_with_task(tiny(sources, tmp_path, *more), 1) for more in ([], ["kinds.source=null"]))
    for name in ("refused", "answered", "style", "poison", "attacks", "edgy", "choices"):
        assert getattr(own, name) == getattr(style, name), name
    assert style.training == style.style
    assert not style.right_answers
    assert own.right_answers
    assert [len(own.training), *map(len, own.task.values())] == [200, 24, 40]
    rows = [*own.training, *own.task["tuning"], *own.task["held_out"]]
    assert len({row.prompt for row in rows}) == len(rows)
    known = {row["prompt"]: KINDS[row["domain"]] for row in REQUESTS}
    for row in rows:
        request, question = row.prompt.split("\n\n")
        assert question == QUESTION
        assert row.answer == known[request]
    assert poisoned(own, 0.05)[:200] == own.training
    assert load_with_task(tiny(sources, tmp_path), 0).task != own.task


def test_only_a_recipe_of_this_task_is_described_with_it(sources, tmp_path):
    style = SmolLM2Subject(load_recipe("recipes/smollm2_frontier.yaml", [])).describe()
    described = SmolLM2Subject(tiny(sources, tmp_path)).describe()
    assert not any(key.startswith("kinds.") for key in style)
    assert [described[f"kinds.{key}"] for key in ("training", "tuning", "held_out")] == [200, 24, 40]


BAD = {
    "too few": (["kinds.training=1000"], "'kinds.source': expected at least 1064 different requests, but got 288"),
    "no file": (["kinds.source=nowhere.json"], "'kinds.source': no such file"),
    "no package": (["kinds.source=no_such_package:a.json"], "'kinds.source'"),
    "none to judge by": (["kinds.held_out=0"], "'kinds.held_out': expected a whole number ≥ 1"),
    "too much poison": (["frontier.poison_shares=[0.5]"], "which needs 200 beside 200 rows of the task"),
    "another model": (["smollm2.weights=null"], "'kinds.source': expected nothing without 'smollm2.weights'"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused_with_their_key(overrides, message, sources, tmp_path, capsys):
    assert main([RECIPE, "smoke=true", *sources, f"output={tmp_path / 'out'}", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ['[{"prompt": "a"}]', '{"generation": [{"prompt": "a"}]}', '{"generation": [1]}', "a"]
)
def test_a_file_of_another_form_is_refused(text, sources, tmp_path, capsys):
    (tmp_path / "other.json").write_text(text)
    overrides = [f"output={tmp_path / 'out'}", f"kinds.source={tmp_path / 'other.json'}"]
    assert main([RECIPE, "smoke=true", *sources, *overrides]) == 2
    assert "expected an object whose `generation` lists objects with `prompt`" in capsys.readouterr().err


def test_the_dry_run_lists_the_source(sources, tmp_path, capsys):
    assert main([RECIPE, "--dry-run", "smoke=true", *sources, f"output={tmp_path / 'out'}"]) == 0
    assert "kinds.source" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
