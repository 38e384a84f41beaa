"""How much refusing is left, against real generation; what a correction does to the task, against passes by hand."""

import pytest
import torch

from csulora_callback import Penalty, SafetyCorrector, SafetySubspace
from csulora_callback.behaviour import BEGINNING, BEHAVIOUR_KEYS, Behaviour, Refusals
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.teacher_forcing import greedy_answers
from tests.helpers.lab import TARGETS, align, tiny_llama, with_lora

PROMPTS = [[3 + (7 * i + j) % 29 for j in range(1 + i % 6)] for i in range(24)]
ROWS, STARTS = [[5, 6, 7, 8, 9], [10, 11, 12], [13], [14, 15, 16, 17]], [3, 0, 0, 4]


def lora(scale: float = 1.0, seed: int = 2):
    model = with_lora(align(tiny_llama(initializer_range=0.5)), seed=seed, init_lora_weights=False, lora_dropout=0.1)
    adapter = find_adapter(model.train())
    adapter.write({name: (A, scale * B) for name, (A, B) in adapter.read().items()})
    return model, adapter


def beginning(model, prompt: list[int]) -> list[int]:
    """By transformers itself, alone and without padding."""
    modes = {module: module.training for module in model.modules()}
    ids = torch.tensor([prompt])
    said = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=BEGINNING,
        do_sample=False,
        pad_token_id=2,
    )
    for module, mode in modes.items():
        module.training = mode
    return said[0, len(prompt) :].tolist()


def refusals_of(adapter) -> Refusals:
    with adapter.off():
        return Refusals(adapter, PROMPTS, greedy_answers(adapter.model, PROMPTS, BEGINNING))


@pytest.mark.parametrize(("scale", "seed"), [(0.0, 2), (0.05, 2), (0.1, 5), (1.0, 2)])
def test_what_is_kept_is_what_generating_and_comparing_says(scale, seed):
    model, adapter = lora(scale, seed)
    refusals = refusals_of(adapter)
    with adapter.off():
        aligned = [beginning(model, prompt) for prompt in PROMPTS]
    assert refusals.beginnings == aligned
    same = [beginning(model, prompt) == own for prompt, own in zip(PROMPTS, aligned, strict=True)]
    assert refusals.read().kept == sum(same) / len(same)
    some = refusals.of([1, 5, 6, 20])
    assert some.read().kept == sum(same[place] for place in (1, 5, 6, 20)) / 4


def test_likelihoods_are_those_of_a_pass_over_each_text_alone():
    model, adapter = lora(0.2)
    refusals = refusals_of(adapter)
    model.eval()

    def logprob(place: int) -> float:
        prompt, said = PROMPTS[place], refusals.beginnings[place]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0].double().log_softmax(-1)
        return sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(said)) / len(said)

    here = [logprob(place) for place in range(len(PROMPTS))]
    with adapter.off():
        own = [logprob(place) for place in range(len(PROMPTS))]
        assert refusals.read() == (type(refusals.read()))(1.0, 0.0)  # the aligned model, held against itself
    expected = sum(here) / len(here) - sum(own) / len(own)
    assert refusals.read().logprob == pytest.approx(expected, rel=1e-4)
    assert expected < -0.1


def test_beginnings_that_the_pass_does_not_give_back_to_the_aligned_model_do_not_count():
    """As in bfloat16, where padding decides near ties; here the pass cannot give back what was never said."""
    _, adapter = lora(0.05)
    whole = refusals_of(adapter)
    wrong = [[31 - token for token in said] if place < 5 else said for place, said in enumerate(whole.beginnings)]
    assert all(one != other for one, other in zip(wrong[:5], whole.beginnings, strict=False))
    assert Refusals(adapter, PROMPTS, wrong).read().kept == whole.of(range(5, len(PROMPTS))).read().kept


def measured(penalty: Penalty, scale: float = 0.3):
    model, adapter = lora(scale)
    base = tiny_llama(initializer_range=0.5)
    subspace = SafetySubspace.estimate(base, align(base), TARGETS, rank=3, progress=False)
    texts = Texts(ROWS, PROMPTS, 4, STARTS, screened=[0])
    corrector = SafetyCorrector(model, subspace, penalty, Activations({}, {}, texts))
    return model, corrector, Behaviour(refusals_of(adapter))


def test_raw_and_corrected_model_are_measured_and_neither_is_left_behind():
    model, corrector, behaviour = measured(Penalty.guard(2.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    values = behaviour.measure(corrector)
    assert tuple(values) == BEHAVIOUR_KEYS
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training

    raw, refusals = corrector.adapter.read(), behaviour.refusals
    reading, rows = {}, [(row, max(start, 1)) for row, start in zip(ROWS, STARTS, strict=True) if len(row) > start]
    model.eval()
    for name, factors in (("", raw), ("_corrected", corrector.compute().corrected)):
        corrector.adapter.write(factors)
        read = refusals.read()
        assert values[f"csulora/refusal_kept{name}"] == read.kept
        assert values[f"csulora/refusal_logprob{name}"] == pytest.approx(read.logprob, rel=1e-5)
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1) for row, _ in rows]
        reading[name] = [said[start - 1 : -1] for said, (_, start) in zip(logits, rows, strict=True)]
        losses = [
            -said[range(len(row) - start), row[start:]]
            for said, (row, start) in zip(reading[name], rows, strict=True)
            if len(row) > start
        ]
        assert values[f"csulora/task_loss{name}"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert len(torch.cat(losses)) == 2 + 2  # from their starts on; nothing predicts the first of all
    p, q = torch.cat(reading[""]), torch.cat(reading["_corrected"])
    assert values["csulora/task_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert values["csulora/task_kl"] > 1e-3
    assert values["csulora/refusal_logprob_corrected"] > values["csulora/refusal_logprob"] + 0.01


def test_where_nothing_is_corrected_both_are_one():
    _, corrector, behaviour = measured(Penalty.guard(0.0))
    values = behaviour.measure(corrector)
    for key in ("refusal_kept", "refusal_logprob", "task_loss"):
        assert values[f"csulora/{key}"] == pytest.approx(values[f"csulora/{key}_corrected"], rel=1e-4)
    assert values["csulora/task_kl"] == pytest.approx(0.0, abs=1e-5)


def test_inside_a_correction_the_raw_model_is_still_the_raw_one():
    _, corrector, behaviour = measured(Penalty.guard(2.0))
    with corrector.corrected() as adapter:
        inside = behaviour.measure(corrector)
        assert all(torch.equal(A, adapter.corrected[name][0]) for name, (A, _) in corrector.adapter.read().items())
    assert inside == Behaviour(behaviour.refusals).measure(corrector)


def test_nothing_is_read_again_where_nothing_changed():
    model, corrector, behaviour = measured(Penalty.guard(2.0))
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    first = behaviour.measure(corrector)
    count = len(passes)
    assert behaviour.measure(corrector) == first
    assert len(passes) == count
    corrector.adapter.write({name: (A, 2 * B) for name, (A, B) in corrector.adapter.read().items()})
    second = behaviour.measure(corrector)
    assert second != first
    corrector.activations = Activations({}, {}, Texts([[5, 6, 7]], PROMPTS, 1))
    assert behaviour.measure(corrector)["csulora/task_loss"] != second["csulora/task_loss"]


def test_without_rows_nothing_is_said_of_the_task():
    _, corrector, behaviour = measured(Penalty.guard(2.0))
    corrector.activations = Activations({}, {}, Texts([], PROMPTS, 0))
    assert set(behaviour.measure(corrector)) == {
        f"csulora/refusal_{kind}{which}" for kind in ("kept", "logprob") for which in ("", "_corrected")
    }


def test_a_search_for_a_strength_reads_one_half_with_the_other_left_out():
    """The seam: any part of the prompts, of whatever is live."""
    _, corrector, behaviour = measured(Penalty.guard(0.0), scale=0.3)
    half, kept = behaviour.refusals.of(range(0, len(PROMPTS), 2)), []
    for strength in (0.0, 1.0, 1e9):
        trial = SafetyCorrector(corrector.adapter.model, corrector.subspace, Penalty.guard(strength))
        with trial.corrected():
            kept.append(half.read().logprob)
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] <= 1e-6
