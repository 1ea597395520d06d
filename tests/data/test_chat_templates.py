"""Chats through the chat templates of real model families, as trl carries them: what of each turn is supervised.

The right answer is what a model that is asked with the template's own generation prompt has to write until it stops.
"""

import importlib.util
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken

from lora_ft.data.chats.encode import encode_chats
from lora_ft.data.chats.format import chat_format
from lora_ft.data.chats.render import render_chat
from lora_ft.data.template import BadRow, Template
from lora_ft.data.tokens import text_encoder

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
TOKENS = "|".join(
    [
        r"<\|[^\s<>|]+\|>|<｜[^\s<>]+｜>|<[a-z_]+\|>|<\|[a-z_]+>",
        "<(?:start|end)_of_(?:turn|utterance)>|</?(?:think|tool_call|tool_response)>",
    ]
)
ASKED = [{"role": "user", "content": "the cat?"}]
TWO_TURNS = [
    *ASKED,
    {"role": "assistant", "content": "the mat"},
    {"role": "user", "content": "and dog?"},
    {"role": "assistant", "content": "the food"},
]
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL_CHAT = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "it is sunny"},
]
REASONED = [*ASKED, {"role": "assistant", "content": "the mat", "reasoning_content": "some dog"}]
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>{0}<|im_end|>"
)
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
LFM_CALL = "<|tool_call_start|>[weather(city='Paris')]<|tool_call_end|><|im_end|>"
GLM_CALL = "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
GPT_CALL = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)
GEMMA_CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>'


def both(form: str) -> list[str]:
    """The two answers of TWO_TURNS in a form."""
    return [form.format("the mat"), form.format("the food")]


# template -> what is supervised of TWO_TURNS; of TOOL_CHAT's call (None: the template has none); of REASONED (None: dropped)
EXPECTED = {
    "cohere": (both("{}<|END_OF_TURN_TOKEN|>"), None, None),
    "cohere2": (both("{}<|END_RESPONSE|>"), None, None),
    "deepseek_r1_distill": (both("{}<｜end▁of▁sentence｜>"), None, None),
    "deepseekv3": (both("{}<｜end▁of▁sentence｜>"), DEEPSEEK_CALL, None),
    "gemma": (both("{}<end_of_turn>"), None, None),
    "gemma3": (both("{}<end_of_turn>"), None, None),
    "gemma4_v5": (both("{}<turn|>"), GEMMA_CALL, "<|channel>thought\nsome dog\n<channel|>the mat<turn|>"),
    "glm4moe": (  # closes turns with nothing
        ["\n<think></think>\nthe mat", "\n<think></think>\nthe food</s>"],
        "\n<think></think>" + GLM_CALL,
        "\n<think>some dog</think>\nthe mat</s>",
    ),
    "glm4moe_training": (
        both("\n<think></think>\n{}<|user|>"),
        "\n<think></think>" + GLM_CALL + "<|observation|>",
        "\n<think>some dog</think>\nthe mat<|user|>",
    ),
    "gptoss": (
        ["<|channel|>final<|message|>the mat<|end|>", "<|channel|>final<|message|>the food<|return|>"],
        GPT_CALL,
        "<|channel|>analysis<|message|>some dog<|end|><|start|>assistant<|channel|>final<|message|>the mat<|return|>",
    ),
    "idefics3": (both(" {}<end_of_utterance>"), None, None),  # reads contents as lists of parts
    "lfm2_2_5_v2": (both("{}<|im_end|>"), LFM_CALL, "<think>some dog</think>the mat<|im_end|>"),
    "llama3": (both("{}<|eot_id|>"), None, None),
    "llama3_1": (both("{}<|eot_id|>"), LLAMA_CALL, None),
    "llama3_2": (both("{}<|eot_id|>"), LLAMA_CALL, None),
    "llava_next": (both(" {}</s>"), None, None),
    "nemotron_3_nano": (
        both("</think>{}<|im_end|>"),
        "</think>\n" + XML_CALL.format("\n"),
        "some dog\n</think>\nthe mat<|im_end|>",
    ),
    "phi3": (both("{}<|end|>"), None, None),  # closes the chat with eos
    "phi3_5": (both("{}<|end|>"), None, None),
    "qwen2_5": (both("{}<|im_end|>"), QWEN_CALL, None),
    "qwen2_5_training": (both("{}<|im_end|>"), QWEN_CALL, None),  # marks its newline before the answer, too
    "qwen3": (
        ["the mat<|im_end|>", "<think>\n\n</think>\n\nthe food<|im_end|>"],
        QWEN_CALL,
        "<think>\nsome dog\n</think>\n\nthe mat<|im_end|>",
    ),
    "qwen3_training": (
        both("<think>\n\n</think>\n\n{}<|im_end|>"),
        "<think>\n\n</think>\n\n" + QWEN_CALL,
        "<think>\nsome dog\n</think>\n\nthe mat<|im_end|>",
    ),
    "qwen3_5_think": (
        ["the mat<|im_end|>", "\n</think>\n\nthe food<|im_end|>"],
        "\n</think>\n\n" + XML_CALL.format(""),
        "some dog\n</think>\n\nthe mat<|im_end|>",
    ),
    "qwen3_instruct_2507": (both("{}<|im_end|>"), QWEN_CALL, None),
    "smolvlm": (both(" {}<end_of_utterance>"), None, None),
}


@pytest.fixture(params=EXPECTED)
def family(request, make_tokenizer):
    """(name, chat format, tokenizer with the template's tokens)."""
    template = (TEMPLATES / f"{request.param}.jinja").read_text()
    tokenizer = make_tokenizer()
    words = sorted(set(re.findall(TOKENS, template)))
    calls = ("tool", "think")  # as in real tokenizers, these are not special
    tokenizer.add_tokens([AddedToken(w, special=not any(c in w for c in calls), normalized=False) for w in words])
    return request.param, chat_format(tokenizer, template), tokenizer


def supervised(row: dict, chat, **settings) -> list[str]:
    rendered = render_chat(row, Template(messages="messages", **settings), chat)
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_two_turns(family):
    name, chat, _ = family
    assert supervised({"messages": TWO_TURNS}, chat) == EXPECTED[name][0]
    assert supervised({"messages": TWO_TURNS}, chat, supervise="last") == EXPECTED[name][0][1:]


def test_a_tool_call(family):
    name, chat, _ = family
    expected = EXPECTED[name][1]
    if expected is None:
        with pytest.raises(BadRow, match="drops the tool calls|the chat template fails"):
            supervised({"messages": TOOL_CHAT}, chat)
        return
    call, answer = supervised({"messages": TOOL_CHAT}, chat)
    assert call == expected and "it is sunny" in answer
    as_text = CALL | {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    with_nulls = CALL | {"function": {"name": "weather", "arguments": {"city": "Paris", "days": None}}, "index": None}
    for form in (
        {"content": None, "tool_calls": [as_text]},
        {"content": None, "tool_calls": [with_nulls], "function_call": None},
        {"function_call": as_text["function"]},
    ):
        turn = {"role": "assistant", **form}
        same = supervised({"messages": [*ASKED, turn, *TOOL_CHAT[2:]]}, chat)
        assert [s.replace("call12345", "") for s in same] == [call.replace("call12345", ""), answer]


def test_reasoning(family):
    name, chat, _ = family
    expected = EXPECTED[name][2]
    rendered = render_chat({"messages": REASONED}, Template(messages="messages"), chat)
    told = [note for note, _ in rendered.notes if note == "the chat template drops the reasoning"]
    if expected is None:
        assert told and "some dog" not in rendered.text
        return
    assert not told
    assert [rendered.text[start:end] for start, end in rendered.spans] == [expected]
    (without,) = supervised({"messages": REASONED}, chat, reasoning="drop")
    assert without == expected[expected.index("the mat") :]


def test_ids_are_those_of_a_generation_loop(family):
    """Prompted as plain transformers does, the model has to write exactly the supervised ids of each turn."""
    _, chat, tokenizer = family
    encoder = text_encoder(tokenizer)
    for turns in (TWO_TURNS, REASONED):
        rendered = render_chat({"messages": turns}, Template(messages="messages", supervise="last"), chat)
        start, end = rendered.spans[0]
        (encoded,) = encode_chats([rendered.text], [[start, end]], [[]], 10_000, "column", encoder)
        prompt = encoder.encode_bare(rendered.text[:start])
        written = [i for i in encoded.labels if i != -100]
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.input_ids[len(prompt) :].tolist()[: len(written)] == written
        assert tokenizer.decode(written) == rendered.text[start:end]
        if rendered.text.startswith(rendered.prompt):
            assert rendered.text[:start] == rendered.prompt


def test_a_template_that_opens_thinking(family):
    """Where the generation prompt is not how answers begin it is told; a switch of the template that mends it is named."""
    name, chat, _ = family
    notes = [note for note, _ in render_chat({"messages": TWO_TURNS}, Template(messages="messages"), chat).notes]
    opens = {"deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "qwen3_5_think"}  # qwen3_5: of the first turn
    assert bool(notes) == (name in opens)
    if name == "nemotron_3_nano":
        assert "set data.chat_template_kwargs: {enable_thinking: false}" in notes[0]
        quiet = chat.with_switch("enable_thinking", False)
        assert not render_chat({"messages": TWO_TURNS}, Template(messages="messages"), quiet).notes


def test_tools_reach_the_template(family):
    name, chat, _ = family
    function = {"name": "weather", "description": "the weather", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": function}
    row = {"messages": TWO_TURNS, "tools": [tool]}
    rendered = render_chat(row, Template(messages="messages"), chat)
    dropped = "the chat template drops the tools" in [note for note, _ in rendered.notes]
    assert dropped == ("weather" not in rendered.text)
    if EXPECTED[name][1] and name != "deepseekv3":
        assert not dropped
