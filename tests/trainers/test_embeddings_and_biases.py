"""LoRA on embeddings and ``lora_bias=True`` in real trainers: trained as without the callback, corrected where saved.

Checkpoints are compared with a dense float64 computation: projectors from a full SVD of weights that transformers
loads, updates as PEFT merges them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct_adapter
from csulora_callback.sidecar import Sidecar
from tests.helpers import lightning as in_lightning
from tests.helpers.dense import STRENGTH, closest, displacement_of, matrices, updates
from tests.helpers.huggingface import losses
from tests.helpers.lab import (
    DEVICE,
    VOCABULARY,
    Tokens,
    assert_same,
    make_trainer,
    raw,
    saved,
    saved_pair,
    tiny_gpt2,
    tiny_llama,
    with_biases,
    with_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of tied weights and of embeddings that are saved

RANK, LORA_RANK = 3, 4
PENALTY = Penalty.csulora(STRENGTH)
WEIGHTS = "adapter_model.safetensors"
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gemma3() -> Gemma3ForCausalLM:
    """Its embedding is tied to the output, multiplied by √dim in the forward pass, and has a padding token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **more, **SPECIAL))


slow = pytest.mark.slow
EMBEDDINGS, BIASES = ["embed_tokens", "v_proj"], {"lora_bias": True}
CASES = {  # a model, what is adapted in it, and a module whose factors it must come to
    "embedding": (tiny_llama, {"target_modules": EMBEDDINGS}, "model.embed_tokens"),
    "biases": (with_biases, BIASES, "model.layers.1.mlp.down_proj.bias"),
    "gpt2's embeddings": (tiny_gpt2, {"target_modules": ["wte", "wpe", "c_attn"]}, "transformer.wpe"),
    "gpt2's biases": (
        tiny_gpt2,
        {"target_modules": ["c_attn", "c_proj"], **BIASES},
        "transformer.h.0.attn.c_attn.bias",
    ),
    "gemma3": (gemma3, {"target_modules": EMBEDDINGS}, "model.embed_tokens"),
    "biases of layers without": (tiny_llama, BIASES, "model.layers.0.self_attn.q_proj.bias"),
    "rank-stabilized embedding": (
        tiny_llama,
        {"target_modules": EMBEDDINGS, "use_rslora": True, "alpha_pattern": {"embed_tokens": 3}},
        "model.embed_tokens",
    ),
    "rank-stabilized biases": (
        with_biases,
        {**BIASES, "use_rslora": True, "alpha_pattern": {"v_proj": 3}},
        "model.layers.0.self_attn.v_proj.bias",
    ),
    "16 bits": (lambda: with_biases().bfloat16(), BIASES, "model.layers.1.mlp.down_proj.bias"),
}
FAST = ("embedding", "biases")
EACH = [pytest.param(case, marks=() if case in FAST else slow) for case in CASES]


def train(pair, output: Path, lora: dict, callbacks: list, resume=None, **arguments):
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), lora_dropout=0.1, **lora)
    trainer = make_trainer(model, output, callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def callback(pair, cache: Path, **arguments) -> CSULoRACallback:
    return CSULoRACallback(base_model=pair[0], cache_dir=cache, **{"rank": RANK, "penalty": PENALTY, **arguments})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By case, once each: the same training with and without the callback."""
    done = {}

    def run(case: str) -> SimpleNamespace:
        if case not in done:
            folder = tmp_path_factory.mktemp("trained")
            build, lora, _ = CASES[case]
            pair = saved_pair(folder, build())
            runs = {
                kind: train(pair, folder / kind, lora, callbacks)
                for kind, callbacks in (("without", []), ("with", [callback(pair, folder / "cache")]))
            }
            done[case] = SimpleNamespace(pair=pair, lora=lora, folder=folder, runs=runs)
        return done[case]

    return run


@pytest.mark.parametrize("case", EACH)
def test_a_checkpoint_is_the_closest_safe_update_and_training_is_what_it_was(trained, case):
    run = trained(case)
    assert losses(run.runs["with"]) == losses(run.runs["without"])
    base, aligned = (matrices(side) for side in run.pair)
    narrow = case == "16 bits"
    for step in (4, 8):
        with_, without = (run.folder / kind / f"checkpoint-{step}" for kind in ("with", "without"))
        assert_same(raw(with_), saved(without))
        before, after = (updates(run.pair[1], folder) for folder in (without, with_))
        assert CASES[case][2] in before
        assert before.keys() == after.keys() == Sidecar.load(with_).record["modules"].keys()
        for name, update in before.items():
            expected = closest(displacement_of(name, base, aligned), update, RANK, LORA_RANK)
            assert (after[name] - expected).norm() < (5e-3 if narrow else 1e-5) * expected.norm(), name
            assert (after[name] - update).norm() > 0.1 * update.norm(), name
    assert_same(live_of(run.runs["with"].model), saved_factors(with_))
    (logged,) = (r for r in run.runs["with"].state.log_history if r["step"] == 8 and "loss" in r)
    for key, value in Sidecar.load(with_).record["metrics"].items():
        assert logged[key] == pytest.approx(value, rel=1e-3, abs=1e-2 if "truncation" in key else 1e-4), key


def live_of(model) -> dict[str, torch.Tensor]:
    """The factors of a model in memory as PEFT names them in its files."""
    return {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def saved_factors(folder: Path) -> dict[str, torch.Tensor]:
    """Without the embedding itself, which PEFT saves with its LoRA."""
    return {key: tensor for key, tensor in saved(folder).items() if ".lora_" in key}


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH)
def test_resuming_is_exact_and_the_corrected_adapter_is_the_posthoc_one(trained, case, tmp_path):
    run = trained(case)
    whole = run.folder / "with/checkpoint-8"
    shutil.copytree(run.folder / "with/checkpoint-4", tmp_path / "parts/checkpoint-4")
    ours = callback(run.pair, run.folder / "cache")
    resumed = train(run.pair, tmp_path / "parts", run.lora, [ours], str(tmp_path / "parts/checkpoint-4"))
    assert losses(resumed) == losses(run.runs["with"])
    for read in (raw, saved):
        assert_same(read(tmp_path / "parts/checkpoint-8"), read(whole))

    modules = {name.removesuffix(".bias") for name in Sidecar.load(whole).record["modules"]}
    subspace = SafetySubspace.estimate(*run.pair, sorted(modules), rank=RANK, progress=False)
    for source, from_raw in ((run.folder / "without/checkpoint-8", False), (whole, True)):
        done = correct_adapter(source, subspace, tmp_path / f"out-{from_raw}", PENALTY)
        assert done.from_raw is from_raw
        assert done.record["modules"] == Sidecar.load(whole).record["modules"]
        assert_same(saved(done.output), saved(whole))
        assert (done.output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

tokens, result, *folders = sys.argv[1:]
ids, logits = torch.load(tokens), []
for aligned, checkpoint in zip(folders[::2], folders[1::2]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(aligned), checkpoint)
    with torch.no_grad():
        logits.append(model.to(ids.device)(ids).logits)
torch.save(logits, result)
assert not any(name.startswith("csulora") for name in sys.modules)
"""


@slow
def test_peft_alone_in_a_new_process_loads_the_corrected_models(trained, tmp_path):
    runs, tokens = [trained(case) for case in CASES], Tokens(count=4).tokens.to(DEVICE)
    torch.save(tokens, tmp_path / "tokens.pt")
    folders = [str(folder) for run in runs for folder in (run.pair[1], run.folder / "with/checkpoint-8")]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of sums, to the bit
    places = [str(tmp_path / name) for name in ("tokens.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", RELOAD, *places, *folders], check=True, env=threads)
    for case, run, logits in zip(CASES, runs, torch.load(tmp_path / "logits.pt"), strict=True):
        shipped, as_trained = (run.runs[kind].model.to(DEVICE).eval() for kind in ("with", "without"))
        with torch.no_grad():
            assert torch.equal(logits, shipped(tokens).logits), case
            assert not torch.equal(logits, as_trained(tokens).logits), case


class EmbeddingModule(in_lightning.Module):
    lora = MappingProxyType({"target_modules": EMBEDDINGS})

    def build(self) -> None:
        self.network = with_lora(AutoModelForCausalLM.from_pretrained(self.aligned), lora_dropout=0.1, **self.lora)


class BiasesModule(EmbeddingModule):
    lora = BIASES


@slow
@pytest.mark.parametrize("kind", [EmbeddingModule, BiasesModule])
def test_lightning(tmp_path, kind):
    pair = saved_pair(tmp_path, with_biases())

    def fit(folder, callbacks, **arguments):
        return in_lightning.fit(pair, tmp_path / folder, callbacks, kind(pair[1]), **arguments)

    def only(folder, end="ckpt"):
        (path,) = (tmp_path / folder).rglob(f"*.{end}")
        return path

    plain, half = fit("plain", []), fit("plain half", [], max_epochs=1)
    ours = [callback(pair, tmp_path / "cache") for _ in range(3)]
    trainer, ours_half = fit("ours", ours[:1]), fit("ours half", ours[1:2], max_epochs=1)
    assert (
        trainer.losses == plain.losses == [*half.losses, *plain.losses[4:]] == [*ours_half.losses, *plain.losses[4:]]
    )
    corrected, raw_there = in_lightning.factors_in(only("ours"))
    assert_same(raw_there, in_lightning.factors_in(only("plain"))[0])
    folder = only("ours", "adapter")
    assert_same(corrected, saved_factors(folder))
    base, aligned = (matrices(side) for side in pair)
    before, after = updates(pair[1], folder / "csulora/raw"), updates(pair[1], folder)
    for name, update in before.items():
        expected = closest(displacement_of(name, base, aligned), update, RANK, LORA_RANK)
        assert (after[name] - expected).norm() < 1e-5 * expected.norm(), name

    # Lightning does not bring back the random state: a run without the callback that resumes there is what counts.
    twin = fit("twin", [], ckpt_path=only("plain half"))
    resumed = fit("resumed", ours[2:], ckpt_path=only("ours half"))
    assert resumed.losses == twin.losses
    assert_same(in_lightning.factors_in(only("resumed"))[1], in_lightning.factors_in(only("twin"))[0])


PROBES = [[0, 5, 6, 7], [0, 9, 8], [0, 4, 11, 12, 13]]


def one_hot(rows: list[list[int]]) -> torch.Tensor:
    """Of all tokens of rows, scaled as token vectors are."""
    vectors = torch.nn.functional.one_hot(torch.tensor([i for row in rows for i in row]), VOCABULARY).double()
    return vectors * (VOCABULARY / len(vectors)) ** 0.5


@slow
def test_a_data_aware_penalty_scales_what_probes_read_of_an_embedding(tmp_path):
    """Against the dense formula, with every token of rows and probes as a one-hot vector."""
    pair = saved_pair(tmp_path, tiny_llama())
    lora, strength = {"target_modules": EMBEDDINGS}, 4.0
    ours = callback(pair, tmp_path / "cache", probes=PROBES, penalty=Penalty.data_aware(strength))
    plain = train(pair, tmp_path / "plain", lora, [])
    trainer = train(pair, tmp_path / "out", lora, [ours])
    assert losses(trainer) == losses(plain)
    folder = tmp_path / "out/checkpoint-8"
    assert_same(raw(folder), saved(tmp_path / "plain/checkpoint-8"))
    texts = Sidecar.load(folder).texts
    T, H = one_hot(texts.task), one_hot(PROBES)
    C_T = (T.T @ T + 0.1 * torch.eye(VOCABULARY)) / 1.1
    C_H = H.T @ H
    update, found = (updates(pair[1], path)["model.embed_tokens"] for path in (folder / "csulora/raw", folder))
    expected = update @ C_T @ torch.linalg.inv(C_T + strength * C_H)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert (found - update).norm() > 0.1 * update.norm()
    read = sorted({i for row in PROBES for i in row})
    left = [i for i in range(VOCABULARY) if i not in read]
    assert torch.equal(found[:, left], update[:, left])  # no probe holds them

    subspace = SafetySubspace.estimate(
        *pair, sorted(Sidecar.load(folder).record["modules"]), rank=RANK, progress=False
    )
    done = correct_adapter(folder, subspace, tmp_path / "again", Penalty.data_aware(strength))
    assert (done.output / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert_same(live_of(trainer.model), saved_factors(folder))


@slow
def test_a_data_aware_penalty_attenuates_biases_by_what_task_and_probes_have_alike(tmp_path):
    pair = saved_pair(tmp_path, with_biases())
    ours = callback(pair, tmp_path / "cache", probes=PROBES, penalty=Penalty.data_aware(4.0))
    plain = train(pair, tmp_path / "plain", BIASES, [])
    trainer = train(pair, tmp_path / "out", BIASES, [ours])
    assert losses(trainer) == losses(plain)
    folder = tmp_path / "out/checkpoint-8"
    before, after = (updates(pair[1], path) for path in (folder / "csulora/raw", folder))
    for name in (name for name in before if name.endswith(".bias")):
        torch.testing.assert_close(after[name], before[name] / 5.0, rtol=1e-6, atol=0)
    assert_same(live_of(trainer.model), saved_factors(folder))
    shutil.copytree(tmp_path / "out/checkpoint-4", tmp_path / "parts/checkpoint-4")
    ours = callback(pair, tmp_path / "cache", probes=PROBES, penalty=Penalty.data_aware(4.0))
    train(pair, tmp_path / "parts", BIASES, [ours], str(tmp_path / "parts/checkpoint-4"))
    assert_same(saved(tmp_path / "parts/checkpoint-8"), saved(folder))


@slow
def test_what_other_embeddings_read_is_not_known_and_they_are_refused_before_training(tmp_path):
    pair = saved_pair(tmp_path, tiny_gpt2())
    model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]), target_modules=["wpe", "c_attn"])
    ours = callback(pair, tmp_path / "cache", probes=PROBES, penalty=Penalty.data_aware(4.0))
    trainer = make_trainer(model, tmp_path / "out", [ours])
    with pytest.raises(ValueError, match=r"module 'transformer.wpe': a data-aware penalty.*Leave this one out"):
        trainer.train()
    assert trainer.state.global_step == 0
