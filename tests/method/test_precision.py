"""Products are as wide as they are said to be, and what users allow for their training is theirs."""

import threading

import pytest
import torch

from csulora_callback import Penalty, correct
from csulora_callback.correcting import Correcting
from csulora_callback.method import precision
from csulora_callback.method.grams import Grams
from csulora_callback.method.precision import as_given, full_width, width_of_logs, width_on
from tests.helpers.updates import make_update
from tests.state.test_stacks import adapter

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


@pytest.fixture(params=["high", "medium"])
def allowed(request):
    """Less than float32, as users allow it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_products_of_float32_are_float64_where_less_is_allowed(allowed):
    assert {width_of_logs(device) for device in (CPU, CUDA)} == {torch.float64}
    assert {width_on(device) for device in (CPU, CUDA)} == {torch.float64}
    assert width_of_logs(MPS) == width_on(MPS) == torch.float32  # has neither


def test_products_are_float32_where_it_is_whole():
    assert {width_of_logs(device) for device in (CPU, CUDA, MPS)} == {torch.float32}


@pytest.mark.parametrize("work", ["correct", "log", "record"])
def test_no_setting_of_the_process_is_touched_while_others_may_train(allowed, work, monkeypatch):
    layers, factors, subspace = adapter()
    correcting = Correcting("default", layers, subspace, Penalty.csulora(10.0))
    done = correcting.correct(factors)
    do = {
        "correct": lambda: correcting.correct(factors),
        "log": lambda: correcting.measure(factors),
        "record": lambda: done.record,
    }
    seen, begin = [], torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda one, other: seen.append(torch.get_float32_matmul_precision()) or begin(one, other),
    )
    do[work]()
    assert set(seen) == {allowed}


def test_an_exception_puts_the_setting_back(allowed):
    with pytest.raises(ValueError, match="inside"), full_width(CPU):
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == allowed


def test_threads_put_the_setting_back_as_it_was_before_the_first(allowed):
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_width(CPU):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with full_width(CPU):
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "highest"  # this one is still inside
    assert torch.get_float32_matmul_precision() == allowed


def test_autocast_makes_nothing_narrower():
    made = make_update(40, 64, 8, 16, 16, seed=0)
    of = [tensor[None] for tensor in (made.A, made.B, made.U, made.V, torch.ones(16))]
    free = correct(*made[:4], Penalty.csulora(10.0)), Grams.of(*of, torch.float32).energies()
    with torch.autocast("cpu", torch.bfloat16):
        bound = correct(*made[:4], Penalty.csulora(10.0)), Grams.of(*of, torch.float32).energies()
        with as_given(CPU):
            assert (made.A @ made.A.T).dtype == torch.float32
    assert torch.equal(free[0].lora_B, bound[0].lora_B)
    assert torch.equal(free[1], bound[1])


@pytest.mark.skipif(not precision._IS_SET_BY_BACKEND, reason="has one setting for all backends")
def test_settings_of_single_backends_are_found_again():
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert width_of_logs(CUDA) == torch.float64
        with full_width(CPU):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision == before[1]
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before
