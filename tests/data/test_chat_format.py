"""The tokens that end an answer, and what a chat format knows of its template."""

import pytest
from transformers import GenerationConfig

from lora_ft.data.chats.dialect import Dialect
from lora_ft.data.chats.format import chat_format, end_tokens, find_chat_format

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_token_that_closes_a_turn_ends_an_answer(plain, make_tokenizer):
    own = GenerationConfig(eos_token_id=7)
    eos, im_end = plain.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert end_tokens(plain, own, find_chat_format(plain)) == {7, eos}  # no chat template
    assert end_tokens(plain, own, chat_format(plain, CHATML)) == {7, eos, im_end}
    assert end_tokens(plain, GenerationConfig(eos_token_id=[7, 9]), chat_format(plain, CHATML)) == {7, 9, eos, im_end}
    assert end_tokens(plain, own, find_chat_format(make_tokenizer(chat_template=CHATML))) == {
        7,
        eos,
        im_end,
    }  # the tokenizer's own
    for refused in ("{{ raise_exception('no') }}", "{% for", "nothing of the chat", CHATML.replace("<|im_end|>", "")):
        assert end_tokens(plain, own, chat_format(plain, refused)) == {7, eos}


def test_markers_are_in_the_same_order_in_every_process(plain):
    """Their pattern is part of the key of the cached texts, and the order of a set differs from process to process."""
    template = CHATML + "".join(f"<|{letter}|>" for letter in "gcaehfbd")
    words = (
        chat_format(plain, template).markers.pattern.replace("\\", "").replace("<|", "<").replace("|>", ">").split("|")
    )
    assert [word for word in words if len(word) == 3 and word[1] in "abcdefgh"] == [f"<{c}>" for c in "abcdefgh"]


CALLS = CHATML.replace("<|im_end|>", "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>")


@pytest.mark.parametrize(
    "content, call, dialect",
    [
        ("m.content", "{{ c.function.name }}{{ c.function.arguments | tojson }}", Dialect()),
        ("m.content", "{{ c.function.name + c.function.arguments }}", Dialect(text_arguments=True)),
        ("m.content", "{{ c.function.name }}{{ c.function.arguments }}", Dialect(text_arguments=True)),
        (
            "m.content",
            "{% if m.content is undefined %}{{ c.function | tojson }}{% endif %}",
            Dialect(no_content=True),
        ),
        ("(m.content | first).text", "{{ c.function | tojson }}", Dialect(parts=True)),
        ("m.content", "", Dialect()),
    ],
)
def test_how_a_template_reads_turns_is_found_by_rendering(plain, content, call, dialect):
    template = CALLS.replace("m.content }}", content + " }}").replace("CALL", call)
    assert chat_format(plain, template).dialect == dialect
