"""The callback on mixtures of experts with fused weights: each expert is corrected by its own displacement.

What a checkpoint does to each expert is compared with a dense float64 computation that shares no code with the
library, of PEFT's own updates and of weights that transformers loads.
"""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter, restore_adapter, write_report
from csulora_callback.sidecar import read_record
from tests.helpers.command_line import run as run_command
from tests.helpers.experts import FAMILIES, LORA, closest, deltas, experts_pair, load, weights
from tests.helpers.huggingface import losses
from tests.helpers.lab import PENALTY, RANK, assert_same, make_trainer, raw, saved, with_lora
from tests.helpers.lightning import Module, fit

FAST = "mixtral"
ALL = [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]

pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # PEFT, of its own patterns


def run(pair, output, callbacks=(), resume=None, lora=LORA[FAST], **arguments):
    model = with_lora(load(pair[1]), **lora)
    trainer = make_trainer(model, output, list(callbacks), **{"max_steps": 4, "save_steps": 2, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By family, once each: the same training without the callback, and with it."""
    done = {}

    def of(name: str) -> SimpleNamespace:
        if name not in done:
            folder = tmp_path_factory.mktemp("experts")
            pair = experts_pair(folder, name)
            callback = CSULoRACallback(pair[0], rank=RANK, penalty=PENALTY, cache_dir=folder / "cache")
            runs = {
                kind: run(pair, folder / kind, callbacks, lora=LORA[name])
                for kind, callbacks in (("without", ()), ("with", [callback]))
            }
            done[name] = SimpleNamespace(name=name, folder=folder, pair=pair, runs=runs)
        return done[name]

    return of


def subspace_of(done) -> SafetySubspace:
    names = sorted(read_record(done.folder / "with/checkpoint-4")["modules"])
    return SafetySubspace.estimate(*done.pair, names, rank=RANK, progress=False)


def expected(done, rank_factor: int = 1) -> dict[str, torch.Tensor]:
    base, aligned = map(weights, done.pair)
    updates = deltas(done.pair[1], done.folder / "without/checkpoint-4")
    return {
        name: closest(aligned[name] - base[name], update, rank_factor * rank)
        for name, (update, rank) in updates.items()
    }


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, update in wanted.items():
        apart = torch.linalg.matrix_norm(got[name] - update)  # of each expert
        assert (apart <= 1e-5 * torch.linalg.matrix_norm(update)).all(), (name, apart)


@pytest.mark.parametrize("name", ALL)
def test_each_expert_is_corrected_by_its_own_displacement(trained, name, caplog):
    done = trained(name)
    wanted = expected(done)
    assert sum(update.ndim == 3 for update in wanted.values()) >= 2
    assert "gate.weight" in " ".join(wanted) or "router.weight" in " ".join(wanted)
    got = {name: update for name, (update, _) in deltas(done.pair[1], done.folder / "with/checkpoint-4").items()}
    assert_close(got, wanted)
    assert "loaded through transformers" not in caplog.text


@pytest.mark.parametrize("name", ALL)
def test_training_is_the_same_bit_for_bit(trained, name):
    done = trained(name)
    assert losses(done.runs["with"]) == losses(done.runs["without"])
    for step in (2, 4):
        checkpoint = f"checkpoint-{step}"
        assert_same(raw(done.folder / "with" / checkpoint), saved(done.folder / "without" / checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_is_exact(trained, name):
    done = trained(name)
    output = done.folder / "resumed"
    shutil.copytree(done.folder / "with/checkpoint-2", output / "checkpoint-2")
    callback = CSULoRACallback(done.pair[0], rank=RANK, penalty=PENALTY)
    resumed = run(done.pair, output, [callback], resume=True, lora=LORA[name])
    assert losses(resumed) == losses(done.runs["without"])
    for of in (raw, saved):
        assert_same(of(output / "checkpoint-4"), of(done.folder / "with/checkpoint-4"))


@pytest.mark.parametrize("name", ALL)
def test_from_files_alone_comes_what_the_callback_wrote(trained, name):
    done = trained(name)
    subspace = subspace_of(done)  # of both folders, in which most families keep each expert apart
    for checkpoint, output in (("without", "from raw"), ("with", "from corrected")):
        made = correct_adapter(done.folder / checkpoint / "checkpoint-4", subspace, done.folder / output, PENALTY)
        assert made.from_raw == (checkpoint == "with")
        assert_same(saved(made.output), saved(done.folder / "with/checkpoint-4"))
    restore_adapter(done.folder / "from corrected", done.folder / "restored")
    assert_same(saved(done.folder / "restored"), saved(done.folder / "without/checkpoint-4"))


RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

aligned, *adapters = sys.argv[1:]
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned), adapter)
    torch.save(model.double().merge_and_unload().state_dict(), adapter + "/merged.pt")
assert not any(name.startswith("csulora") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_alone_loads_it_in_a_new_process_expanded_or_not(trained, name):
    done = trained(name)
    expanded, checkpoint = done.folder / "expanded", done.folder / "with/checkpoint-4"
    correct_adapter(checkpoint, subspace_of(done), expanded, PENALTY, rank="expand")
    command = [sys.executable, "-c", RELOAD, str(done.pair[1]), str(checkpoint), str(expanded)]
    subprocess.run(command, check=True)
    aligned = weights(done.pair[1])
    for adapter, factor in ((checkpoint, 1), (expanded, 2)):
        merged = torch.load(adapter / "merged.pt")
        wanted = expected(done, factor)
        assert_close({name: merged[name] - aligned[name] for name in wanted}, wanted)
        assert all(torch.equal(merged[name], aligned[name]) for name in merged.keys() - wanted.keys())


@pytest.mark.parametrize("arguments", [{"probes": [[3, 4]] * 8}, {"probes": [[3, 4]] * 8, "target": 0.9}])
@pytest.mark.slow
def test_a_data_aware_penalty_is_refused_before_training_with_what_helps(tmp_path, arguments):
    pair = experts_pair(tmp_path, FAST)
    with pytest.raises(
        ValueError, match=r"down_proj\[0\]' reads is known only inside.*Pass penalty=Penalty.guard\(10"
    ):
        run(pair, tmp_path / "out", [CSULoRACallback(pair[0], **arguments)])
    assert not any((tmp_path / "out").rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, 0.5])
def test_probes_measure_and_a_target_is_found_with_weights_alone(tmp_path, target):
    pair = experts_pair(tmp_path, FAST)
    probes = [[0, 3 + i, 4 + 2 * i % 20, *range(5, 5 + i % 3)] for i in range(10)]
    penalty = Penalty.guard(10.0) if target is None else Penalty.guard
    runs = {}
    for kind in ("without", "with"):
        callbacks = [CSULoRACallback(pair[0], rank=RANK, penalty=penalty, probes=probes, target=target)]
        runs[kind] = run(pair, tmp_path / kind, callbacks if kind == "with" else ())
    assert losses(runs["with"]) == losses(runs["without"])
    said = read_record(tmp_path / "with/checkpoint-4")
    assert said["penalty"]["name"] == "guard"
    kept = [
        record["csulora/refusal_kept"] for record in runs["with"].state.log_history if "csulora/refusal_kept" in record
    ]
    assert len(kept) == 2
    assert all(0 <= share <= 1 for share in kept)


class InLightning(Module):
    def build(self) -> None:
        self.network = with_lora(load(self.aligned), **LORA[FAST])


@pytest.mark.slow
def test_lightnings_checkpoints_hold_the_same_correction_and_go_on_exactly(tmp_path):
    pair = experts_pair(tmp_path, FAST)
    seen = {}
    for kind in ("without", "with", "resumed"):
        saving = ModelCheckpoint(tmp_path / kind, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [] if kind == "without" else [CSULoRACallback(pair[0], rank=RANK, penalty=PENALTY)]
        start = tmp_path / "with/step=4.ckpt" if kind == "resumed" else None
        seen[kind] = fit(pair, tmp_path, [*callbacks, saving], InLightning(pair[1]), ckpt_path=start).losses
    assert seen["with"] == seen["without"]
    assert seen["resumed"] == seen["with"][-len(seen["resumed"]) :]
    for step in (4, 8):
        adapter = tmp_path / f"with/step={step}.adapter"
        names = sorted(read_record(adapter)["modules"])
        subspace = SafetySubspace.estimate(*pair, names, rank=RANK, progress=False)
        made = correct_adapter(adapter, subspace, tmp_path / f"again at {step}", PENALTY)
        assert_same(saved(made.output), saved(adapter))
    assert_same(saved(tmp_path / "resumed/step=8.adapter"), saved(tmp_path / "with/step=8.adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "llama4"])  # of the latter ranks do not tell
def test_the_command_line_takes_experts_from_both_checkpoints(trained, name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = trained(name)
    adapter, file = done.folder / "without/checkpoint-4", tmp_path / "whole.safetensors"
    assert run_command("subspace", *done.pair, "-o", file)[0] == 0
    seen = []
    for source in (["--base", done.pair[0]], ["--subspace", file]):
        status, shown, error = run_command("inspect", adapter, *source)
        assert status == 0, error
        assert "gate_up_proj[*]" in shown
        output = tmp_path / source[0].strip("-")
        status, _, error = run_command("correct", adapter, "-o", output, "--penalty", "guard", *source)
        assert status == 0, error
        seen.append(saved(output))
    assert_same(*seen)
    status, shown, error = run_command("inspect", output, "--subspace", file)
    assert status == 0, error
    write_report(output, tmp_path / "report.html")
    assert "gate_up_proj[*]" in (tmp_path / "report.html").read_text()
