"""Shapes of Llamas: those that are measured, and the published ones that costs are computed for."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, fields, replace

from transformers import LlamaConfig

from recipes.schema.measured import Benchmark
from recipes.schema.recipe import RecipeError

Size = tuple[int, int]
"""``(d_out, d_in)`` of a linear layer."""


def label(size: Size) -> str:
    """For a key.

    Example:
        >>> label((512, 2048))
        '512x2048'
    """
    return f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, by the names that a recipe gives them.

    Example:
        >>> LLAMA["Llama-3.1-8B"].parameters, len(LLAMA["Llama-3.1-8B"].modules)
        (8030261248, 224)
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # whether the embedding is the output layer too

    @classmethod
    def of(cls, benchmark: Benchmark) -> Shape:
        """The one that a recipe names."""
        return cls(**{field.name: getattr(benchmark, field.name) for field in fields(cls)})

    @property
    def linears(self) -> dict[str, Size]:
        """The linear layers of one decoder layer, by the end of their name."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden_size),
            "self_attn.k_proj": (keys, self.hidden_size),
            "self_attn.v_proj": (keys, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, queries),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def modules(self) -> dict[str, Size]:
        """All linear layers that LoRA is attached to with ``"all-linear"``, by full name."""
        layers = range(self.layers)
        return {f"model.layers.{layer}.{name}": size for layer in layers for name, size in self.linears.items()}

    @property
    def counts(self) -> Counter[Size]:
        """How many of these there are of each size."""
        return Counter(self.modules.values())

    @property
    def samples(self) -> dict[Size, str]:
        """One module of each size, out of the layer in the middle."""
        return {size: f"model.layers.{self.layers // 2}.{name}" for name, size in reversed(self.linears.items())}

    @property
    def parameters(self) -> int:
        """Their number, embeddings and norms included."""
        linear = sum(rows * columns for rows, columns in self.modules.values())
        norms = (2 * self.layers + 1) * self.hidden_size
        return linear + norms + self.vocabulary * self.hidden_size * (1 if self.tied else 2)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint in bfloat16."""
        return 2 * self.parameters

    def scaled(self, factor: float, layers: int, vocabulary: int) -> Shape:
        """All sides times ``factor``."""
        names = ("hidden_size", "intermediate_size", "head_dim")
        sides = {name: int(getattr(self, name) * factor) for name in names}
        return replace(self, **sides, layers=layers, vocabulary=vocabulary)

    def config(self) -> LlamaConfig:
        """What transformers builds the model from."""
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=1,
        )


def check(benchmark: Benchmark) -> None:
    """Refuse shapes that no Llama has, and growth that cannot be fitted.

    Raises:
        RecipeError: naming the key.
    """

    def refuse(key: str, expected: str, got: object) -> None:
        raise RecipeError(f"'benchmark.{key}': expected {expected}, but got {got!r}")

    if benchmark.heads % benchmark.kv_heads:
        refuse("kv_heads", f"a divisor of the {benchmark.heads} heads", benchmark.kv_heads)
    if benchmark.scratch is not None and not os.path.isdir(benchmark.scratch):
        refuse("scratch", "a folder that is there", benchmark.scratch)
    if benchmark.rank is not None and benchmark.rank < 1:
        refuse("rank", "a whole number ≥ 1", benchmark.rank)
    for key in ("ranks", "depths"):
        if not getattr(benchmark, key) or min(getattr(benchmark, key)) < 1:
            refuse(key, "whole numbers ≥ 1", getattr(benchmark, key))
    if not benchmark.sizes or min(benchmark.sizes) <= 0:
        refuse("sizes", "numbers > 0", benchmark.sizes)
    for factor in (1.0, *benchmark.sizes):  # rotary embeddings turn pairs
        if benchmark.head_dim * factor < 2 or benchmark.head_dim * factor % 2:
            refuse("head_dim", f"an even number, also times {factor:g}", benchmark.head_dim)
        for key in ("hidden_size", "intermediate_size"):
            if getattr(benchmark, key) * factor % 1:
                refuse(key, f"a whole number, also times {factor:g}", getattr(benchmark, key))


LLAMA = {
    "Llama-3.1-8B": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
    "Llama-3.1-70B": Shape(8192, 28672, 80, 64, 8, 128, 128256, tied=False),
    "Llama-3.1-405B": Shape(16384, 53248, 126, 128, 8, 128, 128256, tied=False),
}
