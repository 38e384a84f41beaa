"""How a safety subspace lies on disk: one safetensors file whose content has to fit the fingerprint it states."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from csulora_callback.method.basis import Basis

FORMAT = "3"
"""Also part of a cache's key: raise it whenever the same weights would give another file."""


def fingerprint(bases: Mapping[str, Basis]) -> str:
    """SHA-256 over the content of all bases.

    Example:
        >>> import torch
        >>> basis = Basis(torch.eye(2)[:, :1], torch.eye(3)[:, :1], torch.ones(1), displacement=1.0)
        >>> len(fingerprint({"q_proj": basis}))
        64
    """
    sha = hashlib.sha256()
    for name in sorted(bases):
        basis = bases[name]
        sha.update(f"{name}:{tuple(basis.U.shape)}:{tuple(basis.V.shape)}:{basis.displacement!r}".encode())
        for part in (basis.U, basis.V, basis.singular_values):
            sha.update(part.contiguous().numpy().tobytes())
    return sha.hexdigest()


def write(bases: Mapping[str, Basis], metadata: dict, path: Path) -> None:
    """Write one file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(tensors, temporary, metadata=header)
    os.replace(temporary, path)


def read(path: Path) -> tuple[dict[str, Basis], dict]:
    """The bases and the metadata of a file that :func:`write` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is corrupt, not a safety subspace, of an unknown format, or if its content does not
            have the fingerprint it states.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`subspace`: expected a file that SafetySubspace.save wrote, but {path} is not there."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("csulora_subspace") != FORMAT:
                raise ValueError(
                    f"`subspace`: expected a safety subspace of format {FORMAT}, but {path} is "
                    f"{'another safetensors file' if 'csulora_subspace' not in header else 'of another format'}. "
                    "Estimate it again with SafetySubspace.estimate(...).save(path)."
                )
            bases = {
                name: Basis(*(file.get_tensor(f"{name}.{part}") for part in ("U", "V", "singular_values")), norm)
                for name, norm in json.loads(header["displacement"]).items()
            }
        metadata, expected = json.loads(header["metadata"]), header["sha256"]
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"`subspace`: {path} is corrupt ({error}). Estimate it again.") from error
    found = _content_hash(bases, header)
    if found != expected:
        raise ValueError(
            f"`subspace`: {path} is corrupt: its content has the fingerprint {found[:12]}…, but "
            f"{expected[:12]}… was expected. Estimate it again."
        )
    return bases, metadata


def _content_hash(bases: Mapping[str, Basis], header: Mapping[str, str]) -> str:
    """Covers the tensors, through their fingerprint, and what the header says of them."""
    content = (fingerprint(bases), header["metadata"], header["displacement"])
    return hashlib.sha256("\n".join(content).encode()).hexdigest()
