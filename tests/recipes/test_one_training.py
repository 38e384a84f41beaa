"""All corrections that do not touch training are made of one training run, to the bytes of runs of their own."""

import json
from pathlib import Path

import pytest

from csulora_callback.sidecar import read_record
from recipes.run import main
from recipes.schema.recipe import Correction, Preset
from recipes.training.runs import trained_runs
from tests.helpers.recipes import SMALL

WEIGHTS = "adapter_model.safetensors"
ALL = {
    "csulora": "{preset: csulora, rank: 4}",
    "guard": "{preset: guard, strength: 3, rank: 2}",
    "separable": "{preset: separable, energy: 0.5}",
    "projection": "{preset: projection, rank: 4}",
    "every": "{preset: guard, rank: 4, every_n_steps: 2}",
    "data_aware": "{preset: data_aware, strength: 10, rank: 4}",
    "weaker": "{preset: data_aware, strength: 1, rank: 3}",
    "kept": "{preset: data_aware, target: 0.5, rank: 4}",
    "guard_kept": "{preset: guard, target: 0.5, rank: 3}",
}
TRAINERS = {"huggingface": "quickstart", "lightning": "quickstart_lightning"}


def correction(preset: Preset, **settings) -> Correction:
    return Correction(preset, **settings)


def test_which_corrections_are_trained():
    plain, other = correction(Preset.csulora), correction(Preset.guard)
    every, aware = correction(Preset.guard, every_n_steps=2), correction(Preset.data_aware)
    again = correction(Preset.data_aware, strength=1.0)
    assert trained_runs({"a": plain}) == {"a": []}
    assert trained_runs({"a": plain, "b": other}) == {"a": ["b"]}
    assert trained_runs({"a": every, "b": plain, "c": other}) == {"b": ["c"], "a": []}
    assert trained_runs({"a": plain, "b": aware, "c": other, "d": again}) == {"b": ["d", "a", "c"]}
    assert trained_runs({"a": every}) == {"a": []}
    kept = correction(Preset.guard, target=0.9)
    assert trained_runs({"a": plain, "b": kept, "c": again}) == {"c": ["b", "a"]}
    assert trained_runs({"a": plain, "b": kept}) == {"b": ["a"]}
    aimed = correction(Preset.data_aware, target=0.9)
    assert trained_runs({"a": kept, "b": aimed}) == {"b": ["a"]}  # whose checkpoints hold rows of the task


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> list[str]:
    return [*SMALL, f"toy.cache_dir={tmp_path_factory.mktemp('lab')}", "lora.dropout=0.1"]


def run(trainer: str, lab: list[str], output: Path, names: list[str]) -> Path:
    entries = ", ".join(f"{name}: {ALL[name]}" for name in names)
    settings = [*lab, f"corrections={{{entries}}}", f"output={output}"]
    assert main([f"recipes/{TRAINERS[trainer]}.yaml", *settings]) == 0
    return output


def place(folder: Path, step: int) -> Path:
    """Where a checkpoint's adapter lies, trained in either trainer or made after it."""
    return next(path for path in (folder / f"checkpoint-{step}", folder / f"step={step}.adapter") if path.is_dir())


@pytest.mark.parametrize(
    ("trainer", "names"),
    [
        pytest.param("huggingface", ["csulora", "guard"], marks=pytest.mark.slow),
        pytest.param("huggingface", list(ALL), marks=pytest.mark.slow),
        pytest.param("lightning", list(ALL), marks=pytest.mark.slow),
    ],
)
def test_what_is_made_of_one_run_is_what_runs_of_their_own_write(trainer, names, lab, tmp_path):
    together = run(trainer, lab, tmp_path / "together", names)
    records = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    trained = {record["run"] for record in records if "loss" in record}
    assert trained == ({"data_aware", "every"} if "every" in names else {"csulora"})
    for name in sorted({*names} - trained) + [name for name in names if name == "every"]:
        own = run(trainer, lab, tmp_path / name, [name]) / name
        for step in (2, 4):
            mine, other = place(together / name, step), place(own, step)
            assert (mine / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
            raw = [(folder / "csulora/raw" / WEIGHTS).read_bytes() for folder in (mine, other)]
            assert raw[0] == raw[1]
            # Of the files beside it, texts.json is not written again: nothing is resumed from there.
            said = [{**read_record(folder), "files": None, "sha256": None} for folder in (mine, other)]
            assert said[0] == said[1]
        if name not in trained:
            steps = [record["step"] for record in records if record["run"] == name]
            assert steps == [2, 4]
            made = read_record(place(together / name, 4))["metrics"]
            assert made.items() <= next(r for r in records if r["run"] == name and r["step"] == 4).items()
    rows = json.loads((together / "results.json").read_text())
    assert [row["method"] for row in rows] == ["aligned", "raw", *names]


@pytest.mark.slow
def test_a_run_whose_factors_are_lost_says_so(lab, tmp_path, capsys):
    """A raw adapter that is damaged cannot be corrected in another way."""
    output = run("huggingface", lab, tmp_path / "out", ["csulora", "guard"])
    (output / "csulora/checkpoint-2/csulora/raw" / WEIGHTS).write_bytes(b"")
    capsys.readouterr()
    entries = f"corrections={{csulora: {ALL['csulora']}, guard: {ALL['guard']}}}"
    assert main(["recipes/quickstart.yaml", *lab, entries, f"output={output}"]) == 2
    assert "'corrections.guard': `adapter`: expected the raw factors of" in capsys.readouterr().err
