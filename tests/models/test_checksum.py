"""The content digest: equal for equal weights wherever they lie, and another one for all that happens to weights."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from csulora_callback.models.checksum import _weights, checksum, digest, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.float8_e4m3fn, torch.bool]
CHUNK = 1 << 18  # numbers of four bytes that are summed together
MORE = settings(derandomize=True, deadline=None, max_examples=60)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of any bits that the dtype has."""
    generator = torch.Generator().manual_seed(seed)
    size = int(np.prod(shape)) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def by_hand(tensor: torch.Tensor) -> str:
    """The same with whole numbers of any size, from the published SplitMix64."""

    def weight(place: int) -> int:
        number = (place + 1) * 0x9E3779B97F4A7C15 % 2**64
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
        return (number ^ (number >> 31)) | 1

    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    kind = next(kind for kind in ("<i4", "<i2", "u1") if len(content) % np.dtype(kind).itemsize == 0)
    total = sum(weight(place) * int(number) for place, number in enumerate(np.frombuffer(content, kind))) % 2**64
    total = total - 2**64 if total >> 63 else total
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} {[total]}".encode()).hexdigest()


@MORE
@given(st.sampled_from(DTYPES), st.integers(0, 9), st.integers(1, 9), st.integers(0, 100))
def test_is_what_whole_numbers_give(dtype, rows, columns, seed):
    tensor = random((rows, columns), dtype, seed)
    assert digest(tensor) == by_hand(tensor)


@MORE
@given(st.sampled_from(DTYPES), st.integers(1, 9), st.integers(1, 9), st.data())
def test_one_element_of_any_dtype_shows(dtype, rows, columns, data):
    tensor = random((rows, columns), dtype)
    other = tensor.clone()
    place = data.draw(st.integers(0, tensor.numel() * dtype.itemsize - 1))
    other.flatten().view(torch.uint8)[place] ^= 1 if dtype == torch.bool else data.draw(st.integers(1, 255))
    assert digest(other) != digest(tensor)


@MORE
@given(st.sampled_from(DTYPES[:4]), st.lists(st.tuples(st.integers(0, 799), st.integers(0, 63)), min_size=1))
def test_damaged_bits_show(dtype, flips):
    words = random((800,), torch.int64)
    damaged = words.clone()
    for place, bit in flips:
        damaged[place] ^= -(1 << 63) if bit == 63 else 1 << bit
    assume(not torch.equal(words, damaged))
    assert digest(words.view(dtype)) != digest(damaged.view(dtype))


def two_signs(tensor: torch.Tensor) -> None:
    """The highest bits of two words, which a sum modulo 2⁶⁴ of words of eight bytes forgets."""
    tensor.view(-1)[[3, 7]] *= -1


def all_signs(tensor: torch.Tensor) -> None:
    tensor.mul_(-1)


def zeros_turned(tensor: torch.Tensor) -> None:
    tensor.view(-1)[1000:1008] *= -1


def steps_that_cancel(tensor: torch.Tensor) -> None:
    """By weights that grow evenly, 1 − 2 + 1 would be nothing."""
    bits = tensor.view(torch.int32).view(-1)
    bits[500:503] += torch.tensor([1, -2, 1], dtype=torch.int32)


def elements_swapped(tensor: torch.Tensor) -> None:
    tensor.view(-1)[[0, 5]] = tensor.view(-1)[[5, 0]]


def rows_swapped(tensor: torch.Tensor) -> None:
    tensor[[0, 1]] = tensor[[1, 0]]


def rows_of_chunks_swapped(tensor: torch.Tensor) -> None:
    rows = CHUNK * 4 // tensor.dtype.itemsize // tensor.shape[1]
    tensor[: 2 * rows] = tensor[: 2 * rows].roll(rows, 0)


def rounded(tensor: torch.Tensor) -> None:
    tensor.copy_((tensor.float() * (1 + 2**-7)).to(tensor.dtype))


CHANGES = [two_signs, all_signs, zeros_turned, steps_that_cancel, elements_swapped, rows_swapped]
CHANGES += [rows_of_chunks_swapped, rounded]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_happens_to_weights_shows(dtype, change):
    tensor = torch.randn(2200, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor.view(-1)[1000:1008] = 0.0
    before, other = digest(tensor), tensor.clone()
    change(other)
    assert not torch.equal(other.view(torch.uint8), tensor.view(torch.uint8))
    assert digest(other) != before == digest(tensor.clone())


@MORE
@given(st.sampled_from(DTYPES), st.integers(1, 6), st.integers(1, 6))
def test_shape_and_dtype_count(dtype, rows, columns):
    tensor = random((rows, columns), dtype)
    other = digest(tensor.reshape(columns, rows))
    assert (other == digest(tensor)) == (rows == columns)
    if dtype != torch.uint8:
        assert digest(tensor.view(torch.uint8)) != digest(tensor)
    longer = torch.cat([tensor.view(torch.uint8).flatten(), torch.zeros(1, dtype=torch.uint8)])
    assert digest(longer) != digest(tensor.view(torch.uint8).flatten())  # what is added to fill a word up would be so


@MORE
@given(st.sampled_from(DTYPES), st.integers(1, 6), st.integers(1, 6), st.integers(0, 9))
def test_where_and_how_they_lie_does_not_count(dtype, rows, columns, offset):
    tensor = random((rows, columns), dtype)
    inside = torch.cat([random((offset,), dtype, seed=1), tensor.flatten()])[offset:].reshape(rows, columns)
    assert digest(inside) == digest(tensor)
    assert digest(tensor.T.contiguous().T) == digest(tensor)
    assert digest(tensor.clone().requires_grad_(dtype == torch.float32)) == digest(tensor)


def test_names_count_and_their_order_does_not_in_a_fingerprint():
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert checksum({"a": one, "b": other}) != checksum({"a": other, "b": one})
    digests = {"a": digest(one), "b": digest(other)}
    assert fingerprint(digests) == fingerprint(dict(reversed(digests.items())))
    assert fingerprint(digests) != fingerprint({"a": digests["b"], "b": digests["a"]})
    assert fingerprint(digests) != fingerprint({"a": digests["a"]})


def test_inference_mode_and_a_default_device_change_nothing():
    """In a thread of its own, where nothing was computed before."""
    weights, found = random((5, 7), torch.float32), []

    def work() -> None:
        _weights.cache_clear()
        with torch.inference_mode(), torch.device("meta"):
            found.append(digest(weights))
        found.append(digest(weights))

    with ThreadPoolExecutor() as thread:
        thread.submit(work).result()
    assert found == [by_hand(weights)] * 2
