"""The correction of a live model and a measurement of its drift, beside the dense way of the same mathematics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from csulora_callback import SafetyCorrector, SafetySubspace, correct
from csulora_callback.method.basis import Basis
from recipes.benchmarks.estimation import PENALTIES, update_beside
from recipes.benchmarks.shapes import Shape, label
from recipes.benchmarks.timing import Time, added, interleaved, timed

Work = Callable[[], Time]


def with_lora(model: nn.Module, rank: int) -> PeftModel:
    """The model with LoRA on all its linear layers, as PEFT starts it."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def measure(model: PeftModel, subspace: SafetySubspace, shape: Shape, repeats: int) -> dict:
    """Seconds of a correction of all modules by two penalties, of a log's measurement, and of the dense way.

    Factors change a little before each, as between two steps of training. The dense way is measured on one module of
    each size and counted as often as the model has it; it gives what both penalties say, as the products are the same.
    """
    _set_factors(model, subspace)
    correctors = {name: SafetyCorrector(model, subspace, penalty) for name, penalty in PENALTIES.items()}
    works: dict[str, Work] = {name: _after_a_change(model, it.compute) for name, it in correctors.items()}
    works["log"] = _after_a_change(model, correctors["csulora"].measure)
    for work in works.values():
        work()  # the first ones warm up
    for size, name in shape.samples.items():
        works[label(size)] = lambda name=name: timed(lambda: dense_closest(*_factors(model, name), subspace[name]))
    times = interleaved(repeats, works)
    sampled = {label(size): times.pop(label(size)) for size in shape.samples}
    times["dense"] = added([(number, sampled[label(size)]) for size, number in shape.counts.items()])
    return {"times": times, "sampled": sampled, "agreement": _agreement(model, correctors["guard"], subspace, shape)}


def corrected_and_logged(model: PeftModel, subspace: SafetySubspace, repeats: int) -> dict[str, list[Time]]:
    """The correction and the measurement alone."""
    _set_factors(model, subspace)
    corrector = SafetyCorrector(model, subspace, PENALTIES["csulora"])
    works = {
        "correction": _after_a_change(model, corrector.compute),
        "log": _after_a_change(model, corrector.measure),
    }
    for work in works.values():
        work()
    return interleaved(repeats, works)


def dense_closest(A: Tensor, B: Tensor, scaling: float, basis: Basis) -> dict[str, Tensor]:
    """``X*`` of each penalty, ``(d_out, d_in)``, with dense projectors applied to the dense update."""
    U, V, delta = basis.U.to(A), basis.V.to(A), scaling * (B @ A)
    P_U, P_V = U @ U.T, V @ V.T
    output, inner = P_U @ delta, delta @ P_V
    aligned = output @ P_V
    blocks = {
        "aligned": aligned,
        "output": output - aligned,
        "input": inner - aligned,
        "off": delta - output - inner + aligned,
    }
    energy = {block: part.square().sum().item() for block, part in blocks.items()}
    relative = {block: part / sum(energy.values()) for block, part in energy.items()}
    gains = {name: penalty.gain(relative) for name, penalty in PENALTIES.items()}
    return {name: sum(gain[block] * part for block, part in blocks.items()) for name, gain in gains.items()}


def _agreement(
    model: PeftModel, corrector: SafetyCorrector, subspace: SafetySubspace, shape: Shape
) -> dict[str, float]:
    """``‖X − X_dense‖ / ‖Δ‖``, the largest over one module of each size.

    Of ``guard`` by what the corrector writes into the model; of ``csulora``, whose result the adapter's rank cannot
    hold, by the whole of it.
    """
    live, worst = corrector.compute().corrected, dict.fromkeys(PENALTIES, 0.0)
    for name in shape.samples.values():
        A, B, scaling = _factors(model, name)
        basis, dense = subspace[name], dense_closest(A, B, scaling, subspace[name])
        whole = correct(A, B, basis.U.to(A), basis.V.to(A), PENALTIES["csulora"], scaling, "expand")
        size = (scaling * (B @ A)).norm()
        for penalty, (new_A, new_B) in {"guard": live[name], "csulora": (whole.lora_A, whole.lora_B)}.items():
            error = ((scaling * (new_B @ new_A) - dense[penalty]).norm() / size).item()
            worst[penalty] = max(worst[penalty], error)
    return worst


def _factors(model: PeftModel, name: str) -> tuple[Tensor, Tensor, float]:
    layer = model.get_base_model().get_submodule(name)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), layer.scaling["default"]


@torch.no_grad()
def _set_factors(model: PeftModel, subspace: SafetySubspace) -> None:
    """An update of which a part lies in the subspace, in every module."""
    for name, basis in subspace.items():
        A, B, _ = _factors(model, name)
        new_A, new_B = update_beside(basis.U.double(), basis.V.double(), len(A))
        A.copy_(new_A)
        B.copy_(new_B)


def _after_a_change(model: PeftModel, work: Callable[[], object]) -> Work:
    """What a corrector does with factors that it has not seen."""
    factors = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]

    def changed() -> Time:
        with torch.no_grad():
            for factor in factors:
                factor.mul_(1.001)
        return timed(work)

    return changed
