"""A drift budget in ``transformers.Trainer``: it warns once or stops with a corrected checkpoint, and says why."""

import json

import pytest
import torch
from transformers import TrainerCallback

from csulora_callback import CSULoRACallback, SafetySubspace, write_report
from csulora_callback.budget import UNMEASURED, Budget
from csulora_callback.trainers.stopping import EXCEEDED
from tests.helpers.huggingface import callback, checkpoints, losses
from tests.helpers.lab import RANK, TARGETS, assert_same, corrected_by_hand, live, raw, saved
from tests.helpers.poison import PROBES, crossing, make, poisoned_pair, train
from tests.helpers.reports import Page

UNDONE = "csulora/alignment_undone"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return poisoned_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def subspace(pair):
    return SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)


def curve(trainer, key: str = UNDONE) -> dict[int, float]:
    return {record["step"]: record[key] for record in trainer.state.log_history if key in record}


def reasons(trainer) -> list[tuple[int, str]]:
    return [(record["step"], record[EXCEEDED]) for record in trainer.state.log_history if EXCEEDED in record]


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "csulora_callback.budget"]


@pytest.fixture(scope="module")
def without(pair, tmp_path_factory):
    """A run without the callback that saves every step."""
    folder = tmp_path_factory.mktemp("without")
    return train(pair, folder, [], save_strategy="steps", save_steps=1), folder


@pytest.fixture(scope="module")
def free(pair, tmp_path_factory):
    """A run with the callback and no budget."""
    return train(pair, tmp_path_factory.mktemp("free"), [callback(pair)])


def test_a_run_stops_at_the_first_record_that_exceeds_with_a_corrected_checkpoint(
    pair, subspace, without, free, tmp_path, caplog
):
    bound, step = crossing(curve(free))
    ours = callback(pair, max_drift={UNDONE: bound}, on_exceed="stop")
    trainer = train(pair, tmp_path / "out", [ours])
    assert trainer.state.global_step == step
    assert losses(trainer) == losses(without[0])[:step]

    (folder,) = checkpoints(tmp_path / "out")
    assert folder.name == f"checkpoint-{step}"
    assert_same(raw(folder), saved(without[1] / folder.name))
    assert_same(saved(folder), corrected_by_hand(raw(folder), subspace))
    assert_same(live(trainer.model), saved(folder))

    ((at, reason),) = reasons(trainer)
    value = f"{curve(free)[step]:.3g}"
    assert at == step
    assert reason == f"{UNDONE} is {value}, more than the {bound:g} that max_drift allows, at step {step}"
    assert warnings(caplog) == [f"The drift budget is exceeded, and training stops with a checkpoint saved: {reason}."]
    assert json.loads((folder / "csulora/correction.json").read_text())["budget"] == {
        "max_drift": {UNDONE: bound},
        "min_refusal": None,
        "on_exceed": "stop",
        "exceeded": [reason],
    }
    said = f"**The drift budget was exceeded**, and training was stopped: {reason}.".replace("_", "\\_")
    assert said in (folder / "README.md").read_text()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert history[-1] == {EXCEEDED: reason, "step": step, "epoch": step / 16}

    trainer.create_model_card(model_name="mine")
    trainer.save_model(str(tmp_path / "saved"))
    assert said in (tmp_path / "saved/README.md").read_text()
    write_report(folder, tmp_path / "report.html")
    assert f"was exceeded, and training was stopped: {reason}." in Page.read(tmp_path / "report.html").text

    raised = callback(pair, max_drift={UNDONE: 10.0}, on_exceed="stop", resume_from=folder)
    resumed = train(pair, tmp_path / "more", [raised], resume=folder)
    assert losses(resumed) == losses(without[0])
    assert reasons(resumed) == [(step, reason)]  # the history's; the record is of this run
    resumed.save_model(str(tmp_path / "resumed"))
    record = json.loads((tmp_path / "resumed/csulora/correction.json").read_text())
    assert record["budget"]["exceeded"] == []
    assert "drift budget" not in (tmp_path / "resumed/README.md").read_text()


@SLOW
def test_a_warning_is_given_once_for_each_limit_and_changes_nothing_else(pair, free, tmp_path, caplog):
    bound, step = crossing(curve(free))
    at_once = dict.fromkeys(("csulora/update_norm", "csulora/partial_energy", "csulora/off_energy"), 1e-3)
    limits = {**at_once, UNDONE: bound, "csulora/attenuation": 1.0}
    ours = callback(pair, max_drift=limits)
    trainer = train(pair, tmp_path, [ours], save_strategy="steps", save_steps=1, save_total_limit=1)
    assert losses(trainer) == losses(free)
    assert curve(trainer) == curve(free)
    assert [at for at, _ in reasons(trainer)] == [1, 1, 1, step]
    assert [message.split(": ", 1)[1] for message in warnings(caplog)] == [f"{said}." for _, said in reasons(trainer)]
    assert all("and training goes on: " in message for message in warnings(caplog))
    assert (
        "**The drift budget was exceeded**, and training went on: "
        in (tmp_path / "checkpoint-8/README.md").read_text()
    )
    drifts = [record for record in trainer.state.log_history if "csulora/update_norm" in record]
    assert len(drifts) == 8  # a checkpoint after a record of what was exceeded does not say the drift again


def with_probes(pair, **arguments) -> CSULoRACallback:
    return callback(pair, probes=PROBES, cache_dir=pair[0].parent / "cache", **arguments)


MOMENTS = {
    "an evaluation": ({"eval_strategy": "steps", "eval_steps": 2}, 4),
    "the save itself": ({"save_strategy": "steps", "save_steps": 3}, 3),
    "a log record": ({}, 3),
    "the evaluation after which the best one is saved": (
        # The loss of counting up, of which a higher one counts as better here, falls from the first one on.
        {
            **{"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "eval_loss"},
            **{"greater_is_better": True, "per_device_train_batch_size": 32},
        },
        4,
    ),
}


@SLOW
@pytest.mark.parametrize("moment", MOMENTS)
def test_refusing_that_is_lost_stops_a_run_wherever_it_is_measured(pair, subspace, tmp_path, moment):
    arguments, end = MOMENTS[moment]
    every = 1 if moment == "a log record" else None
    stopper = with_probes(pair, min_refusal=0.8, on_exceed="stop", probe_every_n_steps=every)
    trainer = train(pair, tmp_path, [stopper], **arguments)
    assert trainer.state.global_step == end
    folder = checkpoints(tmp_path)[-1]
    assert folder.name == f"checkpoint-{end}"
    assert_same(saved(folder), corrected_by_hand(raw(folder), subspace))
    ((_, reason),) = reasons(trainer)
    assert "less than the 0.8 that min_refusal asks for" in reason
    assert json.loads((folder / "csulora/correction.json").read_text())["budget"]["exceeded"] == [reason]
    assert reason in (folder / "trainer_state.json").read_text()
    if "best" in moment:
        assert trainer.state.best_global_step < end  # the Trainer alone would not have saved


@SLOW
def test_an_evaluation_before_the_first_step_stops_after_it(pair, tmp_path):
    trainer = train(pair, tmp_path / "poisoned", [callback(pair)], save_strategy="steps", save_steps=8)
    start, evaluations = tmp_path / "poisoned/checkpoint-8", {"eval_on_start": True, "eval_strategy": "epoch"}
    ours = with_probes(pair, min_refusal=0.8, on_exceed="stop", resume_from=start)
    more = {"max_steps": 16, "gradient_accumulation_steps": 1, **evaluations}
    trainer = train(pair, tmp_path / "more", [ours], start, **more)
    assert trainer.state.global_step == 9
    (folder,) = checkpoints(tmp_path / "more")
    assert folder.name == "checkpoint-9"
    assert [step for step, _ in reasons(trainer)] == [8]


@SLOW
def test_where_drift_is_never_logged_it_is_checked_at_saves(pair, tmp_path):
    ours = callback(pair, max_drift={"csulora/update_norm": 1e-3}, on_exceed="stop")
    trainer = train(pair, tmp_path, [ours], logging_strategy="no", save_strategy="steps", save_steps=2)
    assert trainer.state.global_step == 2
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert reasons(trainer)[0][1] in (tmp_path / "checkpoint-2/README.md").read_text().replace("\\", "")


@SLOW
def test_the_checkpoint_of_a_step_of_the_weights_themselves_says_it_too(pair, tmp_path):
    ours = callback(pair, every_n_steps=1, max_drift={"csulora/update_norm": 1e-3}, on_exceed="stop")
    trainer = train(pair, tmp_path, [ours])
    record = json.loads((tmp_path / "checkpoint-1/csulora/correction.json").read_text())
    assert record["budget"]["exceeded"] == [reason for _, reason in reasons(trainer)] != []


@SLOW
def test_the_best_checkpoint_is_loaded_as_ever(pair, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    best |= {"save_strategy": "steps"}
    free = train(pair, tmp_path / "free", [callback(pair)], save_steps=1, eval_steps=1, **best)
    bound, step = crossing(curve(free, "csulora/update_norm"))
    ours = callback(pair, max_drift={"csulora/update_norm": bound}, on_exceed="stop")
    trainer = train(pair, tmp_path / "stopped", [ours], save_steps=1, eval_steps=1, **best)
    assert trainer.state.global_step == step
    assert_same(live(trainer.model), saved(tmp_path / f"stopped/checkpoint-{trainer.state.best_global_step}"))


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 5:
            raise ZeroDivisionError


@SLOW
def test_an_evaluation_by_hand_outside_of_training_stops_nothing(pair, tmp_path, caplog):
    stopper = with_probes(pair, min_refusal=0.8, on_exceed="stop")
    trainer = make(pair, tmp_path, [stopper, Breaks()])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_csulora/refusal_kept_corrected"] < 0.8
    assert not reasons(trainer)
    assert not warnings(caplog)
    assert not trainer.control.should_training_stop


class Spoils(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))


@SLOW
def test_drift_that_cannot_be_measured_is_within_no_budget(pair, tmp_path):
    ours = callback(pair, max_drift={UNDONE: 100.0}, on_exceed="stop")
    trainer = train(pair, tmp_path, [Spoils(), ours])
    assert trainer.state.global_step == 1
    ((_, reason),) = reasons(trainer)
    assert reason == f"{UNDONE} is not a number, which may be more than the 100 that max_drift allows, at step 1"
    card = (tmp_path / "checkpoint-1/README.md").read_text()
    assert "This adapter was not corrected" in card
    assert "The drift budget was exceeded" in card


@SLOW
def test_a_budget_that_was_never_looked_at_is_named(pair, tmp_path, caplog):
    ours = with_probes(pair, min_refusal=0.5, max_drift={"csulora/task_kl": 1.0, UNDONE: 100.0})
    train(pair, tmp_path, [ours], save_strategy="no", max_steps=2)
    (message,) = warnings(caplog)
    assert "was not checked for csulora/task_kl, csulora/refusal_kept_corrected:" in message


@SLOW
def test_the_start_table_shows_it(pair, tmp_path, capsys):
    ours = with_probes(pair, min_refusal=0.25, max_drift={UNDONE: 0.2})
    train(pair, tmp_path, [ours], save_strategy="no", max_steps=1)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"drift budget {UNDONE} ≤ 0.2, csulora/refusal_kept_corrected ≥ 0.25; warn where it is exceeded" in shown
    train(pair, tmp_path, [callback(pair)], save_strategy="no", max_steps=1)
    assert "drift budget" not in capsys.readouterr().out


@SLOW
def test_trackers_get_no_text(pair, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    ours = callback(pair, max_drift={"csulora/update_norm": 1e-3}, on_exceed="stop")
    train(pair, tmp_path, [ours], save_strategy="no", report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert not [tag for tags in events.Tags().values() if isinstance(tags, list) for tag in tags if "exceeded" in tag]


BAD = {
    "no mapping": ({"max_drift": 0.2}, r"`max_drift`: expected logged keys with the most .* but got 0\.2"),
    "empty": ({"max_drift": {}}, r"`max_drift`: expected logged keys with the most .* but got \{\}"),
    "misspelled": (
        {"max_drift": {"csulora/aligment_undone": 0.2}},
        r"`max_drift`: .* but got 'csulora/aligment_undone'\. Did you mean csulora/alignment_undone or csulora/alig",
    ),
    "an evaluation's": (
        {"max_drift": {"eval_csulora/task_kl": 0.2}, "probes": PROBES},
        r"`max_drift`: .* Did you mean csulora/task_kl",
    ),
    "far off": ({"max_drift": {7: 0.2}}, r"`max_drift`: .* but got 7\. Such are csulora/aligned_energy, "),
    "not finite": (
        {"max_drift": {UNDONE: float("nan")}},
        r"`max_drift`: expected a finite number for 'csulora/alignment_undone', but got nan",
    ),
    "no number": ({"max_drift": {UNDONE: True}}, "`max_drift`: expected a finite number .* but got True"),
    "behaviour without probes": (
        {"max_drift": {"csulora/task_kl": 1.0}},
        "`max_drift`: expected `probes` beside 'csulora/task_kl', .* Pass probes='builtin' too",
    ),
    "the wrong way round": (
        {"max_drift": {"csulora/refusal_kept": 0.8}, "probes": PROBES},
        r"`max_drift`: expected keys of which less is safer, but got 'csulora/refusal_kept'.* min_refusal=0\.8",
    ),
    "refusal without probes": ({"min_refusal": 0.8}, "`min_refusal`: expected `probes` beside it"),
    "no refusal": ({"min_refusal": 0.0, "probes": PROBES}, r"`min_refusal`: expected .* but got 0\.0"),
    "percents": ({"min_refusal": 80, "probes": PROBES}, "`min_refusal`: expected .* at most 1, but got 80"),
    "another word": (
        {"max_drift": {UNDONE: 0.2}, "on_exceed": "raise"},
        "`on_exceed`: expected 'warn' or 'stop', but got 'raise'",
    ),
    "nothing to exceed": ({"on_exceed": "stop"}, "`on_exceed`: expected `max_drift` or `min_refusal` beside 'stop'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_budget_that_makes_no_sense_is_refused(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        CSULoRACallback(base_model="org/base", **arguments)


def test_not_a_number_is_within_no_limit():
    budget = Budget({UNDONE: 0.5}, 0.5, has_probes=True)
    assert budget.check({UNDONE: 0.5, "csulora/refusal_kept_corrected": 0.5}, 1) == []
    assert len(budget.check({**UNMEASURED, "csulora/refusal_kept_corrected": float("nan")}, 2)) == 2
    budget.begin()
    assert budget.exceeded == []
    assert len(budget.check({UNDONE: 0.6}, 3)) == 1
