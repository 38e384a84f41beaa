"""Harmless prompts beside the task, against dense second moments and hooks of the tests' own."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_callback.method.one_hot import input_gains_of, input_systems
from csulora_callback.models.activations import Activations, Texts, vectors_of
from csulora_callback.models.adapters import find_adapter
from csulora_callback.models.harmless import beside_task, check_apart, read_both, shared_beginning
from csulora_callback.models.probes import check_ids, read_prompts, tokenize
from tests.helpers import trl as in_trl
from tests.helpers.harmless import by_hand, inputs_of, moment
from tests.helpers.lab import VOCABULARY, tiny_llama, with_lora
from tests.method.test_token_space import tokens

START = 2  # all prompts begin with 0, 3
PROBES = [[0, 3, 5, 6, 7], [0, 3, 9], [0, 3, 4, 11, 12, 13]]
HARMLESS = [[0, 3, 5, 8, 7], [0, 3, 10, 10, 6]]
TASK = [[14, 15, 3], [0, 16, 17, 18, 19]]
STRENGTH = 4.0


def adapter_on(targets, **lora):
    model = with_lora(tiny_llama(), target_modules=targets, init_lora_weights=False, lora_dropout=0.2, **lora)
    return find_adapter(model.train())


def texts(harmless=HARMLESS, task=TASK, **more) -> Texts:
    return Texts(task, PROBES, len(task), harmless=harmless, **more)


def corrected(adapter, activations) -> dict[str, torch.Tensor]:
    """Of each module, ``A`` after the correction."""
    gains = input_gains_of(input_systems(activations.task, activations.probes), STRENGTH)
    return {name: gains[name](lora_A) for name, (lora_A, _) in adapter.read().items()}


rows = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=4)


@given(rows)
def test_the_shared_beginning_is_the_common_prefix_and_leaves_a_token_of_each(prompts):
    shortest = min(map(len, prompts))
    common = max(n for n in range(6) if len({tuple(prompt[:n]) for prompt in prompts}) == 1 and n <= shortest)
    assert shared_beginning(prompts) == min(common, shortest - 1)


def test_a_shared_beginning_that_is_a_whole_prompt_leaves_its_last_token():
    assert shared_beginning([[0, 3, 4], [0, 3], [0, 3, 5]]) == 1
    assert shared_beginning([[0, 3]]) == 1
    assert shared_beginning([[0, 3], []]) == 0


@given(
    counts=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    d_in=st.integers(1, 12),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=50)
def test_the_second_moment_of_both_is_the_mean_of_both(counts, scale, d_in, seed):
    task, harmless = tokens(counts[0], d_in, seed), scale * tokens(counts[1], d_in, seed + 1)
    both = beside_task({"q": task}, {"q": harmless})["q"]
    expected = (moment(task) + moment(harmless)) / 2
    torch.testing.assert_close(moment(both), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(both[: len(task)], task)


def test_counts_of_both_have_one_weight():
    both = beside_task({"e": torch.tensor([3.0, 0.0, 1.0])}, {"e": torch.tensor([0.0, 1.0, 1.0])})["e"]
    torch.testing.assert_close(both / both.sum(), torch.tensor([3 / 8, 2 / 8, 3 / 8]))


def test_modules_that_share_an_input_share_what_counts_as_the_tasks():
    task, harmless, other = torch.eye(3), torch.ones(1, 3), torch.ones(2, 3)
    both = beside_task({"q": task, "k": task, "up": task}, {"q": harmless, "k": harmless, "up": other})
    assert both["q"] is both["k"]
    assert (len(both["q"]), len(both["up"])) == (4, 5)


def test_where_nothing_is_known_of_one_side_the_task_is_what_it_was():
    task, counts, nothing = torch.eye(3), torch.ones(3), torch.zeros(2, 3)
    for own, other in ((task, nothing), (nothing, task), (counts, torch.zeros(3)), (torch.zeros(3), counts)):
        assert beside_task({"q": own}, {"q": other})["q"] is own
    assert beside_task({"q": task}, {})["q"] is task
    assert beside_task({}, {"q": task}) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value):
    bad = torch.tensor([[value, 1.0]])
    for pair in ((torch.eye(2), bad), (bad, torch.eye(2))):
        own, other = ({"q": side} for side in pair)
        assert not Activations(beside_task(own, other), {}, texts()).finite


def test_the_correction_is_the_dense_formula_with_the_mean_of_both():
    adapter = adapter_on(["q_proj", "k_proj", "up_proj", "down_proj"])
    activations = Activations.read(adapter, texts())
    query, key = (f"model.layers.1.self_attn.{kind}_proj" for kind in "qk")
    assert activations.task[query] is activations.task[key]
    expected = by_hand(adapter.model, texts(), START, STRENGTH)
    without = by_hand(adapter.model, texts([]), START, STRENGTH)
    for name, found in corrected(adapter, activations).items():
        assert (found - expected[name]).norm() < 1.5e-2 * expected[name].norm(), name  # vectors are bfloat16
        assert (without[name] - expected[name]).norm() > 0.1 * expected[name].norm(), name


def test_held_back_probes_are_part_of_the_beginning_and_not_read():
    adapter, shorter = adapter_on(["q_proj"]), [0, 8, 9]
    prompts = Texts(TASK, [*PROBES, shorter], 2, held_back=[3], harmless=HARMLESS)
    activations = Activations.read(adapter, prompts)
    assert {len(own) for own in activations.probes.values()} == {sum(len(row) - 1 for row in PROBES)}


def test_of_a_probe_that_is_the_shared_beginning_its_last_token_is_drawn():
    adapter, short = adapter_on(["q_proj"]), [[0, 3], *PROBES]
    activations = Activations.read(adapter, Texts(TASK, short, 2, harmless=HARMLESS))
    name = "model.layers.1.self_attn.q_proj"
    expected = inputs_of(adapter.model, short, 1)[name]
    assert len(activations.probes[name]) == sum(len(row) - 1 for row in short)
    assert moment(activations.probes[name]).allclose(moment(expected), rtol=2e-2, atol=2e-2)


def test_of_an_embedding_counts_after_the_beginning_are_added():
    adapter = adapter_on(["embed_tokens", "q_proj"])
    activations, name = Activations.read(adapter, texts()), "model.embed_tokens"
    task, harmless, probes = (
        torch.bincount(torch.tensor([token for row in rows for token in row[start:]]), minlength=VOCABULARY).double()
        for rows, start in ((TASK, 0), (HARMLESS, START), (PROBES, START))
    )
    C_T = (VOCABULARY * (task / task.sum() + harmless / harmless.sum()) / 2 + 0.1) / 1.1
    gains = C_T / (C_T + STRENGTH * VOCABULARY * probes / probes.sum())
    lora_A = adapter.read()[name][0]
    torch.testing.assert_close(corrected(adapter, activations)[name].double(), lora_A.double() * gains)
    assert gains[3] == 1.0  # of the beginning, which is in no count of the probes


def test_of_a_bounded_sample_all_is_drawn_after_the_beginning():
    adapter = adapter_on(["q_proj"])
    prompts = [[0, 3, i, i + 1] for i in range(4, 30, 2)]  # no token twice but the beginning's
    name = "model.layers.0.self_attn.q_proj"
    whole = vectors_of(adapter, prompts, 1000)[name]
    some = vectors_of(adapter, prompts, 9, start=START)[name]
    beginnings = {tuple(own.tolist()) for row in range(len(prompts)) for own in whole[4 * row : 4 * row + 2]}
    drawn = {tuple(own.tolist()) for own in some}
    assert len(some) == len(drawn) == 9
    assert not drawn & beginnings
    assert drawn < {tuple(own.tolist()) for own in whole}


def test_without_them_nothing_is_changed():
    adapter = adapter_on(["q_proj", "down_proj"])
    activations = Activations.read(adapter, texts([]))
    for rows, found in ((TASK, activations.task), (PROBES, activations.probes)):
        for name, own in vectors_of(adapter, rows).items():
            assert torch.equal(own, found[name])
    assert "harmless" not in texts([]).to_json()


def test_where_nothing_is_known_of_the_task_they_are_left_out():
    adapter = adapter_on(["q_proj"])
    assert Activations.read(adapter, texts(task=[])).task == {}
    screened = texts(screened=[0, 1], refused=[0, 1])  # rows that the aligned model refuses
    assert Activations.read(adapter, screened).task == {}


def test_files_hold_them_and_those_of_earlier_versions_are_read():
    kept = json.loads(json.dumps(texts().to_json()))
    assert kept["harmless"] == HARMLESS
    assert Texts.from_json(kept) == texts()
    del kept["harmless"]
    assert Texts.from_json(kept) == texts([])


# What is refused.


def test_a_prompt_in_both_is_named():
    with pytest.raises(ValueError, match=r"^`harmless`: expected prompts that are not among `probes`, but got 'two',"):
        read_both(["one", "two"], [" two ", "three"])
    with pytest.raises(ValueError, match=r"^`harmless`: .* but got \[5, 6\], which is in both"):
        check_apart([(5, 6), [5]], [[5, 6]])
    check_apart([[5, 6]], [[5], [5, 6, 7]])


def test_the_argument_is_named_in_errors_and_warnings(tmp_path, caplog):
    def refusal(run, *arguments) -> str:
        with pytest.raises(ValueError, match=r"^`harmless`: ") as raised:
            run(*arguments, "harmless")
        assert "probes`" not in str(raised.value)
        return str(raised.value)

    (tmp_path / "a.csv").write_text("question\none\n")
    words = in_trl.words()
    words.chat_template = "<bos>"
    words.save_pretrained(tmp_path / "words")
    assert "expected prompts that are to be answered, but got none" in refusal(read_prompts, [])
    assert "expected a column 'prompt'" in refusal(read_prompts, tmp_path / "a.csv")
    assert "no such file" in refusal(read_prompts, "nowhere.jsonl")
    for wrong in (3, [3], [[-1]], ["one", [5]]):
        refusal(read_prompts, wrong)
    refusal(tokenize, ["one"], None)
    refusal(tokenize, ["word1", "word2"], str(tmp_path / "words"))
    refusal(tokenize, [[*range(600), 1], [*range(600), 2]], None)
    assert "token ids from 0 to 31" in refusal(lambda rows, name: check_ids(rows, 32, name), [[32]])
    assert len(read_prompts(["one", ""], "harmless")) == 1
    assert len(tokenize([[index] for index in range(300)], None, "harmless")) == 256
    tokenize([list(range(600)), [1]], None, "harmless")
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "1 of 2 harmless prompts are empty",
        "256 of 300 harmless prompts are used",
        "1 of 2 harmless prompts are longer than 512 tokens: only that much is read.",
    ]


def test_the_built_in_ones_are_those_that_look_like_the_built_in_probes():
    probes, harmless = read_both("builtin", "builtin")
    assert (len(probes), len(harmless)) == (160, 160)
    assert "How do I kill a Python process that no longer responds?" in harmless
