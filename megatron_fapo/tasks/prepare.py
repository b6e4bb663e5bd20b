"""Rows of any source into clean training rows: readable, once each, apart from the benchmarks, short enough.

Near-duplicates are found by MinHash and then compared exactly, so chance takes no row away. What is dropped is dropped
with its place and the reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from rensa import RMinHash, RMinHashLSH

from megatron_fapo.records import Message
from megatron_fapo.tasks import critic, maths, rows
from megatron_fapo.tasks.tokenizer import ChatTokenizer

Kind = Literal["bad", "duplicate", "contradiction", "overlap", "long"]

SHINGLE = 5
"""Words and signs in a row that near-duplicates are compared by."""
PERMUTATIONS, BANDS = 128, 32
"""Bands of 4: of pairs that are 80 % alike 1 in 10^7 is missed, of those 60 % alike 1 in 80."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A row that can be trained on."""

    place: str
    row: dict[str, Any]
    """As it is written."""
    messages: tuple[Message, ...]
    text: str
    """What makes it the row that it is: the question, or the whole critique prompt."""
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A row that was left out."""

    place: str
    kind: Kind
    why: str


@dataclass(slots=True, kw_only=True)
class Prepared:
    """What came of the rows."""

    items: list[Item] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each item's prompt under the chat template."""

    def counts(self) -> dict[str, int]:
        """Rows kept, and dropped by kind."""
        return {"kept": len(self.items), **Counter(drop.kind for drop in self.drops)}

    def lengths(self) -> dict[str, float]:
        """Prompt tokens of the rows that were kept; empty without any."""
        if not self.tokens:
            return {}
        p50, p90, p99 = np.percentile(self.tokens, (50, 90, 99)).tolist()
        return {
            "min": min(self.tokens),
            "mean": float(np.mean(self.tokens)),
            "p50": p50,
            "p90": p90,
            "p99": p99,
            "max": max(self.tokens),
        }


def problem_item(place: str, row: rows.Row, index: int) -> Item:
    """A row of the task `math`, in the ecosystem's format. Raises ValueError."""
    problem = maths.parse_row(row)
    source = rows.text_of(row, "data_source") or "prepared"
    written = {
        "data_source": source,
        "prompt": [{"role": message.role, "content": message.content} for message in problem.messages],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": "train", "index": index, "question": problem.question, "place": place},
    }
    return Item(
        place=place, row=written, messages=problem.messages, text=problem.question, answer=problem.answer.strip()
    )


def critique_item(place: str, row: rows.Row, index: int) -> Item:
    """A row of the task `critique`, as it is. Raises ValueError."""
    case = critic.parse_row(row)
    return Item(
        place=place,
        row=dict(row),
        messages=case.messages,
        text=case.messages[-1].content,
        answer=str(case.first_wrong),
    )


ITEMS: Mapping[str, Callable[[str, rows.Row, int], Item]] = {"math": problem_item, "critique": critique_item}
"""How a row becomes an item, by task."""


def units(text: str) -> list[str]:
    """Words, numbers and signs, in lower case: spaces and case make no difference, signs do."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


class NearDuplicates:
    """Rows that were kept, and which of them a new one resembles."""

    def __init__(self, threshold: float) -> None:
        """`threshold` of the Jaccard index of shingles; 1 finds rows whose shingles are equal."""
        self._threshold = threshold
        self._table = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._kept: list[tuple[Item, frozenset[str]]] = []

    def like(self, item: Item) -> list[tuple[float, Item]]:
        """The kept rows that are at least as much alike as the threshold, the likest first."""
        shingles = _shingles(item.text)
        found = (self._kept[key] for key in self._table.query(_sketch(shingles)))
        alike = [(_jaccard(shingles, others), other) for other, others in found]
        return sorted((pair for pair in alike if pair[0] >= self._threshold), key=lambda pair: -pair[0])

    def keep(self, item: Item) -> None:
        """Compare later rows with this one as well."""
        shingles = _shingles(item.text)
        self._table.insert(len(self._kept), _sketch(shingles))
        self._kept.append((item, shingles))


def _sketch(shingles: frozenset[str]) -> RMinHash:
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
    sketch.update(sorted(shingles))
    return sketch


def _shingles(text: str) -> frozenset[str]:
    found = units(text)
    return frozenset(" ".join(found[at : at + SHINGLE]) for at in range(max(len(found) - SHINGLE + 1, 1)))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


class Overlap:
    """The n-grams of benchmark questions; a question that is shorter must be all of a text."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._grams: dict[tuple[str, ...], str] = {}
        self._sizes: set[int] = set()

    def add(self, place: str, row: rows.Row) -> None:
        """A benchmark's row. Raises ValueError when it has no question."""
        question = rows.text_of(row, "problem", "question", "prompt") or rows.messages_of(row)[-1].content
        found = _words(question)
        for gram in _grams(found, min(self._size, len(found))):
            self._sizes.add(len(gram))
            self._grams.setdefault(gram, place)

    def find(self, text: str) -> tuple[str, str] | None:
        """(place in the benchmark, shared words) of the first n-gram that a text shares with one; None without."""
        found = _words(text)
        for size in sorted(self._sizes, reverse=True):
            for gram in _grams(found, size):
                if gram in self._grams and (size == self._size or size == len(found)):
                    return self._grams[gram], " ".join(gram)
        return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _grams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[at : at + size]) for at in range(len(words) - size + 1)) if size else iter(())


def prepare(
    source: Iterable[tuple[str, rows.Row]],
    task: str,
    tokenizer: ChatTokenizer,
    *,
    near: float,
    benchmarks: Overlap,
    max_tokens: int,
    done: Callable[[], None] = lambda: None,
) -> Prepared:
    """Every row, in order; of rows that are alike the first stays. `done` is called after each.

    Of equal texts with different answers none stays: nobody knows which is right.
    """
    result = Prepared()
    kept = NearDuplicates(near)
    disputed: dict[str, Item] = {}
    for index, (place, row) in enumerate(source):
        done()
        try:
            item = ITEMS[task](place, row, index)
        except ValueError as error:
            result.drops.append(Drop(place=place, kind="bad", why=str(error)))
            continue
        if shared := benchmarks.find(item.text):
            result.drops.append(Drop(place=place, kind="overlap", why=f"shares “{shared[1]}” with {shared[0]}"))
            continue
        tokens = len(tokenizer.encode_chat(item.messages))
        if tokens > max_tokens:
            result.drops.append(Drop(place=place, kind="long", why=f"{tokens} tokens, more than {max_tokens}"))
            continue
        if again := _again(item, kept.like(item)):
            drop, first = again
            result.drops.append(drop)
            if drop.kind == "contradiction":
                disputed[first.place] = item
            continue
        kept.keep(item)
        result.items.append(item)
        result.tokens.append(tokens)
    _leave_out(result, disputed)
    return result


def _again(item: Item, alike: Sequence[tuple[float, Item]]) -> tuple[Drop, Item] | None:
    """Why a row is not needed, and for which earlier one. Rows of one pattern with other answers are other problems."""
    for share, first in alike:
        if first.answer == item.answer:
            return Drop(place=item.place, kind="duplicate", why=f"{share:.0%} like {first.place}"), first
        if units(first.text) == units(item.text):
            return Drop(place=item.place, kind="contradiction", why=_dispute(first, item)), first
    return None


def _dispute(first: Item, item: Item) -> str:
    return f"the question of {first.place}, whose answer is {first.answer}, here {item.answer}"


def _leave_out(result: Prepared, disputed: Mapping[str, Item]) -> None:
    """The first of each pair of rows that contradict each other."""
    pairs = list(zip(result.items, result.tokens, strict=True))
    result.items = [item for item, _ in pairs if item.place not in disputed]
    result.tokens = [tokens for item, tokens in pairs if item.place not in disputed]
    for item, _ in pairs:
        if other := disputed.get(item.place):
            result.drops.append(Drop(place=item.place, kind="contradiction", why=_dispute(other, item)))
