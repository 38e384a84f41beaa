"""How long an inspection takes at the shapes of Llama-3.2-1B."""

import json
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from csulora_callback import SafetySubspace
from csulora_callback.method.basis import Basis
from csulora_callback.models.factors import to_peft_state_dict
from tests.helpers.command_line import run

HIDDEN, SMALL, INNER, LAYERS, RANK, LORA = 2048, 512, 8192, 16, 64, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (SMALL, HIDDEN),
    "self_attn.v_proj": (SMALL, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def random_basis(d_out: int, d_in: int, generator: torch.Generator) -> Basis:
    U, V = (torch.linalg.qr(torch.randn(d, RANK, generator=generator))[0].contiguous() for d in (d_out, d_in))
    return Basis(U, V, torch.linspace(2.0, 1.0, RANK), displacement=20.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A folder with an adapter of rank 16 on all matrices, and a subspace of rank 64."""
    folder, generator = tmp_path_factory.mktemp("llama"), torch.Generator().manual_seed(0)
    bases, factors = {}, {}
    for layer in range(LAYERS):
        for kind, (d_out, d_in) in SHAPES.items():
            name = f"model.layers.{layer}.{kind}"
            bases[name] = random_basis(d_out, d_in, generator)
            factors[name] = torch.randn(LORA, d_in, generator=generator), torch.randn(d_out, LORA, generator=generator)
    origin = {"source": "random", "fingerprint": "0" * 64, "dtypes": ["bfloat16"]}
    metadata = {"base": origin, "aligned": origin, "rank": RANK, "energy": None}
    SafetySubspace(bases, metadata).save(folder / "subspace.safetensors")
    save_file(to_peft_state_dict(factors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    kinds = [kind.rpartition(".")[2] for kind in SHAPES]
    LoraConfig(r=LORA, target_modules=kinds, task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_inspection_takes_less_than_five_seconds(llama):
    started = time.perf_counter()
    status, output, error = run("inspect", llama, "--subspace", llama / "subspace.safetensors", "--json")
    seconds = time.perf_counter() - started
    assert status == 0, error
    seen = json.loads(output)["states"]["adapter"]
    assert len(seen["modules"]) == 112
    assert seen["together"]["shares"]["aligned"] == pytest.approx(seen["together"]["chance"]["aligned"], rel=0.1)
    assert abs(seen["together"]["undone"]) < 1.0  # a random update of this size points nowhere
    print(f"inspected in {seconds:.2f} s")
    assert seconds < 5.0
