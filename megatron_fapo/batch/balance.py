"""What a sequence costs, and how costs are dealt out evenly.

A layer's matrices cost the same for every token; its attention compares each token with all before it. With n query
heads of size d, k key-value groups, hidden size h, gated MLP of width m (of the experts that a token takes) and L
layers, the forward pass of a sequence of l tokens takes, in floating-point operations,

    a l + b l^2,   a = L (4 h d (n + k) + 6 h m) + 2 h V,   b = 2 L n d

where V is the vocabulary and the two products of attention compute half of l x l entries each. The backward pass takes
twice that, whatever the length. Only the ratio matters for balance: `crossover` = a / b is the length at which
attention costs as much as all the rest.
"""

import heapq
import itertools
import math
from collections.abc import Sequence


def crossover(*, layers: int, hidden: int, heads: int, groups: int, head_dim: int, mlp: int, vocabulary: int) -> float:
    """Length in tokens at which attention costs as much as everything else; `mlp` is the width that a token uses.

    Example: 70455 for Qwen2.5-7B, 1551 for the model of the clock world.
    """
    linear = layers * (4 * hidden * head_dim * (heads + groups) + 6 * hidden * mlp) + 2 * hidden * vocabulary
    return linear / (2 * layers * heads * head_dim)


def cost(length: int, crossover: float = math.inf) -> float:
    """Cost of a sequence, in tokens of a sequence so short that attention costs nothing."""
    return length + length * length / crossover


def balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` lists of nearly equal sums: the better of two heuristics, the same every time.

    The largest and the smallest sum differ by at most the largest cost, and the largest sum is at most that of
    `greedy`. Parts are ordered by sum, the largest first; within a part, indices go up.
    """
    found = min((differencing(costs, parts), greedy(costs, parts)), key=lambda lists: _largest(costs, lists))
    return sorted((sorted(part) for part in found), key=lambda part: (-math.fsum(costs[i] for i in part), part))


def greedy(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Longest processing time first: each cost, the largest first, to the part with the smallest sum (Graham 1969)."""
    lists: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, part) for part in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, part = heap[0]
        lists[part].append(index)
        heapq.heapreplace(heap, (total + costs[index], part))
    return lists


def differencing(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Largest differencing (Karmarkar and Karp 1982): the two partial partitions of the largest spread are joined, the
    heaviest part of one with the lightest of the other, until one is left."""
    empty: list[tuple[float, list[int]]] = [(0.0, []) for _ in range(parts - 1)]
    order = itertools.count()
    heap = [(-value, next(order), [(value, [index]), *empty]) for index, value in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, _, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, [*p, *q]) for (a, p), (b, q) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], next(order), joined))
    return [part for _, part in heap[0][2]] if heap else [[] for _ in range(parts)]


def imbalance(costs: Sequence[float]) -> float:
    """Largest over mean: 1 is perfect, 1.1 lets all but one part wait for a tenth of the mean's time."""
    return max(costs) * len(costs) / math.fsum(costs) if any(costs) else 1.0


def _largest(costs: Sequence[float], lists: Sequence[Sequence[int]]) -> float:
    return max(math.fsum(costs[i] for i in part) for part in lists)


def into_bins(sizes: Sequence[int], costs: Sequence[float], budget: int, least: int = 1) -> list[list[int]]:
    """Indices in bins whose sizes sum to at most `budget`; an item larger than that has a bin to itself.

    At most as many bins as first-fit-decreasing finds, costs balanced among them where the budget allows it; `least`
    asks for more than are needed, and may be given fewer.
    """
    fitting = _first_fit(sizes, budget)
    fewest = max(least, -(-sum(sizes) // budget))
    for count in range(fewest, max(len(fitting), least) + 1):
        bins = [part for part in balanced(costs, count) if part]
        if all(len(part) == 1 or sum(sizes[i] for i in part) <= budget for part in bins):
            return bins
    return fitting


def _first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((b for b, left in enumerate(room) if left >= sizes[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(index)
        room[place] -= sizes[index]
    return bins
