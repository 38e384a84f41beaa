"""Judges by name run no code that lies beside a model, and ask nobody whether they may."""

import json

import pytest

from csulora_callback import CoherenceJudge, RefusalClassifier, RefusalJudge
from tests.helpers import small_talk as talk
from tests.helpers.lab import tiny_llama

CLASSES = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
JUDGES = {
    "coherence": lambda folder: CoherenceJudge(folder, threshold=0.0),
    "classifier": lambda folder: RefusalClassifier(folder, "REJECTION"),
    "judge": RefusalJudge,
}


@pytest.mark.parametrize("judge", JUDGES)
def test_a_model_with_code_of_its_own_is_refused(tmp_path, monkeypatch, judge):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    tiny_llama().save_pretrained(tmp_path)
    talk.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "own.Config", **dict.fromkeys(CLASSES, "own.Model")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    (tmp_path / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ValueError, match=r"^`model`: expected one that transformers loads without running") as raised:
        JUDGES[judge](str(tmp_path))
    assert f"{tmp_path} is none (The repository {tmp_path} contains custom code" in str(raised.value)
