"""A target instead of a strength, in real trainers: what is saved keeps it, the strength below does not.

The likelihood of refusals is that of what the aligned model generates greedily, prompt by prompt, under adapters that
PEFT loads, in float64.
"""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from csulora_callback import CSULoRACallback, Penalty, correct_adapter
from csulora_callback.behaviour import BEGINNING, Refusals
from csulora_callback.method.search import HALVINGS, STRONGEST, WEAKEST
from csulora_callback.models.training_rows import fixed_sample
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers.averages import MovingAverage
from tests.helpers.lab import DEVICE, RANK, assert_same, live, make_trainer, raw, saved, with_lora
from tests.trainers.test_behaviour import Everywhere, train

PROBES = [[0, 3 + i, 4 + 2 * i % 20, *range(5, 5 + i % 3)] for i in range(24)]
PLACES = fixed_sample(24, 12)
HELD_BACK = [PROBES[place] for place in PLACES]
READ = [prompt for prompt in PROBES if prompt not in HELD_BACK]
SHARE = 0.995
STEP = (STRONGEST / WEAKEST) ** (0.5**HALVINGS)  # from a strength to the one that was tried below it


def callback(pair, **arguments) -> CSULoRACallback:
    settings = {"rank": RANK, "target": SHARE, "probes": PROBES, "cache_dir": pair[0].parent / "cache"}
    return CSULoRACallback(base_model=pair[0], **{**settings, **arguments})


@torch.no_grad()
def mean_logprob(pair, adapter: Path | None, prompts: list) -> float:
    """Per token of the beginnings of the aligned model's answers, under the model with an adapter."""
    aligned = AutoModelForCausalLM.from_pretrained(pair[1]).to(DEVICE).eval()
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).to(DEVICE).eval()
    means = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=DEVICE)
        greedy = {"max_new_tokens": BEGINNING, "do_sample": False}
        words = aligned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)
        logprobs = model(input_ids=words).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        means.append(logprobs.gather(1, words[0, len(prompt) :, None]).mean().item())
    return sum(means) / len(means)


def kept(pair, adapter: Path, prompts: list) -> float:
    """The share of the likelihood of its refusals that an adapter leaves of the aligned model's."""
    return math.exp(mean_logprob(pair, adapter, prompts) - mean_logprob(pair, None, prompts))


def assert_smallest(pair, subspace, checkpoint: Path, family, scratch: Path, prompts=HELD_BACK) -> float:
    """The strength in its record keeps the target, and that below it does not; returns it."""
    record = json.loads((checkpoint / "csulora/correction.json").read_text())
    strength, target = record["penalty"]["strength"], record["target"]
    assert record["penalty"] == family(strength).to_json()
    assert record["metrics"]["csulora/strength"] == strength
    likelihood = pytest.approx(kept(pair, checkpoint, prompts), abs=1e-5)
    assert target == {"share": SHARE, "likelihood": likelihood, "prompts": len(prompts)}
    if strength == STRONGEST:
        assert target["likelihood"] < SHARE
        return strength
    assert target["likelihood"] >= SHARE
    below = strength / STEP
    if strength and below > WEAKEST * 1.001:
        correct_adapter(checkpoint, subspace, scratch / f"below-{checkpoint.name}", family(below))
        assert kept(pair, scratch / f"below-{checkpoint.name}", prompts) < SHARE + 1e-6
    correct_adapter(checkpoint, subspace, scratch / f"same-{checkpoint.name}", family(strength))
    assert_same(saved(scratch / f"same-{checkpoint.name}"), saved(checkpoint))
    return strength


def test_checkpoints_keep_the_target_by_the_smallest_strength_and_training_is_bit_identical(
    pair, subspace, tmp_path, capsys
):
    without = train(pair, tmp_path / "a", [])
    trainer = train(pair, tmp_path / "b", [callback(pair)])
    losses = [[r["loss"] for r in run.state.log_history if "loss" in r] for run in (without, trainer)]
    assert losses[0] == losses[1]
    told = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "the smallest that keeps 99.5% of the refusals' likelihood" in told
    for step in (4, 8):
        folder = tmp_path / f"b/checkpoint-{step}"
        assert_same(raw(folder), saved(tmp_path / f"a/checkpoint-{step}"))
        texts = Sidecar.load(folder).texts
        assert (texts.probes, texts.held_back, texts.read) == (PROBES, PLACES, READ)
        strength = assert_smallest(pair, subspace, folder, Penalty.data_aware, tmp_path)
        assert WEAKEST < strength < STRONGEST
        evaluated = [r for r in trainer.state.log_history if r["step"] == step and "eval_loss" in r]
        assert [r["eval_csulora/strength"] for r in evaluated] == [strength]
        for key, adapter in (("_corrected", folder), ("", folder / "csulora/raw")):
            (logged,) = [r[f"eval_csulora/refusal_logprob{key}"] for r in evaluated]
            assert math.exp(logged) == pytest.approx(kept(pair, adapter, HELD_BACK), abs=1e-5)
        again = correct_adapter(folder, subspace, tmp_path / f"again-{step}", Penalty.data_aware, target=SHARE)
        assert_same(saved(tmp_path / f"again-{step}"), saved(folder))
        written = json.loads((folder / "csulora/correction.json").read_text())
        assert {key: again.record[key] for key in ("penalty", "target")} == {
            key: written[key] for key in ("penalty", "target")
        }
    told = (
        "| its strength | the smallest found that keeps 99.5% of the likelihood of refusing 12 prompts; it keeps 99.5%"
    )
    assert told in (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", [Penalty.guard, Penalty.csulora, Penalty.separable])
def test_with_penalties_that_read_nothing_all_probes_are_measured_by(pair, subspace, tmp_path, family):
    trainer = train(pair, tmp_path / "run", [callback(pair, penalty=family)], learning_rate=5e-3)
    for step in (4, 8):
        folder = tmp_path / f"run/checkpoint-{step}"
        texts = Sidecar.load(folder).texts
        assert (texts.probes, texts.held_back) == (PROBES, [])
        assert_smallest(pair, subspace, folder, family, tmp_path, PROBES)
        correct_adapter(folder, subspace, tmp_path / f"again-{step}", family, target=SHARE)
        assert_same(saved(tmp_path / f"again-{step}"), saved(folder))
    assert trainer.state.global_step == 8


@pytest.mark.slow
def test_beside_a_moving_average_it_is_met_by_the_average(pair, subspace, tmp_path):
    train(pair, tmp_path / "run", [MovingAverage("on_save"), callback(pair)], save_steps=2)
    found = {
        step: assert_smallest(pair, subspace, tmp_path / f"run/checkpoint-{step}", Penalty.data_aware, tmp_path)
        for step in (2, 4, 6)
    }
    assert len(set(found.values())) > 1


@pytest.mark.slow
def test_a_resumed_run_finds_what_the_uninterrupted_one_finds(pair, tmp_path):
    train(pair, tmp_path / "whole", [callback(pair)])
    start = tmp_path / "whole/checkpoint-4"
    train(pair, tmp_path / "parts", [callback(pair, resume_from=start)], resume=start)
    one, other = tmp_path / "whole/checkpoint-8", tmp_path / "parts/checkpoint-8"
    assert_same(saved(one), saved(other))
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, other)]
    strengths = [
        [(r["step"], key, r[key]) for r in history for key in r if key.endswith("csulora/strength")]
        for history in histories
    ]
    assert strengths[0] == strengths[1]
    assert len({value for *_, value in strengths[0]}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("average", [False, True])
def test_in_lightning(pair, subspace, tmp_path, average):
    def fit(name: str, ours: list):
        saves = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=4, save_top_k=-1)
        return in_lightning.fit(pair, tmp_path / name, [*ours, *([Everywhere()] if average else []), saves])

    without, trainer = fit("a", []), fit("b", [callback(pair)])
    assert trainer.losses == without.losses
    for step in (4, 8):
        assert_same(
            in_lightning.factors_in(tmp_path / f"b/step={step}.ckpt")[1],
            in_lightning.factors_in(tmp_path / f"a/step={step}.ckpt")[0],
        )
        adapter = tmp_path / f"b/step={step}.adapter"
        record = json.loads((adapter / "csulora/correction.json").read_text())
        assert record["target"]["likelihood"] == pytest.approx(kept(pair, adapter, HELD_BACK), abs=1e-5)
        texts = torch.load(tmp_path / f"b/step={step}.ckpt", weights_only=True)["csulora"]["texts"]
        assert (texts["probes"], texts["held_back"]) == (PROBES, PLACES)
        given = {"probes": READ, "task": texts["task"]}
        found = record["penalty"]["strength"]
        for name, strength in (("same", found), ("below", found / STEP)):
            place = tmp_path / f"{name}-{step}"
            correct_adapter(tmp_path / f"b/step={step}.ckpt", subspace, place, Penalty.data_aware(strength), **given)
        assert_same(saved(tmp_path / f"same-{step}"), saved(adapter))
        was_tried = found / STEP > 1.001 * WEAKEST
        assert not was_tried or kept(pair, tmp_path / f"below-{step}", HELD_BACK) < SHARE + 1e-6


@pytest.mark.slow
def test_an_average_that_comes_in_at_the_end_has_a_strength_of_its_own(pair, tmp_path):
    """Whether it comes in before the callback's last event or after it."""

    def ends(order: str) -> tuple[dict, dict]:
        ours = callback(pair, penalty=Penalty.csulora)
        others = [ours, Everywhere()] if order == "first" else [Everywhere(), ours]
        module = in_lightning.fit(pair, tmp_path / order, others).lightning_module
        module.network.save_pretrained(tmp_path / f"{order}-saved")
        return live(module), json.loads((tmp_path / f"{order}-saved/csulora/correction.json").read_text())

    (first, told), (last, said) = ends("first"), ends("last")
    assert_same(first, last)
    assert (told["penalty"], told["target"]) == (said["penalty"], said["target"])


class Attenuation(TrainerCallback):
    def __init__(self, ours) -> None:
        self.ours, self.seen = ours, []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            key = "csulora/attenuation"
            self.seen.append((logs[key], self.ours._corrector.measure()[key], logs["csulora/strength"]))


@pytest.mark.slow
def test_a_log_record_is_of_one_strength(pair, tmp_path):
    ours = callback(pair, penalty=Penalty.csulora, probe_every_n_steps=1)
    watch = Attenuation(ours)
    train(pair, tmp_path, [ours, watch], eval_strategy="no")
    assert all(logged == of_strength for logged, of_strength, _ in watch.seen)
    assert len({strength for *_, strength in watch.seen}) > 2


def test_an_interrupted_search_leaves_the_strength_that_was(pair, tmp_path, monkeypatch):
    """In a notebook people interrupt a training and save what they have."""
    ours = callback(pair, penalty=Penalty.csulora)
    seen = []

    class Interrupts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            corrector, read, passes = ours._corrector, Refusals.read, []

            def interrupted(refusals):
                passes.append(refusals)
                if len(passes) == 3:
                    raise KeyboardInterrupt
                return read(refusals)

            if state.global_step < 4:
                return
            before = corrector.penalty
            with monkeypatch.context() as patch:
                patch.setattr(Refusals, "read", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    ours._renew()
            assert corrector.penalty == before
            ours._renew()  # what was interrupted is done anew
            seen.append((before, corrector.penalty, corrector.chosen["share"]))

    train(pair, tmp_path, [ours, Interrupts()], max_steps=4, logging_steps=100, eval_strategy="no", save_strategy="no")
    ((before, after, share),) = seen
    assert (before == after, share) == (False, SHARE)


def test_where_no_strength_keeps_it_the_largest_is_taken_and_a_warning_says_so_once(pair, subspace, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(pair, tmp_path / "run", [callback(pair, penalty=Penalty.guard)])
    warned = [r.getMessage() for r in caplog.records if r.getMessage().startswith("`target`")]
    assert len(warned) == 1
    assert "guard (strength 1000), the strongest that is tried, keeps" in warned[0]
    for step in (4, 8):
        folder = tmp_path / f"run/checkpoint-{step}"
        assert assert_smallest(pair, subspace, folder, Penalty.guard, tmp_path, PROBES) == STRONGEST


def test_what_stands_for_what():
    def chosen(**arguments):
        ours = CSULoRACallback(base_model="org/base", **arguments)
        return ours.penalty, ours.target

    assert chosen() == (Penalty.csulora(10.0), None)
    assert chosen(strength=3.0) == (Penalty.csulora(3.0), None)
    assert chosen(probes="builtin") == (Penalty.data_aware, 0.9)
    assert chosen(probes="builtin", target=0.8) == (Penalty.data_aware, 0.8)
    assert chosen(probes="builtin", strength=3.0) == (Penalty.data_aware(3.0), None)
    assert chosen(probes="builtin", penalty=Penalty.guard) == (Penalty.guard, 0.9)
    assert chosen(probes="builtin", penalty=Penalty.guard(3.0)) == (Penalty.guard(3.0), None)


WRONG = {
    "no share": ({"target": 90, "probes": "builtin"}, r"`target`: expected the share .* but got 90"),
    "zero": ({"target": 0, "probes": "builtin"}, r"`target`: expected the share .* but got 0"),
    "a flag": ({"target": True, "probes": "builtin"}, r"`target`: expected the share .* but got True"),
    "not a number": ({"target": math.nan, "probes": "builtin"}, r"`target`: expected the share .* but got nan"),
    "no probes": ({"target": 0.9}, r"`probes`: expected prompts .*, as the strength is looked for"),
    "a preset without probes": (
        {"penalty": Penalty.guard},
        r"`probes`: expected prompts .*, as the strength is looked .* Or give the penalty .*, Penalty.guard\(10\)\.$",
    ),
    "a strength": ({"target": 0.9, "strength": 3.0, "probes": "builtin"}, r"`target`: expected no strength .* 3\.0"),
    "a penalty's": (
        {"target": 0.9, "penalty": Penalty.guard(3.0), "probes": "builtin"},
        r"`target`: expected no strength beside it, as it looks for one, but got guard \(strength 3\)",
    ),
    "no preset": ({"penalty": Penalty.projection, "probes": "builtin"}, r"`penalty`: expected a Penalty such as"),
    "a name": ({"penalty": "guard", "probes": "builtin"}, "`penalty`: .* got 'guard'.* `from csulora_callback import"),
    "beside a preset": (
        {"penalty": Penalty.guard, "strength": 3.0, "probes": "builtin"},
        r"`strength`: expected it in the penalty, Penalty\.guard\(3\.0\)",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CSULoRACallback(base_model="org/base", **arguments)


@pytest.mark.parametrize(
    ("penalty", "count", "message"),
    [
        (Penalty.data_aware, 15, r"at least 16 that the aligned model refuses for a target, as .* but got 15"),
        (Penalty.guard, 7, r"at least 8 that the aligned model refuses for a target, but got 7"),
    ],
)
def test_too_few_to_measure_by_are_refused_before_the_first_step(pair, tmp_path, penalty, count, message):
    ours = callback(pair, penalty=penalty, probes=PROBES[:count])
    trainer = make_trainer(with_lora(AutoModelForCausalLM.from_pretrained(pair[1])), tmp_path, [ours])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
