"""What the planner takes for granted: cards from their datasheets, and numbers that others published, each with source.

None of these was fitted to a number that `docs/planner.md` checks against. Where no source gives a number, it says
"assumed", and the table of sensitivities shows what it matters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_fapo.errors import ConfigError

GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU, by its datasheet."""

    name: str
    memory: float
    """Bytes that a program can have."""
    flops: float
    """Dense BF16 floating-point operations a second."""
    bandwidth: float
    """Bytes a second from its memory."""
    nvlink: float
    """Bytes a second to the other GPUs of its node, one way."""
    pcie: float
    """Bytes a second to the host, one way."""
    network: float
    """Bytes a second to other nodes, one way: its share of the node's adapters."""
    per_node: int = 8
    source: str


CARDS = {
    "h100": Card(
        name="H100 SXM 80 GB",
        memory=79.1 * 2**30,
        flops=989e12,
        bandwidth=3.35e12,
        nvlink=450e9,
        pcie=64e9,
        network=50e9,
        source="NVIDIA H100 datasheet, DGX H100 datasheet (8 adapters of 400 Gb/s)",
    ),
    "h200": Card(
        name="H200 SXM 141 GB",
        memory=139.8 * 2**30,
        flops=989e12,
        bandwidth=4.8e12,
        nvlink=450e9,
        pcie=64e9,
        network=50e9,
        source="NVIDIA H200 datasheet, DGX H200 datasheet",
    ),
    "a100": Card(
        name="A100 SXM 80 GB",
        memory=79.1 * 2**30,
        flops=312e12,
        bandwidth=2.04e12,
        nvlink=300e9,
        pcie=32e9,
        network=25e9,
        source="NVIDIA A100 datasheet, DGX A100 datasheet (8 adapters of 200 Gb/s)",
    ),
    "b200": Card(
        name="B200 SXM 180 GB",
        memory=178.0 * 2**30,
        flops=2250e12,
        bandwidth=8.0e12,
        nvlink=900e9,
        pcie=64e9,
        network=50e9,
        source="NVIDIA DGX B200 datasheet",
    ),
}


def card(name: str) -> Card:
    """A card by its short name. Raises ConfigError."""
    if name not in CARDS:
        raise ConfigError(f"--card {name}: known are {', '.join(CARDS)}")
    return CARDS[name]


def _of(value: float, unit: str, about: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "about": about, "source": source})


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Efficiencies, fixed costs and the workload. Each field's metadata says its unit, meaning and source."""

    dense_mfu: float = _of(
        0.445, "of peak", "training of dense models, TP's messages included", "Megatron on H100, BF16: 41 to 48 % MFU"
    )
    moe_mfu: float = _of(
        0.39, "of peak", "training of mixtures of fine-grained experts", "arXiv:2504.14960: Qwen2-57B-A14B on H100"
    )
    prefill: float = _of(0.445, "of peak", "matrix products of the engines", "as in training: the same matrix products")
    weights_read: float = _of(
        0.78, "of peak", "bandwidth at which decoding reads weights", "Nsight on H100, MLP weights (mikamirai.com)"
    )
    cache_read: float = _of(
        0.57,
        "of peak",
        "bandwidth at which decoding reads keys and values",
        "Nsight on H100, attention (mikamirai.com)",
    )
    decode_step: float = _of(
        1.5e-3, "s", "launches, sampling and scheduling of one decode step", "assumed; SGLang overlaps its scheduler"
    )
    all_reduce: float = _of(10e-6, "s", "one small all-reduce within a node", "assumed; two a layer in decoding")
    pcie: float = _of(0.8, "of peak", "copies between device and pinned memory", "assumed: protocol takes the rest")
    links: float = _of(0.77, "of peak", "collectives over NVLink and network", "nccl-tests, 4 H100: 366 of 480 GB/s")
    hand_over: float = _of(
        2.9,
        "s",
        "a step's two changes of phase without the copies",
        "vime#442, #443: 13 % of 11.2 s of sleep; as much to wake",
    )
    publish_fixed: float = _of(
        3.0, "s", "one publication over NCCL", "verl's 7B and 72B: a line through 5.75 and 28.8 s"
    )
    publish_rate: float = _of(5.63e9, "B/s", "one publication over NCCL", "the same line")
    publish_local: float = _of(
        20.4e9, "B/s", "handing buckets over on the same GPUs", "vime#175: 61 GB in 3.0 s, 8 H200"
    )
    communicators: float = _of(7e9, "B", "NCCL's buffers of a rank, dense", "verl#6266, TP2 PP2 DP2 on 8 H100")
    communicators_moe: float = _of(9.5e9, "B", "the same with experts", "verl#6266")
    context: float = _of(1.1e9, "B", "CUDA's context and what a paused engine keeps", "sglang#2542: paused, 1.1 GB")
    host_adam: float = _of(
        7.7e10 * 0.6,
        "B/s",
        "a GPU's share of host memory for Adam there",
        "DGX H100: 16 channels DDR5-4800, 60 % assumed",
    )
    mean_share: float = _of(
        0.125, "of limit", "mean response over `rollout.max_new_tokens`", "FAPO: 1.1k of 8192, 2.3k of 20480 tokens"
    )
    spread: float = _of(
        0.9, "", "standard deviation of the logarithm of response lengths", "assumed: the 99th percentile is 8 medians"
    )
    prompt_tokens: float = _of(200.0, "tokens", "mean prompt", "assumed: competition mathematics")
    right: float = _of(0.6, "of 1", "rollouts with the right answer", "assumed")
    concentration: float = _of(
        1.0,
        "",
        "sum of the beta distribution's parameters of a prompt's share of right answers",
        "assumed: most prompts are nearly always or nearly never solved",
    )
    flawed: float = _of(0.3, "of right", "right rollouts that the judge flags", "FAPO, Fig. 1: 20 to 40 %")
    verdict_tokens: float = _of(3100.0, "tokens", "mean verdict", "FAPO: 3.0k and 3.2k tokens")
    verdict_spread: float = _of(0.5, "", "standard deviation of the logarithm of verdict lengths", "assumed")
    clear: float = _of(
        0.75, "of 1", "verdicts that a cascade ends after its prefill", "as the clock world's cascade does (results.md)"
    )

    @classmethod
    def names(cls) -> Iterator[str]:
        """Of all of them."""
        return (entry.name for entry in fields(cls))

    @classmethod
    def about(cls, name: str) -> dict[str, str]:
        """Unit, meaning and source of one."""
        return {entry.name: dict(entry.metadata) for entry in fields(cls)}[name]

    def scaled(self, name: str, factor: float) -> "Assumptions":
        """The same with one of them multiplied."""
        return replace(self, **{name: getattr(self, name) * factor})


def overridden(pairs: list[str]) -> Assumptions:
    """The assumptions with `name=value` in place of some. Raises ConfigError."""
    values: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in set(Assumptions.names()):
            raise ConfigError(f"--assume {pair}: known are {', '.join(Assumptions.names())}")
        try:
            values[name] = float(text)
        except ValueError:
            raise ConfigError(f"--assume {pair}: write it as name=number") from None
        unit = Assumptions.about(name)["unit"]
        if not 0.0 < values[name] < math.inf:
            raise ConfigError(f"--assume {pair}: must be above 0")
        if unit.startswith("of ") and values[name] > 1.0:
            raise ConfigError(f"--assume {pair}: a fraction {unit}, at most 1")
    return Assumptions(**values)
