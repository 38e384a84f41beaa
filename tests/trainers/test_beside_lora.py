"""What is trained beside LoRA: corrected whole where the aligned model has it, passed and listed where it is new."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter, restore_adapter
from csulora_callback.adapter_source import read_states
from csulora_callback.checked_probes import check_readable
from csulora_callback.models.adapters import find_adapter
from csulora_callback.sidecar import Sidecar
from tests.helpers.beside import by_hand, key, saved
from tests.helpers.huggingface import callback, losses
from tests.helpers.lab import (
    PENALTY,
    RANK,
    TARGETS,
    VOCABULARY,
    Tokens,
    assert_same,
    make_trainer,
    raw,
    saved_pair,
    tiny_llama,
    with_lora,
)

NEW = 4  # tokens that a user adds
EMBEDDINGS = ["model.embed_tokens", "lm_head"]
SIDED = Penalty.table(aligned=0.25, output=4.0, input=0.5, off=1.0)  # tells an output side from an input side
slow = pytest.mark.slow


def model_of(pair, resize=0, **lora) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    if resize:
        torch.manual_seed(5)
        model.resize_token_embeddings(VOCABULARY + resize, mean_resizing=False)
    return with_lora(model, lora_dropout=0.1, **lora)


def run(pair, output: Path, callbacks: list, resume=None, steps=8, **model):
    trainer = make_trainer(model_of(pair, **model), output, callbacks, max_steps=steps)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


WHOLE = {
    "lm_head": ({}, {"modules_to_save": ["lm_head"]}, ["lm_head"]),
    "both": ({}, {"modules_to_save": ["lm_head", "embed_tokens"]}, EMBEDDINGS),
    "both, resized": ({}, {"resize": NEW, "modules_to_save": ["lm_head", "embed_tokens"]}, EMBEDDINGS),
    "lm_head of a tied model": ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}, ["lm_head"]),
    "tied": (
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ["model.embed_tokens"],
    ),
    "tied, resized": (
        {"tie_word_embeddings": True},
        {"resize": NEW, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        ["model.embed_tokens"],
    ),
    "new tokens, as TRL asks for them": (
        {},
        {"resize": NEW, "trainable_token_indices": {"embed_tokens": [32, 35]}, "modules_to_save": ["lm_head"]},
        ["lm_head"],
    ),
}
FAST = ("both, resized",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else slow) for case in WHOLE])
def test_embeddings_are_corrected_whole(tmp_path, case):
    sizes, model, wholes = WHOLE[case]
    pair = saved_pair(tmp_path, tiny_llama(**sizes))
    without = run(pair, tmp_path / "without", [], **model)
    with_it = run(pair, tmp_path / "with", [callback(pair, penalty=SIDED)], **model)
    assert losses(with_it) == losses(without)

    checkpoint, plain = tmp_path / "with/checkpoint-8", tmp_path / "without/checkpoint-8"
    assert_same(raw(checkpoint), saved(plain))
    written, trained = saved(checkpoint), saved(plain)
    for name in wholes:
        expected = by_hand(name, trained[key(name)], pair, SIDED)
        torch.testing.assert_close(written[key(name)].double(), expected, atol=2e-6, rtol=0)
        assert not torch.allclose(written[key(name)][:VOCABULARY], trained[key(name)][:VOCABULARY], atol=1e-3)
        assert torch.equal(written[key(name)][VOCABULARY:], trained[key(name)][VOCABULARY:])
    if model.get("ensure_weight_tying"):
        assert torch.equal(written[key("lm_head")], written[key("model.embed_tokens")])
    for other in written:  # under whatever other key PEFT writes a trained weight, it is the same
        if ".modules_to_save." in other:
            assert torch.equal(written[other], written[other.replace(".modules_to_save.", ".")])
    record = Sidecar.load(checkpoint).record
    assert set(wholes) == {name for name in record["modules"] if "layers" not in name}
    listed = {f"{name}, rows 32 to 35" for name in wholes if "resize" in model}
    listed |= {"model.embed_tokens"} if "trainable_token_indices" in model else set()
    assert set(record.get("not_corrected", {})) == listed

    covered = [*TARGETS, *wholes]
    subspace = SafetySubspace.estimate(*pair, target_modules=covered, rank=RANK, progress=False)
    for source, output in ((plain, "post hoc"), (checkpoint, "again")):
        done = correct_adapter(source, subspace, tmp_path / output, SIDED)
        assert done.record.get("not_corrected") == record.get("not_corrected")
        assert_same(saved(tmp_path / output), written)
    restore_adapter(checkpoint, tmp_path / "restored")
    assert_same(saved(tmp_path / "restored"), trained)

    with_it.model.save_pretrained(tmp_path / "by hand")  # after training, whatever remains of the run writes it, too
    assert_same(saved(tmp_path / "by hand"), written)
    assert_same(raw(tmp_path / "by hand"), trained)
    base = AutoModelForCausalLM.from_pretrained(pair[1])
    if "resize" in model:
        base.resize_token_embeddings(VOCABULARY + NEW)
    loaded = PeftModel.from_pretrained(base, checkpoint).eval()
    ids = torch.arange(3, VOCABULARY + model.get("resize", 0))[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, with_it.model.eval()(ids).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["both", "tied"])
def test_what_is_evaluated_is_what_ships(tmp_path, case):
    sizes, model, _ = WHOLE[case]
    pair = saved_pair(tmp_path, tiny_llama(**sizes))
    evaluating = {"eval_strategy": "steps", "eval_steps": 4}
    trainers = []
    for name, callbacks in (("without", []), ("with", [callback(pair)])):
        trainers.append(make_trainer(model_of(pair, **model), tmp_path / name, callbacks, **evaluating))
        trainers[-1].train()
    assert losses(trainers[1]) == losses(trainers[0])
    without, seen = (
        {record["step"]: record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record}
        for trainer in trainers
    )
    for step in (4, 8):
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(pair[1]), tmp_path / f"with/checkpoint-{step}"
        )
        found = make_trainer(loaded, tmp_path / "loaded").evaluate()["eval_loss"]
        assert seen[step] == pytest.approx(found, abs=1e-6)
        assert abs(seen[step] - without[step]) > 1e-4


def test_without_the_adapter_the_model_is_the_aligned_one(pair):
    model = model_of(pair, resize=NEW, modules_to_save=["lm_head"], trainable_token_indices=[33]).eval()
    aligned = AutoModelForCausalLM.from_pretrained(pair[1]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    adapter, ids = find_adapter(model), torch.arange(3, 12)[None]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad(), adapter.off():
        assert torch.equal(model(ids).logits[..., :VOCABULARY], aligned(ids).logits)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits[..., :VOCABULARY], aligned(ids).logits, atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["both", "tied, resized"])
def test_resuming_is_exact(tmp_path, case):
    sizes, model, _ = WHOLE[case]
    pair = saved_pair(tmp_path, tiny_llama(**sizes))
    whole = run(pair, tmp_path / "whole", [callback(pair)], **model)
    first = run(pair, tmp_path / "parts", [callback(pair)], steps=8, **model)
    assert losses(first) == losses(whole)
    for later in (tmp_path / "parts").glob("checkpoint-8"):
        later.rename(tmp_path / "later")
    resumed = run(pair, tmp_path / "parts", [callback(pair)], resume=str(tmp_path / "parts/checkpoint-4"), **model)
    assert losses(resumed) == losses(whole)
    for folder in ("", "csulora/raw/"):
        ends = (saved(tmp_path / run / "checkpoint-8" / folder) for run in ("whole", "parts"))
        assert_same(*ends)


LOADING = """
import sys, torch
from peft import PeftModel
from transformers import {kind}
model = {kind}.from_pretrained(sys.argv[1], **{options})
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 12)[None]).logits, sys.argv[3])
"""


def loaded_elsewhere(kind: type, pair, checkpoint: Path, output: Path, **options) -> torch.Tensor:
    """What the checkpoint answers in another process, that knows nothing of us."""
    code = LOADING.format(kind=kind.__name__, options=options)
    subprocess.run([sys.executable, "-c", code, *map(str, (pair[1], checkpoint, output))], check=True, timeout=120)
    return torch.load(output)


class Labelled(Tokens):
    """The token sequences with a label for each, or for each of their tokens."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each = each

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.tokens[index]
        return {"input_ids": ids, "labels": ids % 3 if self.each else ids[0] % 3}


HEADS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


@pytest.mark.slow
@pytest.mark.parametrize("task", HEADS)
def test_new_heads_pass_and_are_listed(pair, tmp_path, task, capsys):
    def train(output: Path, callbacks: list):
        torch.manual_seed(6)
        model = with_lora(HEADS[task].from_pretrained(pair[1], num_labels=3), task_type=task)
        trainer = make_trainer(model, output, callbacks)
        trainer.train_dataset = Labelled(each=task == "TOKEN_CLS")
        trainer.train()
        return trainer

    without, with_it = train(tmp_path / "without", []), train(tmp_path / "with", [callback(pair)])
    assert losses(with_it) == losses(without)
    checkpoint, plain = tmp_path / "with/checkpoint-8", tmp_path / "without/checkpoint-8"
    written, trained = saved(checkpoint), saved(plain)
    assert_same(raw(checkpoint), trained)
    assert {k: bool(written[k].equal(trained[k])) for k in written} == {k: "lora_" not in k for k in written}
    why = "new: the aligned checkpoint has no such module"
    assert json.loads((checkpoint / "csulora/correction.json").read_text())["not_corrected"] == {"score": why}
    assert f"| trained and not corrected | score ({why}) |" in (checkpoint / "README.md").read_text()
    assert "score (new: the aligned" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    subspace = SafetySubspace.estimate(*pair, target_modules=TARGETS, rank=RANK, progress=False)
    done = correct_adapter(plain, subspace, tmp_path / "post hoc", PENALTY)
    assert done.record["not_corrected"] == {"score": why}
    assert_same(saved(tmp_path / "post hoc"), written)
    if task == "SEQ_CLS":
        return
    answers = loaded_elsewhere(HEADS[task], pair, checkpoint, tmp_path / "logits", num_labels=3)
    with torch.no_grad():
        assert torch.equal(answers, with_it.model.eval()(torch.arange(3, 12)[None]).logits)


REFUSED = {
    "a token that the aligned model has": (
        {"trainable_token_indices": [3, 4]},
        ["module 'model.embed_tokens': trainable_token_indices of tokens that the aligned model has (such as 3; 2 "],
        "model.embed_tokens",
    ),
    "layer norms": (
        {"modules_to_save": ["model.norm"]},
        ["module 'model.norm': modules_to_save of a module with weight, which"],
        "model.norm",
    ),
    "a layer whose weight the checkpoint has in another shape": (
        {"modules_to_save": ["layers.0.mlp.up_proj"]},
        ["module 'model.layers.0.mlp.up_proj': modules_to_save of a weight that is (24, 16) in", "and (20, 16) in"],
        "up_proj",
    ),
    "biases": ({"bias": "all"}, ["self_attn.q_proj.bias': a bias that is trained"], "bias"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_corrected_is_refused_unless_named(pair, tmp_path, kind):
    lora, parts, name = REFUSED[kind]
    model = AutoModelForCausalLM.from_pretrained(pair[1], attention_bias=True)
    if "another shape" in kind:
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 20, bias=False)
    model = with_lora(model, **lora)
    with pytest.raises(ValueError, match="is not skipped in silence") as raised:
        find_adapter(model)
    for part in (*parts, "Or let it pass as it is trained, listed as not corrected: uncorrected=["):
        assert part in str(raised.value)
    passing = find_adapter(model, uncorrected=[name]).passing
    assert passing
    assert set(passing.values()) == {"named in `uncorrected`"}
    with pytest.raises(ValueError, match="`uncorrected`: expected names of what is trained beside LoRA, but 'q_proj'"):
        find_adapter(model, uncorrected=[name, "q_proj"])


def test_nothing_is_measured_against_a_model_that_is_trained_in_place(pair):
    """Without its adapter it is not the aligned model, whose refusals `probes` are held against."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    check_readable(find_adapter(model), reads=False)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    adapter = find_adapter(model, uncorrected=["model.norm"])
    with pytest.raises(ValueError, match=r"`probes`: expected that .* but 'model\.norm\.weight', which passes by"):
        check_readable(adapter, reads=False)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight'"), adapter.off():
        pass


@pytest.mark.slow
def test_what_passes_and_is_not_saved_is_no_reason_not_to_look_at_a_checkpoint(pair, tmp_path):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    model.base_model.model.model.norm.weight.requires_grad_(True)  # which PEFT does not save
    trainer = make_trainer(model, tmp_path, [callback(pair, uncorrected=["model.norm"])], max_steps=2, save_steps=2)
    trainer.train()
    _, states, record = read_states(tmp_path / "checkpoint-2")
    assert list(record["not_corrected"]) == ["model.norm.weight"]
    assert set(states) == {"raw", "corrected"}


def test_names_that_match_nothing(pair, tmp_path):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
    trainer = make_trainer(model, tmp_path, [callback(pair, uncorrected=["score"])])
    with pytest.raises(ValueError, match="but 'score' matches nothing; there is nothing trained beside it"):
        trainer.train()
    with pytest.raises(ValueError, match="`uncorrected`: expected a list of names, but got 'score'"):
        CSULoRACallback(base_model=pair[0], uncorrected="score")


def test_an_embedding_has_no_vectors_to_measure_by(pair, tmp_path):
    model = model_of(pair, modules_to_save=["embed_tokens"])
    arguments = {"penalty": Penalty.data_aware(4.0), "probes": [[5, 6], [7, 8]] * 8}
    trainer = make_trainer(model, tmp_path, [callback(pair, **arguments)])
    with pytest.raises(ValueError, match=r"module 'model\.embed_tokens': a data-aware penalty cannot measure"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
