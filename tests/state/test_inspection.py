"""The drift of an adapter on disk, against dense products with the weights themselves."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from csulora_callback import Penalty, SafetySubspace, correct_adapter
from csulora_callback.inspection import Inspection, inspect_adapter, recorded_inspections
from csulora_callback.method.measure import Drift
from csulora_callback.models.pair import CheckpointPair
from csulora_callback.models.saved_adapter import SavedAdapter
from csulora_callback.reporting.inspection import short_kinds, short_layers
from csulora_callback.sidecar import read_record
from tests.helpers.lab import VOCABULARY, align, tiny_llama, with_lora


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


MODELS = {
    "llama": (tiny_llama, ["q_proj", "k_proj", "down_proj"]),
    "gpt2, stored transposed": (tiny_gpt2, ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_dense_products_give(model, dtype, tmp_path):
    make, targets = MODELS[model]
    base = make().to(dtype)
    aligned = align(base)
    before, after = (
        {n: m.weight.detach().double() for n, m in x.named_modules() if hasattr(m, "weight")} for x in (base, aligned)
    )
    subspace = SafetySubspace.estimate(base, aligned, targets, rank=3, progress=False)
    pair = CheckpointPair.open(base, aligned, targets)
    patterns = {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[1]: 3}}
    with_lora(align(base), target_modules=targets, init_lora_weights=False, **patterns).save_pretrained(tmp_path)
    adapter = SavedAdapter.read(tmp_path)
    states = {"raw": adapter.factors, "half": {name: (A, B / 2) for name, (A, B) in adapter.factors.items()}}
    kept, whole = (inspect_adapter(adapter, states, subspace, given) for given in (None, pair))
    for name, (A, B) in adapter.factors.items():
        D, delta = after[name] - before[name], adapter.scalings[name] * B.double() @ A.double()
        U, sigma, Vh = torch.linalg.svd(D, full_matrices=False)
        D_k = (U[:, :3] * sigma[:3]) @ Vh[:3]
        if "transposed" in model:
            D, D_k, U, Vh = D.T, D_k.T, Vh.T, U.T
        for part, seen in ((D, whole), (D_k, kept)):
            undone = -(delta * part).sum() / part.square().sum()
            assert math.isclose(seen["raw"].modules[name].undone, undone, rel_tol=1e-3, abs_tol=1e-4)
            assert math.isclose(seen["half"].modules[name].undone, undone / 2, rel_tol=1e-3, abs_tol=1e-4)
        P_U, P_V = U[:, :3] @ U[:, :3].T, Vh[:3].T @ Vh[:3]
        drift = kept["raw"].modules[name]
        aligned_share = (P_U @ delta @ P_V).square().sum() / delta.square().sum()
        assert math.isclose(drift.shares["aligned"], aligned_share, rel_tol=1e-3, abs_tol=1e-5)
        assert math.isclose(drift.total_energy, delta.square().sum(), rel_tol=1e-5)
        assert math.isclose(drift.chance["aligned"], 9 / delta.numel(), rel_tol=1e-9)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("penalty", [Penalty.guard(3.0), Penalty.csulora(10.0)], ids=str)
def test_a_record_says_where_what_was_written_lies(model, penalty, tmp_path):
    """Also where it was cut to the adapter's rank, so that the gains do not tell."""
    make, targets = MODELS[model]
    base = make()
    aligned = align(base)
    subspace = SafetySubspace.estimate(base, aligned, targets, rank=3, progress=False)
    with_lora(aligned, target_modules=targets, init_lora_weights=False).save_pretrained(tmp_path / "raw")
    done = correct_adapter(tmp_path / "raw", subspace, tmp_path / "made", penalty)
    assert (done.metrics["csulora/truncation_error"] > 0.01) == (penalty.name == "csulora")
    seen = recorded_inspections(read_record(tmp_path / "made"))
    for state, folder in (("raw", "raw"), ("corrected", "made")):
        adapter = SavedAdapter.read(tmp_path / folder)
        for name, (A, B) in adapter.factors.items():
            delta, basis = adapter.scalings[name] * B.double() @ A.double(), subspace[name]
            U, V = (side.double() for side in (basis.U, basis.V))
            D = U * basis.singular_values.double() @ V.T
            if "transposed" in model:
                U, V, D = V, U, D.T
            of_output, of_input = U @ U.T, V @ V.T
            blocks = {
                "aligned": of_output @ delta @ of_input,
                "output": of_output @ (delta - delta @ of_input),
                "input": (delta - of_output @ delta) @ of_input,
                "off": delta - of_output @ delta - delta @ of_input + of_output @ delta @ of_input,
            }
            for block, part in blocks.items():
                found = seen[state].modules[name].energy[block]
                assert math.isclose(found, part.square().sum(), rel_tol=1e-5, abs_tol=1e-7)
            undone = -(delta * D).sum() / D.square().sum()
            assert math.isclose(seen[state].modules[name].undone, undone, rel_tol=1e-5, abs_tol=1e-7)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("penalty", [Penalty.csulora(5.0), Penalty.guard(3.0)], ids=str)
def test_what_a_correction_logs_is_what_an_inspection_says(model, penalty, tmp_path):
    make, targets = MODELS[model]
    base, aligned = make(), align(make())
    subspace = SafetySubspace.estimate(base, aligned, targets, rank=3, progress=False)
    with_lora(aligned, target_modules=targets, init_lora_weights=False).save_pretrained(tmp_path / "trained")
    logged = correct_adapter(tmp_path / "trained", subspace, tmp_path / "corrected", penalty).metrics
    for folder, suffix in (("trained", ""), ("corrected", "_corrected")):
        adapter = SavedAdapter.read(tmp_path / folder)
        seen = inspect_adapter(adapter, {"as it is": adapter.factors}, subspace)["as it is"].together
        assert math.isclose(logged[f"csulora/alignment_undone{suffix}"], seen.undone, rel_tol=1e-5), folder
        assert abs(seen.undone) > 1e-5
        if folder == "trained":
            partial = [sum(shares[half] for half in ("output", "input")) for shares in (seen.shares, seen.chance)]
            assert math.isclose(logged["csulora/partial_over_chance"], partial[0] / partial[1], rel_tol=1e-5)
            for block in ("aligned", "off"):
                over = seen.shares[block] / seen.chance[block]
                assert math.isclose(logged[f"csulora/{block}_over_chance"], over, rel_tol=1e-5), block


def drift(along: float) -> Drift:
    return Drift(along=along, displacement=1.0)


def test_layers_come_in_their_order_and_the_worst_modules_first():
    modules = {
        "model.layers.10.mlp.up_proj": drift(-3.0),
        "lm_head": drift(1.0),
        "model.layers.2.mlp.up_proj": drift(-4.0),
        "model.layers.2.mlp.down_proj": drift(-1.0),
    }
    inspection = Inspection(modules)
    assert list(inspection.by_layer()) == ["model.layers.2", "model.layers.10", ""]
    assert inspection.by_layer()["model.layers.2"].undone == 2.5
    assert inspection.by_layer_and_kind()["", "lm_head"].undone == -1.0
    assert inspection.worst(2) == ["model.layers.2.mlp.up_proj", "model.layers.10.mlp.up_proj"]
    assert "lm_head" not in inspection.worst(10)


def test_names_are_short_only_where_they_stay_different():
    assert list(short_layers(["encoder.block.0", "decoder.block.0"]).values()) == [
        "encoder.block.0",
        "decoder.block.0",
    ]
    assert list(short_kinds(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"]).values()) == [
        "attn.c_proj",
        "mlp.c_proj",
        "c_fc",
    ]
