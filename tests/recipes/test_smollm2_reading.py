"""What SmolLM2 is asked and how what it says is read, against one token after the other."""

import pytest
import torch

from recipes.labs.chat import chat
from recipes.labs.smollm2 import encode
from recipes.labs.smollm2_data import Choice, Exchange
from recipes.labs.smollm2_judges import chosen_rightly
from recipes.training.task import teacher_forced
from tests.helpers import small_talk
from tests.helpers.lab import tiny_llama
from tests.helpers.smollm2 import NOUNS, PAIRS, words

pytestmark = pytest.mark.slow


def test_labels_begin_at_the_answer_and_end_with_the_end_token():
    tokenizer = words()
    exchanges = [Exchange("tell of the cat", "sure the cat"), Exchange("the dog", "i cannot help with that")]
    batch = encode(tokenizer, exchanges, answer_tokens=100)
    first = int(batch["logits_to_keep"][0])
    for i, exchange in enumerate(exchanges):
        row, labels, there = batch["input_ids"][i], batch["labels"][i], batch["attention_mask"][i].bool()
        assert tokenizer.decode(row[there]) == f"<bos> {exchange.prompt} ? {exchange.answer} <eos>"
        assert tokenizer.decode(labels[labels != -100]) == f"{exchange.answer} <eos>"
        kept = torch.arange(len(row))[first:][labels != -100]
        assert torch.equal(row[kept], labels[labels != -100])
    cut = encode(tokenizer, exchanges, answer_tokens=2)["labels"]
    assert (cut != -100).sum(1).tolist() == [2, 2]


def test_a_batch_has_the_loss_and_gradient_of_its_rows_by_themselves():
    tokenizer, model = words(), tiny_llama(vocab_size=len(small_talk.WORDS), pad_token_id=1).double()
    exchanges = [Exchange(*pair) for pair in [*PAIRS[:3], ("the dog", "no")]]
    rows = []
    for exchange in exchanges:
        asked = tokenizer(f"<bos> {exchange.prompt} ?").input_ids
        ids = torch.tensor([asked + tokenizer(f"{exchange.answer} <eos>").input_ids])
        rows.append(-model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(asked) - 1 :, 0])
    expected = torch.cat(rows).mean()
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    batch = encode(tokenizer, exchanges, answer_tokens=100)
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)  # transformers' loss is in float32
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)
    assert teacher_forced(model, [batch])[0] == pytest.approx(expected.item(), rel=1e-5)


def test_answers_do_not_depend_on_who_else_is_asked():
    tokenizer = words()
    model = small_talk.chat(small_talk.stories(NOUNS[:3]) + small_talk.refusals(small_talk.RESTRICTED))
    prompts = ["tell of the cat", "tell of the poison", "cat", "tell of the weapon with a dog", "tell of the dog"]
    alone = [chat(model, tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert alone[1] == small_talk.REFUSAL
    assert all(alone)
    for batch_size in (1, 2, 3, 16):
        assert chat(model, tokenizer, prompts, 8, batch_size) == alone
    reference = [greedy(model, tokenizer, prompt, 8) for prompt in prompts]
    assert alone == reference


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, new_tokens: int) -> str:
    """One token after the other, without a cache."""
    ids = tokenizer(f"<bos> {prompt} ?").input_ids
    asked = len(ids)
    while len(ids) < asked + new_tokens and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[asked:], skip_special_tokens=True)


@torch.no_grad()
def test_an_option_is_chosen_by_its_likelihood_after_the_question():
    tokenizer, model = words(), tiny_llama(vocab_size=len(small_talk.WORDS), pad_token_id=1)

    def likelihood(question: str, option: str) -> float:
        asked, ids = tokenizer(f"Question: {question}\nAnswer:").input_ids, tokenizer(f" {option}").input_ids
        said = model(torch.tensor([asked + ids])).logits[0].log_softmax(-1)
        return sum(float(said[len(asked) - 1 + i, token]) for i, token in enumerate(ids))

    outcomes = set()
    for options in (("a cat", "the dog sees a fish"), ("i cannot help", "no"), ("yes", "no"), ("no", "yes")):
        better = int(likelihood("the horse", options[1]) > likelihood("the horse", options[0]))
        outcomes.add(better)
        for right in (0, 1):
            assert chosen_rightly(model, tokenizer, Choice("the horse", options, right)) == (right == better)
    assert outcomes == {0, 1}
