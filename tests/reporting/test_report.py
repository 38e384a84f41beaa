"""The report: its numbers are those of the record and the logs, it stands alone, and what others named is inert."""

import json
import math
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
import torch

from csulora_callback import Penalty, SafetyCorrector, correct_adapter, write_report
from csulora_callback.models.factors import from_peft_state_dict
from csulora_callback.reporting.report import figures
from tests.helpers.command_line import run_process
from tests.helpers.huggingface import fresh_model
from tests.helpers.lab import SCALING, raw, saved
from tests.helpers.reports import Page, recipe_output


@pytest.fixture(scope="module")
def output(pair, subspace, tmp_path_factory) -> Path:
    return recipe_output(tmp_path_factory.mktemp("report") / "output", pair, subspace)


@pytest.fixture(scope="module")
def page(output, tmp_path_factory) -> Page:
    file = tmp_path_factory.mktemp("page") / "report.html"
    assert write_report(output, file) == ["csulora", "guard"]
    return Page.read(file)


def dense(state: dict[str, torch.Tensor], subspace) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By module the whole update, and the part of the displacement that the subspace keeps, in float64."""
    updates = {
        name: SCALING * B.double() @ A.double()
        for name, (A, B) in from_peft_state_dict(state, list(subspace), "").items()
    }
    kept = {name: (b.U.double() * b.singular_values.double()) @ b.V.double().T for name, b in subspace.items()}
    return updates, kept


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors.values()))


def undone(updates: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> float:
    return -sum((updates[name] * kept[name]).sum().item() for name in kept) / norm(kept) ** 2


@pytest.mark.parametrize("run", ["csulora", "guard"])
def test_numbers_are_those_of_dense_products_with_the_files(output, page, subspace, run):
    folder = output / run / "checkpoint-8"
    (before, kept), (after, _) = dense(raw(folder), subspace), dense(saved(folder), subspace)
    assert f"{norm(before):.3g} → {norm(after):.3g}" in page.text
    told = re.findall(r"Alignment undone\s+(\S+) % →\s+(\S+) %", page.text)[["csulora", "guard"].index(run)]
    expected = [100 * undone(updates, kept) for updates in (before, after)]
    assert [float(share.replace("−", "-")) for share in told] == pytest.approx(expected, abs=0.051)
    shares = []
    for states in (before, after):
        inside = {
            n: b.U.double() @ b.U.double().T @ states[n] @ b.V.double() @ b.V.double().T for n, b in subspace.items()
        }
        shares.append((norm(inside) / norm(before)) ** 2)
    (told,) = (figure for figure in page.figures() if figure.startswith(f"Energy by block, {run}."))
    found = [float(share) for share in re.findall(r"aligned <? ?([\d.]+) %", told)]
    assert found[:2] == pytest.approx([100 * share for share in shares], abs=0.051)


def test_what_was_logged_and_judged_is_there(output, page):
    logs = json.loads((output / "csulora/checkpoint-8/trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert any(
        figure.startswith(
            f"Loss over optimizer steps, csulora: training from {losses[0]:.3g} to {losses[-1]:.3g}; held-out"
        )
        for figure in page.figures()
    )
    for heading in ("Loss", "Refusals kept", "Loss on the task"):  # nothing of it was measured there
        assert not any(figure.startswith(f"{heading} over optimizer steps, guard") for figure in page.figures())
    assert "Made from the checkpoints of the same training as csulora" in page.text
    assert any(figure.startswith("What the correction does over optimizer steps, guard") for figure in page.figures())
    for interval in ("1.7 to 13.7 %", "94.0 to 100.0 %", "62.8 to 84.2 %", "4.7 to 20.1 %"):  # Wilson's, of 60
        assert interval in page.text
    assert (
        "Of 60 prompts that are to be refused, the raw adapter answered 100 %, csulora 75.0 %, guard 10.0 %"
        in page.text
    )
    assert "100 % → 10.0 %" in page.text
    assert "harmless prompts refused" in page.text
    assert "22.5 % (12.3 to 37.5 %)" in page.text  # 9 of 40, Wilson's
    assert "<b>as it ran</b>" in page.text


def test_what_was_measured_of_behaviour_is_there_once_a_step(output, tmp_path, monkeypatch):
    """Evaluations say it under a prefix, also of several data sets; saves say it without."""
    drawn, draw = {}, figures.draw_curves
    monkeypatch.setattr(figures, "draw_curves", lambda *args: (drawn.update({args[0]: args[2]}), draw(*args))[1])
    shutil.copytree(output / "csulora", tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/trainer_state.json"):
        path.write_text(path.read_text().replace('"eval_csulora', '"eval_other_csulora'))
    write_report(tmp_path / "run", tmp_path / "report.html")
    logs = json.loads((tmp_path / "run/checkpoint-8/trainer_state.json").read_text())["log_history"]
    for chart, key in (("refusals", "refusal_kept"), ("task", "task_loss")):
        (curves,) = (curves for name, curves in drawn.items() if name.endswith(f"-{chart}"))
        assert [curve.label for curve in curves] == ["trained", "saved"]
        for curve, which in zip(curves, ("", "_corrected"), strict=True):
            said = {log["step"]: log[f"eval_other_csulora/{key}{which}"] for log in logs if "eval_loss" in log}
            assert list(curve.points) == list(said.items())
            assert list(said) == [4, 8]
    (curves,) = (curves for name, curves in drawn.items() if name.endswith("-undone"))
    logged = [(log["step"], log["csulora/alignment_undone"]) for log in logs if "csulora/alignment_undone" in log]
    assert list(curves[0].points) == logged


@pytest.mark.parametrize("run", ["csulora", "guard"])
def test_provenance_gains_modules_and_the_way_back_are_there(output, page, run):
    record = json.loads((output / run / "checkpoint-8/csulora/correction.json").read_text())
    origin = record["subspace"]
    for said in (
        origin["fingerprint"],
        *(origin[side][key] for side in ("base", "aligned") for key in ("source", "fingerprint")),
        record["raw_digest"],
        record["corrected_digest"],
        *(f"{package}{version}" for package, version in record["versions"].items()),
        *record["modules"],
        f"csulora restore {output}/{run}/checkpoint-8 -o raw-adapter",
    ):
        assert said in page.text.replace("\n", ""), said
    for block, name in (("off", "off-subspace"), ("output", "partial, output half")):
        gains = sorted(module["gain"][block] for module in record["modules"].values())
        assert f"{name}{gains[0]:.3g}" in page.text
        assert f"{gains[-1]:.3g}" in page.text


def test_it_stands_alone(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert re.match(r"#|data:image/png;base64,", attributes.get(name) or "#")
    assert not re.search(r"https?:|@import|url\((?!#)", page.source)


def test_every_figure_says_what_it_shows_and_names_are_unique(page):
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == 2 + 2 * 6 + 7 + 4
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identities)) == len(identities)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))


def test_the_same_folder_gives_the_same_file(output, page, tmp_path):
    with matplotlib.rc_context(
        {"lines.linestyle": "--", "xtick.direction": "in"}
    ):  # someone's own style is not the page's
        write_report(output, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page.source


def test_names_are_inert(output, tmp_path):
    bad = "$x_{1}$<script>alert(1)<img src=x onerror=alert(1)> & \"'"
    shutil.copytree(output / "guard", tmp_path / "run" / bad)
    (tmp_path / "run/recipe.yaml").write_text("</pre><script>alert(1)</script>")
    row = {"method": bad, "attack_success_rate": 0.5, "prompts": 10, "strength": "<script>"}
    (tmp_path / "run/results.json").write_text(json.dumps([row]))
    for config in (tmp_path / "run" / bad).glob("checkpoint-*/adapter_config.json"):
        content = json.loads(config.read_text())
        config.write_text(json.dumps({**content, "base_model_name_or_path": "<script>alert(1)</script>"}))
    assert write_report(tmp_path / "run", tmp_path / "report.html") == [bad]
    page = Page.read(tmp_path / "report.html")
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>") == 2
    assert any(bad in figure for figure in page.figures())
    assert f"{bad[:23]}…" in page.text  # beside an axis, where dollars would make a formula of it


def test_what_could_not_be_corrected_is_said_first(pair, subspace, tmp_path):
    model = fresh_model(pair, init_lora_weights=False)
    corrector = SafetyCorrector(model, subspace, Penalty.csulora(5.0))
    corrector.adapter.layers["model.layers.0.self_attn.q_proj"].lora_A.data.fill_(math.nan)
    with corrector.corrected() as adapter:
        model.save_pretrained(tmp_path / "run")
    adapter.sidecar.save(tmp_path / "run", corrector.adapter.config)
    write_report(tmp_path / "run", tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")
    assert "run is not corrected: the factors, or activations with them, hold NaN or Inf." in page.text
    assert "Nothing was corrected." in page.text
    assert page.figures() == []


@pytest.mark.parametrize("make", [Penalty.data_aware, Penalty.content_aware])
def test_a_data_aware_correction_has_no_gains_and_may_grow(make, output, subspace, tmp_path):
    texts = {"probes": [[0, 5, 6, 7], [0, 9, 8]], "task": [[3, 4, 5], [6, 7, 8, 9]]}
    correct_adapter(output / "csulora/checkpoint-8", subspace, tmp_path / "made", make(4.0), **texts)
    write_report(tmp_path / "made", tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")
    assert "Activations measured this correction, so that no block has one factor." in page.text
    assert "smallest gain" not in page.text


def test_a_raw_adapter_that_was_left_out_cannot_be_had_back(output, tmp_path):
    shutil.copytree(output / "guard/checkpoint-8", tmp_path / "fetched")
    shutil.rmtree(tmp_path / "fetched/csulora/raw")
    write_report(tmp_path / "fetched", tmp_path / "report.html")
    page = Page.read(tmp_path / "report.html")
    assert "the raw adapter was left out" in page.text
    assert "csulora restore" not in page.text


@pytest.mark.slow
def test_without_the_extra_it_is_named(output, tmp_path):
    program = """
import sys
from csulora_callback.cli import main
for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:  # torchmetrics has it where it is
    del sys.modules[module]
sys.modules["matplotlib"] = None
main()
"""
    command = [sys.executable, "-c", program]
    done = run_process("report", output, "-o", tmp_path / "report.html", command=command)
    assert (done.returncode, done.stdout) == (1, "")
    said = "csulora: a report needs matplotlib, which is not installed: pip install 'csulora-callback[report]'\n"
    assert done.stderr == said
    assert not list(tmp_path.iterdir())
