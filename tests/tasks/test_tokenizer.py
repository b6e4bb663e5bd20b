"""The light tokenizer gives what transformers gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_fapo.errors import DataError
from megatron_fapo.records import Message
from megatron_fapo.tasks.tokenizer import ChatTokenizer

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{ tools | tojson }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not message.content.startswith('<tool>') %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ content }}{% endgeneration %}{{ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role') }}
    {% endif %}
[{{ message['role'] | upper }}] {{ message['content'] | trim }} {{ {'n': "<é>"} | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}"""

CHATS = [
    (Message(role="user", content="Was ist 1 + 1? <b>\n"),),
    (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi 😀"),
        Message(role="assistant", content="<think>hm</think>\n\nHello."),
        Message(role="user", content="  Again & again\n\n"),
    ),
]


def model_folder(folder: Path, template: str, *, in_config: bool) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    tokenizer.train_from_iterator([template] * 3, trainer)
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    }
    if in_config:
        config["chat_template"] = template
    else:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return folder


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
def test_chats_are_those_of_transformers(tmp_path: Path, template: str, in_config: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = model_folder(tmp_path, template, in_config=in_config)
    ours, theirs = ChatTokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.eos_ids == (2, 0)
    for chat in CHATS:
        turns = [{"role": message.role, "content": message.content} for message in chat]
        for prompt in (True, False):
            text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(chat, generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(chat).tolist() == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_the_sandbox_holds(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "{{ messages.__class__.__mro__ }}", in_config=False)
    with pytest.raises(DataError, match="unsafe"):
        ChatTokenizer.load(folder).render(CHATS[0])


def test_a_template_may_refuse(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "{{ raise_exception('roles must alternate') }}", in_config=False)
    with pytest.raises(DataError, match="roles must alternate"):
        ChatTokenizer.load(folder).render(CHATS[0])


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    folder = model_folder(tmp_path, CHATML, in_config=False)
    (folder / missing).unlink()
    with pytest.raises(DataError, match=missing.replace(".", r"\.")):
        ChatTokenizer.load(folder)


def test_an_end_of_sequence_token_is_needed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, CHATML, in_config=False)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    with pytest.raises(DataError, match="end-of-sequence"):
        ChatTokenizer.load(folder)


def test_tasks_and_critique_are_light() -> None:
    modules = ["clock", "critic", "interface", "maths", "registry", "rows", "settings", "tokenizer", "clock_tokenizer"]
    code = ";".join(f"import megatron_fapo.tasks.{name}" for name in modules)
    code += ";import sys; print(*{'torch', 'ray', 'transformers', 'wandb', 'datasets', 'sympy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == []
