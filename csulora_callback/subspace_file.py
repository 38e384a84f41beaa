"""How a safety subspace lies on disk: one safetensors file whose content has to fit the fingerprint it states.

Singular vectors are kept in float32: 0.16 GB for Llama-3.2-1B's linear layers at the relative rank, 1.2 GB (computed)
for Llama-3.1-8B's, 7 to 8 % of a checkpoint. Two bytes would halve that, at an error that is not nothing. Against
vectors in float64, on matrices of 1B's shapes and updates in and beside the subspace, the worse of guard and csulora:

| kept in | largest error of X*, over ‖Δ‖ | of a relative energy | entry of UᵀU − I |
|---|---|---|---|
| float32 | 4e-8 | 3e-10 | 7e-9 |
| float16 | 1.4e-4 | 2e-6 | 6e-5 |
| bfloat16 | 1.1e-3 | 6e-5 | 7e-4 |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from csulora_callback.method.basis import Basis
from csulora_callback.models.checksum import combine, digest
from csulora_callback.models.whole_files import write_whole

FORMAT = "5"
"""Also part of a cache's key: raise it whenever the same weights would give another file."""


def fingerprint(bases: Mapping[str, Basis]) -> str:
    """Of the content of all bases, by their :func:`~csulora_callback.models.checksum.digest`: damage shows.

    Example:
        >>> import torch
        >>> basis = Basis(torch.eye(2)[:, :1], torch.eye(3)[:, :1], torch.ones(1), displacement=1.0)
        >>> len(fingerprint({"q_proj": basis}))
        64
    """
    digests = {}
    for name in sorted(bases):
        parts = {"U": bases[name].U, "V": bases[name].V, "singular_values": bases[name].singular_values}
        digests |= {f"{name}.{part}": digest(tensor) for part, tensor in parts.items()}
        digests[f"{name}.displacement"] = repr(bases[name].displacement)
    return combine(digests)


def check_metadata(metadata: object) -> None:
    """Refuse, with a ValueError, a record that does not say which weights a subspace is of.

    Example:
        >>> side = {"source": "org/model", "fingerprint": "0f3a", "dtypes": ["bfloat16"]}
        >>> check_metadata({"base": side, "aligned": side, "rank": 64, "energy": None})
    """
    try:
        json.dumps(metadata, allow_nan=False)  # it goes into the record of every checkpoint
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`subspace`: expected metadata that JSON can hold, but got other ({error}).") from error
    _require(metadata, dict, "metadata")
    for side in ("base", "aligned"):
        origin = _require(metadata.get(side), dict, f"metadata['{side}']")
        for field in ("source", "fingerprint"):
            _require(origin.get(field), str, f"metadata['{side}']['{field}']")
        for dtype in _require(origin.get("dtypes"), list, f"metadata['{side}']['dtypes']"):
            _require(dtype, str, f"metadata['{side}']['dtypes'][…]")
    for field, kind in (("rank", int | None), ("energy", int | float | None)):
        if field not in metadata:  # both None is a rule too, the relative rank, and one has to say so
            raise ValueError(f"`subspace`: expected metadata['{field}'], but there is none. Estimate it again.")
        _require(metadata[field], kind, f"metadata['{field}']")


def write(bases: Mapping[str, Basis], metadata: dict, path: Path) -> None:
    """Write one file; it appears whole or not at all.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if :func:`read` would refuse the metadata.
    """
    check_metadata(metadata)
    tensors = {}
    for name, basis in bases.items():
        tensors[f"{name}.U"] = basis.U.contiguous()
        tensors[f"{name}.V"] = basis.V.contiguous()
        tensors[f"{name}.singular_values"] = basis.singular_values.contiguous()
    header = {
        "csulora_subspace": FORMAT,
        "metadata": json.dumps(metadata),
        "displacement": json.dumps({name: basis.displacement for name, basis in bases.items()}),
    }
    header["sha256"] = _content_hash(bases, header)
    try:
        write_whole(path, lambda place: save_file(tensors, place, metadata=header))
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{path}: the subspace cannot be written ({error}).") from error


def read(path: Path) -> tuple[dict[str, Basis], dict]:
    """The bases and the metadata of a file that :func:`write` wrote. Whether they are bases is not checked here.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is corrupt, not a safety subspace, of an unknown format, or if its content does not
            have the fingerprint it states.
    """
    if not path.is_file():
        got = "is a folder; SafetySubspace.estimate makes one of two checkpoints" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"`subspace`: expected a file that SafetySubspace.save wrote, but {path} {got}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            known = header.get("csulora_subspace") == FORMAT
            bases, metadata, found = _content(file, header) if known else ({}, {}, "")
            expected = header["sha256"] if known else ""
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"`subspace`: {path} is corrupt ({error}). Estimate it again.") from error
    if not known:
        raise ValueError(
            f"`subspace`: expected a safety subspace of format {FORMAT}, but {path} is "
            f"{'another safetensors file' if 'csulora_subspace' not in header else 'of another format'}. "
            "Estimate it again with SafetySubspace.estimate(...).save(path)."
        )
    if found != expected:
        raise ValueError(
            f"`subspace`: {path} is corrupt: its content has the fingerprint {found[:12]}…, but "
            f"{expected[:12]}… was expected. Estimate it again."
        )
    check_metadata(metadata)
    return bases, metadata


def _content(file: safe_open, header: Mapping[str, str]) -> tuple[dict[str, Basis], dict, str]:
    """Bases, metadata, and the fingerprint of both."""
    bases = {}
    for name, displacement in _object(header["displacement"]).items():
        parts = [_float32(file.get_tensor(f"{name}.{part}")) for part in ("U", "V", "singular_values")]
        bases[name] = Basis(*parts, displacement)
    return bases, _object(header["metadata"]), _content_hash(bases, header)


def _float32(tensor: Tensor) -> Tensor:
    # The fingerprint is one of bytes: the same bytes read as another type would have it too.
    if tensor.dtype != torch.float32:
        raise ValueError(f"expected float32 tensors, but got {tensor.dtype}")
    return tensor


def _object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, but got {text[:50]}")
    return value


def _require(value: Any, kind: type | UnionType, what: str) -> Any:
    if not isinstance(value, kind):
        kind = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"`subspace`: expected {what} to be {kind}, but got {value!r}. Estimate it again.")
    return value


def _content_hash(bases: Mapping[str, Basis], header: Mapping[str, str]) -> str:
    """Covers the tensors, through their fingerprint, and what the header says of them."""
    content = (fingerprint(bases), header["metadata"], header["displacement"])
    return hashlib.sha256("\n".join(content).encode()).hexdigest()
