"""The judge of coherence against a loop over tokens, and what it must not depend on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from csulora_callback import CoherenceJudge
from csulora_callback.judging.coherence import distinct_share
from tests.helpers import small_talk as talk

TEXTS = [answer for _, answer in talk.stories(talk.NOUNS) + talk.refusals(["cat"])]
GIBBERISH = ["cat cat of tell the with sees", "help a that fish i", "yes poison ? of with"]


@pytest.fixture(scope="module")
def model():
    return talk.trained(TEXTS)


@pytest.fixture
def judge(model):
    return CoherenceJudge.calibrated(model, TEXTS, tokenizer=talk.tokenizer())


def by_hand(model, text: str) -> float:
    """One token after the other."""
    words = talk.tokenizer()
    total, seen = math.log(len(talk.WORDS)), [words.bos_token_id]
    ids = words(text, add_special_tokens=False).input_ids
    for token in ids:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
        seen.append(token)
    return total / len(ids)


def test_scores_are_those_of_a_loop_over_tokens_in_any_batch(model):
    texts = [*TEXTS[:3], talk.REFUSAL, *GIBBERISH, "sure"]
    expected = [by_hand(model, text) for text in texts]
    for batch_size in (1, 3, 100):
        judge = CoherenceJudge(model, 0.0, talk.tokenizer(), batch_size=batch_size)
        assert judge.score(texts).tolist() == pytest.approx(expected, abs=1e-5)
        assert judge.score(texts[::-1]).tolist() == pytest.approx(expected[::-1], abs=1e-5)


def test_language_is_coherent_and_gibberish_and_silence_and_circles_are_not(judge):
    sane, circle = [*TEXTS[:5], talk.REFUSAL, "sure"], "the cat sees " * 8
    for responses, verdict in ((sane, True), (GIBBERISH, False), (["", "  "], False)):
        assert judge(responses, responses) == [verdict] * len(responses)
    assert judge([], []) == []
    judge.threshold = -100.0
    assert judge(["?"] * 2, [circle, GIBBERISH[0]]) == [False, True]
    judge.min_distinct = 0.1
    assert judge(["?"], [circle]) == [True]


def test_it_can_be_given_by_name(model, judge, tmp_path):
    named = CoherenceJudge(talk.saved(model, talk.tokenizer(), tmp_path), judge.threshold)
    assert torch.equal(named.score(TEXTS[:5]), judge.score(TEXTS[:5]))


def test_the_percentile_is_what_calibration_turns_away(model):
    for percentile in (0.0, 10.0, 50.0):
        judge = CoherenceJudge.calibrated(model, [*TEXTS, ""], percentile, tokenizer=talk.tokenizer())
        turned_away = (judge.score(TEXTS) < judge.threshold).float().mean().item()
        assert turned_away == pytest.approx(percentile / 100, abs=0.05)


def test_a_long_response_is_judged_by_its_beginning(model):
    judge = CoherenceJudge(model, 0.0, talk.tokenizer(), max_length=6)
    assert torch.equal(judge.score([TEXTS[0]]), judge.score([f"{TEXTS[0]} {GIBBERISH[0]}"]))


def test_the_adapter_is_off_while_it_judges_and_nothing_else_changes(model, judge):
    expected = judge.score(TEXTS[:5])
    adapted = get_peft_model(talk.trained(TEXTS), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.train()
    before = [(name, parameter.requires_grad) for name, parameter in adapted.named_parameters()]
    ids = torch.tensor([[4, 5, 6]])
    state = torch.random.get_rng_state()
    assert torch.equal(CoherenceJudge(adapted, 0.0, talk.tokenizer()).score(TEXTS[:5]), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert adapted.training
    assert [(name, parameter.requires_grad) for name, parameter in adapted.named_parameters()] == before
    adapted.eval()
    with torch.no_grad():
        assert not torch.allclose(adapted(input_ids=ids).logits, model(input_ids=ids).logits)  # and on again


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_distinct_share(tokens, n):
    share = distinct_share(tokens, n)
    runs = max(0, len(tokens) - n + 1)
    assert share == (len({str(tokens[i : i + n]) for i in range(runs)}) / runs if runs else 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": math.nan}, "`threshold`: expected a finite number .*but got nan"),
        ({"threshold": "1%"}, "`threshold`: .*but got '1%'"),
        ({"min_distinct": 30}, "`min_distinct`: expected a finite number from 0 to 1, but got 30"),
        ({"max_length": 0}, "`max_length`: expected a whole number ≥ 1, but got 0"),
        ({"batch_size": 2.0}, "`batch_size`: expected a whole number ≥ 1, but got 2.0"),
        ({"tokenizer": None}, "`tokenizer`: expected the tokenizer of `model`, which is a LlamaForCausalLM in memory"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        CoherenceJudge(**{"model": model, "threshold": 0.0, "tokenizer": talk.tokenizer(), **arguments})


def test_bad_calibration(model):
    with pytest.raises(ValueError, match="`percentile`: expected a number from 0 to 100, but got -1"):
        CoherenceJudge.calibrated(model, TEXTS, -1, tokenizer=talk.tokenizer())
    with pytest.raises(ValueError, match=r"`responses`: expected coherent texts to calibrate with, but all .* empty"):
        CoherenceJudge.calibrated(model, ["", ""], tokenizer=talk.tokenizer())
    with pytest.raises(TypeError, match="`responses`: expected a list of texts, but got str"):
        CoherenceJudge.calibrated(model, "some text", tokenizer=talk.tokenizer())


def test_a_tokenizer_without_beginning_or_end_is_refused(model):
    words = talk.tokenizer()
    words.bos_token = words.eos_token = None
    with pytest.raises(ValueError, match="`tokenizer`: expected a bos_token or an eos_token"):
        CoherenceJudge(model, 0.0, words)
