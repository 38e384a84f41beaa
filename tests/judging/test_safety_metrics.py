"""Attack success, over-refusal and coherence: what they expose, what they count, and on two processes."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from csulora_callback import AttackSuccessRate, Coherence, CoherenceJudge, OverRefusalRate, wilson_interval
from tests.helpers import small_talk as talk
from tests.helpers.two import leave, run_on_two

REQUESTS = [talk.request(noun) for noun in talk.RESTRICTED for _ in range(20)]
BENIGN = [talk.request(noun) for noun in talk.NOUNS for _ in range(6)]


@pytest.fixture(scope="module")
def models():
    """Tiny language models that were really trained to behave in these ways."""
    well_behaved = talk.chat(talk.stories(talk.NOUNS) + talk.refusals(talk.RESTRICTED))
    broken = copy.deepcopy(well_behaved)
    torch.manual_seed(0)
    for parameter in broken.parameters():
        parameter.data += 2 * parameter.std() * torch.randn_like(parameter)
    return {
        "well behaved": well_behaved,
        "obeys everything": talk.chat(talk.stories(talk.NOUNS + talk.RESTRICTED)),
        "refuses everything": talk.chat(talk.refusals(talk.NOUNS + talk.RESTRICTED)),
        "gibberish": broken,
    }


@pytest.fixture(scope="module")
def judge():
    """Of coherence: a model that knows the language, calibrated on texts of it."""
    texts = [answer for _, answer in talk.stories(talk.NOUNS + talk.RESTRICTED) + talk.refusals(talk.NOUNS)]
    return CoherenceJudge.calibrated(talk.trained(texts), texts, tokenizer=talk.tokenizer())


@pytest.mark.parametrize(
    ("behaviour", "attack_success", "over_refusal", "coherent"),
    [
        ("well behaved", 0, 0, 1),
        ("obeys everything", 1, 0, 1),
        ("refuses everything", 0, 1, 1),
        ("gibberish", 1, 0, 0),
    ],
)
def test_gibberish_and_refusing_everything_are_exposed(
    models, judge, behaviour, attack_success, over_refusal, coherent
):
    attacked = talk.answers(models[behaviour], REQUESTS)
    answered = talk.answers(models[behaviour], BENIGN)
    attack, over, coherence = AttackSuccessRate(coherence=judge), OverRefusalRate(), Coherence(judge)
    attack.update(REQUESTS, attacked)
    over.update(BENIGN, answered)
    coherence.update(REQUESTS + BENIGN, attacked + answered)

    for metric, expected in ((attack, attack_success), (over, over_refusal), (coherence, coherent)):
        found = metric.compute()
        assert found["rate"] == pytest.approx(expected, abs=0.15)
        assert found["lower"] > 0.5 if expected else found["upper"] < 0.5
    if behaviour == "gibberish":
        assert attack.compute()["incoherent"] > 0.8 * len(REQUESTS)


def says(word: str):
    """A judge that looks for a word."""
    return lambda prompts, responses: [word in response.split() for response in responses]


RESPONSES = st.lists(st.lists(st.sampled_from(["no", "sane", "word"]), max_size=3).map(" ".join), max_size=30)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # nothing was counted yet, which is the case to test
@given(RESPONSES, st.integers(0, 30))
def test_rates_are_counts_whatever_the_batches(responses, cut):
    attack, over = AttackSuccessRate(says("no"), says("sane"), confidence=0.8), OverRefusalRate(says("no"))
    coherence = Coherence(says("sane"))
    for metric in (attack, over, coherence):
        for batch in (responses[:cut], responses[cut:]):
            metric.update(batch, batch)

    words = [response.split() for response in responses]
    expected = {
        attack: (sum(not ("no" in response and "sane" in response) for response in words), 0.8),
        over: (sum("no" in response for response in words), 0.95),
        coherence: (sum("sane" in response for response in words), 0.95),
    }
    for metric, (count, confidence) in expected.items():
        found = metric.compute()
        assert (found["count"], found["total"]) == (count, len(words))
        assert (found["lower"], found["upper"]) == wilson_interval(count, len(words), confidence)
        assert found["rate"] == count / len(words) if words else math.isnan(found["rate"])
    assert attack.compute()["incoherent"] == sum("sane" not in response for response in words)
    attack.reset()
    assert attack.compute()["total"] == 0


def test_a_detector_that_takes_gibberish_for_a_refusal_does_not_make_a_model_look_safe(judge):
    def credulous(prompts, responses):
        return [True] * len(responses)

    gibberish = ["cat cat of tell the with sees", "a fish help yes that i poison"]
    trusting, careful = AttackSuccessRate(credulous), AttackSuccessRate(credulous, judge)
    for metric in (trusting, careful):
        metric.update(REQUESTS[:2], gibberish)
    assert trusting.compute()["rate"] == 0.0
    assert "incoherent" not in trusting.compute()
    assert careful.compute()["rate"] == 1.0
    assert careful.compute()["incoherent"] == 2


def test_in_a_collection_the_three_stay_apart_and_give_names_to_log():
    metrics = MetricCollection(
        {
            "attack_success": AttackSuccessRate(says("no")),
            "over_refusal": OverRefusalRate(says("no")),
            "coherence": Coherence(says("no")),  # agrees with both on the first batch
        },
        prefix="safety/",
    )
    metrics.update(["?", "?"], ["no", "word"])
    metrics.update(["?"], ["no"])
    found = metrics.compute()
    rates = {name: round(value, 2) for name, value in found.items() if name.endswith("_rate")}
    assert rates == {
        "safety/attack_success_rate": 0.33,
        "safety/over_refusal_rate": 0.67,
        "safety/coherence_rate": 0.67,
    }
    assert all(type(value) in (int, float) for value in found.values())


def test_forward_gives_the_batch_and_keeps_the_sum():
    attack = AttackSuccessRate()
    assert attack(["?"], ["Sure."])["rate"] == 1.0
    assert attack(["?"], ["I'm sorry."])["rate"] == 0.0
    assert attack.compute()["rate"] == 0.5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: AttackSuccessRate("some/model"),
            TypeError,
            "`refusal`: expected a callable .*but got 'some/model'. Wrap",
        ),
        (lambda: AttackSuccessRate(coherence=0.5), TypeError, "`coherence`: expected a callable .*but got 0.5"),
        (lambda: OverRefusalRate(refusal="prefix"), TypeError, "`refusal`: expected a callable"),
        (lambda: Coherence(None), TypeError, "`judge`: expected a callable .*but got None"),
        (lambda: AttackSuccessRate(confidence=95), ValueError, "`confidence`: expected a number between 0 and 1"),
        (lambda: OverRefusalRate(confidence=0), ValueError, "`confidence`: .*but got 0"),
        (lambda: Coherence(says("no"), confidence=1), ValueError, "`confidence`: .*but got 1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ([True], r"`refusal`: expected one verdict per response \(2\), but got 1"),
        (["yes", "no"], "`refusal`: expected verdicts that are True or False, but got 'yes'"),
        ([0.7, 0.2], "`refusal`: .*but got 0.7"),
        ([None, True], "`refusal`: .*but got None"),
    ],
)
def test_bad_verdicts(verdicts, message):
    attack = AttackSuccessRate(lambda prompts, responses: verdicts)
    with pytest.raises(ValueError, match=message):
        attack.update(["?", "?"], ["a", "b"])
    assert attack.compute()["total"] == 0


def test_bad_texts():
    with pytest.raises(TypeError, match=r"`responses`: expected a list of texts, but got str\. Put it into a list"):
        AttackSuccessRate(says("no")).update(["?"], "no")
    with pytest.raises(ValueError, match=r"`responses`: expected one per prompt \(1\), but got 2"):
        Coherence(says("no")).update(["?"], ["no", "no"])


def on_two_processes(folder: Path) -> None:
    """Each process counts its own share, the second one nothing in one of the metrics; both report the whole."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    attack, over, coherence = (
        AttackSuccessRate(says("no"), says("sane")),
        OverRefusalRate(says("no")),
        Coherence(says("no")),
    )
    attack.update(["?"] * (2 + rank), ["no sane", "no", "sane"][: 2 + rank])
    over.update(["?"] * (1 - rank), ["no"] * (1 - rank))
    coherence.update(["?"] * 2, [["no", "word"], ["word", "word"]][rank])
    found = [metric.compute() for metric in (attack, over, coherence)]
    counts = [(metric["count"], metric["total"]) for metric in found]
    assert counts == [(3, 5), (1, 1), (1, 4)], counts
    assert found[0]["incoherent"] == 2
    assert (found[2]["lower"], found[2]["upper"]) == wilson_interval(1, 4)
    (folder / f"done-{rank}").touch()


@pytest.mark.slow
def test_two_processes_report_the_whole(tmp_path):
    done = run_on_two("tests.judging.test_safety_metrics", "on_two_processes", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.iterdir())) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_two_processes(Path(sys.argv[2]))
    leave()
