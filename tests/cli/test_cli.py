"""Every command as a process on a real adapter; what it says where something is wrong, and with which status."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from csulora_callback import Penalty, SafetySubspace, correct_adapter
from csulora_callback.models.checkpoint import Checkpoint
from tests.helpers.command_line import run, run_process
from tests.helpers.lab import PENALTY, RANK, TARGETS, assert_same, corrected_by_hand, raw, saved

ESCAPE = "\x1b"


@pytest.mark.slow
def test_a_subspace_is_estimated_written_and_shown(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # another test's may hold one of equal weights
    file = tmp_path / "subspace.safetensors"
    targets = ["--target-modules", "q_proj,v_proj", "--target-modules", "down_proj"]
    done = run_process("subspace", *pair, "-o", file, "--rank", RANK, *targets, "--json")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    expected = SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)
    assert SafetySubspace.load(file).fingerprint == expected.fingerprint == json.loads(done.stdout)["fingerprint"]
    status, shown, _ = run("subspace", "--show", file)
    assert status == 0
    for part in (str(pair[0]), str(pair[1]), expected.fingerprint, "q_proj", f"{100 * expected.energy_kept:.1f} %"):
        assert part in shown
    status, as_json, _ = run("subspace", "--show", file, "--json")
    assert (status, json.loads(as_json)) == (0, json.loads(done.stdout))


def test_a_subspace_is_found_again_and_checked_on_request(pair, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in (path for folder in pair for path in folder.iterdir()):
        os.utime(file, (time.time() - 60,) * 2)
    read, weight = [], Checkpoint.weight
    monkeypatch.setattr(Checkpoint, "weight", lambda self, name: read.append(name) or weight(self, name))
    counts = []
    for options in ([], [], ["--verify"]):
        command = ("subspace", *pair, "-o", tmp_path / "file", "--target-modules", "q_proj", *options)
        with caplog.at_level("INFO", "csulora_callback"):
            assert run(*command)[0] == 0
        assert ("found in the cache" in caplog.text) == bool(counts)
        counts.append(len(read))
        read.clear()
        caplog.clear()
    assert counts == [4, 0, 4]
    assert run("subspace", "--show", tmp_path / "file", "--verify")[0] == 2


@pytest.mark.slow
def test_an_adapter_is_inspected_and_nothing_is_changed(lab):
    before = {path: path.read_bytes() for path in lab.rglob("*") if path.is_file()}
    done = run_process("inspect", lab / "raw", "--subspace", lab / "subspace.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ESCAPE not in done.stdout
    assert "the part that the subspace keeps" in done.stdout
    for part in ("q_proj", "v_proj", "down_proj", "By layer", "Alignment undone, by layer and kind"):
        assert part in done.stdout
    assert before == {path: path.read_bytes() for path in lab.rglob("*") if path.is_file()}


def test_what_is_inspected_are_the_numbers_of_the_correction(lab):
    status, output, _ = run("inspect", lab / "corrected", "--subspace", lab / "subspace.safetensors", "--json")
    seen, record = json.loads(output), json.loads((lab / "corrected/csulora/correction.json").read_text())
    assert status == 0
    assert seen["correction"] == {"status": "corrected", "penalty": PENALTY.to_json()}
    for name, module in record["modules"].items():
        shares = seen["states"]["raw"]["modules"][name]["shares"]
        assert shares == pytest.approx(module["relative_energy"], rel=1e-6)
    metrics, together = record["metrics"], {state: seen["states"][state]["together"] for state in seen["states"]}
    before, after = (together[state]["update_norm"] for state in ("raw", "corrected"))
    assert before == pytest.approx(metrics["csulora/update_norm"])
    assert 1 - after / before == pytest.approx(metrics["csulora/attenuation"], abs=1e-6)
    assert seen["states"]["raw"]["layers"].keys() == {"model.layers.0", "model.layers.1"}


def test_of_an_adapter_published_without_its_raw_one_all_is_shown_that_is_there(lab, tmp_path):
    shutil.copytree(lab / "corrected", tmp_path / "published", ignore=shutil.ignore_patterns("raw"))
    rule = ("--subspace", lab / "subspace.safetensors")
    status, output, _ = run("inspect", tmp_path / "published", *rule)
    assert status == 0
    assert "its raw update was not published with it" in output
    seen, whole = (
        json.loads(run("inspect", f, *rule, "--json")[1]) for f in (tmp_path / "published", lab / "corrected")
    )
    assert seen == {**whole, "adapter": seen["adapter"], "states": {"corrected": whole["states"]["corrected"]}}
    for command in (("correct", *rule), ("restore",)):
        name, *rest = command
        status, output, error = run(name, tmp_path / "published", "-o", tmp_path / "out", *rest)
        assert (status, output) == (1, "")
        assert "whose raw one was not published with it. That lies where the adapter was trained" in error
        assert "changed or is missing" not in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_both_checkpoints_give_the_whole_displacement(lab, pair):
    def undone(*arguments) -> dict:
        seen = json.loads(run("inspect", lab / "raw", *arguments, "--json")[1])
        return seen["displacement"], seen["states"]["adapter"]["together"]["undone"]

    kept, part = undone("--subspace", lab / "subspace.safetensors")
    whole, all_of_it = undone("--base", pair[0])
    assert (kept, whole) == ("kept", "whole")
    base, aligned = (load_file(folder / "model.safetensors") for folder in pair)
    along = size = 0.0
    adapter = saved(lab / "raw")
    for key in [key for key in adapter if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        D = aligned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        delta = 2.0 * adapter[key.replace("lora_A", "lora_B")].double() @ adapter[key].double()
        along, size = along + (delta * D).sum().item(), size + D.square().sum().item()
    assert math.isclose(all_of_it, -along / size, rel_tol=1e-5)
    assert part != pytest.approx(all_of_it, rel=1e-3)


@pytest.mark.slow
def test_on_a_terminal_there_are_colors(lab):
    colors = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm", "COLUMNS": "80"}
    arguments = ("inspect", lab / "corrected", "--subspace", lab / "subspace.safetensors")
    done = run_process(*arguments, **colors)
    assert done.returncode == 0, done.stderr
    assert f"{ESCAPE}[30;48;2;255;" in done.stdout  # black on a red ground
    assert "raw" in done.stdout
    assert "…" not in done.stdout  # eighty columns hold it
    as_json = run_process(*arguments, "--json", **colors)
    assert ESCAPE not in as_json.stdout
    assert json.loads(as_json.stdout)["states"].keys() == {"raw", "corrected"}


@pytest.mark.slow
def test_a_correction_is_made_made_again_and_undone(lab, subspace, tmp_path):
    made, again, restored = (tmp_path / name for name in ("made", "again", "restored"))
    rule = ("--subspace", lab / "subspace.safetensors")
    done = run_process("correct", lab / "raw", "-o", made, *rule, "--strength", 5)
    assert done.returncode == 0, done.stderr
    assert_same(saved(made), corrected_by_hand(saved(lab / "raw"), subspace))
    for part in ("csulora (strength 5)", "which was not corrected", str(made), "before", "after", "truncation error"):
        assert part in done.stdout
    done = run_process("correct", made, "-o", again, *rule, "--penalty", "guard", "--json")
    answer = json.loads(done.stdout)
    assert answer["from_raw"]
    assert answer["penalty"] == Penalty.guard(10.0).to_json()
    assert answer["norm_after"] < answer["norm_before"]
    assert "corrected before" in done.stderr
    correct_adapter(lab / "raw", subspace, tmp_path / "expected", Penalty.guard(10.0))
    assert_same(saved(again), saved(tmp_path / "expected"))
    done = run_process("restore", again, "-o", restored)
    assert done.returncode == 0, done.stderr
    assert str(restored) in done.stdout
    assert_same(saved(restored), saved(lab / "raw"))


def test_an_expanded_correction_is_inspected_beside_its_raw_update(lab, subspace, tmp_path):
    done = correct_adapter(lab / "raw", subspace, tmp_path / "made", PENALTY, rank="expand")
    status, output, error = run("inspect", tmp_path / "made", "--subspace", lab / "subspace.safetensors", "--json")
    assert status == 0, error
    before, after = (json.loads(output)["states"][state]["together"]["update_norm"] for state in ("raw", "corrected"))
    assert 1 - after / before == pytest.approx(done.metrics["csulora/attenuation"], abs=1e-6)


def test_a_checkpoint_of_training_is_restored(lab, tmp_path):
    status, output, _ = run("restore", lab / "corrected", "-o", tmp_path / "raw", "--json")
    assert (status, json.loads(output)) == (0, {"output": str(tmp_path / "raw")})
    assert_same(saved(tmp_path / "raw"), raw(lab / "corrected"))


def test_a_dry_run_writes_nothing(lab, pair, tmp_path):
    status, output, _ = run("correct", lab / "raw", "-o", tmp_path / "made", "--base", pair[0], "--dry-run", "--json")
    assert status == 0
    assert json.loads(output)["output"] is None
    assert not list(tmp_path.iterdir())
    status, output, _ = run("correct", lab / "raw", "--base", pair[0], "--penalty", "guard", "--dry-run")
    assert "note" not in output
    status, output, _ = run("correct", lab / "raw", "--base", pair[0], "--rank", "expand", "--dry-run")
    assert "note" in output
    assert "no better than scaling the adapter down" in " ".join(output.split())
    assert status == 0
    assert "nothing (dry run)" in output
    assert "expand" in output


@pytest.mark.slow
def test_help_shows_examples():
    done = run_process("--help")
    assert done.returncode == 0
    for command in ("subspace", "inspect", "correct", "restore", "report", "screen"):
        assert f"  csulora {command} " in done.stdout
        status, output, _ = run(command, "--help")
        assert status == 0
        assert f"\n    csulora {command} " in output


ESTIMATE = ("subspace", "{base}", "{aligned}", "-o", "s")
NO_CHECKPOINT = "{lab}/none: expected a folder with a checkpoint or a Hub id"
MISUSED = {
    ("subspace",): "expected BASE ALIGNED -o FILE, or --show FILE",
    ("subspace", "{base}", "{aligned}"): "expected BASE ALIGNED -o FILE",
    ("subspace", "{base}", "{aligned}", "-o", "{lab}"): "`--output`: expected the name of a file, but got the folder",
    (*ESTIMATE, "--rank", "0"): "`--rank`: expected a whole number ≥ 1 or None, but got 0",
    ("subspace", "{base}", "{aligned}", "-o", "s", "--energy", "2"): "`--energy`: expected a share in (0, 1]",
    ("subspace", "{base}", "{aligned}", "-o", "s", "--energy", ".5", "--rank", "3"): "`--energy`: expected no --rank",
    ("subspace", "--show", "{subspace}", "--rank", "3"): "`--show`: expected nothing beside it",
    ("inspect", "{raw}"): "expected --subspace FILE or the unaligned --base, but got neither",
    ("inspect", "{raw}", "--base", "b", "--subspace", "s"): "but got both",
    ("inspect", "{raw}", "--subspace", "s", "--aligned", "a"): "`--aligned`: expected it beside --base only",
    ("correct", "{raw}", "--subspace", "{subspace}"): "`--output`: expected a folder to be made, but got none",
    ("correct", "{raw}", "-o", "x", "--subspace", "s", "--strength", "-1"): "`--strength`: expected a number ≥ 0",
    ("correct", "{raw}", "-o", "x", "--subspace", "s", "--penalty", "projection", "--strength", "1"): "`--strength`",
    ("correct", "{raw}", "-o", "x", "--subspace", "s", "--probes", "p"): "only for a data-aware penalty",
    (
        "correct",
        "{raw}",
        "-o",
        "x",
        "--subspace",
        "s",
        "--target",
        "90",
    ): "`--target`: expected the share of the refusals",
    ("correct", "{raw}", "-o", "x", "--subspace", "s", "--target", "1", "--strength", "1"): "expected no strength",
}
FAILED = {
    ("subspace", "--show", "{lab}/none"): "but {lab}/none is not there",
    ("subspace", "--show", "{raw}/adapter_model.safetensors"): "another safetensors file",
    ("subspace", "{base}", "{lab}/none", "-o", "s"): f"`ALIGNED`: {NO_CHECKPOINT}",
    ("subspace", "{base}", "{base}", "-o", "s"): "base equal to aligned, no displacement",
    (
        "subspace",
        "{base}",
        "{aligned}",
        "-o",
        "s",
        "--target-modules",
        "q_prog",
    ): "expected a weight for the module 'q_prog'",
    ("inspect", "{lab}/none", "--subspace", "{subspace}"): "{lab}/none: expected a folder",
    ("inspect", "{lab}", "--subspace", "{subspace}"): "adapter_config.json",
    ("inspect", "{raw}", "--subspace", "{lab}/none"): "but {lab}/none is not there",
    ("inspect", "{raw}", "--base", "{lab}/none"): f"`--base`: {NO_CHECKPOINT}",
    ("inspect", "{raw}", "--subspace", "{base}"): "but {base} is a folder; SafetySubspace.estimate makes one",
    ("correct", "{raw}", "-o", "{lab}", "--subspace", "{subspace}"): "`--output`: expected a folder",
    ("correct", "{raw}", "-o", "{lab}/x", "--subspace", "{raw}/adapter_model.safetensors"): "another safetensors file",
    ("restore", "{raw}", "-o", "{lab}/x"): "`ADAPTER`: expected an adapter that was corrected",
}


@pytest.mark.parametrize(
    ("arguments", "expected", "status"),
    [
        *((arguments, expected, 2) for arguments, expected in MISUSED.items()),
        *((arguments, expected, 1) for arguments, expected in FAILED.items()),
    ],
)
def test_what_is_wrong_is_said_in_one_line(lab, pair, arguments, expected, status, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {
        "lab": lab,
        "raw": lab / "raw",
        "subspace": lab / "subspace.safetensors",
        **dict(zip(("base", "aligned"), pair, strict=True)),
    }
    found, output, error = run(*(argument.format(**names) for argument in arguments))
    assert expected.format(**names) in error
    assert (found, output) == (status, "")
    *_, line, end = error.split("\n")
    assert line.startswith("csulora: ")
    assert end == ""
    assert not list(tmp_path.iterdir())
    assert not (lab / "x").exists()


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["inspect"], ["inspect", "a", "--no-such-option"], ["restore", "a"]]
)
def test_wrong_usage_has_a_status_of_its_own(arguments):
    status, output, error = run(*arguments)
    assert (status, output) == (2, "")
    assert "Error: " in error


@pytest.mark.slow
def test_an_error_has_no_traceback(lab, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    done = run_process("inspect", lab / "raw", "--subspace", tmp_path / "damaged.safetensors", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("csulora: `--subspace`: ")
    assert done.stderr.count("\n") == 1


def test_factors_that_are_not_finite_are_refused(lab, tmp_path):
    shutil.copytree(lab / "raw", tmp_path / "adapter")
    state = saved(tmp_path / "adapter")
    next(iter(state.values())).fill_(math.nan)
    save_file(state, tmp_path / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    status, output, error = run("inspect", tmp_path / "adapter", "--subspace", lab / "subspace.safetensors")
    assert (status, output) == (1, "")
    assert "hold NaN or Inf" in error


@pytest.mark.slow
def test_letters_that_the_output_lacks_are_no_reason_to_fail(lab):
    done = run_process("subspace", "--show", lab / "subspace.safetensors", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "?D?" in done.stdout


@pytest.mark.slow
def test_names_on_the_hub_may_have_a_revision(lab, pair, tmp_path):
    def keep(name: str, revision: str, commit: str, folder: Path) -> None:
        repo = tmp_path / f"models--some-org--{name}"
        shutil.copytree(folder, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)

    keep("model", "main", "a" * 40, pair[0])
    keep("model", "chat", "b" * 40, pair[1])
    keep("adapter", "main", "c" * 40, lab / "corrected")
    keep("adapter", "first", "d" * 40, lab / "raw")
    checkpoints = ("--base", "some-org/model", "--aligned", "some-org/model@chat")
    done = run_process("inspect", "some-org/adapter@first", *checkpoints, "--json", HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = json.loads(run("inspect", lab / "raw", "--base", pair[0], "--json")[1])
    assert json.loads(done.stdout) == {**expected, "adapter": "some-org/adapter@first"}
    texts = ("--penalty", "data_aware", "--probes", tmp_path / "probes.jsonl")
    texts[-1].write_text('{"prompt": [0, 5, 6]}\n{"prompt": [0, 7]}\n')
    rule = ("--subspace", lab / "subspace.safetensors", "--dry-run")
    for penalty in ((), texts):
        for model, status in (("model@chat", 0), ("model", 1)):  # the subspace is of the one, not of the other
            arguments = ("some-org/adapter@first", *rule, "--aligned", f"some-org/{model}", *penalty)
            done = run_process("correct", *arguments, HF_HUB_CACHE=str(tmp_path))
            assert done.returncode == status, done.stderr
            assert status == 0 or "`--subspace`: expected one of the aligned model in use" in done.stderr
    done = run_process("subspace", "some-org/model", "some-org/model@none", "-o", "s", HF_HUB_CACHE=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "csulora: `ALIGNED`: some-org/model: not a local folder, and the Hub did not give it of revision 'none'"
        in done.stderr
    )
