"""Refusal detectors: what the phrases match, what models by name say, and that a folder stands for a Hub id."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from csulora_callback import RefusalClassifier, RefusalJudge, RefusalPhrases
from tests.helpers import small_talk as talk


def refuses(response: str, mode: str = "prefix") -> bool:
    (verdict,) = RefusalPhrases(mode)(["?"], [response])
    return verdict


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but no.",
        "I’m sorry, but no.",  # ’
        "I‘m sorry, but no.",
        "I´m sorry, but no.",
        "  \n\tI'M SORRY",
        "**I'm sorry**, but no.",
        "# Sorry\n\nNo.",
        "> I *cannot*\ndo that.",
        '"I cannot do that."',
        "- I won't.",
        "[🔒SAFE] I can't do that.",
        "Assistant: I can't do that.",
        "Unfortunately, I am unable to do that.",
        "No, I cannot assist you.",
        "As an AI language model, I have no body.",
        "Ｉ ｃａｎｎｏｔ do that.",
    ],
)
def test_openings(response):
    assert refuses(response)
    assert refuses(response, "anywhere")


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   ",
        "Sure, here is how.",
        "I cannoteven",
        "Sorrysome people",
        "I can't wait to tell you!",
        "I can’t believe you asked!",
        "I cannot help but smile.",
        "The cat said that it was sorry.",
        "No.",
        "Assistant: sure.",
        "of teal vast the 7 gone",
    ],
)
def test_no_refusals(response):
    assert not refuses(response)
    assert not refuses(response, "anywhere")


@pytest.mark.parametrize(
    "response", ["Sure! On second thought, **I can’t** help with that.", "That goes against my guidelines."]
)
def test_in_the_middle(response):
    assert not refuses(response)
    assert refuses(response, "anywhere")


@given(st.text())
def test_any_text_has_a_verdict_and_anywhere_refuses_what_prefix_does(text):
    assert refuses(text, "anywhere") >= refuses(text)
    assert refuses(f"I'm sorry. {text}")


def test_long_junk_takes_no_time():
    for junk in ("[" * 100_000, "a:" * 100_000, "*" * 100_000, "i can't " * 20_000):
        refuses(junk, "anywhere")


def test_phrases_of_ones_own_replace_the_others():
    german = RefusalPhrases(phrases=["Ich kann’s nicht", "nein."])
    assert german(["?"] * 4, ["ICH KANN'S NICHT!", "Nein. Danke.", "I'm sorry", "Ach, nein."]) == [
        True,
        True,
        False,
        False,
    ]
    assert RefusalPhrases("anywhere", ["nein"])(["?"] * 2, ["Ach, nein.", "Neinsager"]) == [True, False]
    assert RefusalPhrases(phrases=["I can't wait"])(["?"], ["I can't wait."]) == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "suffix"}, "`mode`: expected 'prefix' or 'anywhere', but got 'suffix'"),
        ({"phrases": []}, r"`phrases`: expected a list of one or more texts .*but got \[\]"),
        ({"phrases": "sorry"}, "`phrases`: .*but got 'sorry'"),
        ({"phrases": ["sorry", " * "]}, "`phrases`: expected .* not empty"),
        ({"phrases": [3]}, r"`phrases`: .*but got \[3\]"),
    ],
)
def test_bad_phrases(arguments, message):
    with pytest.raises(ValueError, match=message):
        RefusalPhrases(**arguments)


def test_bad_texts():
    with pytest.raises(TypeError, match="`responses`: expected a list of texts, but got str"):
        RefusalPhrases()(["?"], "Sorry")
    with pytest.raises(TypeError, match="`prompts`: expected texts, but got NoneType at index 1"):
        RefusalPhrases()(["?", None], ["Sorry", "Sorry"])
    with pytest.raises(ValueError, match=r"`responses`: expected one per prompt \(1\), but got 2"):
        RefusalPhrases()(["?"], ["Sorry", "Sorry"])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny BERT that takes what begins with ``i`` for a refusal, in a folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(talk.WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        id2label={0: "NORMAL", 1: "REJECTION"},
        label2id={"NORMAL": 0, "REJECTION": 1},
    )
    model, words = BertForSequenceClassification(config), talk.tokenizer()
    words.model_max_length = 32
    texts = [talk.REFUSAL, *(talk.story(noun, "sees", "cat") for noun in talk.NOUNS)]
    batch = words(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = torch.tensor([1] + [0] * len(talk.NOUNS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return talk.saved(model, words, tmp_path_factory.mktemp("classifier"))


RESPONSES = [talk.REFUSAL, talk.story("dog", "sees", "fox"), talk.REFUSAL, talk.story("cat", "likes", "cat")]
PROMPTS = [talk.request("dog")] * len(RESPONSES)


def test_a_classifier_by_name(classifier):
    detector = RefusalClassifier(classifier, "REJECTION", batch_size=3)
    assert detector(PROMPTS, RESPONSES) == [True, False, True, False]
    opposite = RefusalClassifier(classifier, "NORMAL")
    assert opposite(PROMPTS, RESPONSES) == [False, True, False, True]
    assert detector([], []) == []
    assert len(detector(PROMPTS[:1], ["sure " * 1000])) == 1  # longer than the model takes


def test_a_classifier_can_read_the_prompt(classifier):
    detector = RefusalClassifier(classifier, "REJECTION", template="{prompt} {response}")
    assert detector([talk.REFUSAL, talk.story("dog", "sees", "fox")], ["{", "}"]) == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"refusal_label": "refusal"},
            r"`refusal_label`: expected one of .*\['NORMAL', 'REJECTION'\], but got 'refusal'",
        ),
        (
            {"refusal_label": "REJECTION", "template": "{answer}"},
            r"`template`: expected .* but got '{answer}'",
        ),
        ({"refusal_label": "REJECTION", "template": "{response} {"}, r"`template`: .*but got '{response} {'"),
    ],
)
def test_bad_arguments_of_a_classifier(classifier, arguments, message):
    with pytest.raises(ValueError, match=message):
        RefusalClassifier(classifier, **arguments)


def judge_folder(folder, with_chat: bool) -> str:
    """A tiny Llama that answers ``yes`` to a refusal and ``no`` to a story."""
    end = " ?" if with_chat else ""
    texts = [f"{talk.REFUSAL}{end} yes", *(f"{answer}{end} no" for _, answer in talk.stories(["dog"]))]
    texts += texts[:1] * len(texts)  # as many of both
    return talk.saved(talk.trained(texts, steps=80), talk.tokenizer(chat=with_chat), folder)


@pytest.mark.parametrize("with_chat", [True, False], ids=["chat template", "plain"])
def test_a_judge_by_name(tmp_path, with_chat, caplog):
    template = "{response}" if with_chat else "<bos> {response}"
    folder = judge_folder(tmp_path, with_chat)
    detector = RefusalJudge(folder, template=template, max_new_tokens=2, batch_size=3)
    with caplog.at_level(logging.WARNING, logger="csulora_callback"):
        assert detector(PROMPTS, RESPONSES) == [True, False, True, False]
    assert detector([], []) == []
    assert not caplog.records
    # The same model, asked where its answer never is: nothing counts as refused, and it says so.
    lost = RefusalJudge(folder, template=template, answer="refusal: (yes|no)", max_new_tokens=2)
    with caplog.at_level(logging.WARNING, logger="csulora_callback"):
        assert lost(PROMPTS, RESPONSES) == [False] * 4
    assert "4 of 4 answers" in caplog.text


def test_bad_arguments_of_a_judge():
    with pytest.raises(ValueError, match=r"`template`: expected .* but got '{prompt}'"):
        RefusalJudge("nowhere", template="{prompt}")
    with pytest.raises(ValueError, match=r"`answer`: expected a group, as in '\(yes\|no\)', but got 'yes'"):
        RefusalJudge("nowhere", answer="yes")
