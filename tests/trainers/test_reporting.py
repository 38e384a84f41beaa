"""The drift is a curve beside the loss: in the log history, on the screen, and in the real trackers' own files."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace
from csulora_callback.reporting.penalties import IN_WORDS, NOTES, NOTHING
from csulora_callback.reporting.terminal import percent
from tests.helpers.lab import TARGETS, make_trainer, with_lora
from tests.helpers.trackers import wandb_history

STRENGTH = 5.0
RANK = 3
LORA_RANK = 4
SCALING = 2.0  # with_lora: lora_alpha 8 over r 4
KEYS = {
    "csulora/aligned_energy",
    "csulora/partial_energy",
    "csulora/off_energy",
    "csulora/aligned_over_chance",
    "csulora/partial_over_chance",
    "csulora/off_over_chance",
    "csulora/alignment_undone",
    "csulora/alignment_undone_corrected",
    "csulora/attenuation",
    "csulora/relative_change",
    "csulora/truncation_error",
    "csulora/update_norm",
}


def train(pair, tmp_path: Path, before=(), after=(), **arguments):
    """A training run in ``tmp_path/output``: 8 steps, logged every second one unless the arguments say otherwise."""
    callback = CSULoRACallback(
        base_model=pair[0],
        rank=RANK,
        penalty=Penalty.csulora(STRENGTH),
        cache_dir=tmp_path / "cache",
        log_every_n_steps=arguments.pop("log_every_n_steps", None),
    )
    settings = {"logging_steps": 2, "save_strategy": "no", **arguments}
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    trainer = make_trainer(model, tmp_path / "output", [*before, callback, *after], **settings)
    trainer.train()
    return trainer


def drift(record: dict) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith("csulora/")}


def curve(history: list[dict]) -> dict[int, dict[str, float]]:
    """The drift by step, which no step may have twice."""
    records = [record for record in history if drift(record)]
    steps = [record["step"] for record in records]
    assert len(set(steps)) == len(steps)
    return {record["step"]: drift(record) for record in records}


def test_log_history_has_all_keys_once_in_the_record_with_the_loss(pair, tmp_path):
    history = train(pair, tmp_path, save_strategy="steps", save_steps=4).state.log_history
    assert [record["step"] for record in history if "loss" in record] == [2, 4, 6, 8]
    for record in history:
        assert set(drift(record)) == (KEYS if "loss" in record else set())
        assert all(type(value) is float for value in drift(record).values())
    assert len(curve(history)) == 4


def test_tensorboard(pair, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    history = train(pair, tmp_path, report_to=["tensorboard"]).state.log_history

    events = event_accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if "csulora" in tag}
    assert tags == {f"train/{key}" for key in KEYS}
    for key in KEYS:  # events hold float32
        written = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert [step for step, _ in written] == [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
        assert [value for _, value in written] == pytest.approx([d[key] for d in curve(history).values()], rel=1e-6)


@pytest.mark.slow
def test_wandb(pair, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        history = train(pair, tmp_path, report_to=["wandb"]).state.log_history
    finally:
        wandb.teardown()  # waits until the writing process has ended; finish() can return before the file is whole

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [row for row in wandb_history(file) if "train/loss" in row or any("csulora" in key for key in row)]
    written = {
        row["train/global_step"]: {
            key.removeprefix("train/"): value for key, value in row.items() if key.startswith("train/csulora/")
        }
        for row in rows
    }
    assert written == curve(history)
    assert len(rows) == len(written) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mlflow(pair, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    store = (tmp_path / "mlruns").as_uri()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    try:
        history = train(pair, tmp_path, report_to=["mlflow"]).state.log_history
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(before)

    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {name for name in run.data.metrics if "csulora" in name} == KEYS
    for key in KEYS:
        written = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
        assert sorted(written) == [(step, values[key]) for step, values in curve(history).items()]


def test_progress_bar_prints_the_drift_with_the_loss(pair, tmp_path, capsys):
    history = train(pair, tmp_path, disable_tqdm=False).state.log_history
    printed = [ast.literal_eval(line) for line in re.findall(r"\{'loss'.*\}", capsys.readouterr().out)]
    assert [drift(line) for line in printed] == [
        {key: f"{value:.4g}" for key, value in values.items()} for values in curve(history).values()
    ]
    assert len(printed) == 4


class Recorder(TrainerCallback):
    """Keeps a copy of what its ``on_log`` is given."""

    def __init__(self) -> None:
        self.records = []

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        self.records.append({**logs, "step": state.global_step})


def test_callbacks_of_the_user_see_the_drift_wherever_they_stand(pair, tmp_path):
    first, last = Recorder(), Recorder()
    history = train(pair, tmp_path, before=[first], after=[last]).state.log_history
    assert len(curve(history)) == 4
    assert first.records == last.records == history


def test_log_every_n_steps_thins_out_the_drift_and_not_the_loss(pair, tmp_path):
    recorder = Recorder()
    history = train(pair, tmp_path, after=[recorder], logging_steps=1, log_every_n_steps=3).state.log_history
    assert [record["step"] for record in history if "loss" in record] == list(range(1, 9))
    assert list(curve(history)) == list(curve(recorder.records)) == [3, 6]


def test_a_run_without_logging_records_the_drift_of_each_checkpoint(pair, tmp_path):
    trainer = train(pair, tmp_path, logging_strategy="no", save_strategy="steps", save_steps=3)
    steps = [3, 6, 8]
    for count, step in enumerate(steps, start=1):
        checkpoint = tmp_path / "output" / f"checkpoint-{step}"
        written = curve(json.loads((checkpoint / "trainer_state.json").read_text())["log_history"])
        assert list(written) == steps[:count]
        assert set(written[step]) == KEYS
        assert written[step] == json.loads((checkpoint / "csulora" / "correction.json").read_text())["metrics"]
    assert list(curve(trainer.state.log_history)) == steps


def test_values_are_those_of_a_dense_computation(pair, tmp_path):
    history = train(pair, tmp_path, save_strategy="steps", save_steps=4).state.log_history
    raw = load_file(tmp_path / "output" / "checkpoint-4" / "csulora" / "raw" / "adapter_model.safetensors")
    weights = [AutoModelForCausalLM.from_pretrained(folder).double() for folder in pair]

    modules = []
    for key in (key for key in raw if key.endswith("lora_A.weight")):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        base, aligned = (model.get_submodule(name).weight.detach() for model in weights)
        update = SCALING * raw[key.replace("lora_A", "lora_B")].double() @ raw[key].double()
        D = aligned - base
        U, sigma, Vh = torch.linalg.svd(D)
        D_k = U[:, :RANK] * sigma[:RANK] @ Vh[:RANK]
        left, right = U[:, :RANK] @ U[:, :RANK].T, Vh[:RANK].T @ Vh[:RANK]
        inside = left @ update @ right
        partial = left @ update + update @ right - 2 * inside
        off = update - inside - partial
        closest = inside
        for part in (partial, off):
            closest = closest + part / (1 + STRENGTH * part.square().sum() / update.square().sum())
        U, sigma, Vh = torch.linalg.svd(closest, full_matrices=False)
        kept = U[:, :LORA_RANK] * sigma[:LORA_RANK] @ Vh[:LORA_RANK]
        parts = {"Δ": update, "aligned": inside, "partial": partial, "off": off, "X*": closest, "X": kept, "D": D_k}
        sides = [RANK / size for size in D.shape]  # how much of the space each block is, by this module's size
        chance = {"aligned": math.prod(sides), "off": math.prod(1 - side for side in sides)}
        chance["partial"] = 1 - sum(chance.values())
        modules.append({**parts, **{f"chance {b}": update * share**0.5 for b, share in chance.items()}})

    def norm(matrix) -> float:
        """Of all modules together."""
        return sum(matrix(module).square().sum().item() for module in modules) ** 0.5

    def undone(name: str) -> float:
        return -sum((m[name] * m["D"]).sum().item() for m in modules) / norm(lambda m: m["D"]) ** 2

    size = norm(lambda m: m["Δ"])
    expected = {
        "csulora/aligned_energy": norm(lambda m: m["aligned"]) ** 2 / size**2,
        "csulora/partial_energy": norm(lambda m: m["partial"]) ** 2 / size**2,
        "csulora/off_energy": norm(lambda m: m["off"]) ** 2 / size**2,
        **{
            f"csulora/{b}_over_chance": norm(lambda m, b=b: m[b]) ** 2 / norm(lambda m, b=b: m[f"chance {b}"]) ** 2
            for b in ("aligned", "partial", "off")
        },
        "csulora/alignment_undone": undone("Δ"),
        "csulora/alignment_undone_corrected": undone("X"),
        "csulora/attenuation": 1 - norm(lambda m: m["X"]) / size,
        "csulora/relative_change": norm(lambda m: m["X"] - m["Δ"]) / size,
        "csulora/truncation_error": norm(lambda m: m["X*"] - m["X"]) / norm(lambda m: m["X*"]),
        "csulora/update_norm": size,
    }
    assert curve(history)[4] == pytest.approx(expected, rel=1e-5)
    assert len(modules) == 6
    assert min(map(abs, expected.values())) > 1e-3


def displaced(pair) -> float:
    """``‖D‖ / ‖W‖`` of the adapted matrices."""
    base, aligned = (AutoModelForCausalLM.from_pretrained(folder).double().state_dict() for folder in pair)
    adapted = [f"{name}.weight" for name in SafetySubspace.estimate(*pair, TARGETS, rank=RANK, progress=False)]
    before, after = (torch.cat([side[name].flatten() for name in adapted]) for side in (base, aligned))
    return float((after - before).norm() / after.norm())


def test_the_start_table_says_what_will_be_corrected(pair, tmp_path, capsys):
    train(pair, tmp_path, max_steps=1)
    first = capsys.readouterr().out
    train(pair, tmp_path, max_steps=1)
    second = capsys.readouterr().out

    for table in (first, second):
        assert re.search(r"adapter\W+default, 6 modules, LoRA rank 4\b", table)
        assert re.search(r"safety subspace\W+rank 3, \d\d\.\d% of the energy of", table)
        said = "".join(re.sub("[│┃]", "", table).split())  # however it was broken into lines
        assert f"basemodel{pair[0]}alignedmodel{pair[1]}(inmemory)" in said
        assert f"penaltycsulora(strength5):{''.join(IN_WORDS['csulora'].split())}" in said
        assert f"oftheenergyofadisplacementof{percent(displaced(pair))}%oftheweights'size" in said
        assert f"note{''.join(NOTES['csulora'].split())}" in said
        assert "evaluationsofthecorrectedweights,whichship" in said
        assert re.search(r"ready in\W+\d+\.\d s", table)
        assert table.count("safety subspace") == 1
    assert "cache" not in first
    assert "cache" in second


def test_a_strength_of_nothing_says_so(pair, tmp_path, capsys):
    callback = CSULoRACallback(base_model=pair[0], penalty=Penalty.guard(0.0), evaluate_corrected=False)
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    make_trainer(model, tmp_path, [callback], max_steps=1, save_steps=1).train()
    said = "".join(re.sub("[│┃]", "", capsys.readouterr().out).split())
    assert f"note{''.join(NOTHING.split())}" in said
    assert "evaluationsoftherawweights" in said
    card = (tmp_path / "checkpoint-1/README.md").read_text()
    assert "The weights in this adapter are those that were trained: the strength of the correction was 0" in card
    assert "are not those that were trained" not in card


def test_of_every_penalty_there_are_words_for_what_it_keeps():
    made = [getattr(Penalty, name)() for name, kind in vars(Penalty).items() if isinstance(kind, classmethod)]
    assert {penalty.name for penalty in made} == set(IN_WORDS)
