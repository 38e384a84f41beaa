"""A recipe that cannot run gets one line that says why, before anything runs."""

import pytest

from recipes.run import main

FRONTIER = "output: a\ntoy: {templates: 2}\ntraining: {max_steps: 1}\nfrontier:\n"

BAD = {
    "unknown key": ("output: a\ntraning: {}", [], "unknown key 'traning'; did you mean 'training'?"),
    "unknown nested key": (
        "output: a\ncorrections: {mine: {preset: guard, strenght: 3}}",
        [],
        "unknown key 'corrections.mine.strenght'; did you mean 'corrections.mine.strength'?",
    ),
    "wrong section": ("output: a\nlearning_rate: 1", [], "did you mean 'training.learning_rate'?"),
    "unknown key in an override": (
        "output: a",
        ["training.max_stepps=3"],
        "unknown key 'training.max_stepps'; did you mean 'training.max_steps'?",
    ),
    "wrong type": (
        "output: a\ntraining: {max_steps: many}",
        [],
        "'training.max_steps': Value 'many' of type 'str' could not be converted to Integer",
    ),
    "wrong choice": (
        "output: a\ntrainer: huggingfase",
        [],
        "'trainer': Invalid value 'huggingfase', expected one of",
    ),
    "not a section": ("output: a\ntraining: 3", [], "'training': expected a section with keys, but got 3"),
    "a correction that is a name": (
        "output: a\ncorrections: {mine: guard}",
        [],
        "'corrections.mine': expected a section such as {preset: guard, strength: 10}, but got 'guard'",
    ),
    "missing value": ("corrections: {mine: {preset: guard}}", [], "missing value: 'output' has to be set"),
    "missing preset": ("output: a\ncorrections: {mine: {rank: 3}}", [], "missing value: 'corrections.mine.preset'"),
    "no corrections": ("output: a", [], "missing value: 'corrections' needs at least one"),
    "half a pair": ("output: a\nmodel: {base: x}", [], "missing value: 'model.aligned'"),
    "pair without data": ("output: a\nmodel: {base: x, aligned: y}", [], "missing value: 'data.source'"),
    "out of range": (
        "output: a\ncorrections: {mine: {preset: guard, rank: 0}}",
        [],
        "'corrections.mine.rank': expected a whole number ≥ 1, but got 0",
    ),
    "rank and energy": (
        "output: a\ncorrections: {mine: {preset: guard, rank: 4, energy: 0.9}}",
        [],
        "'corrections.mine.energy': expected nothing beside corrections.mine.rank, but got 0.9",
    ),
    "wrong word": ("output: a\ntraining: {batch_sise: 3}", [], "did you mean 'training.batch_size'?"),
    "rank of zero": ("output: a\nlora: {r: 0}", [], "'lora.r': expected a whole number ≥ 1, but got 0"),
    "no learning": ("output: a", ["training.learning_rate=nan"], "'training.learning_rate': expected a number > 0"),
    "override of a section": ("output: a", ["training=3"], "'training': expected a section with keys, but got 3"),
    "list of corrections": ("output: a\ncorrections: [a]", [], "'corrections': expected a section with keys"),
    "no epochs": ("output: a", ["training.epochs=-1"], "'training.epochs': expected a number > 0"),
    "half an epoch": (
        "output: a\ntrainer: lightning",
        ["training.epochs=0.5"],
        "'training.epochs': expected a whole number in Lightning",
    ),
    "negative seed": ("output: a", ["training.seed=-1"], "'training.seed': expected a whole number ≥ 0, but got -1"),
    "path as a name": (
        "output: a\ncorrections: {a/b: {preset: guard}}",
        [],
        "'corrections': expected names that can be folder names, but got 'a/b'",
    ),
    "odd size": ("output: a", ["toy.hidden_size=130"], "'toy.hidden_size': expected a multiple of 8"),
    "dropout": ("output: a", ["lora.dropout=2"], "'lora.dropout': expected a share in [0, 1), but got 2.0"),
    "dtype": ("output: a", ["model.dtype=floaty"], "'model.dtype': expected one of ('auto', 'float32'"),
    "targets": ("output: a", ["lora.target_modules=3"], "'lora.target_modules': expected a list of names"),
    "step": (
        "output: a\ncorrections: {mine: {preset: guard, every_n_steps: 0}}",
        [],
        "'corrections.mine.every_n_steps': expected a whole number ≥ 1, but got 0",
    ),
    "unknown method": (
        f"{FRONTIER}  methods: {{scaling: [2], gaurd: [3]}}",
        [],
        "'frontier.methods': expected methods of recipes.evidence.baselines such as 'guard', but got 'gaurd'",
    ),
    "nothing to compare with": (
        f"{FRONTIER}  methods: {{guard: [3]}}",
        [],
        "'frontier.methods': expected 'scaling' among them, as all are compared with it, but got ['guard']",
    ),
    "no strengths": (
        f"{FRONTIER}  methods: {{scaling: []}}",
        [],
        "'frontier.methods.scaling': expected strengths > 0, at least one, but got []",
    ),
    "strengths of a method without": (
        f"{FRONTIER}  methods: {{scaling: [2], projection: [3]}}",
        [],
        "'frontier.methods.projection': expected no strengths, as this method has none, but got [3.0]",
    ),
    "decay": (
        f"{FRONTIER}  methods: {{scaling: [2], averaging: [1]}}",
        [],
        "'frontier.methods.averaging': expected decays < 1, but got [1.0]",
    ),
    "content-aware without end": (
        f"{FRONTIER}  methods: {{scaling: [2], content_aware: [2.0e6]}}",
        [],
        "'frontier.methods.content_aware': expected strengths of at most 1e+06, but got [2000000.0]",
    ),
    "half a module": (
        f"{FRONTIER}  methods: {{scaling: [2], safe_lora_number: [0.5]}}",
        [],
        "'frontier.methods.safe_lora_number': expected whole numbers of modules, but got [0.5]",
    ),
    "half a step": (
        f"{FRONTIER}  methods: {{scaling: [2], one_shot: [1, 1.5]}}",
        [],
        "'frontier.methods.one_shot': expected whole numbers of steps, but got [1.0, 1.5]",
    ),
    "the whole batch refusals": (
        f"{FRONTIER}  methods: {{scaling: [2], mixing: [1]}}",
        [],
        "'frontier.methods.mixing': expected shares < 1 of a batch, but got [1.0]",
    ),
    "all of the refusals": (
        f"{FRONTIER}  methods: {{scaling: [2], target_lab: [1]}}",
        [],
        "'frontier.methods.target_lab': expected shares < 1 of the refusals' likelihood, but got [1.0]",
    ),
    "a seed twice": (
        f"{FRONTIER}  methods: {{scaling: [2]}}",
        ["frontier.seeds=[1,1]"],
        "'frontier.seeds': expected different whole numbers ≥ 0, at least one, but got [1, 1]",
    ),
    "one template": (
        f"{FRONTIER}  methods: {{scaling: [2]}}",
        ["toy.templates=1"],
        "'toy.templates': expected 2, as both are judged, but got 1",
    ),
    "frontier and corrections": (
        f"{FRONTIER}  methods: {{scaling: [2]}}\ncorrections: {{mine: {{preset: guard}}}}",
        [],
        "'corrections': expected nothing beside 'frontier.methods', but got ['mine']",
    ),
    "three templates": ("output: a", ["toy.templates=3"], "'toy.templates': expected 1 or 2, but got 3"),
    "probes in the toy lab": (
        "output: a\ndata: {probes: a.txt}\ncorrections: {mine: {preset: data_aware}}",
        [],
        "'data.probes': expected nothing, as the toy lab has its own, but got 'a.txt'",
    ),
    "no probes": (
        "output: a\nmodel: {base: a/b, aligned: a/b}\ndata: {source: c/d}\ncorrections: {mine: {preset: data_aware}}",
        [],
        "'data.probes': expected prompts that are to be refused, for a data-aware preset or a target, but got None",
    ),
    "no probes for a target": (
        "output: a\nmodel: {base: a/b, aligned: a/b}\ndata: {source: c/d}\n"
        "corrections: {mine: {preset: guard, target: 0.9}}",
        [],
        "'data.probes': expected prompts that are to be refused, for a data-aware preset or a target, but got None",
    ),
    "a target in percent": (
        "output: a\ncorrections: {mine: {preset: guard, target: 90}}",
        [],
        "'corrections.mine.target': expected a share in (0, 1], but got 90.0",
    ),
    "a target and a strength": (
        "output: a\ncorrections: {mine: {preset: guard, target: 0.9, strength: 3}}",
        [],
        "'corrections.mine.strength': expected nothing beside a target, which looks for it, but got 3.0",
    ),
    "a target of a projection": (
        "output: a\ncorrections: {mine: {preset: projection, target: 0.9}}",
        [],
        "'corrections.mine.target': expected nothing, as projection has no strength, but got 0.9",
    ),
    "data-aware without end": (
        "output: a\ncorrections: {mine: {preset: data_aware, strength: .inf}}",
        [],
        "'corrections.mine.strength': expected at most 1e+06 for a data-aware preset, but got inf",
    ),
    "attacks in the toy lab": (
        "output: a\ndata: {attacks: a.txt}\ncorrections: {mine: {preset: guard}}",
        [],
        "'data.attacks': expected nothing, as the toy lab has its own, but got 'a.txt'",
    ),
    "attacks that are the probes": (
        "output: a\nmodel: {base: a/b, aligned: a/b}\ndata: {source: c/d, probes: e.txt, attacks: e.txt}\n"
        "corrections: {mine: {preset: guard}}",
        [],
        "'data.attacks': expected other prompts than data.probes; without it, these are divided, but got 'e.txt'",
    ),
    "a folder above": (
        "output: a\ncorrections: {..: {preset: guard}}",
        [],
        "'corrections': expected names that can be folder names, but got '..'",
    ),
    "a name in the table": (
        "output: a\ncorrections: {raw: {preset: guard}}",
        [],
        "'corrections': expected other names than those of what they are compared with, but got 'raw'",
    ),
    "nothing removed": (
        "output: a\ncorrections: {guard: {preset: guard}}",
        ["corrections.gaurd=null"],
        "'corrections.gaurd': expected an entry that is there, to remove it, of ['guard']",
    ),
    "nothing left": (
        "output: a\ncorrections: {guard: {preset: guard}}",
        ["corrections.guard=null"],
        "missing value: 'corrections' needs at least one",
    ),
    "replaced by nothing": (
        "output: a\ncorrections: {guard: {preset: guard}}",
        ["corrections={}"],
        "missing value: 'corrections' needs at least one",
    ),
    "a tracker that is none": (
        "output: a\ncorrections: {mine: {preset: guard}}",
        ["training.report_to=3"],
        "'training.report_to': expected the name of a tracker, or a list of them, but got 3",
    ),
    "an unknown tracker": (
        "output: a\ncorrections: {mine: {preset: guard}}",
        ["training.report_to=tensorbord"],
        "but got 'tensorbord'",
    ),
    "a tracker of the other trainer": (
        "output: a\ntrainer: lightning\ncorrections: {mine: {preset: guard}}",
        ["training.report_to=[tensorboard,trackio]"],
        "'training.report_to': expected trackers of the trainer lightning, tensorboard, wandb, mlflow (and "
        "metrics.csv is always there), but got 'trackio'",
    ),
    "a tracker that is not installed": (
        "output: a\ncorrections: {mine: {preset: guard}}",
        ["training.report_to=codecarbon"],
        "'training.report_to': codecarbon is not installed; pip install -c constraints.txt codecarbon",
    ),
    "no smoke": ("output: a", ["smoke=true"], "'smoke': expected false, as this recipe has no smoke_overrides"),
    "not an override": ("output: a", ["fast"], "'fast': expected key=value"),
    "not YAML": ("output: [a", [], "not valid YAML"),
    "no such folder": (
        "output: a\nmodel: {base: no/such/folder, aligned: a/b}\ndata: {source: c/d}\n"
        "corrections: {mine: {preset: guard}}",
        [],
        "'model.base': no such file or folder, and not a Hub id: 'no/such/folder'",
    ),
    "no such data": (
        "output: a\nmodel: {base: a/b, aligned: a/b}\ndata: {source: my.jsonl}\ncorrections: {mine: {preset: guard}}",
        [],
        "'data.source': no such file: 'my.jsonl'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_gets_one_clear_line(case, tmp_path, capsys):
    text, overrides, message = BAD[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main([str(path), *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not printed.out


def test_a_missing_file_gets_the_nearest_name(capsys):
    assert main(["recipes/quikstart.yaml"]) == 2
    assert "no such file; did you mean recipes/quickstart.yaml?" in capsys.readouterr().err
