"""Hooks that keep, while a model reads texts, some of the token vectors that enter its adapted modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from csulora_callback.models.reading import Inputs
from csulora_callback.models.training_rows import fixed_sample

_TRANSFER = 2**26  # bytes of vectors that wait on a device, at most about, before they are moved to the host

TokenVectors = dict[str, Tensor]
"""Token vectors ``(n, d_in)`` by module name, bfloat16, on the CPU; modules that share an input share the tensor.

Of an embedding, whose inputs are one-hot, how often each token was read ``(num_embeddings,)``, float32.
"""


@dataclass(frozen=True)
class Drawn:
    """What is read of a text: token ``ids``, of which those at ``places`` are drawn, from the ``first`` one on."""

    ids: Sequence[int]
    places: Tensor
    first: int
    inputs: Inputs


def draw(pairs: Sequence[tuple[Sequence[int], Inputs]], tokens: int, start: int = 0, cut: bool = False) -> list[Drawn]:
    """Texts out of which some token is drawn.

    Args:
        pairs: texts as token ids, and what the model gets beside them.
        tokens: how many are drawn at most, at random, always the same ones.
        start: of each text, which is longer than that, how many tokens stand before the first that may be drawn.
        cut: whether to end a text after the last of them, where nothing else belongs to it.

    Example:
        >>> drawn = draw([([5, 6, 7], {}), ([5, 8], {})], tokens=9, start=1)
        >>> [(text.ids, text.places.tolist(), text.first) for text in drawn]
        [([5, 8], [1], 0), ([5, 6, 7], [1, 2], 1)]
    """
    ordered = sorted(pairs, key=lambda pair: len(pair[0]))
    lengths = [len(row) - start for row, _ in ordered]
    chosen = torch.zeros(sum(lengths), dtype=torch.bool, device="cpu")
    chosen[fixed_sample(len(chosen), tokens)] = True
    places = [start + own.nonzero().squeeze(1) for own in chosen.split(lengths)]
    firsts = accumulate(map(len, places), initial=0)
    return [
        Drawn(row[: int(own[-1]) + 1] if cut and not inputs else row, own, first, inputs)
        for (row, inputs), own, first in zip(ordered, places, firsts, strict=False)
        if len(own)
    ]


class Listener:
    """Hooks that keep, of each pass, the vectors at some positions: so many in all, of each module.

    Args:
        layers: the modules, by name.
        model: which they are in.
        vectors: how many are drawn.
    """

    def __init__(self, layers: Mapping[str, nn.Module], model: nn.Module, vectors: int) -> None:
        self._layers, self._model, self._vectors = layers, model, vectors
        self._kept: dict[str, list[Tensor]] = {}  # of each module, and each of its calls in a pass, all vectors
        self._filled: Counter[str] = Counter()
        self._same: dict[str, str] = {}  # a module, and the first one that got the very same input
        self._waiting: list[tuple[str, int, Tensor]] = []  # a module, its call, and vectors on the module's device
        self._called: set[nn.Module] = set()  # of those that hold the modules

    @contextmanager
    def hooked(self) -> Iterator[None]:
        hooks = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._layers.items()]
        own = set(self._layers.values())
        holders = {module: None for module in self._model.modules() if own.intersection(module.children())}
        hooks += [holder.register_forward_pre_hook(self._call) for holder in holders]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, shape: torch.Size, texts: Sequence[Drawn]) -> None:
        """A pass over ids of this shape, one row for each text."""
        self._tokens, self._last, self._calls = shape.numel(), None, Counter()
        positions = torch.cat([row * shape[1] + text.places for row, text in enumerate(texts)])
        self._positions = {positions.device: positions}
        self._into = torch.cat([text.first + torch.arange(len(text.places), device="cpu") for text in texts])

    def end(self) -> None:
        """The pass is over."""
        self._last = None
        self._move()

    def vectors(self, may_miss: Collection[nn.Module]) -> TokenVectors:
        """What was kept; of modules that were never called and are among those that ``may_miss`` the texts, nothing.

        Raises:
            ValueError: if another module was never called, or some pass left one out.
        """
        missed = [name for name, module in self._layers.items() if name not in self._same and module not in may_miss]
        bypassed = [name for name in missed if self._is_bypassed(self._layers[name])]
        if bypassed:
            raise _bypassed(bypassed)
        for name in missed:
            raise _not_all_tokens(name, "none")
        for name, calls in self._kept.items():
            if self._filled[name] != len(calls) * self._vectors:  # some pass left it out
                raise _not_all_tokens(name, f"{self._filled[name]} in {len(calls)} times {self._vectors}")
        whole = {name: calls[0] if len(calls) == 1 else torch.cat(calls) for name, calls in self._kept.items()}
        return {name: whole[self._same[name]] for name in self._layers if name in self._same}

    def _call(self, holder: nn.Module, args: tuple) -> None:
        self._called.add(holder)

    def _is_bypassed(self, module: nn.Module) -> bool:
        """Whether what holds it was called and did not call it: it computes with the module's weights by itself."""
        return any(module is child for holder in self._called for child in holder.children())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple], None]:
        def before(module: nn.Module, args: tuple) -> None:
            if self._last is not None and args[0] is self._last[1]:
                self._same[name] = self._last[0]
                return
            self._last, self._same[name] = (name, args[0]), name
            vectors = args[0].flatten(0, -2)
            if len(vectors) != self._tokens:
                raise _not_all_tokens(name, str(len(vectors)))
            kept = vectors[self._positions_on(vectors.device)].to(torch.bfloat16)
            self._waiting.append((name, self._calls[name], kept))
            self._calls[name] += 1
            if sum(waiting.nbytes for _, _, waiting in self._waiting) > _TRANSFER:
                self._move()

        return before

    def _positions_on(self, device: torch.device) -> Tensor:
        if device not in self._positions:
            self._positions[device] = next(iter(self._positions.values())).to(device)
        return self._positions[device]

    def _move(self) -> None:
        """All that waits on a device goes to the host at once: each transfer waits for what the device computes."""
        for device in {kept.device for _, _, kept in self._waiting}:
            here = [waiting for waiting in self._waiting if waiting[2].device == device]
            moved = torch.cat([kept.flatten() for _, _, kept in here]).cpu()
            parts = moved.split([kept.numel() for _, _, kept in here])
            for (name, call, kept), part in zip(here, parts, strict=True):
                calls = self._kept.setdefault(name, [])
                if call == len(calls):
                    calls.append(torch.empty(self._vectors, kept.shape[1], dtype=kept.dtype, device="cpu"))
                calls[call][self._into] = part.view_as(kept)
                self._filled[name] += len(kept)
        self._waiting = []


def _bypassed(names: Sequence[str]) -> ValueError:
    """Kernels that fuse LoRA layers take their weights, and their hooks never hear of it."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ValueError(
        f"module '{names[0]}'{others}: expected to see its input, which a data-aware penalty measures by, but what "
        "holds it ran without calling it, as fused LoRA kernels do. Switch them off (axolotl: lora_mlp_kernel, "
        "lora_qkv_kernel and lora_o_kernel: false; unsloth: UNSLOTH_FUSED_LORA_DROPOUT=0 in the environment and a "
        "lora_dropout above 0), or use a penalty that reads weights alone, penalty=Penalty.guard(10)."
    )


def _not_all_tokens(name: str, got: str) -> ValueError:
    return ValueError(
        f"module '{name}': expected one vector for each token that the model reads, but got {got}. A data-aware "
        "penalty needs a model whose adapted modules see all tokens; use another penalty, or adapt fewer modules."
    )
