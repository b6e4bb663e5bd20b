"""How evenly four ways deal sequences to data-parallel ranks: largest over mean cost, 1 is perfect.

    python benchmarks/balance.py

Lengths are log-normal with median 3000 tokens, cut at 32768; costs are those of Qwen2.5-7B (`batch.balance`). The bound
is what no way can go below: one sequence may cost more than a rank's share. Medians over 50 draws, maxima in brackets.
"""

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_fapo.batch.balance import balanced, cost, crossover, greedy, imbalance

QWEN_7B = crossover(layers=28, hidden=3584, heads=28, groups=4, head_dim=128, mlp=18944, vocabulary=152064)
DRAWS = 50


def round_robin(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """In the order given."""
    return [list(range(rank, len(costs), ranks)) for rank in range(ranks)]


def there_and_back(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Sorted, then dealt to the ranks in turn, every other turn backwards."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for place, index in enumerate(sorted(range(len(costs)), key=lambda i: -costs[i])):
        turn, seat = divmod(place, ranks)
        hands[seat if turn % 2 == 0 else ranks - 1 - seat].append(index)
    return hands


WAYS = {"round-robin": round_robin, "there and back": there_and_back, "greedy": greedy, "ours": balanced}


def main() -> None:
    """Entry point."""
    table = Table(title="largest over mean cost of the ranks")
    for column in ("sequences", "ranks", *WAYS, "bound"):
        table.add_column(column, justify="right")
    for samples, ranks in ((64, 8), (256, 8), (512, 32), (4096, 64)):
        seen: dict[str, list[float]] = {name: [] for name in (*WAYS, "bound")}
        for seed in range(DRAWS):
            lengths = np.minimum(np.random.default_rng(seed).lognormal(8.0, 0.8, samples), 32768)
            costs = [cost(int(length), QWEN_7B) for length in lengths]
            for name, way in WAYS.items():
                seen[name].append(imbalance([math.fsum(costs[i] for i in part) for part in way(costs, ranks)]))
            seen["bound"].append(max(1.0, max(costs) * ranks / math.fsum(costs)))
        cells = [f"{np.median(values):.4f} ({max(values):.2f})" for values in seen.values()]
        table.add_row(str(samples), str(ranks), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
