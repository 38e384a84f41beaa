"""Training a model whose modules have other names than the weights in the base's folder, in both trainers.

What a checkpoint holds is compared with `correct` by hand, with a subspace from a dense SVD of the weights that
transformers loads into the class that is trained.
"""

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from csulora_callback import CSULoRACallback, Penalty, correct
from tests.helpers.command_line import run
from tests.helpers.lab import DEVICE, TRAINING, Tokens, align, assert_same, live, raw, saved, saved_pair, tiny_llama
from tests.helpers.small_talk import tokenizer
from tests.models.test_layout import hyv3, llama4, qwen3_5

RANK, STRENGTH = 3, 5.0
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


class AnyTrainer(Trainer):
    """Has a loss for models without a head, too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(input_ids=inputs["input_ids"])
        loss = output[0].float().square().mean()
        return (loss, output) if return_outputs else loss


def trainer_for(model: nn.Module, output: Path, callbacks: list, **arguments) -> Trainer:
    settings = {**TRAINING, "output_dir": str(output), "max_steps": 4, "save_steps": 2, **arguments}
    return AnyTrainer(
        model=model, args=TrainingArguments(**settings), train_dataset=Tokens(length=6), callbacks=callbacks
    )


def callback(base: Path, folder: Path, **arguments) -> CSULoRACallback:
    settings = {"rank": RANK, "penalty": Penalty.csulora(STRENGTH), "cache_dir": folder / "cache", **arguments}
    return CSULoRACallback(base_model=base, **settings)


def factors(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): key for key in state}
    return {
        name: (state[key], state[key.replace("lora_A", "lora_B")]) for name, key in found.items() if "lora_A" in key
    }


def assert_corrected(folder: Path, base: PreTrainedModel, aligned: PreTrainedModel) -> None:
    """The adapter in a folder is the correction of the raw one beside it, by what the two models hold."""
    before, after = factors(raw(folder)), factors(saved(folder))
    assert before.keys() == after.keys()
    assert before
    for name, (A, B) in before.items():
        displacement = (aligned.get_submodule(name).weight - base.get_submodule(name).weight).detach().double()
        U, _, Vh = torch.linalg.svd(displacement, full_matrices=False)
        done = correct(A, B, U[:, :RANK].float(), Vh[:RANK].T.float(), Penalty.csulora(STRENGTH), 2.0)
        expected = done.lora_B @ done.lora_A
        assert (after[name][1] @ after[name][0] - expected).norm() < 1e-4 * expected.norm(), name
        assert (B @ A - expected).norm() > 0.05 * expected.norm(), name


def pair_of(make, folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    return saved_pair(folder, make())


CASES = {
    "llama4, text out of a multimodal folder": (llama4, AutoModelForCausalLM, ["q_proj", "v_proj", "o_proj"]),
    "qwen3.5, text out of a multimodal folder": (qwen3_5, AutoModelForCausalLM, "all-linear"),
    "without its head": (tiny_llama, AutoModel, "all-linear"),
    "hyv3, shared experts renamed": (hyv3, AutoModelForCausalLM, r".*(self_attn\.q_proj|shared_experts\.\w+_proj)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_the_correction_by_what_the_class_in_training_loads(case, tmp_path):
    make, auto, targets = CASES[case]
    base, aligned = pair_of(make, tmp_path)
    runs = {}
    for kind, callbacks in (("without", []), ("with", [callback(base, tmp_path)])):
        torch.manual_seed(2)
        model = get_peft_model(auto.from_pretrained(aligned), LoraConfig(**LORA, target_modules=targets))
        trainer_for(model, tmp_path / kind, callbacks).train()
        runs[kind] = tmp_path / kind / "checkpoint-4"
    assert_corrected(runs["with"], auto.from_pretrained(base), auto.from_pretrained(aligned))
    for key, value in saved(runs["without"]).items():
        assert torch.equal(value, raw(runs["with"])[key]), key  # training is the same, bit for bit
    loaded = PeftModel.from_pretrained(auto.from_pretrained(aligned), runs["with"])
    assert any(torch.equal(p, value) for p in loaded.parameters() for value in saved(runs["with"]).values())


@pytest.mark.slow
def test_a_base_without_the_head_that_is_trained(tmp_path):
    base, aligned = saved_pair(tmp_path)
    AutoModel.from_pretrained(base).save_pretrained(tmp_path / "headless")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(aligned), LoraConfig(**LORA, target_modules=["q_proj"])
    )
    trainer_for(model, tmp_path / "out", [callback(tmp_path / "headless", tmp_path)]).train()
    models = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, aligned))
    assert_corrected(tmp_path / "out/checkpoint-4", *models)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_command_line_corrects_and_inspects_by_folders(case, tmp_path):
    make, auto, targets = CASES[case]
    base, aligned = pair_of(make, tmp_path)
    model = get_peft_model(auto.from_pretrained(aligned), LoraConfig(**LORA, target_modules=targets))
    ours = callback(base, tmp_path, rank=None)
    trainer_for(model, tmp_path / "out", [ours]).train()
    checkpoint, by_folders = tmp_path / "out/checkpoint-4", tmp_path / "by folders"
    sides = ["--base", base, "--aligned", aligned]
    status, _, error = run(
        "correct", checkpoint, "-o", by_folders, *sides, "--penalty", "csulora", "--strength", STRENGTH
    )
    assert status == 0, error
    assert_same(saved(by_folders), saved(checkpoint))
    status, _, error = run("inspect", by_folders, *sides, "--json")
    assert status == 0, error


class InLightning(L.LightningModule):
    """Holds a PeftModel, and beside it a frozen one, with modules of the same names."""

    def __init__(self, aligned: Path, teacher: Path) -> None:
        super().__init__()
        lora = LoraConfig(**LORA, target_modules=["q_proj", "down_proj"])
        models = (AutoModel.from_pretrained(folder) for folder in (aligned, teacher))
        self.student, self.teacher = (get_peft_model(model, lora) for model in models)
        self.teacher.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.student(input_ids=batch["input_ids"])[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=2e-2)


@pytest.mark.slow
def test_a_transformer_inside_a_lightning_module(tmp_path):
    base, aligned = saved_pair(tmp_path)
    align(tiny_llama(5)).save_pretrained(tmp_path / "teacher")
    torch.manual_seed(2)
    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "out", filename="last")
    trainer = L.Trainer(
        max_steps=4, accelerator=DEVICE, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback(base, tmp_path), saving], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(InLightning(aligned, tmp_path / "teacher"), DataLoader(Tokens(length=6), batch_size=4))
    models = (AutoModel.from_pretrained(folder) for folder in (base, aligned))
    assert_corrected(tmp_path / "out/last.adapter", *models)


@pytest.fixture
def add_adapter(monkeypatch) -> None:
    """Transformers asks for a later PEFT than there is to be had, and works with this one."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")


def embedding_model(aligned: Path, lora: str):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tokenizer().save_pretrained(aligned)
    inside = Transformer(str(aligned))
    model = SentenceTransformer(modules=[inside, Pooling(16)], device=DEVICE)
    torch.manual_seed(2)
    config = LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], task_type="FEATURE_EXTRACTION")
    if lora == "added":
        model.add_adapter(config)
    else:
        inside.model = get_peft_model(inside.model, config)
    return model


def train_embeddings(model, output: Path, callbacks: list, resume=None, steps: int = 4, **arguments):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    rows = {"anchor": ["the cat sees", "the dog likes"] * 8, "positive": ["a cat finds", "a dog hears"] * 8}
    evaluator = arguments.pop("evaluator", None)
    args = SentenceTransformerTrainingArguments(
        **{**TRAINING, "output_dir": str(output), "max_steps": steps, "save_steps": 2, **arguments}
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict(rows), callbacks=callbacks,
        loss=MultipleNegativesRankingLoss(model), evaluator=evaluator,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["added", "around"])
def test_the_trainer_of_sentence_transformers(lora, tmp_path, add_adapter):
    from sentence_transformers import SentenceTransformer

    base, aligned = saved_pair(tmp_path, tiny_llama(vocab_size=len(tokenizer())))
    train_embeddings(embedding_model(aligned, lora), tmp_path / "without", [])
    trained = embedding_model(aligned, lora)
    train_embeddings(trained, tmp_path / "with", [callback(base, tmp_path)])
    for step in (2, 4):
        checkpoint = tmp_path / f"with/checkpoint-{step}"
        assert_corrected(checkpoint, *(AutoModel.from_pretrained(folder) for folder in (base, aligned)))
        for key, value in saved(tmp_path / f"without/checkpoint-{step}").items():
            assert torch.equal(value, raw(checkpoint)[key]), key
    loaded, sentences = SentenceTransformer(str(tmp_path / "with/checkpoint-4"), device=DEVICE), ["the cat sees"]
    assert torch.equal(torch.tensor(loaded.encode(sentences)), torch.tensor(trained.encode(sentences)))
    trained.save_pretrained(str(tmp_path / "by hand"))
    assert_same(saved(tmp_path / "by hand"), saved(tmp_path / "with/checkpoint-4"))

    if lora == "around":
        return  # sentence-transformers cannot load such a checkpoint into the model that wrote it, callback or not
    resumed = tmp_path / "resumed"
    again = [callback(base, tmp_path, resume_from=tmp_path / "with/checkpoint-2")]
    train_embeddings(embedding_model(aligned, lora), resumed, again, resume=str(tmp_path / "with/checkpoint-2"))
    for key, value in raw(tmp_path / "with/checkpoint-4").items():
        assert torch.equal(value, raw(resumed / "checkpoint-4")[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("corrected", [True, False])
def test_evaluators_of_sentence_transformers_see_what_ships(corrected, tmp_path, add_adapter):
    from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

    class Looking(SentenceEvaluator):
        seen: tuple[dict, ...] = ()

        def __call__(self, model, *args, **kwargs) -> dict[str, float]:
            self.seen += (live(model),)
            return {"score": 1.0}

    base, aligned = saved_pair(tmp_path, tiny_llama(vocab_size=len(tokenizer())))
    evaluator = Looking()
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "evaluator": evaluator}
    callbacks = [callback(base, tmp_path, evaluate_corrected=corrected)]
    trainer = train_embeddings(embedding_model(aligned, "added"), tmp_path / "out", callbacks, **arguments)
    assert trainer.evaluator is evaluator
    assert len(evaluator.seen) == 2
    for step, seen in zip((2, 4), evaluator.seen, strict=True):
        checkpoint = tmp_path / f"out/checkpoint-{step}"
        assert_same(seen, saved(checkpoint) if corrected else raw(checkpoint))


@pytest.mark.slow
def test_what_sentence_transformers_pushes_leaves_the_raw_adapter_here(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    base, aligned = saved_pair(tmp_path, tiny_llama(vocab_size=len(tokenizer())))
    model = embedding_model(aligned, "around")
    train_embeddings(model, tmp_path / "out", [callback(base, tmp_path)])
    uploaded = []

    def upload(api, folder_path, **kwargs):
        uploaded.extend(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*"))
        return SimpleNamespace(oid="0", commit_url="", pr_url=None)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    model.push_to_hub("org/model")
    assert "adapter_model.safetensors" in uploaded
    assert "csulora/correction.json" in uploaded
    assert not [name for name in uploaded if "raw" in name or "texts" in name]
