"""The clock world's tokenizer, one for policy and judge, saved as an ordinary Hugging Face tokenizer.

Numbers are single tokens, and white space belongs to the token that it surrounds (" + ", "\\n\\n"), so decoding joins
the tokens and gives the text back exactly. The long fixed phrases of the prompts are single tokens too, which keeps
the sequences short enough for a laptop.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron_fapo.critique import boxed, prompt
from megatron_fapo.critique.paragraphs import SEPARATOR
from megatron_fapo.tasks.clock_world import OPERATORS
from megatron_fapo.tasks.instruction import INSTRUCTION
from megatron_fapo.tasks.settings import ClockSettings

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"

PARAGRAPHS = 16
"""Paragraph tags of the judge's prompt that are tokens; a solution of this world has at most 11 paragraphs."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def words(settings: ClockSettings) -> list[str]:
    """What questions, solutions and verdicts are made of."""
    numbers = [str(number) for number in range(settings.hours)]
    operators = [f" {operator} " for operator in (*OPERATORS, "=")]
    return [*numbers, "-1", *operators, SEPARATOR, boxed.OPENING, "}", " ok\n", " no\n"]


def phrases(settings: ClockSettings) -> list[str]:
    """What stands in every prompt."""
    opens = [prompt.tag_open(index) for index in range(PARAGRAPHS)]
    closes = [prompt.tag_close(index) for index in range(PARAGRAPHS)]
    between = [closes[index] + SEPARATOR + opens[index + 1] for index in range(PARAGRAPHS - 1)]
    question = [f"Compute on a {settings.hours}-hour clock: ", " = ?", f" = ? (mod {settings.modulus})"]
    judge = [prompt.OPENING, prompt.ANSWER, prompt.SOLUTION, prompt.CLOSING]
    return [*question, INSTRUCTION, *judge, opens[0], *between, *closes]


def build(settings: ClockSettings) -> Tokenizer:
    """The tokenizer of a world."""
    special = [PAD, UNKNOWN, END, USER, ASSISTANT]
    vocabulary = {token: index for index, token in enumerate([*special, *words(settings)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    longest_first = sorted(words(settings), key=len, reverse=True)
    pattern = "|".join(_escaped(word) for word in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases(settings)])
    return tokenizer


def _escaped(word: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\{}*+-=" else letter for letter in word)


def save(settings: ClockSettings, folder: Path) -> None:
    """Write the tokenizer's files into a model directory."""
    folder.mkdir(parents=True, exist_ok=True)
    build(settings).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "eos_token": END,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
