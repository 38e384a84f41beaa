"""A subspace on disk: it comes back as it was, or is refused with one clear error, whatever happened to the file."""

import dataclasses
import json
import math
import os
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from csulora_callback import CSULoRACallback, Penalty, SafetySubspace, correct, subspace_file
from csulora_callback.method.basis import Basis


def estimated() -> SafetySubspace:
    """One module that moved, one that did not, and names that JSON has to escape."""
    torch.manual_seed(0)
    base, aligned = (nn.ModuleDict({"q_proj": nn.Linear(8, 6), "größe": nn.Linear(5, 7)}) for _ in range(2))
    aligned["größe"].load_state_dict(base["größe"].state_dict())
    return SafetySubspace.estimate(base, aligned, rank=3, progress=False)


SUBSPACE = estimated()
NAME = "q_proj"


def changed(**parts) -> dict[str, Basis]:
    """The bases with one of them changed, which no constructor sees."""
    return {**SUBSPACE.bases, NAME: dataclasses.replace(SUBSPACE[NAME], **parts)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "subspace.safetensors"


def assert_same(left: SafetySubspace, right: SafetySubspace) -> None:
    assert list(left) == list(right)
    assert left.metadata == right.metadata
    for name in left:
        for field in ("U", "V", "singular_values"):
            mine, other = getattr(left[name], field), getattr(right[name], field)
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)
        assert left[name].displacement == right[name].displacement
    assert left.fingerprint == right.fingerprint


def test_comes_back_as_it_was(path):
    path = path.parent / "new" / "folder" / path.name
    SUBSPACE.save(path)
    assert_same(SafetySubspace.load(path), SUBSPACE)
    assert SUBSPACE["größe"].U.shape == (7, 0)
    assert SUBSPACE.metadata["rank"] == 3
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    whole = SUBSPACE.truncated(2)
    whole.save(path)
    assert_same(SafetySubspace.load(path), whole)


def test_a_file_that_is_not_there_or_is_another_one(path):
    with pytest.raises(FileNotFoundError, match=r"`subspace`: .*SafetySubspace\.save wrote, but .* is not there"):
        SafetySubspace.load(path)
    with pytest.raises(FileNotFoundError, match=r"is a folder; SafetySubspace\.estimate makes one"):
        SafetySubspace.load(path.parent)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"expected a safety subspace of format 5, but .* another safetensors file"):
        SafetySubspace.load(path)
    save_file({"a": torch.ones(2)}, path, metadata={"csulora_subspace": "4"})
    with pytest.raises(ValueError, match=r"expected a safety subspace of format 5, but .* is of another format"):
        SafetySubspace.load(path)


def test_a_place_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        SUBSPACE.save(tmp_path / "file" / "subspace.safetensors")


# What happens to bytes.


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """A few bits flipped, mostly in the header, which says what everything else is; or an end cut off; or both."""
    header = 8 + int.from_bytes(whole[:8], "little")
    content = bytearray(whole)
    kind = chance.choice(["flip", "flip", "flip", "cut", "both", "insert"])
    if kind in ("flip", "both"):
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            place = chance.randrange(header if chance.random() < 0.7 else len(content))
            content[place] ^= 1 << chance.randrange(8)
    if kind in ("cut", "both"):
        del content[chance.randrange(len(content)) :]
    if kind == "insert":
        content.insert(chance.randrange(len(content)), chance.randrange(256))
    return bytes(content)


def assert_robust(path: Path, seed: int, times: int) -> None:
    SUBSPACE.save(path)
    whole, chance, refusals = path.read_bytes(), random.Random(seed), []
    for _ in range(times):
        path.write_bytes(damaged(whole, chance))
        try:
            loaded = SafetySubspace.load(path)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert_same(loaded, SUBSPACE)
    assert len(refusals) > 0.9 * times
    assert all("`subspace`" in refusal for refusal in refusals)


def test_damage_is_refused_or_does_no_harm(path):
    assert_robust(path, seed=0, times=1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_much_damage_is_refused_or_does_no_harm(path, seed):
    assert_robust(path, seed, times=2000)


def test_a_file_of_every_shorter_length_is_refused(path):
    SUBSPACE.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"`subspace`: {re.escape(str(path))} is corrupt"):
            SafetySubspace.load(path)
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match="its content has the fingerprint"):
        SafetySubspace.load(path)


# What a header says.


def write_raw(path: Path, bases: dict[str, Basis], **header: str) -> None:
    """A file whose fingerprint fits, whatever is in it: nobody damaged it, somebody made it."""
    tensors = {f"{name}.{field}": getattr(bases[name], field) for name in bases for field in ("U", "V")}
    tensors |= {f"{name}.singular_values": basis.singular_values for name, basis in bases.items()}
    own = {
        "csulora_subspace": subspace_file.FORMAT,
        "metadata": json.dumps(SUBSPACE.metadata),
        "displacement": json.dumps({name: basis.displacement for name, basis in bases.items()}),
    }
    own |= header
    if all(tensor.dtype == torch.float32 for tensor in tensors.values()):
        own["sha256"] = subspace_file._content_hash(bases, own)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=own)


def test_what_the_other_cases_change_would_be_accepted(path):
    write_raw(path, SUBSPACE.bases)
    assert_same(SafetySubspace.load(path), SUBSPACE)


U, V, SIGMA = SUBSPACE[NAME].U, SUBSPACE[NAME].V, SUBSPACE[NAME].singular_values
BASES = {
    "U × 1000": ({"U": 1000 * U}, f"module '{NAME}': expected orthonormal columns in U, but got an entry of 1e+06"),
    "V twice the same": ({"V": V[:, [0, 0, 1]]}, f"module '{NAME}': expected orthonormal columns in V"),
    "float64": ({"U": U.double()}, "expected float32 tensors, but got torch.float64"),
    "bfloat16": ({"V": V.bfloat16()}, "expected float32 tensors, but got torch.bfloat16"),
    "integers": ({"singular_values": SIGMA.int()}, "expected float32 tensors, but got torch.int32"),
    "float8": ({"U": U.to(torch.float8_e4m3fn)}, "expected float32 tensors, but got torch.float8"),
    "transposed": ({"U": U.T.contiguous()}, "as many columns in U and in V as singular values, but got 6, 3 and 3"),
    "flat": ({"V": V.flatten()}, "expected V in float32 with 2 axes, but got torch.float32 of shape (24,)"),
    "NaN": ({"U": U + math.nan}, "expected finite values in U, but got NaN or Inf"),
    "ascending": ({"singular_values": SIGMA.flip(0)}, "expected singular values ≥ 0 in descending order"),
    "negative": ({"singular_values": -SIGMA.flip(0)}, "expected singular values ≥ 0 in descending order"),
    "more than ‖D‖": ({"displacement": 0.1}, "expected singular values of norm ‖D‖ = 0.1 at most"),
    "negative ‖D‖": ({"displacement": -1.0}, "expected a finite displacement ≥ 0, but got -1.0"),
    "‖D‖ NaN": ({"displacement": math.nan}, "expected a finite displacement ≥ 0, but got nan"),
    "‖D‖ Inf": ({"displacement": math.inf}, "expected a finite displacement ≥ 0, but got inf"),
    "‖D‖ missing": ({"displacement": None}, "expected a finite displacement ≥ 0, but got None"),
    "‖D‖ a list": ({"displacement": [1.0]}, "expected a finite displacement ≥ 0, but got [1.0]"),
    "‖D‖ large": ({"displacement": 10**400}, "expected a finite displacement ≥ 0, but got 1000"),
}


@pytest.mark.parametrize("case", BASES)
def test_wrong_bases_are_refused(path, case):
    parts, message = BASES[case]
    bases = changed(**parts)
    write_raw(path, bases)
    with pytest.raises(ValueError, match=f"^`subspace`: .*{re.escape(message)}"):
        SafetySubspace.load(path)
    if "float32 tensors" not in message:
        with pytest.raises(ValueError, match=f"^`subspace`: .*{re.escape(message)}"):
            SafetySubspace(bases, SUBSPACE.metadata)  # an object is asked the same


DEEP = "[" * 100_000 + "]" * 100_000


def metadata(side: str = "aligned", **fields) -> str:
    return rule(**{side: {**SUBSPACE.metadata[side], **fields}})


def rule(**fields) -> str:
    return json.dumps({**SUBSPACE.metadata, **fields})


HEADERS = {
    "deep metadata": ({"metadata": DEEP}, "is corrupt (maximum recursion depth"),
    "deep displacement": ({"displacement": DEEP}, "is corrupt (maximum recursion depth"),
    "a list": ({"metadata": "[]"}, "is corrupt (expected a JSON object, but got [])"),
    "null": ({"metadata": "null"}, "is corrupt (expected a JSON object, but got null)"),
    "no JSON": ({"metadata": "{"}, "is corrupt (Expecting property name"),
    "NaN": ({"metadata": '{"rank": NaN}'}, "expected metadata that JSON can hold, but got other"),
    "empty": ({"metadata": "{}"}, "expected metadata['base'] to be dict, but got None"),
    "side of text": ({"metadata": '{"base": "org/base"}'}, "expected metadata['base'] to be dict, but got 'org/base'"),
    "no dtypes": (
        {"metadata": metadata(dtypes=None)},
        "metadata['aligned']['dtypes'] to be list, but got None",
    ),
    "dtype of text": ({"metadata": metadata(dtypes="float32")}, "['dtypes'] to be list, but got 'float32'"),
    "dtype a number": ({"metadata": metadata(dtypes=[3])}, "['aligned']['dtypes'][…] to be str, but got 3"),
    "no fingerprint": ({"metadata": metadata(fingerprint=None)}, "['aligned']['fingerprint'] to be str, but got None"),
    "base's, too": ({"metadata": metadata("base", fingerprint=7)}, "['base']['fingerprint'] to be str, but got 7"),
    "no source": ({"metadata": metadata(source=3)}, "expected metadata['aligned']['source'] to be str, but got 3"),
    "rank of text": (
        {"metadata": rule(rank="3")},
        "metadata['rank'] to be int | None",
    ),
    "energy of text": ({"metadata": rule(energy="1")}, "metadata['energy'] to be int"),
    "another displacement": ({"displacement": "3.0"}, "is corrupt (expected a JSON object, but got 3.0)"),
    "module missing": ({"displacement": '{"k_proj": 1.0}'}, "is corrupt (File does not contain tensor k_proj.U)"),
    "half a character": ({"displacement": r'{"\ud800": 1.0}'}, "is corrupt ("),
    "many digits": ({"displacement": '{"q_proj": ' + "1" * 5000 + "}"}, "is corrupt (Exceeds the limit"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_headers_are_refused(path, case):
    header, message = HEADERS[case]
    write_raw(path, SUBSPACE.bases, **header)
    with pytest.raises(ValueError, match=f"^`subspace`: .*{re.escape(message)}"):
        SafetySubspace.load(path)


def test_headers_that_safetensors_does_not_write(path):
    SUBSPACE.save(path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    own = header["__metadata__"]
    for field in own:
        rest = {key: value for key, value in own.items() if key != field}
        for other in (rest, {**rest, field: 3}, {**rest, field: None}, {**rest, field: [own[field]]}):
            text = json.dumps({**header, "__metadata__": other}).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
            with pytest.raises(ValueError, match="`subspace`"):
                SafetySubspace.load(path)
    kinds = ["BOOL", "F4", "F6_E2M3", "F8_E5M2", "F8_E8M0", "I8", "I16", "U16", "U32", "I64", "C64", "F16", "F33", ""]
    entry = f"{NAME}.U"
    for kind in kinds:
        text = json.dumps({**header, entry: {**header[entry], "dtype": kind}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        with pytest.raises(ValueError, match="`subspace`"):
            SafetySubspace.load(path)
    for text in (b"\xff" * 100, b"{" * 100_000, b"[]", b"{}", b"null", DEEP.encode(), b""):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(ValueError, match="`subspace`"):
            SafetySubspace.load(path)


# Objects.


def test_metadata_of_an_object_are_asked_for_before_they_are_needed(path):
    for record, message in (
        ({}, "expected metadata['base'] to be dict, but got None"),
        ([], "expected metadata to be dict, but got []"),
        ({**SUBSPACE.metadata, "note": {1, 2}}, "expected metadata that JSON can hold, but got other (Object of type"),
        ({**SUBSPACE.metadata, "note": math.inf}, "expected metadata that JSON can hold, but got other (Out of range"),
    ):
        subspace = SafetySubspace(SUBSPACE.bases, record)
        with pytest.raises(ValueError, match=f"^`subspace`: {re.escape(message)}"):
            CSULoRACallback(subspace=subspace)
        with pytest.raises(ValueError, match=f"^`subspace`: {re.escape(message)}"):
            subspace.save(path)
    assert not os.listdir(path.parent)
    CSULoRACallback(subspace=SUBSPACE)


def test_a_subspace_of_nothing_keeps_all_of_it():
    still = Basis(torch.zeros(8, 0), torch.zeros(6, 0), torch.zeros(0), 0.0)
    assert SafetySubspace({"q_proj": still}, SUBSPACE.metadata).energy_kept == 1.0


@pytest.mark.parametrize(("dtype", "said"), [(torch.float32, 4e-8), (torch.float16, 1.4e-4), (torch.bfloat16, 1.1e-3)])
def test_corrections_by_vectors_of_a_narrower_dtype_are_wrong_by_what_the_table_says(dtype, said):
    """Of an update of which a half leans into the subspace; the table has the largest of many."""
    assert f"| {str(dtype).removeprefix('torch.')} | {said:.1e} |".replace("e-0", "e-").replace(".0e", "e") in (
        subspace_file.__doc__
    )
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(size, 16 + 12, generator=generator, dtype=torch.float64) for size in (512, 384)]
    (U, B), (V, A) = ((torch.linalg.qr(side[:, 16:])[0], side[:, :16] / len(side) ** 0.5) for side in sides)
    B[:, :8], A[:, :8] = B[:, :8] + 0.5 * U[:, :8], A[:, :8] + 0.5 * V[:, :8]
    errors = []
    for penalty in (Penalty.guard(10.0), Penalty.csulora(10.0)):
        exact, kept = (
            correct(A.T, B, *bases, penalty, rank="expand")
            for bases in ((U, V), (U.to(dtype).double(), V.to(dtype).double()))
        )
        difference = exact.lora_B @ exact.lora_A - kept.lora_B @ kept.lora_A
        errors.append((difference.norm() / (B @ A.T).norm()).item())
    assert said / 5 < max(errors) <= said
