"""What is computed on the tests' device, against the same on the CPU."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from csulora_callback import Penalty, SafetyCorrector, SafetySubspace
from csulora_callback.models.activations import Activations, Texts
from csulora_callback.models.adapters import find_adapter
from tests.helpers.lab import DEVICE, RANK, SCALING, TARGETS, align, tiny_llama, with_lora

pytestmark = pytest.mark.gpu

PENALTIES = (
    Penalty.csulora(5.0),
    Penalty.separable(5.0),
    Penalty.guard(5.0),
    Penalty.data_aware(4.0),
    Penalty.content_aware(4.0),
)
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of an update; bfloat16 rounds two factors at their end
TEXTS = Texts([[3 + i, 4, 5 + i, 6, 7 + i % 5] for i in range(20)], [[9, 8, 7, 6], [10, 11], [12] * 20], 20)


def lora(pair, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    return with_lora(model, init_lora_weights=False).to(device, dtype)  # the factors, too


def updates(factors) -> dict[str, torch.Tensor]:
    """Dense, in float64."""
    return {name: SCALING * B.cpu().double() @ A.cpu().double() for name, (A, B) in factors.items()}


def assert_close(got: dict, expected: dict, error: float) -> None:
    assert got.keys() == expected.keys()
    for name, update in expected.items():
        assert (got[name] - update).norm() <= error * update.norm(), name


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)
@pytest.mark.parametrize("dtype", ERROR)
def test_a_correction_is_the_cpus(pair, subspace, dtype, penalty):
    on_cpu, on_device = lora(pair, dtype), lora(pair, dtype, DEVICE)
    activations = Activations.read(find_adapter(on_cpu), TEXTS, penalty.skips_prefix) if penalty.on_probes else None
    expected = SafetyCorrector(on_cpu, subspace, penalty, activations).compute()
    done = SafetyCorrector(on_device, subspace, penalty, activations).compute()
    assert {factor.device.type for pair in done.corrected.values() for factor in pair} == {DEVICE}
    assert {factor.dtype for pair in done.corrected.values() for factor in pair} == {dtype}
    assert_close(updates(done.corrected), updates(expected.corrected), ERROR[dtype])
    for key, value in expected.metrics.items():
        assert done.metrics[key] == pytest.approx(value, rel=1e-2 if dtype == torch.bfloat16 else 1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", ERROR)
def test_what_texts_send_into_modules_is_the_cpus(pair, dtype):
    expected = Activations.read(find_adapter(lora(pair, dtype)), TEXTS)
    got = Activations.read(find_adapter(lora(pair, dtype, DEVICE)), TEXTS)
    for mine, theirs in ((got.task, expected.task), (got.probes, expected.probes)):
        for name, vectors in theirs.items():
            assert mine[name].device.type == "cpu"
            difference = (mine[name].float() - vectors.float()).norm()
            assert difference <= (2**-7 if dtype == torch.float32 else 2**-4) * vectors.float().norm(), name


@pytest.mark.parametrize("size", [16, 48])
def test_an_estimate_is_the_cpus(size):
    base = tiny_llama(hidden_size=size, intermediate_size=3 * size // 2)
    pair = base, align(base)
    expected = SafetySubspace.estimate(*pair, TARGETS, rank=RANK, progress=False)
    got = SafetySubspace.estimate(*copy.deepcopy(pair), TARGETS, rank=RANK, progress=False, device=DEVICE)
    assert list(got) == list(expected)
    for name, basis in expected.items():
        torch.testing.assert_close(got[name].singular_values.cpu(), basis.singular_values, rtol=1e-4, atol=1e-6)
        for mine, theirs in ((got[name].U.cpu(), basis.U), (got[name].V.cpu(), basis.V)):
            assert (mine @ mine.T - theirs @ theirs.T).norm() <= 1e-3, name


@pytest.mark.parametrize("penalty", [Penalty.guard(5.0), Penalty.data_aware(4.0)], ids=lambda penalty: penalty.name)
def test_a_model_divided_over_devices_is_read_and_corrected_as_a_whole_one(pair, subspace, penalty):
    """Over all GPUs that there are; on one device accelerate's hooks are the same, and move tensors nowhere."""
    whole, divided = lora(pair), lora(pair)
    inside = ["embed_tokens", "rotary_emb", "layers.0", "layers.1", "norm"]
    parts = [*(f"base_model.model.model.{part}" for part in inside), "base_model.model.lm_head"]
    places = list(range(torch.cuda.device_count())) if DEVICE == "cuda" else ["cpu"]
    divided = dispatch_model(
        divided, {part: places[i * len(places) // len(parts)] for i, part in enumerate(parts)}, force_hooks=True
    )
    assert all(hasattr(divided.get_submodule(part), "_hf_hook") for part in parts)
    done = []
    for model in (whole, divided):
        activations = Activations.read(find_adapter(model), TEXTS)
        done.append(SafetyCorrector(model, subspace, penalty, activations).compute())
    assert_close(updates(done[1].corrected), updates(done[0].corrected), 2**-7 if penalty.on_probes else 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's peak memory is measured on CUDA")
@pytest.mark.parametrize("what", ["estimate", "read", "correct"])
def test_cuda_peak_memory_is_bounded(what):
    """Beside the model, relative to its weights, which are 16 layers of 26 MB."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 32}
    base = tiny_llama(**sizes)
    aligned = align(base)
    weights = sum(parameter.nbytes for parameter in aligned.parameters())
    subspace = SafetySubspace.estimate(base, aligned, TARGETS, rank=24, progress=False, device="cuda")
    model = with_lora(copy.deepcopy(aligned), init_lora_weights=False).cuda()
    adapter, texts = find_adapter(model), Texts([list(range(3, 30))] * 300, [list(range(3, 30))] * 100, 300)
    corrector = SafetyCorrector(model, subspace, Penalty.data_aware(4.0), Activations.read(adapter, texts))
    work = {
        "estimate": lambda: SafetySubspace.estimate(base, aligned, TARGETS, rank=24, progress=False, device="cuda"),
        "read": lambda: Activations.read(adapter, texts),
        "correct": corrector.compute,
    }[what]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= {"estimate": 0.5, "read": 0.5, "correct": 1.0}[what] * weights, peak / weights
