"""A solution's paragraphs: where they are in the text, and which tokens they cover.

The judge's index, the oracle's index and per-token penalties all count paragraphs with the one function here.
"""

from collections.abc import Callable, Iterable
from functools import cache
from os.path import commonprefix

from megatron_fapo.records import Ints

Span = tuple[int, int]
"""Half open: from the first, up to but not including the second."""

SEPARATOR = "\n\n"


def paragraph_spans(solution: str) -> tuple[Span, ...]:
    """Character spans of the paragraphs, in order, surrounding white space left out.

    Paragraphs are cut at every blank line (two newlines in a row); what is empty between two cuts is none. So
    `"a\\n\\n\\n\\n b"` has two paragraphs, and `"a\\n \\nb"` one, as in the judge's training data.
    """
    spans = []
    start = 0
    for piece in solution.split(SEPARATOR):
        text = piece.strip()
        if text:
            first = start + piece.index(text)
            spans.append((first, first + len(text)))
        start += len(piece) + len(SEPARATOR)
    return tuple(spans)


def split(solution: str) -> tuple[str, ...]:
    """The paragraphs themselves; index i here is index i of a verdict."""
    return tuple(solution[start:end] for start, end in paragraph_spans(solution))


def token_spans(token_ids: Ints, decode: Callable[[Ints], str], spans: Iterable[Span]) -> tuple[Span, ...]:
    """Token spans that cover character spans of `decode(token_ids)`. Nothing is tokenised again.

    token_ids: [T]. A token with characters of two spans is in both; a character made of several tokens (a piece of
    UTF-8 each) takes them all. Each position is found by bisection over the length of the decoded prefix.
    """
    whole = decode(token_ids)

    @cache
    def prefix(count: int) -> tuple[int, bool]:
        """Characters of `whole` that `count` tokens make, and whether these tokens end inside of the next one."""
        # A prefix that ends inside a character decodes to replacement characters there: only what the whole
        # text confirms counts.
        text = decode(token_ids[:count])
        confirmed = len(commonprefix([text, whole]))  # noqa: RUF071 - characters, no paths
        return confirmed, confirmed < len(text)

    def tokens_before(position: int) -> int:
        """The fewest tokens whose text reaches `position`."""
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if prefix(middle)[0] < position else (low, middle)
        return low

    found = []
    for start, end in spans:
        if not 0 <= start < end <= len(whole):
            raise ValueError(f"span ({start}, {end}) is empty or outside a text of {len(whole)} characters")
        first = tokens_before(start)
        reached, inside = prefix(first)
        found.append((first - (reached > start or inside), tokens_before(end)))
    return tuple(found)
