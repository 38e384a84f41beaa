"""Modules are stacked by what they share, in an order of their own, and a log says what a save records."""

import math

import pytest
import torch

from csulora_callback import Penalty, SafetyCorrector, SafetySubspace
from csulora_callback.correcting import Correcting
from csulora_callback.method.basis import Basis
from csulora_callback.models.factors import equal
from csulora_callback.models.saved_adapter import SavedLayer
from csulora_callback.stacks import Stacks
from tests.helpers.huggingface import fresh_model
from tests.helpers.lab import PENALTY
from tests.helpers.updates import make_update

SHAPES = [(24, 16, 4), (24, 16, 4), (8, 16, 4), (16, 24, 4), (24, 16, 2)]  # d_out, d_in, r
PENALTIES = [Penalty.csulora(10.0), Penalty.guard(3.0), Penalty.projection()]


def adapter(ranks=(3, 3, 0, 3, 5), dtype=torch.float32, size=0.1) -> tuple[dict, dict, SafetySubspace]:
    """Layers, factors and a subspace of modules that do not all go together."""
    layers, factors, bases = {}, {}, {}
    for i, ((d_out, d_in, r), k) in enumerate(zip(SHAPES * 2, ranks * 2, strict=True)):
        update, name = make_update(d_out, d_in, r, k, k, seed=i), f"layers.{i // 5}.{'qkvog'[i % 5]}_proj"
        layers[name] = SavedLayer((d_out, r, d_in), scaling=0.5 + i, stored_transposed=False)
        factors[name] = (update.A.to(dtype), (size * update.B).to(dtype))
        bases[name] = Basis(update.U, update.V, torch.linspace(2.0, 1.0, k), displacement=4.0)
    metadata = {side: {"source": side, "fingerprint": "0" * 64, "dtypes": ["float32"]} for side in ("base", "aligned")}
    return layers, factors, SafetySubspace(bases, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("rank", ["truncate", "expand"])
def test_the_order_of_modules_changes_no_bit(penalty, rank, dtype):
    layers, factors, subspace = adapter(dtype=dtype)
    there = Correcting("default", layers, subspace, penalty, rank).correct(factors)
    turned = {name: layers[name] for name in reversed(layers)}
    correcting = Correcting("default", turned, subspace, penalty, rank)
    back = correcting.correct(dict(reversed(factors.items())))
    assert list(back.corrected) == list(reversed(there.corrected))
    assert equal(back.corrected, there.corrected)
    assert back.record == there.record
    assert correcting.measure(factors) == Correcting("default", layers, subspace, penalty).measure(factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_a_log_says_what_a_save_records(penalty, dtype):
    layers, factors, subspace = adapter(dtype=dtype)
    correcting = Correcting("default", layers, subspace, penalty)
    logged, saved = correcting.measure(factors), correcting.correct(factors)
    assert logged.keys() == saved.metrics.keys()
    for key, value in saved.record["metrics"].items():
        assert math.isclose(logged[key], value, rel_tol=1e-4, abs_tol=1e-5), key
    assert equal(Correcting("default", layers, subspace, penalty).correct(factors).corrected, saved.corrected)


def test_modules_go_together_by_shape_rank_and_subspace():
    layers, factors, subspace = adapter()
    stacks = Stacks({name: (basis.U, basis.V, basis.singular_values) for name, basis in subspace.items()})
    together = [stack.names for stack in stacks.of(factors)]
    assert [len(names) for names in together] == [2, 4, 2, 2]
    assert sorted(name for names in together for name in names) == sorted(layers)
    assert [stack.names for stack in stacks.of(dict(reversed(factors.items())))] == together
    for stack in stacks.of(factors):
        for i, name in enumerate(stack.names):
            assert torch.equal(stack.lora_B[i], factors[name][1])
            assert torch.equal(stack.U[i], subspace[name].U)


def test_a_large_module_is_alone_and_not_copied():
    U, V, sigma = torch.zeros(3000, 80), torch.zeros(3000, 80), torch.zeros(80)
    stacks = Stacks(dict.fromkeys(("k_proj", "q_proj"), (U, V, sigma)))
    seen = list(stacks.of(dict.fromkeys(("k_proj", "q_proj"), (torch.zeros(4, 3000), torch.zeros(3000, 4)))))
    assert [stack.names for stack in seen] == [("k_proj",), ("q_proj",)]
    assert all(stack.U.data_ptr() == U.data_ptr() for stack in seen)


def test_bases_are_moved_to_another_device_once():
    """To the device "meta" here, which every machine has."""
    _, factors, subspace = adapter()
    stacks = Stacks({name: (basis.U, basis.V, basis.singular_values) for name, basis in subspace.items()})
    there = {name: (A.to("meta"), B.to("meta")) for name, (A, B) in factors.items()}
    first, second = list(stacks.of(there)), list(stacks.of(there))
    assert all(stack.U.device.type == "meta" for stack in first)
    assert all(one.U is other.U and one.V is other.V for one, other in zip(first, second, strict=True))
    list(stacks.of(factors))
    assert next(iter(stacks.of(there))).U is not first[0].U  # those of a device that was left are not kept


@pytest.mark.parametrize("factor", [1e-25, 1e25, 0.0])
def test_what_a_log_cannot_tell_is_taken_from_the_correction(factor, pair, subspace):
    corrector = SafetyCorrector(fresh_model(pair, init_lora_weights=False), subspace, PENALTY)
    raw = {name: (A, B * factor) for name, (A, B) in corrector.adapter.read().items()}
    corrector.adapter.write(raw)
    logged = corrector.measure()
    assert (corrector._last is None) == (factor == 0.0)  # zero is told, and needs no correction
    assert logged == pytest.approx(corrector.compute().metrics, rel=1e-4)


def test_factors_that_are_not_finite_have_no_metrics_and_one_warning(pair, subspace, caplog):
    corrector = SafetyCorrector(fresh_model(pair, init_lora_weights=False), subspace, PENALTY)
    raw = corrector.adapter.read()
    name = next(iter(raw))
    raw[name][0][0, 0] = math.nan
    corrector.adapter.write(raw)
    assert corrector.measure() == corrector.measure() == {}
    assert len([line for line in caplog.messages if "NaN or Inf" in line]) == 1


def test_a_log_changes_nothing_of_what_is_saved_after_it(pair, subspace):
    made = [SafetyCorrector(fresh_model(pair, init_lora_weights=False), subspace, PENALTY) for _ in range(2)]
    made[0].measure()
    assert made[0]._last is None
    done = [corrector.compute() for corrector in made]
    assert equal(done[0].corrected, done[1].corrected)
    assert done[0].record == done[1].record
    assert made[0].measure() is done[0].metrics  # of these factors the correction is known


def test_a_record_tells_the_sides_of_transposed_weights_apart():
    """As of GPT-2's, which are stored ``(d_in, d_out)``. Nothing is attenuated: after is before."""
    update = make_update(24, 8, 2, 3, 3, seed=0)
    basis = Basis(update.V, update.U, torch.linspace(2.0, 1.0, 3), displacement=4.0)
    _, _, subspace = adapter()
    layers = {"c_attn": SavedLayer((24, 2, 8), scaling=0.5, stored_transposed=True)}
    subspace = SafetySubspace({"c_attn": basis}, subspace.metadata)
    done = Correcting("default", layers, subspace, Penalty.guard(0.0)).correct({"c_attn": (update.A, update.B)})
    drift = done.record["modules"]["c_attn"]["drift"]
    for before, after in zip(drift["raw"].values(), drift["corrected"].values(), strict=True):
        assert before == pytest.approx(after, rel=1e-6)


def test_threads_that_correct_on_different_devices_do_not_disturb_each_other():
    """Where the other one comes in between a look at what is kept and its use."""
    _, factors, subspace = adapter()
    stacks = Stacks({name: (basis.U, basis.V, basis.singular_values) for name, basis in subspace.items()})
    there = {name: (A.to("meta"), B.to("meta")) for name, (A, B) in factors.items()}
    others = iter([stacks.of(factors)])

    class Kept(dict):
        def __contains__(self, key) -> bool:
            is_there = super().__contains__(key)
            for other in others:
                list(other)
            return is_there

    first, walk = list(stacks.of(there)), stacks.of(there)
    begun, stacks._moved = next(walk), Kept(stacks._moved)
    assert [stack.names for stack in (begun, *walk)] == [stack.names for stack in first]
    assert next(others, None) is None
